"""Which samples of a DataLoader calibrate, in which order, and which rank takes which of them.

The loader itself is never touched: a shallow copy of it, with only the index batches exchanged, does the reading. So a
subclass, its collate function, dataset and workers stay what they are, whatever its constructor takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler


class Share(NamedTuple):
    """One batch of one rank: the samples' positions in the common order, and their indices in the dataset."""

    positions: list[int]
    indices: list[Any]


def can_be_resampled(loader: Any) -> bool:
    """Whether ``loader`` is a DataLoader whose batches are made of dataset items, picked by index.

    Example:
        >>> can_be_resampled(DataLoader([1, 2, 3])), can_be_resampled([torch.zeros(2)])
        (True, False)
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None


def order_name(loader: Any, unshuffle: bool) -> str:
    """The order of :func:`index_batches` in words, to be told to the user.

    Example:
        >>> order_name(DataLoader([1, 2, 3], shuffle=True), unshuffle=True)
        'unshuffled'
    """
    if not can_be_resampled(loader):
        return "in its own order"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"in the order of its {type(loader.batch_sampler).__name__}"
    if _fixed_order(loader, unshuffle) is None:
        return f"in the order of its {type(loader.batch_sampler.sampler).__name__}"
    return "unshuffled"


def index_batches(loader: DataLoader[Any], samples: int, unshuffle: bool) -> list[list[Any]]:
    """The dataset indices of the first ``samples`` samples, batch by batch, incomplete last batch included.

    Args:
        loader: a loader that :func:`can_be_resampled`.
        samples: how many samples at most.
        unshuffle: put the dataset's own order 0, 1, 2, ... in place of a shuffling sampler. A batch sampler of the
            user's own, and samplers other than torch's random ones, keep their order: they may leave out samples on
            purpose.

    Example:
        >>> index_batches(DataLoader(range(9), batch_size=2, shuffle=True, drop_last=True), 5, unshuffle=True)
        [[0, 1], [2, 3], [4]]
    """
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is BatchSampler:
        order = _fixed_order(loader, unshuffle)
        with _generators_kept(loader):
            indices = list(islice(batch_sampler.sampler if order is None else order, samples))
        return _chunks(indices, batch_sampler.batch_size)
    batches: list[list[Any]] = []
    with _generators_kept(loader):
        for batch in batch_sampler:
            batches.append(list(batch)[:samples])
            samples -= len(batch)
            if samples <= 0:
                break
    return batches


def deal(batches: Sequence[Sequence[Any]], batch_size: int | None, rank: int, world_size: int) -> list[Share]:
    """This rank's share of the index batches: no sample twice, none left out.

    Args:
        batches: the index batches of all ranks.
        batch_size: the samples are dealt one by one and put together again to batches of this size; with None, whose
            batches belong together, whole batches are dealt.
        rank: who takes.
        world_size: among how many.

    Example:
        >>> deal([["a", "b"], ["c"]], batch_size=2, rank=0, world_size=2)
        [Share(positions=[0, 2], indices=['a', 'c'])]
    """
    indices = [index for batch in batches for index in batch]
    if batch_size is not None:
        positions = _chunks(list(range(rank, len(indices), world_size)), batch_size)
    else:
        ends = torch.tensor([len(batch) for batch in batches], dtype=torch.long).cumsum(0).tolist()
        starts = [0, *ends][:-1]
        spans = [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]
        positions = spans[rank::world_size]
    return [Share(chosen, [indices[position] for position in chosen]) for chosen in positions]


def batch_size_to_deal(loader: DataLoader[Any]) -> int | None:
    """The batch size of a loader whose samples can be regrouped; None if its own batch sampler groups them.

    Example:
        >>> batch_size_to_deal(DataLoader([1, 2, 3], batch_size=2))
        2
    """
    batch_sampler: Any = loader.batch_sampler
    return int(batch_sampler.batch_size) if type(batch_sampler) is BatchSampler else None


def reader(loader: DataLoader[Any], indices: list[list[Any]] | None = None) -> DataLoader[Any]:
    """A copy of the loader that reads these index batches, or the loader's own, and leaves the loader as it is.

    Example:
        >>> list(reader(DataLoader([10, 11, 12]), [[2, 0], [1]]))
        [tensor([12, 10]), tensor([11])]
    """
    copied = copy.copy(loader)
    own = vars(copied)  # DataLoader refuses plain assignment of some of these after construction
    own["persistent_workers"] = False  # neither the loader's workers nor ones that outlive the calibration
    if loader.generator is not None:
        own["generator"] = loader.generator.clone_state()
    if indices is not None:
        own["batch_sampler"] = indices
    return copied


def end_workers(iterator: Iterator[Any]) -> None:
    """End the worker processes of a DataLoader's iterator now, not when it happens to be collected."""
    for ending in ("_shutdown_workers", "close"):  # torch's own iterator, or a generator of a subclass around it
        end = getattr(iterator, ending, None)
        if callable(end):
            end()


def _fixed_order(loader: DataLoader[Any], unshuffle: bool) -> Sequence[Any] | None:
    """The order that does not depend on random numbers, or None where only the sampler knows."""
    sampler: Any = loader.batch_sampler.sampler  # type: ignore[union-attr]
    if isinstance(sampler, DistributedSampler) and sampler.dataset is loader.dataset:
        # the ranks' shares are ours to deal, without the samples that it repeats
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SequentialSampler) or (unshuffle and isinstance(sampler, RandomSampler)):
        return range(len(sampler.data_source))
    if unshuffle and isinstance(sampler, SubsetRandomSampler):
        return sampler.indices
    return None


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@contextmanager
def _generators_kept(loader: DataLoader[Any]) -> Iterator[None]:
    samplers = (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader)
    generators = [getattr(owner, "generator", None) for owner in samplers]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
