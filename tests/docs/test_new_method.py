"""The method that the documentation writes keeps every promise that the methods of the suite keep."""

import importlib
import sys

import pytest
import torch

import lightning_quant
from lightning_quant.quantizers import UniformQuantizer
from tests.callbacks.test_lifecycle import *  # noqa: F403  (each test of a case runs here, on the case below)
from tests.callbacks.test_round_trips import *  # noqa: F403
from tests.cases import Case
from tests.docs.blocks import REPOSITORY, blocks, save_files

del test_a_run_that_is_killed_and_resumed_ends_like_an_undisturbed_one  # noqa: F821  (of methods that train)

PAGE = REPOSITORY / "docs" / "new_method.md"


@pytest.fixture
def case(tmp_path, monkeypatch):
    """The line that the page adds to the table."""
    save_files(PAGE, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    module = importlib.import_module("power_of_two")
    monkeypatch.setattr(lightning_quant, "PowerOfTwoScales", module.PowerOfTwoScales, raising=False)  # "into the suite"
    (line,) = (block.text for block in blocks(PAGE) if block.file == "tests/cases.py")
    names = {"Case": Case, "PowerOfTwoScales": module.PowerOfTwoScales}
    exec(line, names)
    (found,) = names["CASES"].values()
    yield found
    sys.modules.pop("power_of_two")


def test_every_scale_is_a_power_of_two(case):
    scales = [m.scale for m in case.quantized().modules() if isinstance(m, UniformQuantizer)]
    assert scales
    for scale in scales:
        exponent = scale.log2()
        assert torch.equal(exponent, exponent.round())
