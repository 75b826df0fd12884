"""A histogram that depends only on which values it saw, never on their order or on how they were split into batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Histogram"]

# float32 numbers carry 24 bits, so bins finer than 2^-24 of the largest magnitude would tell nothing apart.
MANTISSA_BITS = 24
SMALLEST_EXPONENT = -126


@dataclass(frozen=True)
class Histogram:
    r"""Integer counts in bins :math:`j = \mathrm{trunc}(x / 2^k)`, one histogram per row.

    The exponent k of a row is the smallest one whose bins cover the row's range, so it follows from the extremes alone.
    When the range grows, k grows and bins merge exactly, :math:`j \mapsto \mathrm{trunc}(j / 2)`. Hence merging is
    associative and commutative, and two processes that saw half of the data each hold together exactly what one process
    that saw all of it holds. Bin j stands in slot ``j mod bins``, so a growing range never moves what need not merge.
    All bins are :math:`2^k` wide but bin 0, which reaches as far on both sides of 0 and has 0 as its centre.

    Args:
        lo: Exact minimum, ``(rows,)``.
        hi: Exact maximum, ``(rows,)``.
        exponent: The exponent k of the bin width, ``(rows,)`` of int64.
        counts: ``(rows, bins)`` of int64; the number of bins is a power of two.

    Example:
        >>> first, second = Histogram.of(torch.tensor([[0.0, 1.0]]), 8), Histogram.of(torch.tensor([[-5.0]]), 8)
        >>> values, counts = first.merge(second).sorted_bins()
        >>> values[counts > 0], counts[counts > 0]
        (tensor([-5.,  0.,  1.]), tensor([1, 1, 1]))
    """

    lo: Tensor
    hi: Tensor
    exponent: Tensor
    counts: Tensor

    @classmethod
    def of(cls, rows: Tensor, bins: int) -> Histogram:
        """Counts ``rows``.

        Args:
            rows: Finite float32 values, ``(rows, values)``, at least one value per row.
            bins: Number of bins, a power of two.

        Raises:
            ValueError: If ``bins`` is not a power of two.
        """
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"a histogram has a power of two of bins, got bins={bins}.")
        lo, hi = rows.amin(1), rows.amax(1)  # several times faster than torch.aminmax along an axis
        exponent = _exponent(lo, hi, bins)
        # Scaling by a power of two is exact, so an edge case falls into the same bin in every batch. The one exception,
        # a tiny number that underflows to 0, is harmless: truncating (unlike rounding down) takes it to bin 0 anyway.
        slots = (rows * _power_of_two(-exponent).float().unsqueeze(1)).to(torch.int32).bitwise_and_(bins - 1)
        slots += torch.arange(0, len(rows) * bins, bins, dtype=torch.int32, device=rows.device).unsqueeze(1)
        return cls(lo, hi, exponent, torch.bincount(slots.flatten(), minlength=len(rows) * bins).view(-1, bins))

    def merge(self, other: Histogram) -> Histogram:
        """Returns the histogram of both data sets together."""
        lo, hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        exponent = _exponent(lo, hi, self.counts.shape[1])
        return Histogram(lo, hi, exponent, self._coarsened(exponent) + other._coarsened(exponent))

    def sorted_bins(self) -> tuple[Tensor, Tensor]:
        """Returns bin centres, moved inside the exact range, and counts, both ``(rows, bins)`` in ascending order."""
        bins = self.counts.shape[1]
        indices = self._lowest_bin().unsqueeze(1) + torch.arange(bins, device=self.counts.device)
        centres = (indices + 0.5 * indices.sign()).double() * _power_of_two(self.exponent).unsqueeze(1)
        centres = centres.float().clamp(self.lo.unsqueeze(1), self.hi.unsqueeze(1))
        return centres, self.counts.gather(1, indices % bins)

    def _lowest_bin(self) -> Tensor:
        return (self.lo.double() * _power_of_two(-self.exponent)).long()

    def _coarsened(self, exponent: Tensor) -> Tensor:
        bins = self.counts.shape[1]
        lowest = self._lowest_bin().unsqueeze(1)
        slots = torch.arange(bins, device=self.counts.device)
        indices = lowest + (slots - lowest) % bins  # which bin stands in each slot
        factor = 1 << (exponent - self.exponent).clamp(max=2 * MANTISSA_BITS).unsqueeze(1)
        coarse = torch.div(indices, factor, rounding_mode="trunc")
        return torch.zeros_like(self.counts).scatter_add_(1, coarse % bins, self.counts)


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.double())


def _exponent(lo: Tensor, hi: Tensor, bins: int) -> Tensor:
    """Smallest k, not below what float32 resolves, for which at most ``bins`` bins cover [lo, hi]."""
    lo, hi = lo.double(), hi.double()
    largest = torch.maximum(lo.abs(), hi.abs())
    magnitude = torch.frexp(largest).exponent.long().masked_fill(largest == 0, SMALLEST_EXPONENT)
    exponent = (magnitude - MANTISSA_BITS).clamp(min=SMALLEST_EXPONENT)
    # Bins of width (hi - lo) / bins nearly suffice; the loop below adds the step or two that are missing.
    width = torch.frexp((hi - lo) / bins).exponent.long() - 1
    exponent = torch.where(hi > lo, torch.maximum(exponent, width), exponent)
    for _ in range(3):
        power = _power_of_two(-exponent)
        exponent = exponent + ((hi * power).trunc() - (lo * power).trunc() + 1 > bins).long()
    return exponent
