"""Facts and pictures to whatever loggers a Trainer has; none of them can stop the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_quant.reports.section import Section

PREFIX = "quant_report"


def log_sections(loggers: Iterable[Logger], sections: Iterable[Section], step: int) -> None:
    """Give the scalars to every logger, and the figures to those that can take one.

    A logger takes figures if its experiment has ``add_figure`` (TensorBoard) or it has ``log_image`` itself (Weights &
    Biases, as the Lightning logger has it). What goes wrong is told in a warning.

    Args:
        loggers: of the Trainer.
        sections: of the report.
        step: at which it was made.
    """
    sections = list(sections)
    scalars = {
        f"{PREFIX}/{name}": value
        for section in sections
        for name, value in section.scalars.items()
        if value is not None and math.isfinite(value)
    }
    for logger in loggers:
        try:
            if scalars:
                logger.log_metrics(scalars, step)
            _log_figures(logger, sections, step)
        except Exception as error:  # a logger of anybody's may raise anything, and the report is written by now
            rank_zero_warn(f"QuantReport: {type(logger).__name__} took not all of the report ({_told(error)})")


def _log_figures(logger: Any, sections: list[Section], step: int) -> None:
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    log_image = getattr(logger, "log_image", None)
    if not callable(add_figure) and not callable(log_image):
        return
    for section in sections:
        if section.figure is None:
            continue
        try:
            figure = section.figure()
        except ModuleNotFoundError as error:
            missing = (error.name or "a package").partition(".")[0]
            rank_zero_warn(
                f"QuantReport gives {type(logger).__name__} no pictures, because {missing} is not installed; "
                f"report.html has them all the same"
            )
            return
        if callable(add_figure):
            add_figure(f"{PREFIX}/{section.key}", figure, step)
        elif callable(log_image):
            log_image(key=f"{PREFIX}/{section.key}", images=[_pixels(figure)], step=step)


def _pixels(figure: Any) -> Any:
    """A figure as an array (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
