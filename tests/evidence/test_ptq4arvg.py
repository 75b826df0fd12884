"""Digits painted pixel by pixel, in six bits: how near the logits are to the float ones, on digits held out."""

import importlib.util
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import PTQ4ARVG, PostTrainingQuantization
from lightning_quant.layers import as_float
from lightning_quant.metrics import sqnr
from tests.models import trainer

pytestmark = [pytest.mark.evidence, pytest.mark.long, pytest.mark.usefixtures("own_cores")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "autoregressive_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("painting_evidence", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_six_bits_are_nearer_with_it_than_without(example, capsys):
    """In three painters, each trained from a start of its own."""
    train, val = example.digits()
    some, held_out = DataLoader(train, batch_size=128), DataLoader(val, batch_size=99)
    without = {"gain": False, "sinks": None, "mix": None}
    ways = {
        "plain": lambda: PostTrainingQuantization("int6", "int6", calibration_samples=128, calibration_loader=some),
        "without": lambda: PTQ4ARVG("int6", "int6", calibration_loader=some, **without),
        "channels": lambda: PTQ4ARVG("int6", "int6", calibration_loader=some, sinks=None, mix=None),
        "PTQ4ARVG": lambda: PTQ4ARVG("int6", "int6", calibration_loader=some),
        'PTQ4ARVG(ranges="mse")': lambda: PTQ4ARVG("int6", "int6", ranges="mse", calibration_loader=some),
    }
    found = {name: [] for name in ways}
    for seed in range(3):
        torch.manual_seed(seed)
        model = example.Painter()
        trainer(max_epochs=4).fit(model, DataLoader(train, batch_size=50, shuffle=True))
        for name, make in ways.items():
            callback = make()
            trainer(callback).validate(model, held_out, verbose=False)
            with torch.no_grad():
                quantized = model(*val.tensors)
                with as_float(model):
                    found[name].append(float(sqnr(quantized, model(*val.tensors))))
            callback.remove(model)
    with capsys.disabled():
        for name, ratios in found.items():
            print(
                f"\n  W6A6, logits, {name}: {' '.join(f'{ratio:.2f}' for ratio in ratios)}, mean {mean(ratios):.2f} dB"
            )
    assert mean(found["PTQ4ARVG"]) > max(mean(found["without"]), mean(found["plain"]))
    assert all(with_it > without for with_it, without in zip(found["PTQ4ARVG"], found["without"], strict=True))
