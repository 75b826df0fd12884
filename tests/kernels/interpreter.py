"""Triton's interpreter, which runs kernels on tensors of the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interpreted(*names: str) -> Iterator[list[ModuleType]]:
    """Modules of kernels, imported with a Triton of their own: it looks for its interpreter when it decorates them."""
    pytest.importorskip("triton")

    def loaded() -> list[str]:  # compiled parts can be loaded only once
        return [name for name in sys.modules if "_C" not in name and (name.split(".")[0] == "triton" or name in names)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in loaded():
            patch.delitem(sys.modules, name)
        yield [importlib.import_module(name) for name in names]
        for name in loaded():
            del sys.modules[name]
    for name in names:  # the next one who imports it gets a compiled one
        package, _, module = name.rpartition(".")
        vars(sys.modules[package]).pop(module, None)
