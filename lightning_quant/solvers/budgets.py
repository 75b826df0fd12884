"""What mixed precision may cost, as people write it: ``"4.0bit"``, ``"6MB"``, ``"20GBitOps"``, ``"drop<=0.5"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Budget"]

EXAMPLES = '"4.0bit", "6MB", "20GBitOps", "8ms", "drop<=0.5", "drop<=1%"'
_AMOUNT = re.compile(r"([\d.]+)\s*(bits?|[kMG]?B|[kMGT]?BitOps|ms)", re.IGNORECASE)
_DROP = re.compile(r"drop\s*<=\s*([\d.]+)\s*(%?)")
PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Budget:
    """A limit.

    Args:
        kind: ``"bits"``, ``"bytes"``, ``"BitOps"``, ``"milliseconds"``, ``"drop"`` (in points) or ``"relative drop"``.
        amount: the most there may be.
        text: as it was written.
    """

    kind: str
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads a budget.

        Raises:
            ValueError: if the text is none.

        >>> Budget.parse("6MB")
        Budget(kind='bytes', amount=6000000.0, text='6MB')
        >>> Budget.parse("drop<=1%").kind
        'relative drop'
        """
        try:
            if match := _DROP.fullmatch(text.strip()):
                return cls("relative drop" if match[2] else "drop", float(match[1]), text)
            if match := _AMOUNT.fullmatch(text.strip()):
                amount, unit = float(match[1]), match[2].lower()
                if unit.startswith("bit") and not unit.endswith("ops"):
                    return cls("bits", amount, text)
                if unit == "ms":
                    return cls("milliseconds", amount, text)
                kind = "BitOps" if unit.endswith("bitops") else "bytes"
                prefix = unit.removesuffix("bitops" if kind == "BitOps" else "b")
                return cls(kind, amount * PREFIXES[prefix], text)
        except ValueError:  # 1.2.3
            pass
        raise ValueError(f"budget={text!r} is none that is known; valid examples: {EXAMPLES}")

    @property
    def is_measured(self) -> bool:
        """Whether only running the quantized model tells if it is met."""
        return self.kind.endswith("drop")

    def allowed(self, exact: float, mode: str) -> float:
        """The value of a metric that is just good enough.

        A point is one hundredth of a metric that is a share, from 0 to 1, and one unit of any other.

        Args:
            exact: the value of the float model.
            mode: ``"max"`` if larger values are better, ``"min"`` if smaller ones are.

        >>> round(Budget.parse("drop<=1.0").allowed(0.804, "max"), 3), Budget.parse("drop<=1.0").allowed(80.4, "max")
        (0.794, 79.4)
        """
        if self.kind == "relative drop":
            drop = abs(exact) * self.amount / 100
        else:
            drop = self.amount / 100 if 0 <= exact <= 1 else self.amount
        return exact - drop if mode == "max" else exact + drop
