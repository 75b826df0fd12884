"""What the samples of a denoiser lose where its deep feature is a few steps old, at one place of the trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_quant.calibration import Sampler
from lightning_quant.graph import CachePoint
from lightning_quant.layers import KeptFeatures, cache_modules, stop_caching


def stale_groups(
    module: Sampler,
    point: CachePoint,
    refresh: Sequence[int],
    seeds: Tensor,
    conditions: dict[str, Any],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Iterator[tuple[int, float]]:
    """Sample again and again with a cache, each time in another group of steps; everywhere else all modules run.

    Args:
        module: a sampler, which is not cached.
        point: where its denoiser is cut.
        refresh: the first step of each group.
        seeds: of the samples.
        conditions: theirs.
        scale: the factors that correct the kept feature (steps, channels), ``None`` for 1.
        shift: the addends.

    Yields:
        the first step of each group, and the sum of squares that the final samples are away from those of the whole
        model by.
    """
    timesteps = module.timesteps
    steps = len({*timesteps})
    exact = _last(module, seeds, conditions)
    for first, end in pairwise([*refresh, steps]):
        whole = [*range(first + 1), *range(end, steps)]
        cache_modules(
            module.denoiser, point.deep, point.point, point.residual, KeptFeatures(timesteps, whole, scale, shift)
        )
        try:
            found = _last(module, seeds, conditions)
        finally:
            stop_caching(module.denoiser)
        yield first, float((found - exact).double().square().sum())


def _last(module: Sampler, seeds: Tensor, conditions: dict[str, Any]) -> Tensor:
    for moment in module.trajectory(seeds, **conditions):
        last = moment.after
    return last
