"""What watches a table of scales: the rows of steps, or those of positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_quant.quantizers.observers import Observer
from lightning_quant.quantizers.ranges import RangeRule
from lightning_quant.quantizers.uniform import UniformQuantizer

Q = TypeVar("Q", bound=UniformQuantizer)


class TableObserver(ABC, Generic[Q]):
    """Watches an activation and freezes a table: an :class:`Observer` for each row, and the nearest for rows never met.

    Args:
        quantizer: The quantizer to set.
        rule: How the ranges are found.
        name: The layer's name, for messages.
    """

    def __init__(self, quantizer: Q, rule: RangeRule | str = "minmax", name: str = "") -> None:
        self.quantizer, self.rule, self.name = quantizer, RangeRule.parse(rule), name
        self.rows: dict[int, Observer] = {}

    @property
    @abstractmethod
    def length(self) -> int:
        """How many rows the table has."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Takes one batch into account and returns it unchanged."""

    @property
    def seen(self) -> int:
        """How many elements were seen."""
        return sum(observer.seen for observer in self.rows.values())

    def freeze(self) -> None:
        """Sets the quantizer from what was seen."""
        states = {}
        for row, observer in self.rows.items():
            observer.freeze()
            states[row] = (observer.quantizer.scale, observer.quantizer.get_buffer("zero_point"))
        if not states:
            raise ValueError(f"{self.name or 'a quantizer'} saw nothing, so it has no range.")
        nearest = [min(states, key=lambda met: (abs(met - row), met)) for row in range(self.length)]
        for place, name in enumerate(self.quantizer.state_names):
            self.quantizer._store(name, torch.stack([states[row][place] for row in nearest]))

    def state(self) -> dict[str, Any]:
        """What was seen, for other ranks."""
        return {"rows": {row: observer.state() for row, observer in self.rows.items()}}

    def merge(self, state: dict[str, Any]) -> None:
        """Takes what another rank has seen into account."""
        for row, seen in state["rows"].items():
            self.row(row).merge(seen)

    def row(self, row: int) -> Observer:
        """What watches one row."""
        if row not in self.rows:
            plain = UniformQuantizer(self.quantizer.scheme, self.quantizer.axis).to(self.quantizer.scale.device)
            self.rows[row] = Observer(plain, self.rule, self.name)
        return self.rows[row]
