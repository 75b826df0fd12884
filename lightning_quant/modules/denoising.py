"""The two things that a scheduler says about training: how a sample is made noisy, and what is to be predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching: it mixes sample and noise instead of adding them."""
    return not hasattr(scheduler, "add_noise")


def training_timesteps(scheduler: Any) -> Tensor:
    """All timesteps that a scheduler was made for.

    Args:
        scheduler: one of diffusers', whose timesteps nobody has set.
    """
    every: Tensor = scheduler.timesteps
    return every if is_flow(scheduler) else torch.arange(scheduler.config.num_train_timesteps)


def noised(scheduler: Any, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    r"""Noisy samples: :math:`\sqrt{\bar a_t} x + \sqrt{1 - \bar a_t} \epsilon`, or :math:`(1 - s) x + s \epsilon`.

    Args:
        scheduler: gives :math:`\bar a_t`, or :math:`s`.
        x: the samples (B, ...).
        noise: in their shape.
        timesteps: (B,).
    """
    if not is_flow(scheduler):
        mixed: Tensor = scheduler.add_noise(x, noise, timesteps)
        return mixed
    share = (timesteps / scheduler.config.num_train_timesteps).to(x).view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x, noise, share)


def prediction_target(scheduler: Any, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a denoiser should answer for :func:`noised` samples: the noise, the sample, or a velocity.

    Args:
        scheduler: whose ``prediction_type`` decides.
        x: the samples (B, ...).
        noise: in their shape.
        timesteps: (B,).
    """
    if is_flow(scheduler):
        return noise - x
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(x, noise, timesteps)
        return velocity
    raise ValueError(
        f"prediction_type={kind!r} of {type(scheduler).__name__} is none of 'epsilon', 'sample', 'v_prediction': "
        f"override training_step"
    )
