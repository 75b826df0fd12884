"""What reaches the terminal: the run's own words, and one line for a mistake."""

from __future__ import annotations

import dis
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

MISTAKE = 2  # exit code


def print_mistake(text: str) -> None:
    """One line on stderr."""
    print("error:", " ".join(text.split()), file=sys.stderr)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End with one line and exit code 2 where the user is told what to do; anything else keeps its traceback."""
    try:
        yield
    except Exception as error:
        told = next((cause for cause in _chain(error) if _tells_what_to_do(cause)), None)
        if told is None:
            raise
        print_mistake(str(told))
        sys.exit(MISTAKE)


@contextmanager
def quiet() -> Iterator[None]:
    """What a run logs goes to stdout, without advertisement; stderr is for what went wrong."""
    handlers = [
        handler
        for name in ("lightning.fabric", "lightning.pytorch")
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(sys.stdout)
        handler.addFilter(_no_advertisement)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own use of torch
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
            handler.removeFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in str(record.msg)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _tells_what_to_do(error: BaseException) -> bool:
    """Whether it was raised on purpose by this package, or by Lightning for a wrong setting."""
    if isinstance(error, MisconfigurationException):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("lightning_quant."):
        return False
    # A `raise` statement of ours names the cure; an operation that failed in our code is a bug and needs its trace.
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
