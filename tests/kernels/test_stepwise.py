"""Integer kernels whose input scale depends on the step: the answers of the simulated layers, packed once."""

import pickle

import pytest
import torch
from torch import nn

from lightning_quant import CacheQuant, KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.int8_product import saturates
from lightning_quant.kernels.layer_door import give_back, run_on
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Scheme, StepQuantizer, Steps
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import trainer

pytestmark = pytest.mark.skipif(saturates(), reason="sums saturate on this CPU")
SHAPES = {
    "linear": (lambda: nn.Linear(12, 8), (3, 5, 12)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (3, 4, 9, 9)),
    "pixels": (lambda: nn.Conv2d(4, 8, 1), (3, 4, 5, 5)),
    "patches": (lambda: nn.Conv2d(4, 8, 2, stride=2), (3, 4, 6, 6)),
}


def stepwise(make, weights="int8_sym_channel"):
    """A layer whose input has a grid for each of three steps, and the trajectory."""
    torch.manual_seed(0)
    steps = Steps([900, 500, 100])
    layer = quantize_layer(make(), Scheme.parse(weights), Scheme.parse("uint8_asym"))
    layer.weight_quantizer.fit(layer.weight_rows())
    layer.input_quantizer = StepQuantizer("uint8_asym", None, steps)
    layer.input_quantizer.freeze_rows(torch.tensor([-2.0, 0.0, -0.1]), torch.tensor([2.0, 0.5, 3.0]))
    return layer.eval(), steps


@pytest.mark.parametrize("weights", ["int8_sym_channel", "int4_sym_channel", "int8_asym_channel"])
@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_each_step_is_what_the_layer_simulates(make, shape, weights):
    layer, steps = stepwise(make, weights)
    spec = LayerSpec.of(layer)
    chosen = choose(spec)
    if weights == "int8_asym_channel" and chosen.why_not:  # convolutions take symmetric weights
        assert len(shape) == 4 and "not symmetric" in chosen.why_not
        return
    assert "by step" in chosen.kernel.name
    kernel, x = chosen.kernel.of(layer), torch.randn(shape)
    for again in (kernel, pickle.loads(pickle.dumps(kernel))):
        for row in (1, 0, 2, 1):
            steps.stand_at([row])
            simulated = layer(x)
            run_on(layer, again)
            found = layer(x) + 0
            give_back(layer)
            torch.testing.assert_close(found, simulated, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_are_packed_once():
    layer, steps = stepwise(SHAPES["linear"][0])
    kernel = choose(LayerSpec.of(layer)).kernel.of(layer)
    run_on(layer, kernel)
    for row in range(3):
        steps.stand_at([row])
        layer(torch.randn(2, 12))
    assert len(kernel._rows) == 3
    assert all(found.product.packed is kernel.first.product.packed for found in kernel._rows.values())
    assert len({found.product.zero_point for found in kernel._rows.values()}) == 3


@torch.no_grad()
def test_samples_at_different_steps_are_simulated():
    layer, steps = stepwise(SHAPES["conv"][0])
    x = torch.randn(SHAPES["conv"][1])
    steps.stand_at([0, 2, 1])
    simulated = layer(x)
    run_on(layer, choose(LayerSpec.of(layer)).kernel.of(layer))
    torch.testing.assert_close(layer(x), simulated)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", [sampler, labelled], ids=["unet", "dit"])
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_a_sampler_predicts_on_them(make, keep, cached):
    module = make(steps=6)
    arguments = {"attention": False, "calibration_loader": seeds(8, 8), "calibration_samples": 8}
    callback = (
        CacheQuant("int8", "int8", interval=3, **arguments)
        if cached
        else PostTrainingQuantization("int8", "int8", per_step=True, ranges="minmax", **arguments)
    )
    trainer(callback).validate(module, pictures(), verbose=False)
    simulated = torch.cat(trainer(callback).predict(module, seeds()))
    swap = KernelSwap(backend="torch", keep=keep)
    found = torch.cat(trainer(callback, swap).predict(module, seeds()))
    torch.testing.assert_close(found, simulated, atol=1e-3, rtol=1e-3)
    assert "by step" in str(swap.table) and "depends on the step" not in str(swap.table)
