"""A histogram cut to what an eye can see: some hundred bars around the levels of a quantizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lightning_quant.quantizers import Quantizer, from_steps, levels
from lightning_quant.reports.errors import TensorError

BARS = 96
MARGIN = 0.35  # how far beyond the outermost levels bars are shown, as a share of the grid's width


@dataclass
class Bars:
    """Counts in bars of one width, on the ruler of :func:`~lightning_quant.quantizers.levels`.

    Args:
        start: where the first bar begins.
        width: of each bar.
        counts: of values in each.
        below: count of values before the first bar.
        above: count of values behind the last bar.
        levels: where the levels are.
        values: what the ends of the grid, and 0, stand for as ``(place, value)``; None where that differs by channel.
        logarithmic: whether the ruler is that of a logarithmic format, so that what is below it becomes 0.
    """

    start: float
    width: float
    counts: list[int]
    below: int
    above: int
    levels: list[float]
    values: list[tuple[float, float]] | None
    logarithmic: bool = False

    @property
    def end(self) -> float:
        """Where the last bar ends."""
        return self.start + self.width * len(self.counts)

    @property
    def facts(self) -> dict[str, Any]:
        """What ``report.json`` tells: of a fine grid only its ends."""
        ends = [self.levels[0], self.levels[-1]]
        return {
            "start": self.start,
            "width": self.width,
            "counts": self.counts,
            "below": self.below,
            "above": self.above,
            "levels": len(self.levels),
            "first_and_last_level": ends,
            "value_of_level": None if self.values is None else dict(self.values),
        }


def bars(error: TensorError, count: int = BARS) -> Bars | None:
    """Cut the histogram of a tensor to about ``count`` bars; None if nothing finite was seen.

    The bars cover the whole grid, also where there are no values, and somewhat more where there are values beyond it.

    Args:
        error: of the tensor.
        count: how many bars to aim at.

    Example:
        >>> from lightning_quant.quantizers import build_quantizer
        >>> quantizer = build_quantizer("uint2_asym")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(3.0))
        >>> error = TensorError("input", quantizer)
        >>> error.add(torch.tensor([0.0, 1.1, 2.0, 2.1, 90.0]))
        >>> shown = bars(error, count=5)
        >>> shown.start, shown.counts, shown.above
        (-0.5, [1, 1, 2, 0, 0], 1)
    """
    if error.histogram is None:
        return None
    centres, counts = (rows[0].double().cpu() for rows in error.histogram.sorted_bins())
    centres, counts = centres[counts > 0], counts[counts > 0]
    marks = levels(error.quantizer).double()
    first, last = marks[0].item(), marks[-1].item()
    span = last - first
    low = max(first - MARGIN * span, min(first - 0.5, centres[0].item()))
    high = min(last + MARGIN * span, max(last + 0.5, centres[-1].item()))
    finest = 2.0 ** int(error.histogram.exponent)
    width = max((high - low) / count, finest)
    # Whole numbers of bars to a step, or of steps to a bar: else evenly spread values would seem to beat with the grid.
    width = float(math.ceil(width)) if width > 0.5 else 1 / math.floor(1 / width)
    start = math.floor((low + 0.5) / width) * width - 0.5
    number = max(1, math.ceil((high - start) / width - 1e-9))
    places = ((centres - start) / width).floor().clamp(-1, number).long() + 1
    cut = torch.bincount(places, counts, minlength=number + 2).long().tolist()
    values, logarithmic = _values(error.quantizer, first, last), error.quantizer.scheme.kind == "log"
    return Bars(start, width, cut[1:-1], cut[0], cut[-1], marks.tolist(), values, logarithmic)


def _values(quantizer: Quantizer, first: float, last: float) -> list[tuple[float, float]] | None:
    places = [first, last]
    zero_point = getattr(quantizer, "zero_point", None)
    if quantizer.scheme.kind != "log":
        zero = 0.0 if zero_point is None or zero_point.numel() != 1 else float(zero_point)
        places = [first, zero, last] if first < zero < last else places
    values = from_steps(quantizer, torch.tensor(places))
    return None if values is None else list(zip(places, values.tolist(), strict=True))
