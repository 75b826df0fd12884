"""EDADM as a user meets it: which steps calibrate, how blocks are fitted, and what survives a checkpoint."""

import pytest
import torch

from lightning_quant import EDADM, AlignedTrajectory, DiffusionModule, PostTrainingQuantization, Reconstruction
from lightning_quant.quantizers import StepQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import TinyTransformer, trainer, validate

MODELS = {"unet": sampler, "dit": labelled}
FEW = {**Reconstruction.parse("edadm").to_dict(), "samples": 16, "batch_size": 4, "iterations": 2}
LOADER = {"calibration_samples": 16, "moments": 2, "calibration_loader": seeds(8)}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def quantized(module, tmp_path=None, **more):
    callback = EDADM(**{"reconstruct": None, **LOADER, **more})
    run = trainer(callback) if tmp_path is None else trainer(callback, default_root_dir=tmp_path)
    run.validate(module, pictures(), verbose=False)
    return callback, run


def images(module):
    return torch.cat(trainer().predict(module, seeds()))


def error(module, reference):
    """The mean error of the prediction at the steps of the float model."""
    given = {"class_labels": torch.arange(8)} if module.conditions else {}
    with torch.no_grad():
        moments = list(reference.trajectory(torch.arange(8), **given))
        return sum(
            float((module(m.given, torch.full((8,), int(m.timestep)), **given) - m.predicted).square().mean())
            for m in moments
        )


def test_sampling_and_fitting_work_alone(tmp_path):
    chosen, even = labelled(), labelled()
    callback, _ = quantized(chosen)
    assert isinstance(callback.trajectory, AlignedTrajectory) and len(callback.trajectory) == 16
    other, _ = quantized(even, tmp_path, diversity=None, reconstruct=FEW)
    assert not isinstance(other.trajectory, AlignedTrajectory)
    assert [other.trajectory.steps.count(k) for k in range(4)] == [4] * 4
    assert callback.reconstruct is None and other.reconstruct.layer_weight == 0.8


def test_fitting_brings_the_prediction_nearer(tmp_path):
    reference, plain, fitted = labelled(), labelled(), labelled()
    quantized(plain)
    quantized(fitted, tmp_path, reconstruct={**FEW, "iterations": 40, "learning_rate": 0.1})
    assert error(fitted, reference) < 0.9 * error(plain, reference)


def test_without_layer_terms_it_is_a_plain_block_reconstruction(tmp_path):
    """gamma = 0 and no drop: the same codes as reconstruct= of the callback below, on the same moments."""
    settings = {**FEW, "inputs": "quantized", "keep": 1.0}
    module, same = labelled(), labelled()
    callback, _ = quantized(module, tmp_path / "a", layer_weight=0, reconstruct=settings)
    plain = PostTrainingQuantization(
        "int4_asym", "int8", ranges="minmax", reconstruct={**settings, "layer_weight": 0.0},
        calibration_samples=16, calibration_loader=callback.trajectory,
    )  # fmt: skip
    plain.formats = callback.formats
    trainer(plain, default_root_dir=tmp_path / "b").validate(same, pictures(), verbose=False)
    mine, other = module.state_dict(), same.state_dict()
    codes = [key for key in mine if key.endswith("codes")]
    assert codes and all(torch.equal(mine[key], other[key]) for key in codes)


def test_one_set_of_scales_serves_all_steps_and_probabilities_have_eight_bits(make):
    module = make()
    quantized(module, activations="int4")
    assert not any(isinstance(m, StepQuantizer) for m in module.modules())
    found = {n: m.scheme.bits for n, m in module.named_modules() if n.endswith("probabilities_quantizer")}
    assert found and set(found.values()) == {8}


def test_a_checkpoint_reproduces_the_images(make, tmp_path):
    module, other = make(), make()
    fit = FEW if make is labelled else None
    _, run = quantized(module, tmp_path, reconstruct=fit)
    before = torch.cat(run.predict(module, seeds()))
    run.save_checkpoint(tmp_path / "q.ckpt")
    new = trainer(EDADM(reconstruct=fit, **LOADER))
    assert torch.equal(torch.cat(new.predict(other, seeds(), ckpt_path=tmp_path / "q.ckpt")), before)
    alone = DiffusionModule.load_from_checkpoint(
        tmp_path / "q.ckpt", denoiser=make().denoiser, scheduler=module.scheduler, num_inference_steps=4,
        conditions=module.conditions,
    )  # fmt: skip
    assert torch.equal(images(alone), before)


def test_it_can_quantize_another_model_on_moments_of_its_own():
    callback = EDADM(reconstruct=None, **LOADER)
    first, second = sampler(), labelled()
    for module in (first, second):
        trainer(callback).validate(module, pictures(), verbose=False)
    assert "class_labels" in callback.trajectory.take([0])["conditions"]
    callback.remove(first)
    assert is_float(first)


def test_nonsense_is_refused():
    with pytest.raises(TypeError, match="does not say how it samples"):
        validate(TinyTransformer(), EDADM())
    with pytest.raises(ValueError, match="layer_weight must be 0 or more"):
        EDADM(layer_weight=-1)
    with pytest.raises(ValueError, match="diversity and radius must be 0 or more"):
        EDADM(diversity=-1)
