"""Two uniform grids side by side, one fine and one coarse, whose steps differ by a power of two."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.uniform import TINY

__all__ = ["TwinQuantizer", "UnsignedTwinQuantizer"]

LARGEST_EXPONENT = 8


class TwinQuantizer(Quantizer):
    r"""A fine grid below 0 and a coarse one above (``twin_N``), for what comes out of a GELU.

    .. math::
        \hat x = \begin{cases} \Delta_1 \lfloor x / \Delta_1 \rceil & x < 0 \\
                               \Delta_2 \lfloor x / \Delta_2 \rceil & x \ge 0 \end{cases}, \qquad
        \Delta_2 = 2^m \Delta_1

    where :math:`\Delta_1` is the scale and m a whole number, the exponent: a kernel brings both to one scale by a
    shift. The integers are those of two's complement, so half of the codes are on either side; with m = 0 it is the
    symmetric grid of :class:`UniformQuantizer`.

    A range sets the coarse step by its upper end, and the finest m that reaches down to its lower end.

    Args:
        scheme: A ``twin_N`` format; see :class:`Scheme`.
        axis: Not used, as there is one scale per tensor.

    Example:
        >>> quantizer = TwinQuantizer("twin_3")
        >>> quantizer.freeze(torch.tensor(-0.2), torch.tensor(3.0))
        >>> quantizer.exponent
        tensor(4.)
        >>> quantizer.decode(torch.arange(8))
        tensor([-0.2500, -0.1875, -0.1250, -0.0625,  0.0000,  1.0000,  2.0000,  3.0000])
    """

    kind: ClassVar[str] = "twin"
    state_names: ClassVar[tuple[str, ...]] = ("scale", "exponent")

    exponent: Tensor

    @property
    def levels_each(self) -> int:
        """How many codes each grid has."""
        return int(2 ** (self.scheme.bits - 1))

    @property
    def lowest(self) -> int:
        """The place of code 0 on the ruler."""
        return -self.levels_each

    @torch.no_grad()
    def align(self, coarse: Tensor, exponent: int) -> None:
        r"""Sets the coarse step and how many times the fine one goes into it, as a power of two.

        Args:
            coarse: :math:`\Delta_2`, positive.
            exponent: m, from 0 to 8.

        Raises:
            ValueError: If a number is out of range.
        """
        if not 0 <= exponent <= LARGEST_EXPONENT or not bool(coarse > 0):
            raise ValueError(f"a step is above 0, an exponent from 0 to {LARGEST_EXPONENT}, got {coarse}, {exponent}.")
        self._store("scale", (coarse.float() / 2**exponent).to(self.scale.device))
        self._store("exponent", torch.full_like(self.scale, float(exponent)))

    def to_ruler(self, steps: Tensor, exponent: Tensor) -> Tensor:
        """Where multiples of the fine step lie on the ruler, on which neighbouring codes are 1 apart."""
        return torch.where(steps < 0, steps, steps * torch.exp2(-exponent))

    def from_ruler(self, places: Tensor, exponent: Tensor) -> Tensor:
        """The inverse of :meth:`to_ruler`."""
        return torch.where(places < 0, places, places * torch.exp2(exponent))

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the fine step and the exponent."""
        coarse = (hi.clamp(min=0) / (self.levels_each - 1)).clamp(min=TINY)
        fine = (-lo).clamp(min=0) / self.levels_each
        exponent = (coarse / fine.clamp(min=TINY)).log2().floor().clamp(0, LARGEST_EXPONENT)
        # nothing but negative numbers: the fine grid is all there is
        scale = torch.where(fine > coarse, fine, coarse * torch.exp2(-exponent)).clamp(min=TINY)
        return scale, exponent

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the two grids."""
        scale, exponent = (tensor.to(x.dtype) for tensor in state)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._rounded(x, scale, exponent)
        lowest, highest = (self.from_ruler(end, exponent) * scale for end in self._ends(x))
        clipped = torch.minimum(torch.maximum(x, lowest), highest)
        return straight_through(clipped, self._rounded(x.detach(), scale, exponent))

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns the places on the ruler, counted from the lowest one."""
        scale, exponent = state
        return (self._places(x, scale, exponent) - self.lowest).to(torch.int32)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the values of codes."""
        scale, exponent = state
        return self.from_ruler(codes.to(scale.dtype) + self.lowest, exponent) * scale

    def _rounded(self, x: Tensor, scale: Tensor, exponent: Tensor) -> Tensor:
        return self.from_ruler(self._places(x, scale, exponent), exponent) * scale

    def _places(self, x: Tensor, scale: Tensor, exponent: Tensor) -> Tensor:
        lowest, highest = self._ends(x)
        return self.to_ruler(x / scale, exponent).round().clamp(lowest, highest)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ends = x.new_tensor([self.lowest, self.lowest + 2 * self.levels_each - 1])
        return ends[0], ends[1]


class UnsignedTwinQuantizer(TwinQuantizer):
    r"""A fine grid for small numbers and a coarse one for large ones (``utwin_N``), for attention probabilities.

    .. math::
        \hat x \in \{ k \Delta_1 \} \cup \{ k \Delta_2 \}, \quad 0 \le k < 2^{bits - 1}, \qquad \Delta_2 = 2^m \Delta_1

    the nearest of both, so one bit of a code tells the grid. What is below 0 becomes 0. A range sets the coarse step by
    its upper end and begins with m = bits - 1, where the grids just meet.

    Args:
        scheme: A ``utwin_N`` format; see :class:`Scheme`.
        axis: Not used, as there is one scale per tensor.

    Example:
        >>> quantizer = UnsignedTwinQuantizer("utwin_3")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(0.75))
        >>> quantizer.decode(torch.arange(8))
        tensor([0.0000, 0.0625, 0.1250, 0.1875, 0.0000, 0.2500, 0.5000, 0.7500])
        >>> quantizer(torch.tensor([0.07, 0.21, 0.23, 0.6]))
        tensor([0.0625, 0.1875, 0.2500, 0.5000])
    """

    kind: ClassVar[str] = "utwin"

    @property
    def lowest(self) -> int:
        """The place of code 0 on the ruler."""
        return 0

    def to_ruler(self, steps: Tensor, exponent: Tensor) -> Tensor:
        """The places of the fine grid, then those of the coarse one; a number between them belongs to the nearer."""
        coarse = steps * torch.exp2(-exponent)
        ends = (torch.full_like(coarse, self.levels_each - 1.0), (coarse.round() * torch.exp2(exponent)))
        fine_is_nearer = (steps <= ends[0]) | (steps - ends[0] <= (steps - ends[1]).abs())
        return torch.where(
            fine_is_nearer, steps.clamp(max=self.levels_each - 0.51), coarse.clamp(min=0.51) + self.levels_each
        )

    def from_ruler(self, places: Tensor, exponent: Tensor) -> Tensor:
        """The inverse of :meth:`to_ruler`."""
        return torch.where(places < self.levels_each, places, (places - self.levels_each) * torch.exp2(exponent))

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the fine step and the exponent."""
        exponent = torch.full_like(hi, float(self.scheme.bits - 1))
        coarse = (hi / (self.levels_each - 1)).clamp(min=TINY)
        return coarse * torch.exp2(-exponent), exponent
