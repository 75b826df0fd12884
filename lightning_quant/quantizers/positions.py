"""A uniform grid with a scale for every position of a sequence, or for each of its first few and one for the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.tables import TableObserver
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["PositionObserver", "PositionQuantizer", "Positions"]


class Positions:
    """Where in its sequence a network is called: how many tokens it has seen before, as those in a cache.

    One such object serves all quantizers of a network. Someone who sees how the network is called sets it.

    Attributes:
        start: the position of the first token of the present call.
    """

    def __init__(self) -> None:
        self.start = 0


class PositionQuantizer(UniformQuantizer):
    r"""Integers times a static scale that depends on the position of the token.

    .. math:: \hat x_p = Q(x_p; \; s_{g(p)}, z_{g(p)})

    where :math:`Q` is the :class:`UniformQuantizer`, p the position, and g its row in the table. Tokens are along the
    last axis but one. In a call that goes on behind a cache the first token has the position that :class:`Positions`
    says, so a sequence that is fed token by token has the same values as one that is fed at once.

    Args:
        scheme: A static ``intN`` or ``uintN`` format per tensor; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.
        positions: Where the sequence is.
        rows: How many rows the table has.
        open_ended: Whether the last row serves all positions behind it, too; they are refused otherwise.

    Raises:
        ValueError: If the format is dynamic, or not per tensor.

    Example:
        >>> positions = Positions()
        >>> quantizer = PositionQuantizer("uint4_asym", -1, positions, rows=2)
        >>> quantizer.freeze_rows(torch.tensor([0.0, 0.0]), torch.tensor([15.0, 1.5]))
        >>> quantizer(torch.full((1, 3, 1), 0.36)).flatten()
        tensor([0.0000, 0.4000, 0.4000])
        >>> positions.start = 2
        >>> quantizer(torch.full((1, 1, 1), 0.36)).flatten()
        tensor([0.4000])
    """

    state_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    def __init__(
        self, scheme: Scheme | str, axis: int | None, positions: Positions, rows: int, open_ended: bool = True
    ) -> None:
        super().__init__(scheme, axis)
        if self.scheme.dynamic or self.scheme.granularity != "tensor":
            raise ValueError(
                f'"{self.scheme}" has no scale that could depend on the position: it needs a static format per tensor.'
            )
        self.positions, self.rows_of_table, self.open_ended = positions, rows, open_ended

    @torch.no_grad()
    def freeze_rows(self, lo: Tensor, hi: Tensor) -> None:
        """Sets the table from known ranges.

        Args:
            lo: Lower ends, (rows,).
            hi: Upper ends, in the same shape.
        """
        for name, value in zip(self.state_names, self.state_from_range(lo, hi), strict=True):
            self._store(name, value.to(self.scale.device))

    def freeze(self, lo: Tensor, hi: Tensor) -> None:
        """Sets every row from one range."""
        super().freeze(lo, hi)
        for name in self.state_names:
            self._store(name, getattr(self, name).expand(self.rows_of_table).clone())

    def row_of(self, x: Tensor) -> Tensor:
        """The row of each token of ``x``, (tokens,).

        Raises:
            ValueError: If there is none, since the table ends before.
        """
        first = self.positions.start
        last = first + (x.shape[-2] if x.dim() > 1 else 1)
        if last > self.rows_of_table and not self.open_ended:
            raise ValueError(
                f"this model has scales for {self.rows_of_table} positions of a sequence, and is asked for position "
                f"{last - 1}: calibrate it with sequences as long, after remove(model) of the callback"
            )
        return torch.arange(first, last, device=x.device).clamp(max=self.rows_of_table - 1)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The rows of the tokens' positions, in the shape that broadcasts against ``view``."""
        rows = self.row_of(view)
        return tuple(getattr(self, name)[rows].unsqueeze(-1) for name in self.state_names)


class PositionObserver(TableObserver[PositionQuantizer]):
    """Watches an activation and freezes the table of a :class:`PositionQuantizer`; see :class:`TableObserver`."""

    @property
    def length(self) -> int:
        """How many rows the table has."""
        return self.quantizer.rows_of_table

    def __call__(self, x: Tensor) -> Tensor:
        """Takes one batch into account and returns it unchanged."""
        rows = self.quantizer.row_of(x)
        for row in rows.unique().tolist():
            self.row(row)(x[..., rows == row, :])
        return x
