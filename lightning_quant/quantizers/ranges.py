"""How the range of a quantizer is found: extremes, percentiles, or a search for the least error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_quant.quantizers.histogram import Histogram
from lightning_quant.quantizers.quantiles import quantile

__all__ = ["Distribution", "RangeRule", "histogram_bins", "quantile", "search"]

# Elements scored at a time: small enough that all passes over them stay in a core's second-level cache.
TILE = 2**16
# The narrowest range that the shrinking searches try is a fifth of the full one.
SHRINK = 0.8


@dataclass(frozen=True)
class RangeRule:
    r"""How to find the range ``[lo, hi]`` that a quantizer covers.

    ==================  ==========================================================================================
    ``minmax``          the extremes of all data
    ``percentile``      ``hi`` is one high quantile p, ``lo`` the quantile 1 - p
    ``mse``             the extremes shrunk together, both ends times 1, 0.99, ..., 0.21: least mean squared error
    ``lp``              the same with the error to the power 2.4
    ``percentile_mse``  the pair of quantiles with the least mean squared error (the rule of RepQ-ViT)
    ``running``         exponential moving average of the extremes of each batch
    ``kl``              the extremes shrunk together, least Kullback-Leibler divergence between the clipped float
                        histogram and the quantized one (the rule of TensorRT)
    ==================  ==========================================================================================

    Args:
        name: One of the names above.
        percentiles: The quantiles p that the percentile rules use.
        norm: Power of the error.
        candidates: Number of ranges that ``mse``, ``lp`` and ``kl`` try.
        momentum: Weight of a new batch in ``running``.
        include_zero: Whether the range is widened to hold 0, so that 0 is exact.
        room: How far from 0 the range reaches, in ends that were found; more than 1 is room for what was not seen.

    Raises:
        ValueError: If the name is unknown or a number is out of range.

    Example:
        >>> RangeRule.parse("lp").norm
        2.4
    """

    name: str
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    norm: float = 2.0
    candidates: int = 80
    momentum: float = 0.1
    include_zero: bool = True
    room: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f'"{self.name}" is not a range rule; the rules are {", ".join(NAMES)}.')
        if not self.percentiles or not all(0.5 < p <= 1 for p in self.percentiles):
            raise ValueError(f"percentiles lie above 0.5 and up to 1, got {self.percentiles}.")
        if self.room < 1:
            raise ValueError(f"room is at least 1, got {self.room}.")
        if self.norm <= 0 or self.candidates < 1 or not 0 < self.momentum <= 1:
            raise ValueError(
                "norm is above 0, candidates at least 1 and momentum above 0 and up to 1, "
                f"got norm={self.norm}, candidates={self.candidates}, momentum={self.momentum}."
            )

    @classmethod
    def parse(cls, name: str | RangeRule) -> RangeRule:
        """Returns the rule of a name with its usual numbers; a :class:`RangeRule` is returned as it is.

        Raises:
            ValueError: If the name is unknown.

        Example:
            >>> RangeRule.parse("percentile").percentiles
            (0.9999,)
        """
        if isinstance(name, RangeRule):
            return name
        if name == "percentile":
            return cls(name, percentiles=(0.9999,))
        if name == "percentile_mse":
            return cls(name, include_zero=False)
        return cls(name, norm=2.4 if name == "lp" else 2.0)


NAMES = ("minmax", "percentile", "mse", "lp", "percentile_mse", "running", "kl")


class RangeQuantizer(Protocol):
    """What a search needs of a quantizer: its state for a range, and its rounding for a state."""

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]: ...

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Distribution:
    """The values that share a scale, one row per scale, as they are or as counted bins.

    Args:
        values: ``(rows, values)``; ascending if counted.
        counts: How often each value occurs, in the shape of ``values``; ``None`` means once.
        lo: Exact minimum, ``(rows,)``.
        hi: Exact maximum, ``(rows,)``.
    """

    values: Tensor
    counts: Tensor | None
    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Distribution:
        """Takes the values as they are.

        Raises:
            ValueError: If there are no values, or a value is NaN or infinite.
        """
        if rows.numel() == 0:
            raise ValueError("a range cannot be found for a tensor without elements.")
        lo, hi = rows.amin(1), rows.amax(1)  # several times faster than torch.aminmax along an axis
        if not bool((lo.isfinite() & hi.isfinite()).all()):
            raise ValueError("a range cannot be found for a tensor with NaN or infinite elements.")
        return cls(rows, None, lo, hi)

    @classmethod
    def of_histogram(cls, histogram: Histogram) -> Distribution:
        """Takes the bins of a histogram."""
        return cls(*histogram.sorted_bins(), histogram.lo, histogram.hi)

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """Returns the quantiles of each row, ``(len(q), rows)``."""
        if self.counts is None:
            return quantile(self.values, q, dim=1)
        cumulative = self.counts.cumsum(1)  # (rows, bins)
        rank = torch.tensor(q, dtype=torch.float64, device=cumulative.device) * (cumulative[:, -1:] - 1)  # (rows, q)
        below, above = (
            self.values.gather(1, torch.searchsorted(cumulative, index.long() + 1)) for index in (rank, rank.ceil())
        )
        return torch.lerp(below, above, rank.frac().to(below.dtype)).T.contiguous()


@torch.no_grad()
def search(distribution: Distribution, rule: RangeRule, quantizer: RangeQuantizer) -> tuple[Tensor, Tensor]:
    """Finds the range of each row.

    Every candidate is scored by the quantizer's own rounding, so one search serves all number formats; each row picks
    its own candidate, the widest one when several are equally good.

    Args:
        distribution: The values, one row per scale.
        rule: Which candidates are tried and what is least.
        quantizer: The format that will cover the range.

    Returns:
        Lower and upper ends, ``(rows,)`` each.

    Example:
        >>> from lightning_quant.quantizers import UniformQuantizer
        >>> values = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([9.0])])
        >>> lo, hi = search(Distribution.of(values[None]), RangeRule.parse("mse"), UniformQuantizer("int4"))
        >>> bool(hi < 9)
        True
    """
    lo, hi = _best(distribution, rule, quantizer)
    return (
        (lo, hi)
        if rule.room == 1
        else (torch.where(lo < 0, lo * rule.room, lo), torch.where(hi > 0, hi * rule.room, hi))
    )


def _best(distribution: Distribution, rule: RangeRule, quantizer: RangeQuantizer) -> tuple[Tensor, Tensor]:
    lo, hi = _candidates(distribution, rule)  # (candidates, rows)
    if rule.include_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if len(lo) == 1:
        return lo[0], hi[0]
    if rule.name == "kl":
        loss = _divergence(distribution, lo, hi, quantizer)
    else:
        loss = _power_error(distribution, lo, hi, rule.norm, quantizer)
    best = loss.argmin(0, keepdim=True)
    return lo.gather(0, best)[0], hi.gather(0, best)[0]


def _candidates(distribution: Distribution, rule: RangeRule) -> tuple[Tensor, Tensor]:
    if rule.name in ("minmax", "running"):
        return distribution.lo[None], distribution.hi[None]
    if rule.name in ("percentile", "percentile_mse"):
        high, low = distribution.quantiles([*rule.percentiles, *(1 - p for p in rule.percentiles)]).chunk(2)
        return low, high
    steps = torch.arange(rule.candidates, dtype=torch.float64, device=distribution.lo.device)
    fraction = (1 - steps * (SHRINK / rule.candidates)).float().unsqueeze(1)
    return distribution.lo * fraction, distribution.hi * fraction


def _power_error(
    distribution: Distribution, lo: Tensor, hi: Tensor, norm: float, quantizer: RangeQuantizer
) -> Tensor:  # (candidates, rows)
    state = quantizer.state_from_range(lo, hi)
    loss = torch.zeros(lo.shape, dtype=torch.float64, device=lo.device)
    for rows, columns in _tiles(distribution.values):
        values = distribution.values[rows, columns].contiguous()
        weights = None if distribution.counts is None else distribution.counts[rows, columns].float()
        for candidate in range(len(lo)):
            error = quantizer.simulate(values, *(tensor[candidate, rows, None] for tensor in state)).sub_(values)
            error = error.square_() if norm == 2 else error.abs_().pow_(norm)
            loss[candidate, rows] += (error if weights is None else error.mul_(weights)).sum(1)
    return loss


def _tiles(values: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, columns = values.shape
    height = max(1, TILE // columns)
    for top in range(0, rows, height):
        for left in range(0, columns, TILE):
            yield slice(top, top + height), slice(left, left + TILE)


def _divergence(distribution: Distribution, lo: Tensor, hi: Tensor, quantizer: RangeQuantizer) -> Tensor:
    if distribution.counts is None:
        rows = distribution.values
        distribution = Distribution.of_histogram(Histogram.of(rows, histogram_bins(len(rows))))
    assert distribution.counts is not None
    values, counts = distribution.values, distribution.counts.double()  # (rows, bins)
    state = quantizer.state_from_range(lo, hi)
    loss = torch.empty(lo.shape, dtype=torch.float64, device=lo.device)
    for candidate in range(len(lo)):
        rounded = quantizer.simulate(values, *(tensor[candidate, :, None] for tensor in state))
        # A symmetric grid reaches further than [lo, hi] on one side; values ascend, so its ends are the outer columns.
        bottom = torch.minimum(lo[candidate], rounded[:, 0]).unsqueeze(1)
        top = torch.maximum(hi[candidate], rounded[:, -1]).unsqueeze(1)
        kept = counts.masked_fill((values < bottom) | (values > top), 0)
        # The reference puts what is clipped into the outermost kept bins; the quantized histogram does not know of it.
        reference = kept.clone()
        last = values.shape[1] - 1
        first_kept = (values < bottom).sum(1, keepdim=True).clamp(max=last)
        last_kept = last - (values > top).sum(1, keepdim=True).clamp(max=last)
        reference.scatter_add_(1, first_kept, counts.masked_fill(values >= bottom, 0).sum(1, keepdim=True))
        reference.scatter_add_(1, last_kept, counts.masked_fill(values <= top, 0).sum(1, keepdim=True))
        loss[candidate] = _kl(reference, _spread(kept, rounded))
    return loss


def _spread(counts: Tensor, rounded: Tensor) -> Tensor:
    """Spreads the counts of all bins with one code evenly over those of them that are not empty."""
    step = (rounded[:, 1:] != rounded[:, :-1]).long().cumsum(1)
    code = torch.nn.functional.pad(step, (1, 0))  # (rows, bins): 0, 0, 0, 1, 1, ...
    filled = (counts > 0).double()
    total = torch.zeros_like(counts).scatter_add_(1, code, counts).gather(1, code)
    number = torch.zeros_like(counts).scatter_add_(1, code, filled).gather(1, code)
    return filled * total / number.clamp(min=1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    p = p / p.sum(1, keepdim=True).clamp(min=1)
    q = q / q.sum(1, keepdim=True).clamp(min=1)
    divergence: Tensor = torch.special.xlogy(p, p / q.clamp(min=1e-12)).sum(1)
    return divergence


def histogram_bins(rows: int) -> int:
    """Returns how many bins a histogram has: 4096 for one tensor, 1024 for each of several channels.

    Example:
        >>> histogram_bins(1), histogram_bins(192)
        (4096, 1024)
    """
    return 4096 if rows == 1 else 1024
