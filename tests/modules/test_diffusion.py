"""A denoiser as a LightningModule: sampling from seeds, guidance, losses, and how it is judged and calibrated."""

import os
import subprocess
import sys

import diffusers
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import DiffusionModule, PostTrainingQuantization
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.metrics import sqnr
from tests.diffusion import Own, ddim, dit, labelled, pictures, sampler, seeds, unet
from tests.models import trainer
from tests.real import REPOSITORY

SCHEDULERS = {
    "ddim": ddim,
    "ddpm": lambda: diffusers.DDPMScheduler(1000, clip_sample=False),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(1000),
    "dpm++ sde": lambda: diffusers.DPMSolverMultistepScheduler(1000, algorithm_type="sde-dpmsolver++"),
    "plms": lambda: diffusers.PNDMScheduler(1000, skip_prk_steps=True),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(1000),
}


@pytest.fixture(params=SCHEDULERS.values(), ids=SCHEDULERS)
def scheduler(request):
    return request.param()


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_trajectory_is_the_plain_loop_bit_for_bit(name):
    module, scheduler = sampler(scheduler=SCHEDULERS[name](), steps=6), SCHEDULERS[name]()
    random = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    x = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in random])
    scheduler.set_timesteps(6)
    more = {} if name == "plms" else {"generator": random}
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(module.denoiser(x, t.expand(2)).sample, t, x, **more).prev_sample
    assert torch.equal(module.sample(torch.tensor([4, 9])), x)
    assert torch.equal(module.sample(torch.tensor([4, 9])), x)  # nothing was left in the scheduler


def test_samples_belong_to_their_seeds_whatever_the_batch(scheduler):
    module = sampler(scheduler=scheduler)
    whole = torch.cat(trainer().predict(module, seeds(5, 5)))
    single = torch.cat(trainer().predict(module, seeds(5, 1)))
    torch.testing.assert_close(single, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_error_of_ddim_is_linear_in_that_of_the_noise(eta):
    """x' = A x + B eps, so two trajectories of equal noise differ by A d + B (eps_q - eps)."""
    module = sampler(steps=5, step_arguments={"eta": eta})
    other = sampler(steps=5, step_arguments={"eta": eta})
    with torch.no_grad():
        other.denoiser.conv_out.weight += 0.02
    a = module.scheduler.alphas_cumprod
    timesteps = [int(t) for t in module.timesteps]
    pairs = zip(module.trajectory(torch.tensor([3])), other.trajectory(torch.tensor([3])), strict=True)
    for (exact, moved), t, following in zip(pairs, timesteps, [*timesteps[1:], 0], strict=True):
        now, then = a[t], a[following]
        spread = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        A = (then / now).sqrt()
        B = (1 - then - spread).sqrt() - (then * (1 - now) / now).sqrt()
        if exact.k < len(timesteps) - 1:
            expected = A * (moved.given - exact.given) + B * (moved.predicted - exact.predicted)
            torch.testing.assert_close(moved.after - exact.after, expected, rtol=1e-4, atol=1e-5)


def test_guidance_mixes_both_halves():
    module = labelled(guidance_scale=3.0)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([500, 20]), torch.tensor([1, 2])
    with torch.no_grad():
        conditional = module(x, t, class_labels=labels)
        unconditional = module(x, t, class_labels=torch.tensor([10, 10]))
        guided = module.guided(x, t, class_labels=labels)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


def test_guidance_that_knows_no_other_half_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale=2.*the conditions none, unconditional= has none"):
        sampler(guidance_scale=2.0).sample(torch.tensor([0]))


def test_a_learned_variance_is_left_out_of_the_prediction():
    module = sampler(unet(out_channels=2))
    assert module(torch.randn(1, 1, 8, 8), torch.tensor([3])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("net", ["condition", "pixart"])
def test_denoisers_with_text(net):
    torch.manual_seed(0)
    if net == "condition":
        denoiser = diffusers.UNet2DConditionModel(
            8, 4, 4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=6, attention_head_dim=4,
        )  # fmt: skip
        more = {}
    else:
        denoiser = diffusers.PixArtTransformer2DModel(
            2, 8, 4, 4, 2, norm_num_groups=1, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=6
        )
        more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    nothing = torch.randn(3, 6)
    module = sampler(denoiser.eval(), guidance_scale=2.0, unconditional={"encoder_hidden_states": nothing})
    batch = {"seed": torch.tensor([5, 6]), "encoder_hidden_states": torch.randn(2, 3, 6), **more}
    samples = module.predict_step(batch, 0)
    assert samples.shape == (2, 4, 8, 8) and samples.isfinite().all()
    first = {"seed": torch.tensor([5]), "encoder_hidden_states": batch["encoder_hidden_states"][:1], **more}
    torch.testing.assert_close(module.predict_step(first, 0), samples[:1], atol=1e-4, rtol=1e-4)


def test_a_denoiser_of_ones_own_says_its_shape():
    with pytest.raises(ValueError, match=r"sample_shape=\(channels, height, width\)"):
        sampler(Own()).sample(torch.tensor([0]))
    assert sampler(Own(), sample_shape=(1, 4, 6)).sample(torch.tensor([0])).shape == (1, 1, 4, 6)


def test_a_batch_without_images_or_seeds_is_refused():
    with pytest.raises(ValueError, match="neither images nor seeds in a dict"):
        sampler().predict_step({"labels": torch.tensor([1])}, 0)


# ---------------------------------------------------------------- training and judging


def test_it_learns_to_denoise(scheduler):
    module = sampler(scheduler=scheduler, learning_rate=3e-3)
    data = DataLoader(TensorDataset(torch.ones(32, 1, 8, 8)), batch_size=16)
    loss = lambda: float(module.denoising_loss(next(iter(data)), generator=torch.Generator().manual_seed(0)))  # noqa: E731
    before = loss()
    trainer(max_epochs=20).fit(module, data)
    assert loss() < 0.7 * before


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_the_scheduler_calls_it(kind):
    """A denoiser that answers the target exactly lets one step from t give back the very sample."""
    from lightning_quant.modules.denoising import noised, prediction_target

    scheduler = diffusers.DDIMScheduler(1000, clip_sample=False, prediction_type=kind)
    x, noise, t = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.tensor([600])
    target = prediction_target(scheduler, x, noise, t)
    scheduler.set_timesteps(10)
    out = scheduler.step(target, 600, noised(scheduler, x, noise, t))
    torch.testing.assert_close(out.pred_original_sample, x, atol=1e-4, rtol=1e-4)


def test_validation_tells_how_far_the_samples_are_from_those_of_the_float_twin():
    module = labelled(validation_samples=5)
    (logged,) = trainer().validate(module, pictures(), verbose=False)
    assert set(logged) == {"noise_mse"}  # a float model is its own twin
    (logged,) = trainer(PostTrainingQuantization("int4", "int4")).validate(module, pictures(), verbose=False)
    own, labels = module.sample(torch.arange(5), class_labels=torch.arange(5)), torch.arange(5)
    with as_float(module):
        exact = module.sample(torch.arange(5), class_labels=labels)
    assert logged["trajectory_sqnr"] == pytest.approx(float(sqnr(own, exact)), abs=0.01)
    assert logged["trajectory_sqnr"] < 40


def test_frechet_distance_of_what_the_features_see():
    class Features(nn.Module):
        def forward(self, images):
            return images.flatten(2).mean(2).expand(-1, 3) * torch.tensor([1.0, 2.0, 3.0])

    module = sampler(validation_samples=8, features=Features())
    assert not any("features" in name for name in module.state_dict())
    (logged,) = trainer().validate(module, pictures(), verbose=False)
    assert set(logged) == {"noise_mse", "frechet"}
    (logged,) = trainer(PostTrainingQuantization("int8", "int8")).validate(module, pictures(), verbose=False)
    assert 0 <= logged["frechet_to_float"] < logged["frechet"]


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("loader", ["auto", seeds(), pictures()], ids=["trajectories", "seeds", "images"])
def test_any_batch_calibrates(loader):
    module = labelled(guidance_scale=2.0)
    callback = PostTrainingQuantization("int8", "int8", calibration_loader=loader, calibration_samples=5)
    trainer(callback).validate(module, pictures(), verbose=False)
    assert callback.is_calibrated(module)
    assert sum(isinstance(m, QuantizedLayer) for m in module.modules()) > 20


def test_a_checkpoint_gives_the_same_images_in_a_new_process(tmp_path):
    module = sampler(dit(), conditions=["class_labels"])
    callback = PostTrainingQuantization("int8", "int8", per_step=True)
    run = trainer(callback)
    run.validate(module, pictures(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    torch.save(torch.cat(run.predict(module, seeds())), tmp_path / "images.pt")
    script = """
import sys, torch
from lightning_quant import DiffusionModule
from tests.diffusion import ddim, dit, seeds
from tests.models import trainer
torch.set_num_threads(1)
folder = sys.argv[1]
module = DiffusionModule.load_from_checkpoint(
    folder + "/q.ckpt", denoiser=dit(), scheduler=ddim(), num_inference_steps=4, conditions=["class_labels"]
)
assert torch.equal(torch.cat(trainer().predict(module, seeds())), torch.load(folder + "/images.pt"))
"""
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120, env=own)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1"):
        DiffusionModule(unet(), ddim(), num_inference_steps=0)
