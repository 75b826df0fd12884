"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

NARROW = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def decibels(value: float | None, unit: bool = True) -> str:
    """An SQNR.

    >>> decibels(12.345, unit=False), decibels(float("inf")), decibels(None)
    ('12.3', 'exact', '–')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "exact" if value > 0 else f"{MINUS}∞"
    return f"{value:.1f}".replace("-", MINUS) + (f"{NARROW}dB" if unit else "")


def size(count: float) -> str:
    """Bytes, in powers of 1000.

    >>> size(999).replace(NARROW, " "), size(22_880_000).replace(NARROW, " ")
    ('999 B', '22.9 MB')
    """
    units = ["B", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{f'{count:.3g}' if count < 999.5 else f'{count:,.0f}'}{NARROW}{units[0]}"


def sizes(before: float, after: float) -> tuple[str, str]:
    """Two sizes, the first without its unit if it is the same one.

    >>> sizes(22_880_000, 3_280_000)[0], sizes(1_000_000, 90_000)[0].replace(NARROW, " ")
    ('22.9', '1 MB')
    """
    first, second = size(before), size(after)
    number, unit = first.split(NARROW)
    return (number if second.endswith(NARROW + unit) else first), second


def share(part: float) -> str:
    """A share as percentage, small ones not rounded to nothing.

    >>> share(0.1234).replace(NARROW, " "), share(0.00001).replace(NARROW, " "), share(0).replace(NARROW, " ")
    ('12.3 %', '< 0.01 %', '0 %')
    """
    percent = 100 * part
    if 0 < percent < 0.01:
        return f"<{NARROW}0.01{NARROW}%"
    if 99.9 <= percent < 100:
        return f">{NARROW}99.9{NARROW}%"
    return f"{percent:.3g}{NARROW}%" if percent >= 1 else f"{percent:.2g}{NARROW}%"


def figure(value: float, digits: int = 4) -> str:
    """Any number with a few digits.

    >>> figure(0.7), figure(80.4), figure(-1234567.0), figure(float("nan"))
    ('0.7000', '80.40', '−1.235e+06', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    # With the zeros at its end, so that two of them can be compared at a glance.
    written = f"{value:.{digits}g}" if value == round(value) and abs(value) >= 10 else f"{value:#.{digits}g}"
    written = "0" if value == 0 else written.removesuffix(".")
    return MINUS + written.removeprefix("-") if value < 0 else written


def change(before: float, after: float) -> str:
    """A difference with its sign.

    >>> change(0.804, 0.634), change(1.0, 1.5), change(2.0, 2.0)
    ('−0.17', '+0.50', '±0')
    """
    difference = after - before
    if difference == 0:
        return "±0"
    return figure(difference, 2) if difference < 0 or math.isnan(difference) else f"+{figure(difference, 2)}"


def plain(value: Any) -> Any:
    """The same facts with nothing in them that JSON does not know: infinity and NaN become ``"inf"`` and ``"nan"``.

    >>> plain({"sqnr": float("inf"), 3: (1, 2.0, None)})
    {'sqnr': 'inf', '3': [1, 2.0, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (int, str, bool)) or value is None else str(value)
