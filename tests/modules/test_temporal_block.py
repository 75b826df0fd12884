"""What a denoiser makes of its timesteps, recorded and computed again."""

import pytest
import torch

from lightning_quant.graph import trace
from lightning_quant.layers import LayerPlan, Plan, as_float
from lightning_quant.modules import TemporalBlock, every_step
from tests.diffusion import Own, labelled, sampler

MAKE = {"unet": sampler, "dit": labelled, "own": lambda **more: sampler(Own(), sample_shape=(1, 8, 8), **more)}


def batch_of(module, count=6):
    conditions = {"class_labels": torch.arange(count) % 3} if module.conditions else {}
    return {"x": torch.randn(count, 1, 8, 8), "timestep": torch.arange(count) % 4 * 250, "conditions": conditions}


def block_of(module):
    every = every_step(module, batch_of(module))
    temporal = trace(module, lambda: module.calibration_step(batch_of(module))).temporal
    return TemporalBlock(module, temporal, lambda: module.calibration_step(every)), every, temporal


@pytest.fixture(params=MAKE.values(), ids=MAKE)
def make(request):
    return request.param


def test_every_timestep_comes_with_every_label():
    module = labelled()
    every = every_step(module, batch_of(module))
    pairs = list(zip(every["timestep"].tolist(), every["conditions"]["class_labels"].tolist(), strict=True))
    assert pairs == [(t, label) for t in (750, 500, 250, 0) for label in range(3)]
    assert len(every_step(module, batch_of(module), most=5)["x"]) == 4
    assert every_step(sampler(), batch_of(sampler()))["timestep"].tolist() == [750, 500, 250, 0]
    seeds = every_step(module, (torch.arange(4), torch.tensor([7, 7, 2, 7])))
    assert seeds["conditions"]["class_labels"].tolist() == [7, 2] * 4


def test_it_gives_what_the_blocks_receive_whatever_the_sample(make):
    module = make()
    block, every, temporal = block_of(module)
    received = {}
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: received.update({name: out}))
        for name in temporal.outputs
    ]
    with torch.no_grad():
        module.calibration_step({**every, "x": torch.randn_like(every["x"])})
    for handle in handles:
        handle.remove()
    rows = torch.tensor([2, 0, 3])
    for name, out in zip(temporal.outputs, block(rows), strict=True):
        torch.testing.assert_close(out, received[name][rows], atol=1e-6, rtol=1e-6)


def test_it_computes_with_the_layers_as_they_are_now(make):
    module = make()
    block, *_ = block_of(module)
    rows = torch.arange(block.rows)
    exact = block(rows)
    plan = Plan("Demo", {}, {name: LayerPlan("int3_sym_tensor", None) for name in block.names})
    plan.apply(module)
    for quantizer, layer in ((m.weight_quantizer, m) for m in plan.quantized_layers(module).values()):
        quantizer.fit(layer.weight_rows())
    assert not any(torch.equal(a, b) for a, b in zip(block(rows), exact, strict=True))
    with as_float(module):
        assert all(torch.equal(a, b) for a, b in zip(block(rows), exact, strict=True))
    plan.undo(module)
    sum(out.square().sum() for out in block(rows)).backward()
    assert all(module.get_submodule(name).weight.grad.abs().sum() > 0 for name in block.names)


def test_guidance_has_both_halves():
    module = labelled(guidance_scale=2.0)
    block, every, _ = block_of(module)
    assert block.rows == 2 * len(every["x"])
