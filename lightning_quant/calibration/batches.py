"""Calibration batches, drawn as Lightning's loops would draw them, beside the loops.

The only file of the package that touches names which Lightning keeps private; ``tests/calibration/test_batches.py`` has
a test for each that fails when an upgrade takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quant.calibration import order
from lightning_quant.calibration.progress import progress_bar
from lightning_quant.calibration.random_numbers import OwnRandomNumbers, RandomState
from lightning_quant.calibration.ranks import merge_across_ranks
from lightning_quant.calibration.samples import first_samples, merge_batches, reordered, sample_count

ADVICE = (
    "pass calibration_loader (a DataLoader, an iterable of batches, or a function that returns one) or define "
    "calibration_dataloader() on the LightningModule or the datamodule"
)


class CalibrationBatches:
    """The batches of ``samples`` calibration samples, ready to be fed forward; can be iterated more than once.

    Every batch goes the way it goes in the loops: the precision's input conversion, ``on_before_batch_transfer``,
    transfer to the device, ``on_after_batch_transfer``. Batches are never inference tensors. The run's random numbers
    are left alone: augmentations draw from a stream of their own, which starts alike in each pass.

    *Where from*: with ``"auto"``, ``calibration_dataloader()`` of the datamodule or else of the LightningModule; then
    the train loader in the order 0, 1, 2, ...; then the validation loader. A train set that augments its samples
    augments them here too, so give it a ``calibration_dataloader()`` with the evaluation transform. Several train
    loaders are refused (passed over by ``"auto"``); of several validation loaders the first is used.

    *How many*: exactly ``samples``, or what there is. A DataLoader over a dataset with a length fetches just those, in
    its own batch size, and a sample is an item of the dataset; for all else the samples of a batch are counted as
    Lightning counts the batch size, and the last batch is cut.

    *Several ranks*: the samples are dealt one by one, so that rank r takes r, r + world size, ...; batches of an
    iterable dataset, a ready iterable or a batch sampler of the user's own are dealt whole. No sample is repeated, so
    ranks may differ in their number of batches, and one may get none: collectives belong after the loop. Build it on
    every rank.

    Args:
        trainer: the running trainer.
        pl_module: the module that is calibrated.
        loader: ``"auto"``, ``"train"``, ``"val"``, a DataLoader or another iterable of batches, or a function that
            returns one.
        samples: how many samples to draw, over all ranks.

    Attributes:
        source: what is used, in words, with the reasons where ``"auto"`` had to pass something over.
        drawn: how many samples this rank has drawn in the current pass.
        available: how many samples there are, at most as many as were asked for, as far as that is known.

    Raises:
        ValueError: if there is no loader, or it is empty.
        TypeError: if ``loader`` is something else altogether.

    Example:
        >>> class Doubler(pl.LightningModule):
        ...     def forward(self, x):
        ...         return 2 * x
        ...
        ...     def validation_step(self, batch, batch_idx): ...
        >>> class Show(pl.Callback):
        ...     def on_validation_start(self, trainer, pl_module):
        ...         batches = CalibrationBatches(trainer, pl_module, samples=3)
        ...         print(batches.source)
        ...         print([batch.tolist() for batch in batches])
        >>> trainer = pl.Trainer(accelerator="cpu", callbacks=Show(), barebones=True)
        >>> _ = trainer.validate(Doubler(), DataLoader([1.0, 2.0, 3.0, 4.0], batch_size=2), verbose=False)
        the validation loader, unshuffled (the train loader cannot be used: no train_dataloader is defined)
        [[1.0, 2.0], [3.0]]
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any = "auto", samples: int = 32
    ) -> None:
        if samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, found {samples}.")
        self.samples = samples
        self.drawn = 0
        self._trainer, self._pl_module = trainer, pl_module
        self._random_state = RandomState.now()
        self._warned = False
        self.available = samples  # as far as is known; some loaders tell only when they have been read
        with OwnRandomNumbers(self._random_state), torch.inference_mode(False):
            self._found = _find_loader(trainer, pl_module, loader)
            self._shares = self._dealt_shares()
        self.source = str(self._found)
        rank_zero_info(f"Calibration draws {samples} samples from {self.source}.")

    @property
    def total(self) -> int | None:
        """How many samples this rank will draw, None where only reading tells."""
        return None if self._shares is None else sum(len(share.positions) for share in self._shares)

    def __len__(self) -> int:
        """The number of batches of this rank, where it is known before reading."""
        if self._shares is None:
            raise TypeError(f"{self._found.name} does not tell how many batches {self.samples} samples are")
        return len(self._shares)

    def __iter__(self) -> Iterator[Any]:
        return (drawn.batch for drawn in self._draw())

    def merged(self) -> Any:
        """All samples as one batch; on several ranks each gets the whole batch, equal bit for bit to a single process'.

        Raises:
            ValueError: if the batches cannot be concatenated, for instance token sequences of different lengths.
        """
        drawn = list(self._draw())
        if self._trainer.world_size > 1:
            drawn = [one for share in merge_across_ranks(drawn) for one in share]
        with torch.inference_mode(False), torch.no_grad():
            batch = drawn[0].batch if len(drawn) == 1 else merge_batches([one.batch for one in drawn])
            positions = [position for one in drawn for position in one.positions]
            if positions == sorted(positions):
                return batch
            if sample_count(batch) != len(positions):
                raise ValueError(
                    f"cannot merge the calibration batches of several ranks: {len(positions)} samples of the dataset "
                    f"gave {sample_count(batch)} rows. Let calibration_loader's collate function give one row each."
                )
            return reordered(batch, sorted(range(len(positions)), key=positions.__getitem__))

    def _dealt_shares(self) -> list[order.Share] | None:
        """This rank's batches by index, or None if the loader can only be read from front to back."""
        loader = self._found.loader
        if not order.can_be_resampled(loader):
            if not isinstance(loader, DataLoader) and hasattr(loader, "__len__") and len(loader) == 0:
                raise self._empty()
            return None
        batches = order.index_batches(loader, self.samples, self._found.unshuffle)
        batches = self._trainer.strategy.broadcast(batches)  # a random sampler would draw differently on each rank
        available = sum(map(len, batches))
        if available == 0:
            raise self._empty()
        self._warn_if_short(available)
        batch_size = order.batch_size_to_deal(loader)
        return order.deal(batches, batch_size, self._trainer.global_rank, self._trainer.world_size)

    def _draw(self) -> Iterator[_Drawn]:
        self.drawn = 0
        stream = self._resampled() if self._shares is not None else self._read_through()
        own_random_numbers = OwnRandomNumbers(self._random_state)
        try:
            with progress_bar(self._trainer, "Calibrating", self.total or self.samples) as advance:
                while True:
                    # the modes are for drawing alone: between two batches the caller's own are in force
                    with own_random_numbers, torch.inference_mode(False), torch.no_grad():
                        drawn = next(stream, None)
                    if drawn is None:
                        return
                    self.drawn += len(drawn.positions)
                    yield drawn
                    advance(len(drawn.positions))
        finally:
            stream.close()

    def _resampled(self) -> Generator[_Drawn, None, None]:
        shares = self._shares or []
        iterator = iter(order.reader(self._found.loader, [share.indices for share in shares]))
        try:
            for share, batch in zip(shares, iterator, strict=False):
                yield _Drawn(share.positions, self._moved(batch))
        finally:
            order.end_workers(iterator)

    def _read_through(self) -> Generator[_Drawn, None, None]:
        loader = self._found.fresh()
        iterator = iter(order.reader(loader) if isinstance(loader, DataLoader) else loader)
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        number = seen = 0
        try:
            while seen < self.samples and (raw := next(iterator, _END)) is not _END:
                batch = self._moved(raw)
                count = min(sample_count(batch), self.samples - seen)
                if number % world_size == rank and count > 0:
                    yield _Drawn(list(range(seen, seen + count)), first_samples(batch, count))
                number, seen = number + 1, seen + count
        finally:
            if isinstance(loader, DataLoader):
                order.end_workers(iterator)
        if seen == 0:
            raise self._empty()
        self._warn_if_short(seen)

    def _moved(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        # a ready batch may have been made inside inference mode, and would refuse to take part in training
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def _warn_if_short(self, available: int) -> None:
        self.available = min(available, self.samples)
        if available < self.samples and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"calibration_samples={self.samples}, but {self._found.name} has only {available} samples: "
                f"calibrating on these {available}."
            )

    def _empty(self) -> ValueError:
        used_up = " or read before (pass a function that returns a new one)"
        reason = f"it is empty{used_up if isinstance(self._found.loader, Iterator) else ''}"
        return ValueError(f"calibration got no sample from {self._found.name}, {reason}: {ADVICE}.")


def draw_training_batches_from(trainer: pl.Trainer, pl_module: pl.LightningModule, samples: int) -> CalibrationBatches:
    """Calibrate on the loader that was given to ``trainer.fit``, and let fit run on the module's own train loader.

    To be called in ``LightningModule.setup``, before the loop asks for its loader.

    Args:
        trainer: the trainer that is about to fit.
        pl_module: the module, which defines ``train_dataloader``.
        samples: how many samples to draw.

    Raises:
        ValueError: if no loader was given to ``fit``.
    """
    if trainer.fit_loop._data_source.instance is pl_module:
        raise ValueError(
            f"{type(pl_module).__name__} has no calibration data: call trainer.fit(stage, loader), or give it batches="
        )
    batches = CalibrationBatches(trainer, pl_module, "train", samples)
    trainer.fit_loop._data_source = _DataLoaderSource(pl_module, "train_dataloader")
    return batches


class _Drawn(NamedTuple):
    positions: list[int]  # in the order in which a single process would draw
    batch: Any


_END = object()


class _Found(NamedTuple):
    """A loader and what to say about it."""

    loader: Any
    name: str
    unshuffle: bool = False
    make: Callable[[], Any] | None = None
    passed_over: tuple[str, ...] = ()

    def fresh(self) -> Any:
        """The loader, made anew if it is an iterator that an earlier pass may have used up."""
        return self.make() if self.make is not None and isinstance(self.loader, Iterator) else self.loader

    def __str__(self) -> str:
        reasons = f" ({'; '.join(self.passed_over)})" if self.passed_over else ""
        return f"{self.name}, {order.order_name(self.loader, self.unshuffle)}{reasons}"


def _find_loader(trainer: pl.Trainer, pl_module: pl.LightningModule, wanted: Any) -> _Found:
    if not isinstance(wanted, str):
        return _given_loader(trainer, pl_module, wanted)
    if wanted not in ("auto", "train", "val", "loops"):
        raise ValueError(f"calibration_loader={wanted!r} is none of 'auto', 'train' and 'val'.")
    if wanted == "auto":
        # The trainer keeps the datamodule of an earlier run; the loops' data source knows that of this run.
        for owner in (trainer.fit_loop._data_source.instance, pl_module):
            make = getattr(owner, "calibration_dataloader", None)
            if isinstance(owner, (pl.LightningDataModule, pl.LightningModule)) and callable(make):
                return _given_loader(
                    trainer, pl_module, make, name=f"calibration_dataloader() of {type(owner).__name__}"
                )
    passed_over: list[str] = []
    sources = {"train": trainer.fit_loop._data_source, "val": trainer.validate_loop._data_source}
    for stage, name in (("train", "the train loader"), ("val", "the validation loader")):
        if wanted in ("auto", "loops", stage):  # "loops": for what calibration_dataloader() itself draws from
            found, reason = _loader_of_loop(sources[stage], name, several=stage == "val")
            if found is not None:
                return found._replace(passed_over=tuple(passed_over))
            passed_over.append(f"{name} cannot be used: {reason}")
    raise ValueError(f"calibration found no data: {'; '.join(passed_over)}. Please {ADVICE}.")


def _loader_of_loop(source: Any, name: str, several: bool) -> tuple[_Found | None, str]:
    """The loader that a loop would run on, or None and the reason.

    In ``validate`` a datamodule was not set up for fit, so that asking for its train loader may fail in any way.
    """
    if not source.is_defined():
        return None, f"no {source.name} is defined"
    try:
        loaders = source.dataloader()
        loaders = (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened
    except Exception as error:
        return None, f"{source.name}() failed with {type(error).__name__}: {error}"
    if len(loaders) > 1 and several:
        name = f"the first of {len(loaders)} validation loaders"
    elif len(loaders) != 1:
        return None, f"it is a collection of {len(loaders)} loaders"
    if not isinstance(loaders[0], Iterable):
        return None, f"{source.name}() returned {type(loaders[0]).__name__}, which is no iterable of batches"
    return _Found(loaders[0], name, unshuffle=True), ""


def _given_loader(trainer: pl.Trainer, pl_module: pl.LightningModule, given: Any, name: str = "") -> _Found:
    make = given if callable(given) and not isinstance(given, Iterable) else None
    loader = given if make is None else make()
    if hasattr(loader, "recorded"):  # a Trajectory, which samples from the module
        return _Found(loader.recorded(trainer, pl_module), "recorded trajectories of the float model")
    name = name or f"the {type(loader).__name__} {'given' if make is None else 'that the given function returns'}"
    parts = loader.flattened if isinstance(loader, CombinedLoader) else loader
    collection = isinstance(parts, (list, tuple)) and any(isinstance(part, DataLoader) for part in parts)
    if collection or isinstance(parts, Mapping):
        raise TypeError(f"{name} is a collection of loaders, but calibration draws from one: {ADVICE}.")
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} is no iterable of batches: {ADVICE}.")
    return _Found(loader, name, make=make)
