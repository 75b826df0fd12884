"""Logarithmic levels on either side of 0, as the bell with long tails that weights of transformers form asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.ranges import RangeRule
from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.uniform import TINY

__all__ = ["TwinLogQuantizer", "one_sided_steps"]

OFFSETS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)


def one_sided_steps(
    magnitudes: Tensor, counts: Tensor, offset: float, percentile: float, last: int
) -> tuple[Tensor, Tensor]:
    r"""The step and the lowest level of a logarithmic grid for the numbers of one sign in each row.

    .. math::
        L = \log_2(|w| + \eta), \qquad \delta = \frac{Q_p(L) - \min L}{n}, \qquad z = \lfloor \min L / \delta \rceil

    where :math:`Q_p` is the p-quantile, with linear interpolation.

    Args:
        magnitudes: :math:`|w|` of the own sign in ascending order, and anything behind them (rows, columns).
        counts: how many of each row are its own (rows,).
        offset: :math:`\eta`.
        percentile: p.
        last: n, the number of steps.

    Returns:
        :math:`\delta` and :math:`z` of each row; 1 and 0 for a row without a number.

    >>> weights = torch.tensor([[0.125, 0.25, 0.5, 1.0, 9.0]])
    >>> one_sided_steps(weights, torch.tensor([4]), offset=0.0, percentile=1.0, last=3)
    (tensor([1.]), tensor([-3.]))
    """
    last_own = (counts - 1).clamp(min=0)
    place = percentile * last_own.double()
    below = place.floor().long()
    ends = torch.stack([torch.zeros_like(below), below, torch.minimum(below + 1, last_own)], dim=1)
    low, first, second = (magnitudes.gather(1, ends).double() + offset).clamp(min=TINY).log2().unbind(1)
    high = torch.lerp(first, second, place - below)
    step = (high - low) / last
    # all equal: any step of which the level is a multiple
    step = torch.where(step > 1e-6, step, torch.where(low.abs() > 1e-6, low.abs(), torch.ones_like(low)))
    step = torch.where(counts > 0, step, torch.ones_like(step))
    lowest = torch.where(counts > 0, (low / step).round(), torch.zeros_like(low))
    return step.to(magnitudes.dtype), lowest.to(magnitudes.dtype)


class TwinLogQuantizer(Quantizer):
    r"""TLQ, levels whose logarithms are evenly spaced, above 0 and below (``twinlog_N``), for weights.

    .. math::
        q = \text{clamp}(\lfloor \log_2(|w| + \eta) / \delta \rceil - z, \, 0, \, n), \qquad
        \hat w = \text{sign}(w) \max(2^{(q + z) \delta} - \eta, \, 0), \qquad n = 2^{bits - 1} - 1

    One bit of a code tells the sign, and each sign has a step :math:`\delta` and a lowest level :math:`z` of its own,
    in every row. The offset :math:`\eta`, one for the tensor, makes the levels near 0 as even as one likes. There is
    no code for 0 itself, which becomes the lowest level above it; where :math:`\eta` is not 0 that is nearly 0. Where a
    row has no number of one sign, that sign has the levels of the other.

    :meth:`fit` tries every offset with every pair of percentiles, and keeps what has the least squared error in the
    whole tensor, whatever the rule; the ranges are those of the numbers of one sign alone. A range alone, by
    :meth:`freeze`, sets levels one octave apart below its two ends. A product with integers is not to be had: a kernel
    looks the levels up.

    Reference: TLQ of *LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion Transformers* (2025). Its code has
    one level more below 0 than the bits can tell, and counts zeros in the place of the other sign when it finds ranges.

    Args:
        scheme: A ``twinlog_N`` format; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.

    Example:
        >>> quantizer = TwinLogQuantizer("twinlog_3")
        >>> quantizer.freeze(torch.tensor(-1.0), torch.tensor(4.0))
        >>> quantizer.decode(torch.arange(8))
        tensor([-1.0000, -0.5000, -0.2500, -0.1250,  0.5000,  1.0000,  2.0000,  4.0000])
        >>> quantizer(torch.tensor([-0.9, -0.2, 0.8, 3.0]))
        tensor([-1.0000, -0.2500,  1.0000,  4.0000])
    """

    kind: ClassVar[str] = "twinlog"
    state_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "negative_scale", "negative_zero_point", "offset")

    zero_point: Tensor
    negative_scale: Tensor
    negative_zero_point: Tensor
    offset: Tensor

    def __init__(self, scheme: Scheme | str, axis: int | None = None) -> None:
        super().__init__(scheme, axis)
        if self.scheme.dynamic:
            raise ValueError(f'"{self.scheme}" finds its levels by a search, so it cannot be dynamic.')

    @property
    def last(self) -> int:
        """The number of steps on either side of 0."""
        return int(2 ** (self.scheme.bits - 1) - 1)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        rule: RangeRule | str = "mse",
        offsets: Sequence[float] = OFFSETS,
        percentiles: Sequence[float] = PERCENTILES,
    ) -> None:
        """Searches the offset and the percentiles of least squared error.

        Args:
            x: A weight.
            rule: Not used.
            offsets: Candidates of the offset.
            percentiles: Candidates of the upper end, tried for each sign.

        Raises:
            ValueError: If ``x`` is empty or holds NaN or infinity.
        """
        x = x.detach().float()
        if x.numel() == 0 or not bool(x.isfinite().all()):
            raise ValueError(f'"{self.scheme}" takes finite numbers, got {tuple(x.shape)} with NaN, infinity or none.')
        rows = self.rows(x)
        sides = [_Side(rows, sign, self.last) for sign in (1, -1)]
        found = min(
            (
                (sum(error for error, _, _ in best), offset, best)
                for offset in offsets
                for best in [[side.best(offset, percentiles) for side in sides]]
            ),
            key=lambda tried: tried[0],
        )
        _, offset, ((_, up, low), (_, negative_up, negative_low)) = found
        has = [side.counts > 0 for side in sides]
        up, low = (a.where(has[0], b) for a, b in ((up, negative_up), (low, negative_low)))
        negative_up, negative_low = (a.where(has[1], b) for a, b in ((negative_up, up), (negative_low, low)))
        shape = self._state_shape(self._view(x))
        self.codes = None
        for name, value in zip(self.state_names[:-1], (up, low, negative_up, negative_low), strict=True):
            self._store(name, value.reshape(shape).to(self.scale.device))
        self._store("offset", torch.tensor(offset, dtype=torch.float32, device=self.scale.device))

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]:
        """Returns steps of one octave below both ends, and no offset."""
        reach = torch.maximum(hi, -lo).clamp(min=TINY)
        above, below = (torch.where(end > 0, end, reach).log2().round() - self.last for end in (hi, -lo))
        return torch.ones_like(hi), above, torch.ones_like(hi), below, torch.zeros_like(hi)

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the levels."""
        own = tuple(tensor.to(x.dtype) for tensor in state)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.from_ruler(self._places(x, *own), *own)
        half = torch.full_like(x.detach(), self.last + 0.5)
        highest, lowest = self.from_ruler(half, *own), self.from_ruler(-half, *own)
        clipped = torch.minimum(torch.maximum(x, lowest), highest)
        return straight_through(clipped, self.from_ruler(self._places(x.detach(), *own), *own))

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns codes from 0, the lowest level below 0, to ``2**bits - 1``, the highest above it."""
        return (self._places(x, *state) + self.last + 0.5).to(torch.int32)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the levels of codes."""
        return self.from_ruler(codes.to(state[0].dtype) - self.last - 0.5, *state)

    def to_ruler(self, x: Tensor, *state: Tensor) -> Tensor:
        """Where ``x`` lies on a ruler on which neighbouring levels are 1 apart, with 0 in the middle of two."""
        negative = x.signbit()  # a level that the offset makes -0 stays below
        scale, zero_point, offset = self._of_sign(negative, *state)
        places = ((x.abs() + offset).clamp(min=TINY).log2() / scale - zero_point + 0.5).clamp(min=0)
        return torch.where(negative, -places, places)

    def from_ruler(self, places: Tensor, *state: Tensor) -> Tensor:
        """The inverse of :meth:`to_ruler`, for places of levels."""
        negative = places.signbit()
        scale, zero_point, offset = self._of_sign(negative, *state)
        magnitude = (torch.exp2((places.abs() - 0.5 + zero_point) * scale) - offset).clamp(min=0)
        return torch.where(negative, -magnitude, magnitude)

    def _places(self, x: Tensor, *state: Tensor) -> Tensor:
        places = self.to_ruler(x, *state)
        magnitude = (places.abs() - 0.5).round().clamp(0, self.last) + 0.5
        return torch.where(x.signbit(), -magnitude, magnitude)

    @staticmethod
    def _of_sign(negative: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero_point, negative_scale, negative_zero_point, offset = state
        return (
            torch.where(negative, negative_scale, scale),
            torch.where(negative, negative_zero_point, zero_point),
            offset,
        )


class _Side:
    """The numbers of one sign in every row, sorted by magnitude."""

    def __init__(self, rows: Tensor, sign: int, last: int) -> None:
        magnitudes = torch.where(rows * sign > 0, rows.abs(), torch.inf).sort(dim=1).values
        self.counts = magnitudes.isfinite().sum(dim=1)
        self.magnitudes = magnitudes[:, : max(1, int(self.counts.max()))]
        self.own = self.magnitudes.isfinite()
        self.magnitudes = self.magnitudes.where(self.own, 1.0)
        self.last = last

    def best(self, offset: float, percentiles: Sequence[float]) -> tuple[float, Tensor, Tensor]:
        """The least squared error over all rows with this offset, and the steps and lowest levels that make it."""
        logarithms = (self.magnitudes + offset).clamp(min=TINY).log2()
        tried = []
        for percentile in percentiles:
            step, low = one_sided_steps(self.magnitudes, self.counts, offset, percentile, self.last)
            codes = (logarithms / step[:, None] - low[:, None]).round_().clamp_(0, self.last)
            levels = codes.add_(low[:, None]).mul_(step[:, None]).exp2_().sub_(offset).clamp_(min=0)
            error = levels.sub_(self.magnitudes).square_().mul_(self.own).sum(dtype=torch.float64)
            tried.append((float(error), step, low))
        return min(tried, key=lambda one: one[0])
