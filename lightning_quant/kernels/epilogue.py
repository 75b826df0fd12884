"""What follows a sum of integers in the same pass."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.kernels.codes import Grid

_BYTE = 255


class Epilogue(NamedTuple):
    """What follows the sum of integers: a scale and a bias for every output, and a clamp or a curve.

    Args:
        scale: of every output (out,).
        bias: of every output (out,), or ``None``.
        low: the lowest answer.
        high: the highest answer.
        curve: an activation that oneDNN knows by this name, in the place of the clamp.
        dtype: of floats that are answered.
    """

    scale: Tensor
    bias: Tensor | None
    low: float = -math.inf
    high: float = math.inf
    curve: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def activated(self) -> bool:
        """Whether there is a clamp or a curve."""
        return bool(self.curve) or self.low > -math.inf or self.high < math.inf

    def reaches(self, grid: Grid) -> bool:
        """Whether one step can end on a grid's codes."""
        whole = grid.highest - grid.lowest == _BYTE
        return 0 <= grid.zero_point <= _BYTE and (whole or not self.curve)

    def clamped_to(self, grid: Grid) -> Epilogue:
        """The same with a clamp between codes of a grid, or with none where bytes end there by themselves."""
        low, high = _ends(self.low, self.high, grid)
        return self if self.curve else self._replace(low=low, high=high)

    def operation(self) -> tuple[str, list[float], str]:
        """The clamp or curve as oneDNN calls it, with its numbers and its algorithm."""
        if self.curve or not self.activated:
            name, _, algorithm = self.curve.partition(" ")
            return name or "none", [], algorithm
        if (self.low, self.high) == (0.0, math.inf):
            return "relu", [], ""
        largest = torch.finfo(torch.float32).max
        return "hardtanh", [max(self.low, -largest), min(self.high, largest)], ""

    def ending_on(self, grid: Grid | None) -> tuple[Any, ...]:
        """How oneDNN is told what to answer: floats, or codes of a grid; and the operation before that."""
        if grid is None:
            return 1.0, 0, self.dtype, *self.operation()
        return grid.scale, grid.zero_point, torch.uint8, *self.clamped_to(grid).operation()


@functools.lru_cache(maxsize=2**12)
def _ends(low: float, high: float, grid: Grid) -> tuple[float, float]:
    """What the codes of two bounds stand for: the same codes come out, and no float falls between two of them."""
    steps = (torch.tensor([low, high]) * grid.inverse).round_().clamp_(grid.lowest, grid.highest).tolist()
    if steps == [grid.lowest, grid.highest] and grid.highest - grid.lowest == _BYTE:
        return -math.inf, math.inf
    return grid.scale * steps[0], grid.scale * steps[1]
