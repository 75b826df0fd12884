"""From floats to the bytes of a quantizer whose scale is known before, in few passes."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.quantizers import UniformQuantizer

CENTRE = 128  # of the codes of 8 bits
PIECE = 2**18  # floats that are worked on at a time: they stay in the processor's cache


class Grid(NamedTuple):
    r"""A plain integer grid with one scale: :math:`s \cdot n` for all integers n from the lowest to the highest.

    Codes are those of the quantizer, bit for bit.

    Args:
        scale: s.
        inverse: its reciprocal in float32, by which the quantizer multiplies.
        lowest: the lowest n.
        highest: the highest n.

    >>> from lightning_quant.quantizers import UniformQuantizer
    >>> quantizer = UniformQuantizer("int8_asym_tensor")
    >>> quantizer.freeze(torch.tensor(-27.0), torch.tensor(228.0))
    >>> grid = Grid.of(quantizer)
    >>> grid.unsigned(torch.tensor([-30.0, 1.2, 300.0]))
    tensor([  0,  28, 255], dtype=torch.uint8)
    >>> grid.signed(torch.tensor([-30.0, 1.2, 300.0])).int() - grid.offset
    tensor([-27,   1, 228], dtype=torch.int32)
    """

    scale: float
    inverse: float
    lowest: int
    highest: int

    @classmethod
    def of(cls, quantizer: UniformQuantizer) -> Grid:
        """The grid of a quantizer with one scale and a whole zero point."""
        zero_point, scheme = int(quantizer.zero_point), quantizer.scheme
        inverse = float(quantizer.scale.reciprocal())
        return cls(float(quantizer.scale), inverse, scheme.qmin - zero_point, scheme.qmax - zero_point)

    @property
    def offset(self) -> int:
        """What is added to n so that it fits into int8."""
        fits = self.lowest >= -CENTRE and self.highest < CENTRE
        return 0 if fits else -self.lowest - CENTRE

    @property
    def zero_point(self) -> int:
        """The unsigned code of 0."""
        return -self.lowest

    def unsigned(self, x: Tensor, exact: bool = True) -> Tensor:
        """uint8 codes: n counted from the lowest one.

        Args:
            x: floats.
            exact: ``False`` takes the fastest way, which may round what lies in the middle between two codes the other
                way; for models whose floats are rounded to bfloat16 anyhow.
        """
        if not exact and 0 <= self.zero_point <= 2 * CENTRE - 1 and rounds_at_once():
            return self._at_once(x.detach())
        return self._bytes(x, self.zero_point - CENTRE).view(torch.uint8).add_(CENTRE)

    def signed(self, x: Tensor) -> Tensor:
        """int8 codes: n with the offset added."""
        return self._bytes(x, self.offset)

    def signed_(self, x: Tensor, out: Tensor) -> Tensor:
        """The same of a float32 tensor into an int8 tensor; the first one is left with whole numbers."""
        return out.copy_(self._round_(x.mul_(self.inverse), self.offset))

    def _bytes(self, x: Tensor, offset: int) -> Tensor:
        """int8 tensors are made, as torch converts to uint8 several times slower, and large ones piece by piece."""
        x = x.detach()
        if torch.compiler.is_compiling() or x.numel() < 2 * PIECE or not x.is_contiguous():
            return self._round_(torch.mul(x.float(), self.inverse), offset).to(torch.int8)
        out, work = torch.empty(x.shape, dtype=torch.int8), torch.empty(PIECE)
        for piece, codes in zip(x.view(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
            steps = torch.mul(piece.float(), self.inverse, out=work[: len(piece)])
            codes.copy_(self._round_(steps, offset))
        return out

    def _at_once(self, x: Tensor) -> Tensor:
        if x.numel() < 2 * PIECE or not x.is_contiguous() or x.dtype == torch.float32:
            codes = _rounded_at_once(x.float(), self.scale, self.zero_point)
        else:
            codes = torch.empty(x.shape, dtype=torch.uint8)
            for piece, part in zip(x.view(-1).split(PIECE), codes.view(-1).split(PIECE), strict=True):
                part.copy_(_rounded_at_once(piece.float(), self.scale, self.zero_point))
        levels = self.highest - self.lowest
        return codes if levels == 2 * CENTRE - 1 else codes.clamp_(max=levels)

    def _round_(self, steps: Tensor, offset: int) -> Tensor:
        steps = steps.round_().add_(offset) if offset else steps.round_()
        return steps.clamp_(self.lowest + offset, self.highest + offset)


def to_uint8(steps: Tensor) -> Tensor:
    """Whole floats from 0 to 255, which nobody needs any more, as bytes."""
    return steps.sub_(CENTRE).to(torch.int8).view(torch.uint8).add_(CENTRE)


def rounds_at_once() -> bool:
    """Whether torch still has an operator that makes bytes of floats in one pass; not inside a compiled graph."""
    return not torch.compiler.is_compiling() and _has_operator()


@functools.cache
def _has_operator() -> bool:
    """It belongs to the quantized tensors that torch will remove some day, of which it warns once."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _rounded_at_once(torch.tensor([-1.0, 0.26, 9.0]), 0.5, 3).tolist() == [1, 4, 21]


def _rounded_at_once(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """It adds the zero point before it rounds, so that near ties may fall on the other side."""
    quantized = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    codes = torch.empty(0, dtype=torch.uint8)  # int_repr() would copy them
    return codes.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
