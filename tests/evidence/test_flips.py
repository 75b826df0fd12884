"""How many images a really trained DeiT-Tiny loses by quantization that it had right, logged by the callback."""

from pathlib import Path

import pytest
import yaml

from lightning_quant import Fidelity, PostTrainingQuantization, RepQViT
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("own_cores")]
FLOAT = yaml.safe_load((Path(__file__).parents[1] / "references.yaml").read_text())["deit_tiny"]["float"]
METRICS = ("sqnr", "cosine", "agreement", "negative_flips", "relative_negative_flips", "positive_flips")


def compared(name, method, capsys):
    """Everything in percent but the SQNR."""
    run = trainer(method, Fidelity(METRICS))
    logged = run.validate(deit_tiny(), datamodule=ImageNetData(), verbose=False)[0]
    found = {"top1": 100 * logged["top1"], "sqnr": logged["fidelity/sqnr"]}
    found |= {metric: 100 * logged[f"fidelity/{metric}"] for metric in METRICS[1:]}
    with capsys.disabled():
        print(f"\n  DeiT-Tiny {name}: {', '.join(f'{key} {value:.2f}' for key, value in found.items())}", flush=True)
    assert found["top1"] == pytest.approx(FLOAT - found["negative_flips"] + found["positive_flips"], abs=1e-4)
    assert 100 - found["agreement"] >= found["negative_flips"] + found["positive_flips"] - 1e-9
    return found


def test_eight_bits_flip_little_and_four_bits_much(capsys):
    fine = compared("W8A8", PostTrainingQuantization(weights="int8", activations="int8"), capsys)
    coarse = compared("W4A4", RepQViT(weights="int4", activations="int4"), capsys)
    # Eight bits hardly change the accuracy, and yet break single images.
    assert 0 < fine["negative_flips"] < 3 and fine["sqnr"] > 12 and fine["agreement"] > 95
    assert 8 < coarse["negative_flips"] < 30 and 0 < coarse["positive_flips"] < 8
    # The damage is not random: what breaks is less than independent errors would.
    assert fine["relative_negative_flips"] < coarse["relative_negative_flips"] < 100
