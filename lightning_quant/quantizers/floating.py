"""Small floating-point formats: a sign, some exponent bits, some mantissa bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.uniform import TINY

__all__ = ["FloatQuantizer", "float_grid", "float_max", "float_quantize"]

# Formats that keep their top exponent for infinity and NaN, as IEEE 754 does: fp8_e5m2, float16 and bfloat16.
IEEE = {(5, 2), (5, 10), (8, 7)}
# The widest exponent, whose top value 2^128 float32 (in which we compute) has no room for.
FLOAT32_EXPONENT = 8


def float_max(exponent: int, mantissa: int) -> float:
    """Returns the largest value of a float format.

    e5m2, e5m10 and e8m7 are the IEEE formats without infinity, as is every other format with 8 exponent bits; e4m3
    is the "fn" variant, whose all-ones code is NaN; all other formats are finite throughout.

    Args:
        exponent: Exponent bits.
        mantissa: Mantissa bits.

    Example:
        >>> float_max(4, 3), float_max(5, 2), float_max(2, 1)
        (448.0, 57344.0, 6.0)
    """
    top = (1 << exponent) - 1 - _bias(exponent)
    significand = 2 - 2.0**-mantissa
    if (exponent, mantissa) in IEEE or exponent == FLOAT32_EXPONENT:
        top -= 1
    elif (exponent, mantissa) == (4, 3):
        significand -= 2.0**-mantissa
    return significand * 2.0**top


def float_quantize(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Rounds ``x`` to the nearest value of a float format: ties to even, subnormals kept, saturating, NaN stays NaN.

    Without mantissa bits every significand is odd, and ties go away from 0. Gradients pass straight through up to the
    largest value and are 0 beyond it.

    Args:
        x: Floats, float32 or float64.
        exponent: Exponent bits.
        mantissa: Mantissa bits.

    Example:
        >>> float_quantize(torch.tensor([0.3, 2.5, -100.0]), exponent=2, mantissa=1)
        tensor([ 0.5000,  2.0000, -6.0000])
    """
    largest = float_max(exponent, mantissa)
    clamped = x.clamp(-largest, largest)
    exact = clamped.detach()
    step = _step(exact, exponent, mantissa)
    rounded = (exact / step).round_().mul_(step)
    return straight_through(clamped, rounded) if clamped.requires_grad else rounded


def float_grid(exponent: int, mantissa: int) -> Tensor:
    """Returns all values of a float format in ascending order, 0 once.

    Args:
        exponent: Exponent bits.
        mantissa: Mantissa bits.

    Example:
        >>> float_grid(2, 1)[7:]
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    """
    positive = _from_bits(torch.arange(2 ** (exponent + mantissa)), exponent, mantissa)
    positive = positive[positive <= float_max(exponent, mantissa)]
    return torch.cat([-positive.flip(0)[:-1], positive])


def _bias(exponent: int) -> int:
    return (1 << exponent - 1) - 1


def _step(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Distance between neighbours of the format around ``x``, always a power of two."""
    # Keeping only the exponent bits of x leaves the power of two below |x| (0 for subnormals, infinity for NaN).
    if x.dtype == torch.float64:
        power = (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    else:
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_(min=2.0 ** (1 - _bias(exponent))).mul_(2.0**-mantissa)


def _to_bits(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Bit patterns of float32 values that are in the format."""
    step = _step(x, exponent, mantissa)
    lowest = 1 - _bias(exponent) - mantissa  # exponent of the smallest step
    # Step 2^e has biased exponent e; steps below the normal float32 range belong to the lowest binade anyway.
    binade = torch.frexp(step).exponent - 1 - lowest
    # From the second binade on, the significand x / step counts from 2^mantissa, which carries into the exponent bits.
    magnitude = (binade << mantissa) + (x.abs() / step).to(torch.int32)
    return magnitude + (torch.signbit(x).to(torch.int32) << (exponent + mantissa))


def _from_bits(bits: Tensor, exponent: int, mantissa: int) -> Tensor:
    """float32 values of bit patterns."""
    magnitude = bits & (2 ** (exponent + mantissa) - 1)
    biased, fraction = magnitude >> mantissa, magnitude & (2**mantissa - 1)
    significand = fraction + (biased > 0) * 2**mantissa
    values = significand.double() * torch.exp2((biased.clamp(min=1) - _bias(exponent) - mantissa).double())
    return torch.where(bits >> (exponent + mantissa) == 1, -values, values).float()


class FloatQuantizer(Quantizer):
    r"""A small float format times a scale: ``fp8_e4m3``, ``fp4_e2m1``, any ``fpN_eXmY``.

    .. math:: \hat x = s \cdot \mathrm{float}(x / s), \quad s = \max(|lo|, |hi|) / m

    where :math:`m` is the largest value of the format. Codes are bit patterns, sign before exponent before mantissa.

    Args:
        scheme: An ``fpN_eXmY`` format; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.

    Example:
        >>> quantizer = FloatQuantizer("fp4_e2m1")
        >>> quantizer.freeze(torch.tensor(-6.0), torch.tensor(6.0))
        >>> quantizer(torch.tensor([0.3, 2.4, -100.0]))
        tensor([ 0.5000,  2.0000, -6.0000])
        >>> quantizer.encode(torch.tensor([0.3, 2.4, -100.0]))
        tensor([ 1,  4, 15], dtype=torch.int32)
    """

    kind: ClassVar[str] = "float"

    @property
    def exponent(self) -> int:
        """Exponent bits."""
        return self.scheme.exponent or 0

    @property
    def mantissa(self) -> int:
        """Mantissa bits."""
        return self.scheme.mantissa or 0

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor]:
        """Returns the scale that puts the larger end of the range on the largest value."""
        return ((torch.maximum(lo.abs(), hi.abs()) / float_max(self.exponent, self.mantissa)).clamp(min=TINY),)

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` in the format; see :func:`float_quantize`."""
        scale = state[0].to(x.dtype)
        return float_quantize(x * scale.reciprocal(), self.exponent, self.mantissa) * scale

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns bit patterns."""
        rounded = float_quantize(x * state[0].reciprocal(), self.exponent, self.mantissa)
        return _to_bits(rounded, self.exponent, self.mantissa)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the values of bit patterns."""
        return _from_bits(codes.to(torch.int32), self.exponent, self.mantissa) * state[0]
