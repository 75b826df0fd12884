"""What only the tests need; what docstring examples need too stands in the conftest.py above."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cases import CASES, METHODS, Case
from tests.real import ASSETS


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every line of the table: what holds for every method."""
    return request.param


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Case:
    """One mild line for each method that quantizes a transformer by validating it."""
    return request.param


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data. A test that asks for it is skipped only where there is no such folder."""
    if not ASSETS.is_dir():
        if "LIGHTNING_QUANT_ASSETS" in os.environ:
            pytest.fail(f"LIGHTNING_QUANT_ASSETS names {ASSETS}, which is not a folder")
        pytest.skip("needs the real models and data: ../shared/assets, or the folder LIGHTNING_QUANT_ASSETS names")
    return ASSETS
