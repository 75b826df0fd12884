"""TFMQ-DM: temporal layers are nearer to the float ones, nothing is clipped there, and later stages leave them be."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant import TFMQDM, DiffusionModule, Reconstruction
from lightning_quant.layers import as_float
from lightning_quant.modules import every_step
from lightning_quant.quantizers import StepQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import TinyTransformer, trainer
from tests.modules.test_temporal_block import batch_of, block_of

MODELS = {"unet": sampler, "dit": labelled}
LIGHT = {"calibration_samples": 16, "steps": 4, "iterations": 40}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def quantized(module, **more):
    callback = TFMQDM(**{**LIGHT, **more})
    run = trainer(callback)
    run.validate(module, pictures(), verbose=False)
    return callback, run


def temporal_codes(module, names):
    return {name: module.get_submodule(name).weight_quantizer.codes for name in names}


def features(module):
    """The temporal features of the model and of its float twin, and their layers."""
    with as_float(module):
        block, every, _ = block_of(module)
        exact = block(torch.arange(block.rows))
    with torch.no_grad():
        module.calibration_step(every)  # the tables stand at these steps now
        return block(torch.arange(block.rows)), exact, block.names


def nearness(module):
    found, exact, _ = features(module)
    return torch.cat([F.cosine_similarity(a, b).flatten() for a, b in zip(found, exact, strict=True)]).mean()


def test_learned_together_they_are_much_nearer_than_the_nearest(make):
    """At three bits, by the angle between float and quantized features; activations are float."""
    angles = {}
    for tiar in (True, False):
        module = make()
        quantized(module, weights="int3", activations=None, tiar=tiar, iterations=300)
        angles[tiar] = 1 - float(nearness(module))
    assert 0 < angles[True] < 0.5 * angles[False]


def test_nothing_is_clipped_at_any_step(make):
    module = make()
    quantized(module)
    _, _, names = features(module)
    seen = []

    def look(layer, args):
        table = layer.input_quantizer
        assert isinstance(table, StepQuantizer) and table.scale.shape == (4,)
        x, rows = args[0], torch.tensor(table.steps.rows)
        half = table.scale[rows].view(-1, 1) / 2
        seen.append(((table(x) - x).abs() <= half * 1.001 + 1e-6).all())

    handles = [module.get_submodule(name).register_forward_pre_hook(look) for name in names]
    with torch.no_grad():
        module.calibration_step(every_step(module, batch_of(module)))
    for handle in handles:
        handle.remove()
    assert len(seen) >= len(names) and all(seen)  # a layer may run more than once


def test_only_temporal_activations_have_tables_unless_all_are_asked_for(make):
    module = make()
    callback, _ = quantized(module, tiar=False)
    _, _, names = features(module)
    tables = {name for name, m in module.named_modules() if isinstance(m, StepQuantizer)}
    assert tables == {f"{name}.input_quantizer" for name in names}
    callback.remove(module)
    quantized(module, tiar=False, finite_set=False)
    assert not any(isinstance(m, StepQuantizer) for m in module.modules())


def test_reconstruction_of_blocks_leaves_their_codes_alone():
    alone, with_blocks = sampler(), sampler()
    quantized(alone)
    brecq = Reconstruction(
        granularity=["*up_blocks.1"], phases=["weights", "activations"], inputs="quantized", keep=1.0, iterations=5,
        learning_rate=0.3, samples=8, batch_size=4,
    )  # fmt: skip
    quantized(with_blocks, reconstruct=brecq)
    names = [name for name in features(alone)[2] if "up_blocks.1" in name]
    first, second = temporal_codes(alone, names), temporal_codes(with_blocks, names)
    assert len(names) == 2 and all(torch.equal(first[name], second[name]) for name in names)
    conv = "denoiser.up_blocks.1.resnets.0.conv1"
    assert with_blocks.get_submodule(conv).weight_quantizer.codes is not None
    assert alone.get_submodule(conv).weight_quantizer.codes is None


def test_a_checkpoint_reproduces_the_images_and_removing_gives_the_float_ones(make, tmp_path):
    module, other = make(), make()
    exact = torch.cat(trainer().predict(module, seeds()))
    callback, run = quantized(module)
    images = torch.cat(run.predict(module, seeds()))
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert torch.equal(
        torch.cat(trainer(TFMQDM(**LIGHT)).predict(other, seeds(), ckpt_path=tmp_path / "q.ckpt")), images
    )
    longer = DiffusionModule.load_from_checkpoint(
        tmp_path / "q.ckpt", denoiser=make().denoiser, scheduler=module.scheduler, num_inference_steps=5,
        conditions=module.conditions,
    )  # fmt: skip
    with pytest.raises(ValueError, match="this model has scales for 4 steps"):
        trainer().predict(longer, seeds())
    callback.remove(module)
    assert is_float(module) and torch.equal(torch.cat(trainer().predict(module, seeds())), exact)


def test_what_it_cannot_do_is_refused_before_anything_is_changed():
    module = sampler()
    with pytest.raises(ValueError, match="no quantized layer in DiffusionModule that depends on the timestep alone"):
        quantized(module, skip=["*time_emb*"])
    assert is_float(module)
    with pytest.raises(TypeError, match="TFMQDM calibrates on the trajectories of a model that samples"):
        trainer(TFMQDM(**LIGHT)).validate(TinyTransformer(), torch.utils.data.DataLoader(torch.zeros(2, 4)))
