"""The part of the page of results about language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.language_rows import BITS, FORMATS, LANGUAGE, PATTERNS, PRUNING

Cell = Callable[..., str]
Table = Callable[[list[str], Iterable[list[str]]], str]


def language_section(measured: dict[str, Any], cell: Cell, table: Table) -> str:
    """Two tables for each model: rounding and pruning, and what they took."""
    parts = []
    for model in FORMATS:
        if model not in measured:
            continue
        columns = BITS[model]
        first = _column(columns[0])
        rounding = table(
            ["method", *(_column(bits) for bits in columns), f"{first}, seconds", f"{first}, peak"],
            (
                [m, *(cell(model, m, bits) for bits in columns), *_cost(measured, model, m, columns[0])]
                for m in LANGUAGE
            ),
        )
        pruning = table(
            ["method", *PATTERNS, "2:4, seconds", "2:4, peak"],
            ([m, *(cell(model, m, p) for p in PATTERNS), *_cost(measured, model, m, "2:4")] for m in PRUNING),
        )
        parts.append(f"### {model}\n\nThe float model has {cell(model, 'float', 'W32A32')}.\n\n{rounding}\n\n{pruning}")
    return "\n\n".join(parts) if parts else "Not measured yet."


def _column(bits: str) -> str:
    """``W4`` where activations are float."""
    return bits.removesuffix("A32")


def _cost(measured: dict[str, Any], model: str, method: str, bits: str) -> list[str]:
    """Seconds of one core that quantizing took, and the most memory that the process had."""
    entries = measured.get(model, {}).get(method, {}).get(bits, [])
    if not entries:
        return ["–", "–"]
    seconds, peak = entries[0]["core_seconds"], entries[0].get("peak_mb")
    return ["resumed" if seconds is None else f"{seconds} s", "–" if peak is None else f"{peak} MB"]
