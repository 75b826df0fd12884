"""The progress bar of the calibration, beside Lightning's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    trainer: pl.Trainer, description: str, total: int, unit: str = "samples"
) -> Iterator[Callable[[int], None]]:
    """Show ``Calibrating  n/total samples`` while the block runs; the bar is gone afterwards.

    Nothing is shown on other ranks than the first, or where the trainer's own progress bar is switched off.

    Args:
        trainer: whose progress bar decides whether one is shown.
        description: what is going on.
        total: how much there is to do.
        unit: of what.

    Yields:
        A function that is told how much more is done.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, barebones=True)
        >>> with progress_bar(trainer, "Calibrating", total=32) as advance:
        ...     advance(8)
    """
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or bar is None or getattr(bar, "is_disabled", False):
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, transient=True)
    try:
        progress.start()
    except LiveError:  # rich before 14.1 shows one live bar at a time, and Lightning's is up
        yield lambda done: None
        return
    try:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
    finally:
        progress.stop()
