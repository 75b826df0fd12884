"""Ranges for each step of the trajectory, as a user meets them: ``per_step=`` of a callback."""

import copy

import diffusers
import pytest
import torch

from lightning_quant import KernelSwap, PostTrainingQuantization, load_quantized, save_quantized
from lightning_quant.layers import as_float, has_scale_to_learn
from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import StepQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, sampler, seeds
from tests.models import TinyTransformer, trainer, validate


def quantized(module, per_step=True, **more):
    callback = PostTrainingQuantization("int8", "int8", ranges="minmax", per_step=per_step, **more)
    trainer(callback).validate(module, pictures(), verbose=False)
    return callback


def images(module):
    return torch.cat(trainer().predict(module, seeds()))


def open_loop(module, wanted):
    """How near the prediction is, for what the float model meets at each step."""
    labels = torch.arange(5)
    with torch.no_grad(), as_float(module):
        moments = list(module.trajectory(torch.arange(5), class_labels=labels))
    with torch.no_grad():
        found = [
            sqnr(module(moment.given, torch.full((5,), int(moment.timestep)), class_labels=labels), moment.predicted)
            for moment in moments
        ]
    return torch.stack(found)


def test_each_step_has_its_own_range_and_loses_less():
    plain, table = labelled(), labelled()
    loader = {"calibration_loader": seeds(8), "calibration_samples": 8}
    quantized(plain, False, **loader)
    quantized(table, **loader)
    tables = [m for m in table.modules() if isinstance(m, StepQuantizer)]
    assert tables and all(m.scale.shape == (4,) for m in tables)
    assert (open_loop(table, None) > open_loop(plain, None) - 0.5).all()
    assert open_loop(table, None).mean() > open_loop(plain, None).mean() + 1


@pytest.mark.parametrize("make", [sampler, labelled], ids=["unet", "dit"])
def test_a_batch_of_mixed_steps_is_each_sample_at_its_own(make):
    module = make()
    quantized(module, 2)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([750, 0, 250, 750])
    more = {"class_labels": torch.arange(4)} if module.conditions else {}
    with torch.no_grad():
        together = module(x, t, **more)
        single = torch.cat(
            [module(x[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in more.items()}) for i in range(4)]
        )
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 2},  # its timesteps are all among those of the table
        {"num_inference_steps": 5},
        {"scheduler": diffusers.DPMSolverMultistepScheduler(1000)},
    ],
    ids=["fewer", "more", "dpm++"],
)
def test_another_schedule_is_refused_with_one_line(change):
    module = sampler()
    quantized(module)
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(ValueError, match=r"scales for 4 steps \(750, 500, 250, 0\), and is asked for") as refused:
        images(module)
    assert "\n" not in str(refused.value) and "trainer.validate(model, ...) again" in str(refused.value)


def test_remove_gives_the_float_model_back_and_watches_no_longer():
    module = sampler()
    before = images(module)
    callback = quantized(module)
    assert module.denoiser._forward_pre_hooks
    callback.remove(module)
    assert is_float(module) and not module.denoiser._forward_pre_hooks
    assert torch.equal(images(module), before)
    module.num_inference_steps = 2
    images(module)


def test_a_failed_calibration_leaves_nothing_behind():
    module = sampler()

    def broken(batch):
        raise RuntimeError("broken")

    module.calibration_step = broken
    with pytest.raises(RuntimeError, match="broken"):
        quantized(module)
    assert is_float(module) and not module.denoiser._forward_pre_hooks


def test_copies_follow_their_own_timestep():
    module = sampler()
    quantized(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module(torch.randn(1, 1, 8, 8), torch.tensor([0]))
    assert torch.equal(images(twin), images(module))
    hooks = [next(iter(m.denoiser._forward_pre_hooks.values())) for m in (module, twin)]
    assert hooks[0].steps is not hooks[1].steps
    assert all(m.steps is hooks[1].steps for m in twin.modules() if isinstance(m, StepQuantizer))


def test_saved_and_loaded(tmp_path):
    module, other = sampler(), sampler()
    quantized(module)
    save_quantized(module, tmp_path / "q")
    load_quantized(other, tmp_path / "q")
    assert torch.equal(images(other), images(module))
    other.num_inference_steps = 2
    with pytest.raises(ValueError, match="scales for 4 steps"):
        images(other)


def test_attention_with_tables_has_no_integer_kernel_and_says_so():
    module = sampler()
    quantized(module)
    before, swap = images(module), KernelSwap(backend="torch")
    torch.testing.assert_close(torch.cat(trainer(swap).predict(module, seeds())), before, atol=1e-4, rtol=1e-4)
    assert "the grid of its query depends on the step of the trajectory" in swap.table.rows[-1].why_not


def test_a_model_without_a_schedule_is_refused():
    model = TinyTransformer()
    with pytest.raises(TypeError, match="per_step=True needs a model that knows its sampling schedule"):
        validate(model, PostTrainingQuantization("int8", "int8", per_step=True))
    assert is_float(model)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="per_step=1"):
        PostTrainingQuantization("int8", "int8", per_step=1)
    with pytest.raises(ValueError, match="per_step=9 groups, but a trajectory has only 4 steps"):
        quantized(sampler(), 9)


def test_the_sample_has_room_in_the_first_layer_and_its_range_is_not_learned():
    """What the range of the sample cuts off is fed back and grows, so it is neither clipped nor narrowed."""
    found = {}
    for ranges in ("minmax", "mse"):
        module = sampler()
        callback = PostTrainingQuantization(
            "int4", "int8", ranges, first_last="int8", calibration_loader=seeds(8), calibration_samples=8
        )
        trainer(callback).validate(module, pictures(), verbose=False)
        layer = module.denoiser.conv_in
        with torch.no_grad(), as_float(module):
            seen = torch.stack([moment.given for moment in module.trajectory(torch.arange(8))])
        found[ranges] = float(layer.input_quantizer.scale)
        assert found[ranges] * 255 == pytest.approx(1.3 * float(seen.amax() - seen.amin()), rel=0.02)
        assert layer.weight_quantizer.scheme.bits == 8 and not has_scale_to_learn(layer.input_quantizer)
    assert found["minmax"] == found["mse"]


@pytest.mark.parametrize(("activations", "room"), [("int8", 1.3), ("int4", 1.0)])
def test_a_step_has_room_for_what_its_few_samples_did_not_show(activations, room):
    tables, single = sampler(), sampler()
    for module, per_step in ((tables, True), (single, False)):
        callback = PostTrainingQuantization(
            None, activations, "minmax", per_step=per_step, calibration_loader=seeds(8), calibration_samples=8
        )
        trainer(callback).validate(module, pictures(), verbose=False)
    name = "denoiser.up_blocks.1.resnets.0.conv1.input_quantizer"
    widest = tables.get_submodule(name).scale.amax()
    assert float(widest) == pytest.approx(room * float(single.get_submodule(name).scale), rel=0.02)
