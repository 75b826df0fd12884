"""What only the tests need; what docstring examples need too stands in the conftest.py above."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.real import ASSETS


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data. A test that asks for it is skipped only where there is no such folder."""
    if not ASSETS.is_dir():
        if "LIGHTNING_QUANT_ASSETS" in os.environ:
            pytest.fail(f"LIGHTNING_QUANT_ASSETS names {ASSETS}, which is not a folder")
        pytest.skip("needs the real models and data: ../shared/assets, or the folder LIGHTNING_QUANT_ASSETS names")
    return ASSETS
