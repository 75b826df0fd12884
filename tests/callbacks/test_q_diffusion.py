"""Q-Diffusion: all of a trajectory calibrates, halves of skip concatenations have scales of their own."""

import itertools

import pytest
import torch

from lightning_quant import KernelSwap, QDiffusion, Reconstruction, Trajectory, load_quantized, save_quantized
from lightning_quant.calibration import at_intervals
from lightning_quant.layers import as_float
from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import SplitQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import TinyTransformer, trainer

LIGHT = {"calibration_samples": 16, "steps": 4}


def quantized(module, **more):
    callback = QDiffusion(**{**LIGHT, **more})
    run = trainer(callback)
    run.validate(module, pictures(), verbose=False)
    return callback, run


def test_samples_are_spread_evenly_over_the_trajectory():
    moments = QDiffusion(steps=20, calibration_samples=640).moments(sampler(steps=50), None)
    counts = moments.allocation(50, 32 * moments.moments)
    chosen = [k for k, count in enumerate(counts) if count]
    assert len(chosen) == 20 and {counts[k] for k in chosen} == {32}
    assert chosen[0] == 0 and chosen[-1] >= 47 and {b - a for a, b in itertools.pairwise(chosen)} == {2, 3}
    short = QDiffusion(steps=20, calibration_samples=6).moments(sampler(steps=4), None)
    assert short.allocation(4, short.trajectories * short.moments) == [2] * 4
    assert at_intervals(3)(7, 8) == [2, 0, 3, 0, 3, 0, 0]


def test_shortcuts_on_the_way_up_are_split_and_nothing_else():
    module = sampler()
    quantized(module)
    found = {name: m for name, m in module.named_modules() if isinstance(m, SplitQuantizer)}
    shortcuts = [n for n, _ in module.named_modules() if "up_blocks" in n and n.endswith("conv_shortcut")]
    assert {*found} == {f"{name}.{which}_quantizer" for name in shortcuts for which in ("weight", "input")}
    assert found["denoiser.up_blocks.1.resnets.1.conv_shortcut.weight_quantizer"].scale.shape == (8, 2)
    for module, more in ((labelled(), {}), (sampler(), {"split": False})):
        quantized(module, **more)
        assert not any(isinstance(m, SplitQuantizer) for m in module.modules())


def test_in_floats_a_split_layer_is_the_plain_one_and_quantized_it_is_nearer():
    """The skip half is a hundred times as large as the stream."""
    errors = {}
    for split in (True, False):
        module = sampler()
        x = torch.randn(4, 16, 5, 5, generator=torch.Generator().manual_seed(0))
        x[:, 8:] *= 100
        layer = module.denoiser.up_blocks[1].resnets[1].conv_shortcut
        exact = layer(x)
        quantized(module, split=split)
        with as_float(module):
            torch.testing.assert_close(layer(x), exact, atol=1e-5, rtol=1e-5)
        layer.input_quantizer.fit(x)
        layer.weight_quantizer.reset()
        with torch.no_grad():  # what the smaller half adds
            halves = torch.nn.functional.conv2d(layer.input_quantizer(x)[:, :8], layer.weight[:, :8])
            wanted = torch.nn.functional.conv2d(x[:, :8], layer.weight[:, :8])
        errors[split] = float((halves - wanted).square().mean())
    assert errors[True] < errors[False] / 1000


def test_rounding_is_learned_through_split_layers_and_reloads_everywhere(tmp_path):
    module, other, third = sampler(), sampler(), sampler()
    exact = torch.cat(trainer().predict(module, seeds()))
    settings = Reconstruction(
        granularity=["*up_blocks.1"], phases=["weights", "activations"], inputs="quantized", keep=1.0, iterations=5,
        samples=8, batch_size=4,
    )  # fmt: skip
    callback, run = quantized(module, reconstruct=settings)
    assert module.denoiser.up_blocks[1].resnets[0].conv_shortcut.weight_quantizer.codes is not None
    images = torch.cat(run.predict(module, seeds()))
    assert sqnr(images, exact) > 10
    run.save_checkpoint(tmp_path / "q.ckpt")
    again = trainer(QDiffusion(**LIGHT, reconstruct=settings))
    assert torch.equal(torch.cat(again.predict(other, seeds(), ckpt_path=tmp_path / "q.ckpt")), images)
    save_quantized(module, tmp_path / "q")
    load_quantized(third, tmp_path / "q")
    assert torch.equal(torch.cat(trainer().predict(third, seeds())), images)
    callback.remove(module)
    assert is_float(module) and torch.equal(torch.cat(trainer().predict(module, seeds())), exact)


def test_split_layers_stay_behind_when_kernels_are_swapped_in():
    module = sampler()
    _, run = quantized(module, weights="int8")
    simulated = torch.cat(run.predict(module, seeds()))
    swap = KernelSwap()
    real = torch.cat(trainer(swap).predict(module, seeds()))
    assert sqnr(real, simulated) > 30


def test_a_trajectory_is_taken_as_it_is_and_the_callback_keeps_what_it_was_given():
    moments = Trajectory(4, 2, loader=None)
    callback, _ = quantized(sampler(), calibration_loader=moments)
    assert callback.calibration_loader is moments and len(moments) == 8
    callback, _ = quantized(sampler(), calibration_loader=None)
    assert callback.calibration_loader is None


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        QDiffusion(steps=0)
    module = sampler()
    with pytest.raises(ValueError, match=r"conv_shortcut` cannot take what QDiffusion wants.*for each part"):
        quantized(module, activations="int8_token_dynamic")
    assert is_float(module)
    with pytest.raises(TypeError, match="QDiffusion calibrates on the trajectories of a model that samples"):
        trainer(QDiffusion(**LIGHT)).validate(TinyTransformer(), torch.utils.data.DataLoader(torch.zeros(2, 4)))
