"""Powers of 2 or of sqrt(2): fine steps near 0, coarse ones near the largest value, as softmax probabilities need."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.uniform import TINY

__all__ = ["LogQuantizer", "log_dequantize", "log_dequantize_by_parity", "log_fake_quantize", "log_quantize"]

Base: TypeAlias = Literal["2", "sqrt2"]

STEPS_PER_OCTAVE: dict[Base, int] = {"2": 1, "sqrt2": 2}


def log_fake_quantize(x: Tensor, scale: Tensor, bits: int, base: Base) -> Tensor:
    r"""Rounds ``x`` to the nearest power of the base, in the logarithm.

    .. math:: k = \mathrm{round}(-n \log_2 (x / d)), \quad
              \hat x = d \cdot 2^{-\max(k, 0) / n} \;\text{if}\; k < 2^{bits},\; \text{else}\; 0

    where :math:`d` is the scale and :math:`n` the steps per octave: 1 for base 2, 2 for base :math:`\sqrt 2`. Values
    above d become d; values too small for a code, 0 and negative values become 0. Gradients pass straight through
    between the smallest level and d and are 0 outside.

    Args:
        x: Non-negative floats.
        scale: The largest level, broadcastable against ``x``.
        bits: Number of bits of a code.
        base: ``"2"`` or ``"sqrt2"``.

    Example:
        >>> log_fake_quantize(torch.tensor([2.0, 0.45, 0.12, 0.001, 0.0]), torch.tensor(1.0), 2, "2")
        tensor([1.0000, 0.5000, 0.1250, 0.0000, 0.0000])
    """
    scale = scale.to(x.dtype)
    ratio = x * scale.reciprocal()
    if torch.is_grad_enabled() and ratio.requires_grad:
        ratio = ratio.clamp(0, 1)
        levels = _levels(ratio.detach().clone(), bits, base)
        return torch.where(levels == 0, 0, straight_through(ratio, levels)) * scale
    return _levels(ratio.clamp_(0, 1), bits, base).mul_(scale)


def _levels(ratio: Tensor, bits: int, base: Base) -> Tensor:
    """Rounds ratios in [0, 1] in place to the levels of a scale of 1."""
    steps = STEPS_PER_OCTAVE[base]
    levels = ratio.log2_().mul_(-steps).round_().mul_(-1 / steps).exp2_()
    # Half a step below the lowest code: one pass instead of a mask, and NaN is not below anything.
    return F.threshold(levels, 2 ** (-(2**bits - 0.5) / steps), 0.0, inplace=True)


def log_quantize(x: Tensor, scale: Tensor, bits: int, base: Base) -> Tensor:
    """Returns int32 codes: k from 0 (the scale) to ``2**bits - 1``, and ``2**bits`` for what becomes 0.

    Args:
        x: Non-negative floats without NaN.
        scale: The largest level, broadcastable against ``x``.
        bits: Number of bits of a code.
        base: ``"2"`` or ``"sqrt2"``.

    Example:
        >>> log_quantize(torch.tensor([2.0, 0.45, 0.12, 0.001, 0.0]), torch.tensor(1.0), 2, "2")
        tensor([0, 1, 3, 4, 4], dtype=torch.int32)
    """
    ratio = (x * scale.reciprocal()).clamp_(0, 1)
    # -log2(0) is infinite: clamped to the dead code before it becomes an integer.
    return ratio.log2_().mul_(-STEPS_PER_OCTAVE[base]).round_().clamp_(max=2**bits).to(torch.int32)


def log_dequantize(codes: Tensor, scale: Tensor, bits: int, base: Base) -> Tensor:
    r"""Returns :math:`d \cdot 2^{-q / n}`, and 0 for the dead code: the direct form.

    Args:
        codes: Codes of :func:`log_quantize`.
        scale: The largest level :math:`d`, broadcastable against ``codes``.
        bits: Number of bits of a code.
        base: ``"2"`` or ``"sqrt2"``.

    Example:
        >>> log_dequantize(torch.tensor([0, 2, 3, 4]), torch.tensor(0.5), 2, "sqrt2")
        tensor([0.5000, 0.2500, 0.1768, 0.0000])
    """
    levels = torch.exp2(codes.to(scale.dtype) * (-1 / STEPS_PER_OCTAVE[base])) * scale
    return levels.masked_fill(codes >= 2**bits, 0)


def log_dequantize_by_parity(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    r"""Returns the values of base-:math:`\sqrt 2` codes as a right shift and one of two scales.

    .. math:: \hat x = \tilde d \cdot 2^{-\lceil q / 2 \rceil}, \quad
              \tilde d = d \;\text{for even q}, \; \sqrt 2\, d \;\text{for odd q}

    This is what an integer kernel runs, and equals :func:`log_dequantize` bit for bit (as long as float32 does not
    underflow: from 8 bits on, the lowest levels are below 1e-38 of the scale).

    Args:
        codes: Base-sqrt2 codes of :func:`log_quantize`.
        scale: The largest level :math:`d`, broadcastable against ``codes``.
        bits: Number of bits of a code.

    Example:
        >>> log_dequantize_by_parity(torch.tensor([0, 2, 3, 4]), torch.tensor(0.5), 2)
        tensor([0.5000, 0.2500, 0.1768, 0.0000])
    """
    odd = codes % 2
    shift = (codes + odd) // 2
    parity_scale = scale * torch.where(odd == 1, math.sqrt(2), 1.0).to(scale.dtype)
    return (parity_scale * torch.exp2(-shift.to(scale.dtype))).masked_fill(codes >= 2**bits, 0)


class LogQuantizer(Quantizer):
    r"""Powers of 2 (``log2_N``) or of :math:`\sqrt 2` (``logsqrt2_N``) times one scale, for non-negative values.

    The scale is the largest level; of a range only the upper end counts. Code ``q`` stands for the q-th level below the
    scale, and ``2**bits``, one code more than the bits hold, for exactly 0: a kernel reserves a code or masks.

    Args:
        scheme: A ``log2_N`` or ``logsqrt2_N`` format; see :class:`Scheme`.
        axis: Not used, as there is one scale per tensor.

    Example:
        >>> quantizer = LogQuantizer("logsqrt2_4")
        >>> quantizer.fit(torch.tensor([0.0, 0.1, 0.4, 1.0]))
        >>> quantizer(torch.tensor([0.0, 0.1, 0.4, 1.0]))
        tensor([0.0000, 0.0884, 0.3536, 1.0000])
    """

    kind: ClassVar[str] = "log"

    @property
    def base(self) -> Base:
        """Base of the powers, ``"2"`` or ``"sqrt2"``."""
        return self.scheme.base or "2"

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor]:
        """Returns the upper end as the scale."""
        return (hi.clamp(min=TINY),)

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the levels; see :func:`log_fake_quantize`."""
        return log_fake_quantize(x, state[0], self.scheme.bits, self.base)

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns codes; see :func:`log_quantize`."""
        return log_quantize(x, state[0], self.scheme.bits, self.base)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns levels; see :func:`log_dequantize`."""
        return log_dequantize(codes.to(torch.int32), state[0], self.scheme.bits, self.base)
