"""Blocks of a trained denoiser fitted to their float twins at W4A8: 50 DDIM steps, final samples paired by seed.

Rounding to the nearest moves the mean of what such a net predicts, and that adds up over fifty steps: how far it drifts
is luck. So the baseline is asked for in more than one way, and the best of them counts.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import EDADM, DilateQuant, PostTrainingQuantization, Reconstruction, Trajectory
from lightning_quant.metrics import sqnr
from tests.models import trainer
from tests.real import diffuser

pytestmark = [pytest.mark.evidence, pytest.mark.long, pytest.mark.usefixtures("own_cores")]
SAMPLES = 64


def seeds(first, count, batch_size=16):
    return DataLoader(torch.arange(first, first + count), batch_size=batch_size)


def scores(net, callbacks):
    """SQNR in dB of the final samples of each callback, by its label."""
    exact = torch.cat(trainer().predict(diffuser(net, validation_samples=0), seeds(0, SAMPLES)))
    found = {}
    for label, callback in callbacks.items():
        module = diffuser(net, validation_samples=0)
        trainer(callback).validate(module, seeds(0, 2), verbose=False)
        drawn = torch.cat(trainer(callback).predict(module, seeds(0, SAMPLES)))
        found[label] = round(float(sqnr(drawn, exact)), 2)
    return found


def plain(**arguments):
    rows = Trajectory(32, 8, loader=seeds(1000, 32))
    return PostTrainingQuantization(
        **{"weights": "int4", "activations": "int8", "first_last": "int8", **arguments},
        calibration_samples=256,
        calibration_loader=rows,
    )


BASELINES = {
    "plain": {},
    "plain, lp": {"weights": "int4_asym", "ranges": "lp"},
    "plain, minmax": {"weights": "int4_asym", "ranges": "minmax"},
}


def test_edadm_is_nearer_than_plain_quantization(capsys):
    fit = replace(Reconstruction.parse("edadm"), iterations=60, batch_size=8)
    found = scores(
        "unet_mnist",
        {
            **{label: plain(**arguments) for label, arguments in BASELINES.items()},
            "EDA-DM": EDADM(moments=4, calibration_loader=seeds(1000, 64), reconstruct=fit),
        },
    )
    told(capsys, found)
    assert found["EDA-DM"] > max(found[label] for label in BASELINES) + 1


def test_dilatequant_is_nearer_than_plain_quantization(capsys):
    fit = replace(Reconstruction.parse("dilatequant"), iterations=60, batch_size=8)
    rows = Trajectory(32, "all", loader=seeds(1000, 32))
    found = scores(
        "ddpm_mnist",
        {
            **{label: plain(**arguments) for label, arguments in BASELINES.items()},
            "DilateQuant": DilateQuant(calibration_samples=1600, calibration_loader=rows, reconstruct=fit),
        },
    )
    told(capsys, found)
    assert found["DilateQuant"] > max(found[label] for label in BASELINES) + 1


def told(capsys, found):
    with capsys.disabled():
        print(f"\n  W4A8, SQNR of {SAMPLES} final samples: {found}")
