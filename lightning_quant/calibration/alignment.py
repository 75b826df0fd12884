"""Which steps of a denoising trajectory calibrate how often, by the density and diversity of what is felt there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.calibration.trajectory import Sampler, Trajectory
from lightning_quant.graph import find_bottleneck

__all__ = ["AlignedTrajectory", "density", "diversity", "shared_out", "step_shares"]


def density(features: Tensor, radius: float | None = None) -> Tensor:
    r"""How many other steps are near each step.

    .. math:: D_k = \#\{ j \ne k : \overline{(F_k - F_j)^2} \le r \}

    Args:
        features: (steps, ...).
        radius: :math:`r`; ``None`` takes the 15 % quantile of all such distances, for it depends on the model.

    >>> density(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), radius=1.0)
    tensor([1., 2., 1., 0.])
    """
    flat = features.flatten(1).double()
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square() / flat.shape[1]
    others = ~torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    if radius is None:
        radius = float(apart[others].quantile(0.15)) if len(flat) > 1 else 0.0
    return ((apart <= radius) & others).sum(1).float()


def diversity(features: Tensor, axis: int = 1) -> Tensor:
    r"""How much each step differs in direction from all others.

    .. math:: V_k = \sum_{j \ne k} \sum_{b, h, w} 1 - \cos(F_{k b : h w}, F_{j b : h w})

    Args:
        features: (steps, samples, channels, ...).
        axis: of the channels within a step's features.

    >>> diversity(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]))
    tensor([1., 1., 2.])
    """
    # a cosine along channels, summed over positions, is a product of what has length 1 along channels
    steps = len(features)
    direction = F.normalize(features.double().movedim(axis + 1 if axis >= 0 else axis, -1), dim=-1, eps=1e-6)
    positions = direction[0, ..., 0].numel()
    direction = direction.flatten(1)
    apart = positions - direction @ direction.T
    return apart.masked_fill(torch.eye(steps, dtype=torch.bool, device=apart.device), 0).sum(1).clamp(min=0).float()


def step_shares(features: Tensor, weight: float = 1.2, radius: float | None = None, axis: int = 1) -> Tensor:
    r"""The share of each step in a calibration set: where features crowd, and where they are unlike the others.

    .. math:: p_k \propto \tilde D_k + \lambda \tilde V_k

    where the tilde maps the least of all steps to 0 and the greatest to 1, or all to 0 where they are equal.

    Args:
        features: (steps, samples, channels, ...).
        weight: :math:`\lambda`, what diversity counts beside density; 0 follows density alone.
        radius: see :func:`density`.
        axis: of the channels within a step's features.

    >>> step_shares(torch.ones(4, 2, 3))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    wanted = _stretched(density(features, radius))
    if weight:
        wanted = wanted + weight * _stretched(diversity(features, axis))
    return wanted / wanted.sum() if float(wanted.sum()) > 0 else torch.full_like(wanted, 1 / len(wanted))


def shared_out(shares: Sequence[float] | Tensor, rows: int, most: int | None = None) -> list[int]:
    """How many rows each step gives by its share, rounded so that they add up.

    What is short goes to the largest numbers, one each; what is over is taken from those that have any, the last first.

    Args:
        shares: of the steps; they add up to 1.
        rows: how many there are.
        most: how many a step can give; what it has beyond that goes to those of the largest share that can.

    >>> shared_out([0.5, 0.25, 0.25], 10), shared_out([0.25] * 4, 6), shared_out([0.8, 0.15, 0.05], 10, most=5)
    ([6, 2, 2], [2, 2, 1, 1], [5, 4, 1])
    """
    most = rows if most is None else most
    counts = [min(round(float(share) * rows), most) for share in shares]
    while (short := rows - sum(counts)) > 0:
        free = [k for k in sorted(range(len(counts)), key=lambda k: -float(shares[k])) if counts[k] < most]
        for k in free[:short]:
            counts[k] += 1
    while (over := sum(counts) - rows) > 0:
        for k in [k for k in reversed(range(len(counts))) if counts[k]][:over]:
            counts[k] -= 1
    return counts


class AlignedTrajectory(Trajectory):
    r"""Moments of trajectories whose steps are chosen by density and diversity (TDAC of EDA-DM).

    A few trajectories are sampled first, and a feature in the middle of the denoiser is looked at in every step. Each
    step then gives as many moments as :func:`step_shares` says, one of each trajectory, drawn at random.

    Reference: Liu et al., *EDA-DM: Enhanced Distribution Alignment for Post-Training Quantization of Diffusion Models*,
    2024.

    Args:
        trajectories: how many are sampled.
        moments: how many are kept of each, at different steps. The paper takes one, from as many trajectories.
        feature: name of the module whose output is looked at, relative to the LightningModule; ``"auto"``: what is
            handed to the attention in the middle of a U-Net, or to the middle block of a transformer.
        diversity: what diversity counts beside density.
        radius: within which features count as near; ``None``: the 15 % quantile of their distances.
        watched: how many trajectories are looked at first.
        axis: of the channels of the feature; ``None``: 1 of images, the last one of tokens.
        arguments: ``loader``, ``batch_size``, ``folder``: see :class:`Trajectory`.

    Attributes:
        shares: of each step, in the order of sampling; ``None`` before anything is recorded.

    >>> from lightning_quant import PostTrainingQuantization
    >>> rows = AlignedTrajectory(trajectories=256)
    >>> callback = PostTrainingQuantization(calibration_loader=rows, calibration_samples=256)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        trajectories: int = 256,
        moments: int = 1,
        feature: str = "auto",
        diversity: float = 1.2,
        radius: float | None = None,
        watched: int = 16,
        axis: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(trajectories, moments, allocation=self._by_share, **arguments)
        if diversity < 0 or (radius is not None and radius < 0):
            raise ValueError(f"diversity and radius must be 0 or more, found {diversity} and {radius}")
        if watched < 1:
            raise ValueError(f"watched must be at least 1, found {watched}")
        self.feature, self.diversity, self.radius = feature, diversity, radius
        self.watched, self.axis = min(watched, trajectories), axis
        self.shares: Tensor | None = None

    def _record(self, trainer: pl.Trainer, module: Sampler) -> None:
        """Look first, then record."""
        name = f"denoiser.{find_bottleneck(cast(Any, module).denoiser)}" if self.feature == "auto" else self.feature
        first = Trajectory(self.watched, "all", features=[name], loader=self.loader, batch_size=self.batch_size)
        first._record(trainer, module)
        self.shares = step_shares(*self._features(first, name))
        super()._record(trainer, module)

    def _features(self, seen: Trajectory, name: str) -> tuple[Tensor, float, float | None, int]:
        """The features (steps, samples, channels, ...) of all trajectories, and how they are judged."""
        everything = seen.take(sorted(range(len(seen)), key=lambda row: (seen.steps[row], seen._origins[row])))
        features: Tensor = everything["features"][name]
        features = features.unflatten(0, (max(seen.steps) + 1, -1))
        axis = (1 if features.dim() != 4 else -1) if self.axis is None else self.axis
        return features, self.diversity, self.radius, axis

    def _by_share(self, steps: int, rows: int) -> list[int]:
        assert self.shares is not None
        return shared_out(self.shares, rows, most=rows // int(self.moments))


def _stretched(x: Tensor) -> Tensor:
    reach = x.amax() - x.amin()
    return (x - x.amin()) / reach if float(reach) > 0 else torch.zeros_like(x)
