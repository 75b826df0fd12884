"""How far the largest number that a layer reads stands above the others, and a sample of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibration.ranks import merge_across_ranks
from lightning_quant.quantizers import quantile

__all__ = ["fluctuations", "sampled_inputs"]


def fluctuations(
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    scales: Mapping[str, Tensor] | None = None,
    share: float = 0.99,
) -> dict[str, float]:
    r"""The mean over the batches of :math:`\max|x| / Q_{0.99}(|x|)` for each layer that they reach, on all ranks.

    Args:
        layers: the layers, by name; what they read is looked at.
        batches: calibration batches.
        run: feeds one forward.
        scales: what each channel (C,) is multiplied with before it is looked at, for those layers that have it.
        share: which quantile.

    >>> layer = nn.Linear(2, 1)
    >>> fluctuations({"layer": layer}, [torch.tensor([[1.0, -2.0], [1.0, 8.0]])], layer, share=0.5)
    {'layer': 5.333333492279053}
    """
    found: dict[str, list[float]] = {}
    scales = scales or {}

    def look(name: str, x: Tensor) -> None:
        magnitudes = (x.detach().float() * scales.get(name, 1)).abs().flatten()
        usual = quantile(magnitudes, share).clamp(min=torch.finfo(torch.float32).tiny)
        found.setdefault(name, []).append(float(magnitudes.max() / usual))

    with _reading(layers, look):
        for batch in batches:
            run(batch)
    of_all: dict[str, list[float]] = {}
    for rank in merge_across_ranks(found):
        for name, values in rank.items():
            of_all.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in of_all.items()}


def sampled_inputs(
    layers: Mapping[str, nn.Module], run: Callable[[], Any], rows: int = 2048, skip_first: int = 0
) -> dict[str, Tensor]:
    """What layers read in one forward (n, C), evenly thinned out to so many rows; that of the first rank on all ranks.

    Args:
        layers: the layers, by name.
        run: feeds one forward.
        rows: how many are kept of each at most.
        skip_first: how many of the first tokens of each sequence (B, T, C) are left out.

    >>> layer = nn.Linear(3, 1)
    >>> sampled_inputs({"layer": layer}, lambda: layer(torch.zeros(5, 4, 3)), rows=10)["layer"].shape
    torch.Size([10, 3])
    """
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        x = x[:, skip_first:] if x.dim() == 3 else x
        flat = x.detach().flatten(0, -2).float()
        if name not in found:
            found[name] = flat[torch.linspace(0, len(flat) - 1, min(rows, len(flat))).round().long()]

    with _reading(layers, look):
        run()
    return merge_across_ranks(found)[0]


@contextmanager
def _reading(layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        look(name, args[0])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
