"""From floats to the bytes of a quantizer whose scale is known before, in few passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.quantizers import UniformQuantizer

CENTRE = 128  # of the codes of 8 bits


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

    def unsigned(self, x: Tensor) -> Tensor:
        """uint8 codes: n counted from the lowest one."""
        steps = torch.mul(x.float(), self.inverse).round_().add_(self.zero_point)
        return to_uint8(steps.clamp_(0, self.highest - self.lowest))

    def signed(self, x: Tensor) -> Tensor:
        """int8 codes: n with the offset added."""
        return self._steps(torch.mul(x.float(), self.inverse)).to(torch.int8)

    def signed_(self, x: Tensor, out: Tensor) -> Tensor:
        """The same of a float32 tensor that nobody needs any more, into an int8 tensor."""
        return out.copy_(self._steps(x.mul_(self.inverse)))

    def _steps(self, steps: Tensor) -> Tensor:
        offset = self.offset
        steps = steps.round_().add_(offset) if offset else steps.round_()
        return steps.clamp_(self.lowest + offset, self.highest + offset)


def to_uint8(steps: Tensor) -> Tensor:
    """Whole floats from 0 to 255, which nobody needs any more, as bytes; torch makes int8 several times faster."""
    return steps.sub_(CENTRE).to(torch.int8).view(torch.uint8).add_(CENTRE)
