"""How large activations are: streamed sums and a histogram of magnitudes with logarithmic bins, never the values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OUTLIER = 6.0  # a magnitude, and how many deviations from the mean
LOUD_IN = 0.25  # a channel is an outlier if it is one in so many samples
LOWEST, HIGHEST, BINS_A_DECADE = -8, 8, 50  # of the histogram, as powers of ten


class ActivationStatistics:
    """Statistics of what one layer reads, in memory that does not grow.

    A quantile is exact to a bin, which is 4.7 % wide.

    Args:
        skip_first: leave out the first token of each sample, which alone may carry massive activations.

    >>> found = ActivationStatistics()
    >>> found.add(torch.tensor([[[1.0, -2.0], [3.0, 70.0]]]))
    >>> found.absmax, found.outlier_share, found.outlier_channels
    (70.0, 0.25, {1})
    """

    def __init__(self, skip_first: bool = False) -> None:
        self.skip_first = skip_first
        self.count = 0
        self.samples = 0
        self.absmax = 0.0
        self.outliers = 0
        self.moments = torch.zeros(4, dtype=torch.float64)  # sums of x, x^2, x^3, x^4
        self.magnitudes = 0.0
        self.loud: Tensor | None = None  # (C,), in how many samples
        self.histogram = torch.zeros((HIGHEST - LOWEST) * BINS_A_DECADE, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Add one batch, (samples, ..., channels)."""
        x = x.detach().float()
        x = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)  # (B, T, C)
        if self.skip_first:
            x = x[:, 1:]
        if x.numel() == 0:
            return
        magnitude = x.abs()
        self.count += x.numel()
        self.samples += len(x)
        self.absmax = max(self.absmax, float(magnitude.max()))
        self.outliers += int((magnitude > OUTLIER).sum())
        self.magnitudes += float(magnitude.double().sum())
        wide = x.double()
        self.moments += torch.stack([(wide**power).sum() for power in (1, 2, 3, 4)]).cpu()
        loud = (magnitude.amax(1) > OUTLIER).sum(0).cpu()
        self.loud = loud if self.loud is None else self.loud + loud
        place = (magnitude.clamp(min=10.0**LOWEST).log10() - LOWEST) * BINS_A_DECADE
        self.histogram += torch.bincount(
            place.long().clamp(0, len(self.histogram) - 1).flatten().cpu(), minlength=len(self.histogram)
        )

    @property
    def absmean(self) -> float:
        """Mean magnitude."""
        return self.magnitudes / max(1, self.count)

    @property
    def outlier_share(self) -> float:
        """Share of the numbers whose magnitude is above 6."""
        return self.outliers / max(1, self.count)

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance; 3 for a normal distribution."""
        first, second, third, fourth = (self.moments / max(1, self.count)).tolist()
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return float(central / variance**2) if variance > 0 else math.nan

    @property
    def outlier_channels(self) -> set[int]:
        """Channels that exceed 6 in a quarter of the samples or more."""
        if self.loud is None:
            return set()
        return set((self.loud >= LOUD_IN * self.samples).nonzero().flatten().tolist())

    def quantile(self, q: float) -> float:
        """The magnitude that a share ``q`` of the numbers does not exceed: the upper end of its bin."""
        below = self.histogram.cumsum(0)
        place = int(torch.searchsorted(below, torch.tensor(math.ceil(q * self.count))))
        return float(min(10.0 ** (LOWEST + (place + 1) / BINS_A_DECADE), self.absmax))


def jaccard(one: set[int], other: set[int]) -> float:
    """How much two sets have in common; 1 if both are empty.

    >>> jaccard({1, 2}, {2, 3}), jaccard(set(), set())
    (0.3333333333333333, 1.0)
    """
    return len(one & other) / len(one | other) if one | other else 1.0


@contextmanager
def activation_statistics(
    layers: Mapping[str, nn.Module], skip_first: bool = False
) -> Iterator[dict[str, ActivationStatistics]]:
    """Statistics of what layers read meanwhile, by name.

    >>> layer = nn.Linear(2, 1)
    >>> with activation_statistics({"layer": layer}) as found:
    ...     _ = layer(torch.tensor([[3.0, -4.0]]))
    >>> found["layer"].absmax
    4.0
    """
    found = {name: ActivationStatistics(skip_first) for name in layers}

    def hook(statistics: ActivationStatistics, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            statistics.add(args[0])

    handles = [layer.register_forward_pre_hook(partial(hook, found[name])) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
