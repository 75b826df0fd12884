"""What every rank observed, brought together once, after the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed

T = TypeVar("T")


def merge_across_ranks(states: T) -> list[T]:
    r"""The ranks' states in rank order, the same list on every rank; a list of one without a process group.

    It is one collective: call it on every rank, once, after the last batch. Ranks may have seen different numbers of
    batches, so a collective per batch would hang.

    Args:
        states: what this rank gathered, usually ``{layer name: statistics}``; anything that can be pickled. Tensors in
            nested lists, tuples and dicts come back on the device on which this rank keeps its own.

    Example:
        >>> merge_across_ranks({"blocks.0.fc1": {"min": -1.0, "max": 2.0}})
        [{'blocks.0.fc1': {'min': -1.0, 'max': 2.0}}]
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [states]
    gathered: list[Any] = [None] * distributed.get_world_size()
    # a pickled CUDA tensor would come back on the sender's device, hence the way over the CPU
    distributed.all_gather_object(gathered, _moved(states, torch.device("cpu")))
    device = _first_device(states)
    return [state if device is None else _moved(state, device) for state in gathered]


def from_other_ranks(states: T) -> list[T]:
    """The states of all ranks but this one, in rank order; empty without a process group. One collective."""
    gathered = merge_across_ranks(states)
    own = distributed.get_rank() if len(gathered) > 1 else 0
    return gathered[:own] + gathered[own + 1 :]


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors of one shape, the very same on every rank; itself without a process group.

    One collective, for what is too big to be gathered.

    Example:
        >>> sum_across_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def mean_across_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor averaged over the ranks, the same on all of them. One collective.

    >>> mean_across_ranks([torch.tensor([1.0, 2.0])])
    [tensor([1., 2.])]
    """
    states = merge_across_ranks(list(tensors))
    return [torch.stack(same).mean(0) for same in zip(*states, strict=True)]


def _moved(states: Any, device: torch.device) -> Any:
    return apply_to_collection(states, Tensor, lambda tensor: tensor.detach().to(device))


def _first_device(states: Any) -> torch.device | None:
    devices: list[torch.device] = []
    apply_to_collection(states, Tensor, lambda tensor: devices.append(tensor.device))
    return devices[0] if devices else None
