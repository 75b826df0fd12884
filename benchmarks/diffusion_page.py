"""The part of the page of results about diffusion models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.diffusion_rows import BITS, NETS, SAMPLERS

Table = Callable[[list[str], Iterable[list[str]]], str]
MISSING = "–"


def diffusion_section(measured: dict[str, Any], table: Table) -> str:
    """One table for each net: signal to noise ratio, error of the noise, Frechet distance where there is one, parts."""
    parts = []
    for net in NETS:
        if net not in measured:
            continue
        there = {name: method for name, method in SAMPLERS.items() if net in method.nets and name in measured[net]}
        methods = [name for name, method in there.items() if method.part_of is None]
        without = [name for name, method in there.items() if method.part_of in measured[net]]
        exact = _entry(measured, net, "float", "W32A32")
        lines = [[m, *(_cell(_entry(measured, net, m, bits)) for bits in BITS)] for m in methods]
        far = [
            [m, *(_figure(_entry(measured, net, m, bits), "frechet", ".2f") for bits in BITS)]
            for m in methods
            if any("frechet" in (_entry(measured, net, m, bits) or {}) for bits in BITS)
        ]
        said = f"The float model's noise MSE is {_figure(exact, 'noise_mse', '.4f')}."
        if far:
            own = _figure(exact, "frechet", ".2f")
            said += f" Two sets of its own samples, from other seeds, have a Frechet distance of {own}."
        parts.append(f"### {net}\n\n{said}")
        parts += [table(["method", *BITS], lines)] if lines else []
        parts += [table(["Frechet distance to float samples", *BITS], far)] if far else []
        parts += [_without(measured, net, without, table)] if without else []
    return "\n\n".join(parts) if parts else "Not measured yet."


def _without(measured: dict[str, Any], net: str, names: list[str], table: Table) -> str:
    """What each part of a method does."""
    lines = []
    for name in names:
        whole, bits = SAMPLERS[name].part_of or "", SAMPLERS[name].bits[0]
        found = (_figure(_entry(measured, net, method, bits), "sqnr", ".1f") for method in (name, whole))
        lines.append([name, bits, *found])
    return table(["a method without one of its parts", "bits", "dB", "with it"], lines)


def _entry(measured: dict[str, Any], net: str, method: str, bits: str) -> dict[str, Any] | None:
    entries = measured.get(net, {}).get(method, {}).get(bits, [])
    return entries[0] if entries else None


def _cell(entry: dict[str, Any] | None) -> str:
    return MISSING if entry is None else f"{entry['sqnr']:.1f} dB, {entry['noise_mse']:.4f}"


def _figure(entry: dict[str, Any] | None, name: str, form: str) -> str:
    return MISSING if entry is None or name not in entry else format(entry[name], form)
