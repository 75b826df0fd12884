"""What this machine's CPU has for products of integers."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from lightning_quant.kernels.int8_product import saturates

_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@functools.cache
def integer_instructions() -> str:
    """The CPU's name, its integer instructions, and whether their sums saturate, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    found = [flag for flag in _FLAGS if flag in flags]
    how = "8-bit sums saturate, so they are windowed" if saturates() else "8-bit sums are exact"
    return f"{facts.get('model name') or platform.processor() or 'CPU'}: {', '.join(found) or 'no known flags'}; {how}"
