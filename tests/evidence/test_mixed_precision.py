"""Bits that go where they are needed: a real DeiT-Tiny, on 500 images, with 32 for calibration."""

import pytest

from lightning_quant import MixedPrecision, RepQViT
from lightning_quant.reports import model_sizes
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("own_cores")]
FLOAT = 80.4


def quantized(callback):
    """The model and its accuracy in percent."""
    model = deit_tiny()
    return model, 100 * trainer(callback).validate(model, datamodule=ImageNetData(), verbose=False)[0]["top1"]


def show(capsys, line):
    with capsys.disabled():
        print(f"\n  {line}", flush=True)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_four_bits_in_the_mean_are_two_points_above_four_bits_everywhere(capsys):
    """The stem counts too, which the uniform model has at eight bits; and the bit operations are no more."""
    _, uniform = quantized(RepQViT(weights="int4", activations="int4"))
    callback = MixedPrecision(budget="4.0bit")
    _, mixed = quantized(callback)
    costs = callback.choice.point.costs
    show(capsys, f"RepQViT W4A4 {uniform:.1f}; MixedPrecision {mixed:.1f} with {callback.choice}")
    assert costs["weight bits"] <= 4.0 + 1e-6 and costs["activation bits"] <= 4.0 + 1e-6
    macs = sum(product.macs for product in callback.choice.allocation.products)
    assert costs["BitOps"] <= 16 * macs * (1 + 1e-6)
    assert mixed >= uniform + 2.0


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_drop_of_one_point_is_kept_with_fewer_bytes_than_uniform_eight_bits(capsys):
    callback = MixedPrecision(budget="drop<=1.0", monitor="top1", trials=2)
    model, top1 = quantized(callback)
    choice, eight = callback.choice, callback.choice.allocation.uniform(8)
    tried = "; ".join(f"{bits:.2f} bits {100 * value:.1f}" for bits, value in choice.trials)
    show(capsys, f"drop<=1.0: {top1:.1f} with {choice} ({tried}); eight bits: {eight.costs['bytes'] / 1e6:.2f} MB")
    assert FLOAT - top1 <= 1.0 + 1e-6
    assert model_sizes(model).after == pytest.approx(choice.point.costs["bytes"], abs=64)
    assert model_sizes(model).after < eight.costs["bytes"]
    assert choice.point.costs["BitOps"] < eight.costs["BitOps"]
