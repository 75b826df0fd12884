"""The deep feature of a denoiser along trajectories: how nearby steps are related, and what samples lose by its age."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_quant.calibration import Sampler, from_other_ranks, merge_across_ranks, progress_bar, reordered
from lightning_quant.graph import CachePoint
from lightning_quant.layers import KeptFeatures, cache_modules, deep_feature, stop_caching
from lightning_quant.solvers.caching import FeaturePairs

CHUNK = 32  # trajectories that are sampled at a time
PROBES = 8  # trajectories on which samples are asked what they lose


class WatchedFeature:
    """Samples with a float denoiser, whole or with a cache, and watches the feature that a cache would keep.

    Args:
        trainer: the running trainer; each of its ranks samples its share.
        module: a sampler, which is not cached.
        point: where its denoiser is cut.
        seeds: of the trajectories, the same ones on every rank, and their conditions.
    """

    def __init__(
        self, trainer: pl.Trainer, module: Sampler, point: CachePoint, seeds: tuple[Tensor, dict[str, Any]]
    ) -> None:
        self.trainer, self.module, self.point, self.seeds = trainer, module, point, seeds
        self.own = range(trainer.global_rank, len(seeds[0]), trainer.world_size)

    def pairs(self, window: int) -> FeaturePairs:
        """How the features of steps at most so far apart are related, over the trajectories of all ranks."""
        steps = {timestep: k for k, timestep in enumerate(dict.fromkeys(self.module.timesteps))}
        found, point = FeaturePairs(len(steps), window), self.point
        with (
            progress_bar(self.trainer, "Watching the deep feature", len(self.own) * len(steps), "steps") as advance,
            deep_feature(self.module.denoiser, point.deep, point.point, point.residual) as feature,
        ):
            for start in range(0, len(self.own), CHUNK):
                chunk = self.own[start : start + CHUNK]
                seeds, conditions = reordered(self.seeds, chunk)
                seen = -1
                for moment in self.module.trajectory(seeds, **conditions):
                    step = steps[moment.timestep]
                    if step != seen:  # a timestep that comes again is the same step
                        found.add(step, feature[0])
                    seen = step
                    advance(len(chunk))
        for other in from_other_ranks(found.state()):
            found.merge(other)
        return found

    def lost(self, refresh: Sequence[int], scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """What the samples lose, in squares, by each group of steps alone, where its first step is; see below."""
        found = torch.zeros(len({*self.module.timesteps}), dtype=torch.float64)
        if self.own:
            seeds, conditions = reordered(self.seeds, self.own[:PROBES])
            with progress_bar(self.trainer, "Weighing stale features", len(refresh), "groups") as advance:
                for first, loss in stale_groups(self.module, self.point, refresh, seeds, conditions, scale, shift):
                    found[first] = loss
                    advance(1)
        return torch.stack(merge_across_ranks(found)).sum(0)


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
