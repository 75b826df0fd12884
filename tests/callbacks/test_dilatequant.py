"""DilateQuant as a user meets it: dilated layers, tables that are trained, and what survives a checkpoint."""

import pytest
import torch

from lightning_quant import (
    DiffusionModule,
    DilateQuant,
    KernelSwap,
    PostTrainingQuantization,
    Reconstruction,
    ReconstructionStage,
    load_quantized,
    save_quantized,
)
from lightning_quant.layers import Dilation, as_float
from lightning_quant.quantizers import StepQuantizer, UniformQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import TinyTransformer, trainer, validate

MODELS = {"unet": sampler, "dit": labelled}
FEW = {
    "granularity": "inner", "rounding": "free", "inputs": "quantized", "keep": 1.0, "samples": 32, "batch_size": 8,
    "iterations": 3,
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def quantized(module, tmp_path=None, **more):
    callback = DilateQuant(**{"reconstruct": None, **more})
    run = trainer(callback) if tmp_path is None else trainer(callback, default_root_dir=tmp_path)
    run.validate(module, pictures(), verbose=False)
    return callback, run


def images(module):
    return torch.cat(trainer().predict(module, seeds()))


def widen(module):
    """Let some channels of every float layer be quiet, so that there is something to dilate."""
    with torch.no_grad():
        for layer in module.modules():
            if getattr(layer, "weight", None) is not None and layer.weight.dim() > 1 and layer.weight.shape[1] > 2:
                layer.weight[:, ::2] *= 0.2
    return module


def tables(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, StepQuantizer)}


def test_dilation_leaves_the_float_function_and_the_steps_of_weights_alone(make):
    module, plain = widen(make()), widen(make())
    before, weights = images(module), {name: p.detach().clone() for name, p in module.named_parameters()}
    quantized(module, ranges="minmax", first_last=None)
    PTQ = PostTrainingQuantization("int4_asym", "int8", ranges="minmax", per_step=True)
    trainer(PTQ).validate(plain, pictures(), verbose=False)
    dilated = {name: m for name, m in module.named_modules() if isinstance(m, Dilation)}
    factors = torch.cat([m.factor for m in dilated.values()])
    assert (factors >= 1).all() and (factors > 1.5).sum() > 20
    with as_float(module):
        torch.testing.assert_close(images(module), before, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    for name in dilated:
        mine, other = (m.get_submodule(name.rpartition(".")[0]) for m in (module, plain))
        torch.testing.assert_close(mine.weight_quantizer.scale, other.weight_quantizer.scale, atol=0, rtol=1e-6)
        assert (mine.input_quantizer.scale <= 1.001 * other.input_quantizer.scale).all()  # no range grows


def test_steps_learn_together_and_each_row_for_itself(make, tmp_path):
    """A unit sees samples at many steps at once, each quantized with its own row."""
    module, other = make(), make()
    quantized(module, dilate=False)
    before = {name: m.scale.clone() for name, m in tables(module).items()}
    assert before and all(scale.shape == (4,) for scale in before.values())
    quantized(other, tmp_path, dilate=False, reconstruct={**FEW, "scale_learning_rate": 0.01})
    moved = [(m.scale - before[name]).abs() > 0 for name, m in tables(other).items()]
    assert sum(bool(rows.all()) for rows in moved) > len(moved) / 2
    assert all(type(m) is StepQuantizer and (m.scale > 0).all() for m in tables(other).values())
    assert all((m.zero_point == m.zero_point.round()).all() for m in tables(other).values())


def errors(module, reference):
    """The mean error of the prediction at the steps of the float model."""
    given = {"class_labels": torch.arange(5)} if module.conditions else {}
    with torch.no_grad():
        moments = list(reference.trajectory(torch.arange(5), **given))
        return sum(
            float((module(m.given, torch.full((5,), int(m.timestep)), **given) - m.predicted).square().mean())
            for m in moments
        )


def test_training_brings_the_prediction_nearer(tmp_path):
    reference, plain, trained = labelled(), labelled(), labelled()
    quantized(plain, dilate=False)
    quantized(trained, tmp_path, dilate=False, reconstruct={**FEW, "iterations": 30, "learning_rate": 0.05})
    assert errors(trained, reference) < 0.8 * errors(plain, reference)


@pytest.mark.parametrize(
    "half", [{"per_step": False}, {"per_step": 2}, {"dilate": False}], ids=["dilation", "groups", "tables"]
)  # fmt: skip
def test_each_part_works_alone(half):
    module = labelled()
    quantized(module, **half)
    assert any(isinstance(m, Dilation) for m in module.modules()) == half.get("dilate", True)
    assert bool(tables(module)) == bool(half.get("per_step", True))
    assert images(module).isfinite().all()


def test_a_stage_of_the_users_own_trains_what_validate_calibrated(tmp_path):
    module, reference, given = labelled(), labelled(), {"class_labels": torch.arange(8)}
    quantized(module)
    before = errors(module, reference)
    rows = [
        {"x": m.given, "timestep": torch.full((8,), int(m.timestep)), "conditions": given}
        for m in reference.trajectory(torch.arange(8), **given)
    ]
    settings = Reconstruction(**{**FEW, "iterations": 20, "learning_rate": 0.05})
    trainer(max_epochs=1, default_root_dir=tmp_path).fit(ReconstructionStage(module, settings, rows))
    assert errors(module, reference) < before


def test_a_checkpoint_reproduces_the_images(make, tmp_path):
    module, other, packed = make(), make(), make()
    arguments = {"reconstruct": FEW if make is labelled else None}
    _, run = quantized(module, tmp_path, **arguments)
    before = torch.cat(run.predict(module, seeds()))
    run.save_checkpoint(tmp_path / "q.ckpt")
    new = trainer(DilateQuant(**arguments))
    assert torch.equal(torch.cat(new.predict(other, seeds(), ckpt_path=tmp_path / "q.ckpt")), before)
    save_quantized(module, tmp_path / "q")
    load_quantized(packed, tmp_path / "q")
    assert torch.equal(images(packed), before)
    alone = DiffusionModule.load_from_checkpoint(
        tmp_path / "q.ckpt", denoiser=make().denoiser, scheduler=module.scheduler, num_inference_steps=4,
        conditions=module.conditions,
    )  # fmt: skip
    assert torch.equal(images(alone), before)


def test_remove_gives_the_float_model_back_bit_for_bit(make):
    module = make()
    before = images(module)
    callback, _ = quantized(module)
    callback.remove(module)
    assert is_float(module) and not any(isinstance(m, Dilation) for m in module.modules())
    assert torch.equal(images(module), before)


def test_a_kernel_keeps_off_a_dilated_layer():
    module = sampler()
    quantized(module, per_step=False, weights="int8")
    before, swap = images(module), KernelSwap(backend="torch")
    torch.testing.assert_close(torch.cat(trainer(swap).predict(module, seeds())), before, atol=1e-4, rtol=1e-4)
    assert any("dilation" in row.why_not for row in swap.table.rows)


def test_without_tables_it_takes_any_model():
    model = TinyTransformer()
    validate(model, DilateQuant(per_step=False, reconstruct=None, first_last=None))
    assert any(isinstance(m, Dilation) for m in model.modules())
    assert all(type(m) is UniformQuantizer for m in model.modules() if isinstance(m, UniformQuantizer))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="dilation is between the two"):
        DilateQuant(activations=None)
    with pytest.raises(TypeError, match="per_step=True needs a model that knows its sampling schedule"):
        validate(TinyTransformer(), DilateQuant())
