"""How a denoiser is called: which argument says the timestep, and what comes out."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def timestep_argument(denoiser: nn.Module) -> str | None:
    """The argument of a network's ``forward`` that is the timestep, if it has one.

    >>> class Net(nn.Module):
    ...     def forward(self, x, t, label=None): ...
    >>> timestep_argument(Net()), timestep_argument(nn.Linear(2, 2))
    ('t', None)
    """
    taken = inspect.signature(denoiser.forward).parameters
    return next((name for name in TIMESTEP_NAMES if name in taken), None)


def given_timesteps(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float] | None:
    """The timesteps that a network is called with: one for each sample, or a single one for all of them.

    Args:
        denoiser: the network.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.

    >>> class Net(nn.Module):
    ...     def forward(self, x, t): ...
    >>> given_timesteps(Net(), (None, 981), {})
    [981.0]
    """
    argument = timestep_argument(denoiser)
    if argument is None:
        return None
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments.get(argument)
    if given is None:
        return None
    listed = given.flatten().tolist() if isinstance(given, Tensor) else [given]
    found = [float(timestep) for timestep in listed]
    return found[:1] if len({*found}) == 1 else found


def call_denoiser(denoiser: nn.Module, x: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
    """What a denoiser predicts, as a plain tensor.

    Args:
        denoiser: one of diffusers', or any module called ``(x, t, **conditions)``.
        x: the noisy samples (B, ...).
        timesteps: one for each of them (B,).
        conditions: its other arguments, by name.
    """
    argument = timestep_argument(denoiser)
    out = (
        denoiser(x, timesteps, **conditions) if argument is None else denoiser(x, **{argument: timesteps}, **conditions)
    )
    found: Any = getattr(out, "sample", out)
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{type(denoiser).__name__} returned a {type(found).__name__}: a denoiser returns its prediction as a "
            f"tensor, as the first element of a tuple, or as `.sample`"
        )
    return found
