"""The least and the greatest number that a layer reads in each channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibration.ranks import merge_across_ranks

Extremes = dict[str, tuple[Tensor, Tensor]]


def channel_extremes(layers: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]) -> Extremes:
    """Run batches and tell the extremes of every channel (the last axis) of each layer that they reach, on all ranks.

    Args:
        layers: the layers, by name; what they read is looked at.
        batches: calibration batches.
        run: feeds one forward.

    Raises:
        ValueError: naming a layer that reads NaN or infinity.

    >>> layer = nn.Linear(2, 1)
    >>> channel_extremes({"layer": layer}, [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 5.0]])], layer)
    {'layer': (tensor([ 0., -2.]), tensor([1., 5.]))}
    """
    found: Extremes = {}
    with _watched(layers, found):
        for batch in batches:
            run(batch)
    merged: Extremes = {}
    for rank in merge_across_ranks(found):
        for name, (lo, hi) in rank.items():
            _widen(merged, name, lo, hi)
    for name, (lo, hi) in merged.items():
        if not bool((lo.isfinite() & hi.isfinite()).all()):
            raise ValueError(
                f"`{name}` reads NaN or infinity in the calibration data; check it, or leave it out with skip="
            )
    return merged


@contextmanager
def _watched(layers: Mapping[str, nn.Module], found: Extremes) -> Iterator[None]:
    def hook(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        if len(x):
            _widen(found, name, x.amin(0), x.amax(0))

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(found: Extremes, name: str, lo: Tensor, hi: Tensor) -> None:
    if name in found:
        lo, hi = torch.minimum(lo, found[name][0]), torch.maximum(hi, found[name][1])
    found[name] = (lo, hi)
