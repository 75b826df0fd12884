"""Caching and quantization together: the corrections, what survives a checkpoint, and what is left behind."""

import pytest
import torch

from lightning_quant import CacheQuant, DiffusionModule
from lightning_quant.layers import CachedModule, StepCorrection, as_float, corrected_part
from lightning_quant.metrics import sqnr
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import trainer

MODELS = {"unet": sampler, "dit": labelled}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def quantized(module, **more):
    callback = CacheQuant(**{"interval": 3, "calibration_samples": 8, **more})
    run = trainer(callback)
    run.validate(module, pictures(), verbose=False)
    return callback, run


def corrections(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, StepCorrection)}


def test_the_layers_that_read_the_kept_feature_are_corrected(make):
    module = make(steps=6)
    quantized(module)
    found = corrections(module)
    reads = (
        ["up_blocks.1.resnets.1.conv_shortcut"]
        if make is sampler
        else [f"transformer_blocks.2.attn1.to_{name}" for name in "qkv"]
    )
    assert list(found) == [f"denoiser.{name}.step_correction" for name in reads]
    assert all(m.scale.shape == (6, len(m.scale[0])) and (m.scale != 1).any() for m in found.values())


def test_without_rounding_the_corrected_part_is_what_the_layer_computes(make):
    """y = W0 x0 + W1 x1 + b, taken apart and put together again."""
    module = make(steps=6)
    quantized(module, weights="int8", activations="int8")
    for name, correction in corrections(module).items():
        layer = module.get_submodule(name.rpartition(".")[0])
        width = layer.weight_rows().shape[1]
        x = torch.randn(2, width, 5, 5) if layer.weight.dim() == 4 else torch.randn(2, 5, width)
        with torch.no_grad(), as_float(module):
            whole, bias = layer(x), 0 if layer.bias is None else layer.bias
            bias = bias.view(-1, 1, 1) if layer.weight.dim() == 4 else bias
            torch.testing.assert_close(corrected_part(layer, x, width, exact=True) + bias, whole, atol=1e-5, rtol=1e-5)
            first = x.clone()
            first.narrow(layer.input_axis, correction.channels, width - correction.channels).zero_()
            part = corrected_part(layer, x, correction.channels, exact=True)
            torch.testing.assert_close(part + bias, layer(first), atol=1e-5, rtol=1e-5)


def test_the_correction_brings_the_layer_nearer_to_the_float_one(make):
    module = make(steps=6)
    callback, _ = quantized(module, weights="int3", activations="int4", calibration_loader=seeds(8))
    errors, given = {True: 0.0, False: 0.0}, {"class_labels": torch.arange(8)} if module.conditions else {}

    def compare(layer, args):
        exact = corrected_part(layer, args[0], layer.step_correction.channels, exact=True)
        plain = corrected_part(layer, args[0], layer.step_correction.channels)
        row = layer.step_correction.steps.rows[0]
        shape = (-1, 1, 1) if layer.weight.dim() == 4 else (-1,)
        better = plain * layer.step_correction.scale[row].view(shape) + layer.step_correction.shift[row].view(shape)
        errors[False] += float((plain - exact).square().sum())
        errors[True] += float((better - exact).square().sum())

    handles = [
        module.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(compare) for name in corrections(module)
    ]
    callback.begin(module)
    with as_float(module, cached=True):
        module.sample(torch.arange(8), **given)
    callback.end()
    for handle in handles:
        handle.remove()
    assert 0 < errors[True] < errors[False]


def test_a_mixed_batch_is_each_sample_at_its_own_step(make):
    module = make(steps=4)
    quantized(module)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([750, 0, 250, 750])
    given = {"class_labels": torch.arange(4)} if module.conditions else {}
    with torch.no_grad():
        together = module(x, t, **given)
        alone = [module(x[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()}) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_samples_are_near_and_the_deep_part_is_skipped(make):
    module = make(steps=6)
    before = torch.cat(trainer().predict(module, seeds()))
    callback, run = quantized(module)
    assert sqnr(torch.cat(run.predict(module, seeds())), before) > 0
    assert callback.cache.runs == {"deep": 2, "skipped": 4}
    assert not any(isinstance(m, CachedModule) for m in module.modules())


def test_a_checkpoint_reproduces_the_images(make, tmp_path):
    module, other = make(steps=6), make(steps=6)
    _, run = quantized(module)
    before = torch.cat(run.predict(module, seeds()))
    run.save_checkpoint(tmp_path / "q.ckpt")
    new = trainer(CacheQuant(interval=3, calibration_samples=8))
    assert torch.equal(torch.cat(new.predict(other, seeds(), ckpt_path=tmp_path / "q.ckpt")), before)
    alone = DiffusionModule.load_from_checkpoint(
        tmp_path / "q.ckpt", denoiser=make().denoiser, scheduler=module.scheduler, num_inference_steps=6,
        conditions=module.conditions,
    )  # fmt: skip
    assert list(corrections(alone)) == list(corrections(module))  # without the callback it is quantized, and not cached
    assert alone.predict_step(next(iter(seeds())), 0).isfinite().all()


def test_remove_gives_the_float_model_back(make):
    module = make(steps=6)
    before = torch.cat(trainer().predict(module, seeds()))
    callback, _ = quantized(module)
    callback.remove(module)
    assert is_float(module) and not corrections(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.equal(torch.cat(trainer().predict(module, seeds())), before)


def test_the_float_twin_is_neither_cached_nor_corrected(make):
    module = make(steps=6)
    given = {"class_labels": torch.arange(3)} if module.conditions else {}
    before = module.sample(torch.arange(3), **given)
    callback, _ = quantized(module)
    callback.begin(module)
    with as_float(module):
        twin = module.sample(torch.arange(3), **given)
    callback.end()
    assert torch.equal(twin, before)


def test_a_failed_calibration_leaves_nothing_behind(make):
    module = make(steps=6)
    sample = module.sample
    module.sample = lambda *seeds, **given: (
        1 / 0 if any(isinstance(m, CachedModule) for m in module.modules()) else sample(*seeds, **given)
    )
    with pytest.raises(ZeroDivisionError):
        quantized(module)
    assert is_float(module) and not corrections(module)
    assert not any(isinstance(m, CachedModule) for m in module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="CacheQuant takes no reconstruct="):
        CacheQuant(reconstruct="adaround")
    with pytest.raises(ValueError, match="it needs per_step=True"):
        CacheQuant(per_step=False)
    module = sampler()
    with pytest.raises(RuntimeError, match="has not calibrated"):
        trainer(CacheQuant()).predict(module, seeds())
