"""What a report is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.reports.html import Html

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One part of a report: the same facts for readers, for programs and for loggers.

    Args:
        key: its name in ``report.json``.
        title: its heading in ``report.html``; empty for none.
        facts: what ``report.json`` tells: dicts, lists, strings and numbers.
        body: the markup below the heading, made with :func:`~lightning_quant.reports.tag`, which escapes.
        scalars: what loggers get, by name; those that are None or not finite are left out.
        figure: draws what loggers get as a picture, called only if there is such a logger.

    >>> from lightning_quant.reports import tag
    >>> Section("kernels", "Kernels", {"int8": 48}, tag("p", "48 layers run on int8 kernels.")).body
    '<p>48 layers run on int8 kernels.</p>'
    """

    key: str
    title: str
    facts: Any
    body: Html
    scalars: Mapping[str, float | None] = field(default_factory=dict)
    figure: Callable[[], Figure] | None = None


@runtime_checkable
class Contributor(Protocol):
    """A callback, or the LightningModule itself, that has something to add to the report."""

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[Section]:
        """The sections, asked for at the end of the run, on rank 0 only."""


def contributed(trainer: Trainer, pl_module: LightningModule) -> list[Section]:
    """The sections that the callbacks of a run, and its module, have to add."""
    owners = [*trainer.callbacks, pl_module]  # type: ignore[attr-defined]
    return [
        section
        for owner in owners
        if isinstance(owner, Contributor)
        for section in owner.report_sections(trainer, pl_module)
    ]
