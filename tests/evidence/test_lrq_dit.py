"""LRQDiT on a trained DiT with weights of four bits: 50 DDIM steps, final samples paired by seed."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import LRQDiT, PostTrainingQuantization, Trajectory
from lightning_quant.metrics import sqnr
from tests.models import trainer
from tests.real import diffuser

pytestmark = [pytest.mark.evidence, pytest.mark.long, pytest.mark.usefixtures("own_cores")]
SAMPLES = 16


def loader(first):
    """Seeds and labels."""
    return DataLoader(TensorDataset(torch.arange(first, first + SAMPLES), torch.arange(SAMPLES) % 10), batch_size=16)


def test_lrq_dit_is_nearer_than_plain_rounding_and_each_half_helps(capsys):
    moments, found = Trajectory(SAMPLES, 4, loader=loader(1000)), {}
    common = {"calibration_samples": 64, "calibration_loader": moments}
    exact = torch.cat(trainer().predict(diffuser("dit_mnist"), loader(0)))
    for name, callback in {
        "plain": PostTrainingQuantization("int4", "int8", **common),
        "plain, tokens": PostTrainingQuantization("int4", "int8_sym_token_dynamic", attention=False, **common),
        "levels alone": LRQDiT(rotation=None, smooth=None, **common),
        "rotations alone": LRQDiT("int4", **common),
        "LRQDiT": LRQDiT(**common),
    }.items():
        module = diffuser("dit_mnist", validation_samples=0)
        trainer(callback).validate(module, loader(0), verbose=False)
        found[name] = float(sqnr(torch.cat(trainer(callback).predict(module, loader(0))), exact))
    with capsys.disabled():
        print(f"\n  dit_mnist, W4A8, SQNR of {SAMPLES} final samples: {found}")
    assert found["LRQDiT"] > found["plain"] + 2
    assert found["LRQDiT"] > found["plain, tokens"] + 1.5
    assert min(found["levels alone"], found["rotations alone"]) > found["plain, tokens"] + 0.5
    assert found["LRQDiT"] > max(found["levels alone"], found["rotations alone"])
