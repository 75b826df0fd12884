"""What a denoiser really meets: moments of sampling trajectories of the float model, kept to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant.calibration.batches import CalibrationBatches
from lightning_quant.calibration.cache import SampleCache
from lightning_quant.calibration.progress import progress_bar
from lightning_quant.calibration.samples import reordered
from lightning_quant.calibration.undisturbed import undisturbed
from lightning_quant.layers import as_float

GOLDEN = (5**0.5 - 1) / 2


class Moment(NamedTuple):
    """One step of a trajectory: its number and timestep, what the denoiser is given, what it answers, what follows."""

    k: int
    timestep: float
    given: Tensor
    predicted: Tensor
    after: Tensor


class Sampler(Protocol):
    """A LightningModule that samples from seeds, as :class:`~lightning_quant.modules.DiffusionMixin` does."""

    denoiser: nn.Module

    @property
    def timesteps(self) -> list[float]:
        """Of a trajectory, in its order."""

    def seeds_of(self, batch: Any, first: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """The seeds of a batch and its conditions."""

    def trajectory(self, seeds: Tensor, **conditions: Any) -> Iterator[Moment]:
        """Sample, step by step."""


def trajectory_seeds(trainer: pl.Trainer, module: Sampler, loader: Any, count: int) -> tuple[Tensor, dict[str, Any]]:
    """Seeds and conditions of trajectories to calibrate on, the same ones on every rank.

    Args:
        trainer: the running trainer.
        module: which samples.
        loader: where from, as :class:`Trajectory` says.
        count: how many.
    """
    if loader is None:
        return torch.arange(count), {}
    loader = "loops" if loader == "auto" else loader
    # conditions are small, so every rank may have all of them; what is made of them is dealt to the ranks afterwards
    return module.seeds_of(CalibrationBatches(trainer, cast(pl.LightningModule, module), loader, count).merged())


class WholeTrajectories:
    """Seeds and their conditions as calibration batches, for a module that runs them through all their steps.

    Args:
        loader: where they come from, as :class:`Trajectory` says.
        count: how many.
        batch_size: how many at a time.
    """

    def __init__(self, loader: Any = "auto", count: int = 32, batch_size: int = 32) -> None:
        self.loader, self.count, self.batch_size = loader, count, batch_size

    def recorded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> DataLoader[Any]:
        """The batches: dicts with ``"seed"`` and the conditions."""
        seeds, conditions = trajectory_seeds(trainer, cast(Sampler, pl_module), self.loader, self.count)
        batch = {"seed": seeds, **conditions}
        rows = cast(Any, range(len(seeds)))
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=lambda chosen: reordered(batch, chosen))


Allocation = Callable[[int, int], Sequence[int]]


def evenly(steps: int, rows: int) -> list[int]:
    """How many rows each step gives, as equal as can be.

    >>> evenly(4, 10)
    [2, 3, 2, 3]
    """
    return [rows * (k + 1) // steps - rows * k // steps for k in range(steps)]


def at_intervals(chosen: int) -> Allocation:
    """An allocation that takes the same number of rows at so many steps, at equal intervals from the first one.

    Args:
        chosen: how many steps give rows.

    >>> at_intervals(2)(5, 6)
    [3, 0, 3, 0, 0]
    """

    def allocation(steps: int, rows: int) -> list[int]:
        counts = [0] * steps
        for k, count in zip((i * steps // chosen for i in range(chosen)), evenly(chosen, rows), strict=True):
            counts[k] = count
        return counts

    return allocation


class Trajectory:
    r"""Moments of the float model's trajectories, to be given to any callback as its ``calibration_loader``.

    Trajectories are sampled once, when calibration begins, and of each some moments are kept: what the denoiser is
    given, its timestep, the conditions, and what it answers in float. A batch of them holds samples at different
    steps; however few are drawn, they are spread over the whole trajectory. Rows of one trajectory are at different
    steps.

    *Memory* is that of the rows and of one batch while it is sampled, however many steps there are: 64 trajectories of
    1000 steps, of which one moment each is kept, are 0.5 MB for images of (1, 32, 32) in float32, and 524 MB with
    ``moments="all"``; ``folder`` keeps them on the disk instead.

    Args:
        trajectories: how many are sampled.
        moments: how many are kept of each, in the mean; ``"all"``: every step.
        allocation: a function of the number of steps and of rows that says how many rows each step gives, in the order
            of sampling; they add up to the rows. Default: as equal as can be.
        features: names of modules whose output is kept as well, relative to the LightningModule.
        loader: where seeds and conditions come from: ``"auto"`` (the train, else the validation loader), ``"train"``,
            ``"val"``, a DataLoader, or a callable; images are numbered, and only their conditions are used. ``None``:
            seeds 0, 1, 2, ... without conditions.
        batch_size: how many trajectories are sampled at a time, and how many rows a calibration batch has.
        folder: where the rows are kept; ``None``: in memory.

    Attributes:
        steps: for each row the number of its step.

    Raises:
        TypeError: if the model does not sample, see :class:`~lightning_quant.DiffusionModule`.
        ValueError: if a trajectory has fewer moments than are to be kept, or the allocation does not add up.

    >>> from lightning_quant import PostTrainingQuantization
    >>> rows = Trajectory(trajectories=64, moments=4)
    >>> callback = PostTrainingQuantization(calibration_loader=rows, calibration_samples=256)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        trajectories: int = 64,
        moments: int | Literal["all"] = 1,
        allocation: Allocation = evenly,
        features: Sequence[str] = (),
        loader: Any = "auto",
        batch_size: int = 32,
        folder: Any = None,
    ) -> None:
        if trajectories < 1 or batch_size < 1:
            raise ValueError(f"trajectories and batch_size must be at least 1, found {trajectories} and {batch_size}")
        if moments != "all" and (not isinstance(moments, int) or moments < 1):
            raise ValueError(f"moments={moments!r} is neither a number, 1 or more, nor 'all'")
        self.trajectories, self.moments, self.allocation = trajectories, moments, allocation
        self.features, self.loader, self.batch_size, self.folder = list(features), loader, batch_size, folder
        self.steps: list[int] = []
        self._cache: SampleCache | None = None
        self._origins: list[int] = []
        self._timesteps: list[float] = []
        self._conditions: dict[str, Any] = {}

    # ---------------------------------------------------------------- recording

    def recorded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> DataLoader[Any]:
        """The rows as a loader; they are sampled the first time.

        Args:
            trainer: the running trainer.
            pl_module: the model, float or quantized: what is recorded is its float twin.
        """
        if not hasattr(pl_module, "trajectory") or not hasattr(pl_module, "seeds_of"):
            raise TypeError(
                f"{type(pl_module).__name__} does not say how it samples, so there are no trajectories to record: "
                f"derive it from DiffusionMixin, or use DiffusionModule"
            )
        if self._cache is None:
            with undisturbed(pl_module), as_float(pl_module):
                self._record(trainer, cast(Sampler, pl_module))
        rows = cast(Any, range(len(self)))
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.take)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), self.batch_size):
            yield self.take(range(start, min(start + self.batch_size, len(self))))

    @property
    def nbytes(self) -> int:
        """The size of what is kept."""
        return 0 if self._cache is None else self._cache.nbytes

    def take(self, rows: Sequence[int]) -> dict[str, Any]:
        """Rows as a batch: ``x``, ``timestep``, ``k``, ``prediction``, ``conditions`` and ``features``."""
        if self._cache is None:
            raise ValueError("nothing is recorded yet: give the Trajectory to a callback as its calibration_loader=")
        x, prediction, *features = self._cache.take(torch.tensor(rows))
        steps = [self.steps[row] for row in rows]
        conditions = self._conditions
        if conditions:
            conditions = reordered(conditions, [self._origins[row] for row in rows])
        whole = all(timestep.is_integer() for timestep in self._timesteps)  # float32 for flow matching
        timesteps = torch.tensor([self._timesteps[k] for k in steps], dtype=torch.int64 if whole else torch.float32)
        return {
            "x": x,
            "timestep": timesteps.to(x.device),
            "k": torch.tensor(steps, device=x.device),
            "prediction": prediction,
            "conditions": conditions,
            "features": dict(zip(self.features, features, strict=True)),
        }

    # ---------------------------------------------------------------- private

    def _record(self, trainer: pl.Trainer, module: Sampler) -> None:
        seeds, conditions = trajectory_seeds(trainer, module, self.loader, self.trajectories)
        timesteps = module.timesteps
        self._allocate(len(seeds), len(timesteps))
        places: dict[tuple[int, int], int] = {
            (origin, k): row for row, (origin, k) in enumerate(zip(self._origins, self.steps, strict=True))
        }
        cache = SampleCache(len(self.steps), self.folder)
        last = max(self.steps)
        with progress_bar(trainer, "Sampling trajectories", len(seeds) * (last + 1), "steps") as advance:
            for start in range(0, len(seeds), self.batch_size):
                chunk = range(start, min(start + self.batch_size, len(seeds)))
                own_seeds, own = reordered((seeds, conditions), chunk)
                with _outputs(cast(nn.Module, module), self.features) as outputs:
                    for moment in module.trajectory(own_seeds, **own):
                        columns = [moment.given, moment.predicted, *(outputs[name] for name in self.features)]
                        for place, origin in enumerate(chunk):
                            if (row := places.get((origin, moment.k))) is not None:
                                cache.put(row, [column[place : place + 1] for column in columns])
                        advance(len(chunk))
                        if moment.k == last:
                            break
        self._cache, self._timesteps, self._conditions = cache, timesteps, conditions

    def _allocate(self, trajectories: int, steps: int) -> None:
        """Decide which moments are kept, and in which order."""
        each = steps if self.moments == "all" else int(self.moments)
        if each > steps:
            raise ValueError(f"moments={each}, but a trajectory has {steps} steps")
        rows = trajectories * each
        counts = list(self.allocation(steps, rows))
        if len(counts) != steps or sum(counts) != rows or not all(0 <= count <= trajectories for count in counts):
            raise ValueError(
                f"allocation has to give each of {steps} steps 0 to {trajectories} rows, {rows} in all; it gave "
                f"{len(counts)} numbers with the sum {sum(counts)}, from {min(counts)} to {max(counts)}"
            )
        by_step = [k for k, count in enumerate(counts) for _ in range(count)]
        shuffled = torch.randperm(trajectories, generator=torch.Generator().manual_seed(0)).tolist()
        # dealt in the order of the steps, a trajectory gets a step once; drawn by the golden ratio, any first few are
        # spread over all steps
        origins = [shuffled[row % trajectories] for row in range(rows)]
        order = sorted(range(rows), key=lambda row: row * GOLDEN % 1)
        self.steps, self._origins = [by_step[row] for row in order], [origins[row] for row in order]


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """The last outputs of modules, by name; of a guided batch its first, conditional half is what a row takes."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
