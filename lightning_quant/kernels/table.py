"""What runs on which kernel, as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Column, Table


@dataclass(frozen=True)
class KernelRow:
    """One layer.

    Args:
        layer: its name.
        kernel: what computes it.
        formats: of its weights and inputs.
        why_not: why it does not run on a low-bit kernel; empty if it does.
    """

    layer: str
    kernel: str
    formats: str
    why_not: str = ""


@dataclass(frozen=True)
class KernelTable:
    """What runs on which kernel; print it for a table.

    Args:
        rows: one for every quantized layer and attention site.
        cpu: what the processor has for integers, or which GPU it is, in words.

    >>> row = KernelRow("head", "int8 (oneDNN)", "int8_sym_channel x int8_asym_tensor")
    >>> print(KernelTable([row]).summary())
    1 layer on int8 (oneDNN)
    """

    rows: list[KernelRow]
    cpu: str = ""

    @property
    def simulated(self) -> list[KernelRow]:
        """The layers without a low-bit kernel."""
        return [row for row in self.rows if row.why_not]

    def with_others(self, found: Mapping[str, tuple[str, str]]) -> KernelTable:
        """The same with other kernels for some layers, each with why it is not a low-bit one."""
        rows = [
            replace(row, kernel=found[row.layer][0], why_not=found[row.layer][1]) if row.layer in found else row
            for row in self.rows
        ]
        return KernelTable(rows, self.cpu)

    def summary(self) -> str:
        """How many layers run on which kernel, and why not all on a low-bit one; a few lines."""
        counts = Counter(row.kernel for row in self.rows)
        lines = [", ".join(f"{n} {'layers' if n > 1 else 'layer'} on {kernel}" for kernel, n in counts.most_common())]
        reasons: dict[str, list[str]] = {}
        for row in self.simulated:
            reasons.setdefault(row.why_not, []).append(row.layer)
        for why, layers in reasons.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            lines.append(f"  `{layers[0]}`{more}: {why}")
        return "\n".join(lines)

    def table(self) -> Table:
        """A rich table: one line a layer."""
        table = Table(Column("layer", no_wrap=True), "kernel", "weights x inputs", "why not a low-bit one")
        for row in self.rows:
            table.add_row(row.layer, row.kernel, row.formats, row.why_not)
        table.caption = self.cpu
        return table

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()
