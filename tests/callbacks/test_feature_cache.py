"""Feature caching as a user meets it: what is skipped, what is refused, and that nothing stays behind."""

from itertools import pairwise

import diffusers
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import FeatureCache, Fidelity, KernelSwap, PostTrainingQuantization
from lightning_quant.layers import CachedModule, as_float, deep_feature
from lightning_quant.metrics import sqnr
from lightning_quant.solvers import stale_groups
from tests.diffusion import Own, dit, labelled, pictures, sampler, seeds, unet
from tests.models import TinyTransformer, trainer, validate

MODELS = {"unet": sampler, "dit": labelled}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def images(module, *callbacks, batch_size=5, **options):
    return torch.cat(trainer(*callbacks, **options).predict(module, seeds(5, batch_size)))


def plain(**more):
    return FeatureCache(**{"interval": 3, "correct": False, **more})


def calls(module, names):
    """How often modules of the denoiser really compute: a hook on what is inside them."""
    counts = dict.fromkeys(names, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name in names:
        inside = next(m for m in module.denoiser.get_submodule(name).modules() if not list(m.children()))
        inside.register_forward_hook(count(name))
    return counts


def untouched(module):
    return not any(isinstance(m, CachedModule) for m in module.modules()) and not module.denoiser._forward_pre_hooks


# ---------------------------------------------------------------- what is computed


def test_refreshing_at_every_step_is_the_plain_sampler_bit_for_bit(make):
    module = make(steps=6)
    before = images(module)
    assert torch.equal(images(module, plain(interval=1)), before)


def test_the_deep_part_runs_at_the_refresh_steps_only_and_the_rest_always(make):
    module = make(steps=10)
    cached, before = plain(), images(module)
    deep, shallow = (
        (
            ["mid_block.resnets.0", "down_blocks.0.resnets.0"],
            ["conv_in", "up_blocks.1.resnets.1"],
        )
        if make is sampler
        else (["transformer_blocks.1.attn1"], ["transformer_blocks.0.attn1", "transformer_blocks.2.attn1"])
    )
    counts = calls(module, [*deep, *shallow])
    after = images(module, cached)
    assert [counts[name] for name in deep] == [4] * len(deep)  # at 0, 3, 6, 9
    assert [counts[name] for name in shallow] == [10] * len(shallow)
    assert cached.refresh == [0, 3, 6, 9] and cached.runs == {"deep": 4, "skipped": 6}
    assert not torch.equal(after, before) and sqnr(after, before) > 5


@pytest.mark.parametrize("point", ["up_blocks.0.attentions.0", "up_blocks.0", "up_blocks.1.resnets.0"])
def test_an_unchanged_input_gives_the_full_answer_back(point):
    """If a trajectory stood still, what is kept would be what is computed."""
    module = sampler(steps=4)
    cached = plain(interval=4, cache_point=point)
    cached.begin(module)
    x, answers = torch.randn(2, 1, 8, 8), []
    cached._features.begin(module.timesteps)
    with torch.no_grad():
        answers += [module.denoiser(x, 750).sample]
        cached._features.step_of[750.0] = 1  # the same moment again, as a step that does not refresh
        answers += [module.denoiser(x, 750).sample]
    cached.end()
    assert cached.runs == {"deep": 1, "skipped": 1}
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5)


def test_an_unchanged_stream_gives_the_full_answer_back():
    module = labelled(steps=4)
    cached = plain(interval=4)
    cached.begin(module)
    x, t, labels, answers = torch.randn(2, 1, 8, 8), torch.tensor([750, 750]), torch.tensor([1, 2]), []
    cached._features.begin(module.timesteps)
    with torch.no_grad():
        answers += [module(x, t, class_labels=labels)]
        cached._features.step_of[750.0] = 1
        answers += [module(x, t, class_labels=labels)]
    cached.end()
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5)


def test_samples_belong_to_their_seeds_whatever_the_batch(make):
    module = make(steps=6)
    torch.testing.assert_close(images(module, plain(), batch_size=1), images(module, plain()), atol=1e-4, rtol=1e-4)


def test_guidance_keeps_both_halves():
    module = labelled(steps=6, guidance_scale=2.0)
    before = images(module)
    assert torch.equal(images(module, plain(interval=1)), before)
    assert sqnr(images(module, plain(interval=2)), before) > 5


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.PNDMScheduler(1000, skip_prk_steps=True), diffusers.DPMSolverMultistepScheduler(1000)],
    ids=["plms", "dpm++"],
)
def test_other_schedulers(scheduler):
    module = sampler(scheduler=scheduler, steps=6)
    before = images(module)
    assert torch.equal(images(module, plain(interval=1)), before)
    cached = plain(interval=2)
    assert sqnr(images(module, cached), before) > 5
    assert cached.runs["skipped"] >= 3


# ---------------------------------------------------------------- calibration


def test_correction_brings_the_kept_feature_nearer_at_every_step(make):
    """Along the trajectories that it was found on; what that does to samples is for evidence on trained models."""
    module = make(steps=12)
    cached = FeatureCache(interval=4, calibration_loader=seeds(5), calibration_samples=5)
    images(module, cached)
    point, given = cached.point(module), {"class_labels": torch.arange(5)} if module.conditions else {}
    kept = corrected = None
    with deep_feature(module.denoiser, point.deep, point.point, point.residual) as feature:
        for moment in module.trajectory(torch.arange(5), **given):
            kept = feature[0] if moment.k in (0, 4, 8) else kept
            shape = [1, -1, 1, 1] if kept.dim() == 4 else [-1]
            corrected = kept * cached.scale[moment.k].view(shape) + cached.shift[moment.k].view(shape)
            if moment.k in (0, 4, 8):
                assert torch.equal(corrected, feature[0])
            else:
                assert (corrected - feature[0]).square().sum() < (kept - feature[0]).square().sum()


def test_the_schedule_goes_where_the_feature_moves(make):
    module = make(steps=12)
    chosen = FeatureCache(interval=4, schedule="dps", calibration_loader=seeds(5), calibration_samples=5)
    images(module, chosen)
    assert len(chosen.refresh) == 3 and chosen.refresh[0] == 0 and chosen.runs == {"deep": 3, "skipped": 9}
    assert all(2 <= b - a <= 8 for a, b in pairwise([*chosen.refresh, 12]))


def test_a_weighted_schedule_asks_the_samples_what_they_lose():
    """In a U-Net whose deep part answers two things only: a kept answer is wrong where the next one is another."""
    module, changes, step = sampler(steps=12), 6, []
    point = FeatureCache().point(module)
    module.denoiser.register_forward_pre_hook(lambda *_: step.append(len(step) % 12))
    for layer in (module.denoiser.get_submodule(point.point).get_submodule(n) for n in ("conv2", "conv_shortcut")):
        layer.register_forward_hook(
            lambda _, args, out: torch.linspace(0, 1 + (step[-1] >= changes), 8).expand_as(out).clone()
        )
    lost = dict(stale_groups(module, point, [0, 4, 8], torch.arange(2), {}))
    assert lost[0] == lost[8] == 0 < lost[4]
    chosen = FeatureCache(4, "weighted", correct=False, calibration_loader=seeds(5), calibration_samples=5)
    exact = images(module)
    assert torch.equal(images(module, chosen), exact)
    assert changes in chosen.refresh and len(chosen.refresh) == 3 and chosen.runs == {"deep": 3, "skipped": 9}


def test_a_weighted_schedule_on_any_denoiser(make):
    chosen = FeatureCache(interval=4, schedule="weighted", calibration_loader=seeds(5), calibration_samples=5)
    images(make(steps=12), chosen)
    assert len(chosen.refresh) == 3 and all(3 <= b - a <= 6 for a, b in pairwise([*chosen.refresh, 12]))


def test_a_correction_is_kept_where_the_samples_gain_by_it(make):
    module, chosen = make(steps=12), {}
    for correct in (True, "auto"):
        chosen[correct] = FeatureCache(4, correct=correct, calibration_loader=seeds(5), calibration_samples=5)
        images(module, chosen[correct])
    point, given = chosen[True].point(module), module.seeds_of(next(iter(seeds(5, 5))))
    with_it = dict(stale_groups(module, point, [0, 4, 8], *given, chosen[True].scale, chosen[True].shift))
    without = dict(stale_groups(module, point, [0, 4, 8], *given))
    for first in (0, 4, 8):
        group = slice(first, first + 4)
        scale, shift = chosen["auto"].scale[group], chosen["auto"].shift[group]
        if with_it[first] < without[first]:
            assert torch.equal(scale, chosen[True].scale[group]) and torch.equal(shift, chosen[True].shift[group])
        else:
            assert (scale == 1).all() and (shift == 0).all()


def test_validate_calibrates_and_judges_the_cached_sampler(make):
    module = make(steps=8, validation_samples=4)
    cached = FeatureCache(interval=4, schedule="dps")
    run = trainer(cached)
    (logged,) = run.validate(module, pictures(), verbose=False)
    assert 0 < logged["trajectory_sqnr"] < 100
    assert untouched(module)
    (again,) = run.validate(module, pictures(), verbose=False)
    assert again == logged
    assert sqnr(torch.cat(run.predict(module, seeds())), images(module)) > 0
    assert untouched(module)


@pytest.mark.parametrize(
    "arguments",
    [{"schedule": "dps", "correct": False}, {"schedule": "weighted", "correct": False}, {"correct": True}],
)
def test_without_calibration_predict_is_refused(arguments):
    module = sampler()
    with pytest.raises(RuntimeError, match=r"run trainer.validate\(model, ...\) before trainer.predict"):
        images(module, FeatureCache(**arguments))
    assert untouched(module)


def test_the_checkpoint_brings_the_schedule_and_the_correction(tmp_path):
    module = sampler(steps=8)
    run = trainer(FeatureCache(interval=4, schedule="dps"))
    run.validate(module, pictures(), verbose=False)
    before = torch.cat(run.predict(module, seeds()))
    run.save_checkpoint(tmp_path / "cached.ckpt")
    new = trainer(FeatureCache(interval=4, schedule="dps"))
    again = new.predict(sampler(steps=8), seeds(), ckpt_path=tmp_path / "cached.ckpt")
    assert torch.equal(torch.cat(again), before)
    other = trainer(FeatureCache(interval=2, schedule="dps"))
    with pytest.raises(ValueError, match="cached with interval=4, and this FeatureCache has interval=2"):
        other.predict(sampler(steps=8), seeds(), ckpt_path=tmp_path / "cached.ckpt")


# ---------------------------------------------------------------- neighbours, and what is left behind


def test_the_float_twin_is_not_cached(make):
    module, cached = make(steps=6), plain()
    before = module.sample(torch.arange(5), **({"class_labels": torch.arange(5)} if module.conditions else {}))
    cached.begin(module)
    with as_float(module):
        twin = module.sample(torch.arange(5), **({"class_labels": torch.arange(5)} if module.conditions else {}))
    cached.end()
    assert torch.equal(twin, before)


@pytest.mark.parametrize("first", [True, False])
def test_with_quantization_on_either_side_of_it(make, first):
    module = make(steps=6)
    quantization, cached = PostTrainingQuantization("int8", "int8", ranges="minmax"), plain()
    run = trainer(*([quantization, cached] if first else [cached, quantization]), Fidelity(["sqnr"], target=None))
    (logged,) = run.validate(module, pictures(), verbose=False)
    assert logged["trajectory_sqnr"] > 0 and logged["fidelity/sqnr"] > 0
    counts = calls(module, ["mid_block.resnets.0" if make is sampler else "transformer_blocks.1.attn1"])
    run.predict(module, seeds())
    assert list(counts.values()) == [2]
    assert not any(isinstance(m, CachedModule) for m in module.modules())
    quantization.remove(module)
    assert untouched(module)


def test_on_integer_kernels():
    module = sampler(steps=6)
    quantization = PostTrainingQuantization("int8", "int8", ranges="minmax")
    trainer(quantization).validate(module, pictures(), verbose=False)
    simulated = images(module, plain())
    torch.testing.assert_close(images(module, plain(), KernelSwap(backend="torch")), simulated, atol=1e-2, rtol=1e-2)
    assert not any(isinstance(m, CachedModule) for m in module.modules())


class Breaks(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise RuntimeError("broken")
        return index


def test_nothing_stays_behind_after_an_exception(make):
    module = make()
    module.conditions = []
    loader = DataLoader(Breaks(), batch_size=2)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        trainer(plain()).predict(module, loader)
    assert untouched(module)


def test_another_schedule_is_refused():
    module = sampler(steps=8)
    run = trainer(FeatureCache(interval=4))
    run.validate(module, pictures(), verbose=False)
    module.num_inference_steps = 4
    with pytest.raises(ValueError, match=r"cached for 8 steps .* this trajectory has 4 .*num_inference_steps"):
        run.predict(module, seeds())
    assert untouched(module)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="neither skip connections nor a list of three or more equal blocks in Own"):
        images(sampler(Own(), sample_shape=(1, 8, 8)), plain())
    with pytest.raises(ValueError, match=r"the answer of one of \['up_blocks.0.attentions.0', .* can be kept"):
        images(sampler(), plain(cache_point="up_blocks.7"))
    with pytest.raises(ValueError, match="has 3 blocks, and no run 1:9"):
        images(labelled(), plain(cache_point="transformer_blocks.1:9"))
    with pytest.raises(TypeError, match="FeatureCache needs a model that samples step by step"):
        validate(TinyTransformer(), plain())
    with pytest.raises(ValueError, match="begins 0"):
        FeatureCache(schedule=[1, 2])
    with pytest.raises(ValueError, match="goes beyond the steps"):
        images(sampler(), plain(schedule=[0, 9]))


def test_a_wider_part_can_be_cut_out_of_a_deeper_net():
    net = dit(layers=5)
    module = sampler(net, conditions=["class_labels"], steps=6)
    counts = calls(module, [f"transformer_blocks.{i}.attn1" for i in range(5)])
    images(module, plain(cache_point="transformer_blocks.2:4"))
    assert list(counts.values()) == [6, 6, 2, 2, 6]
    deeper = sampler(unet(layers_per_block=2), steps=6)
    counts = calls(deeper, [f"{side}.resnets.{i}" for side in ("down_blocks.0", "up_blocks.1") for i in (0, 1)])
    images(deeper, plain(cache_point="up_blocks.1.resnets.0"))
    assert list(counts.values()) == [6, 2, 2, 6]


def test_a_text_conditioned_unet_of_four_levels():
    torch.manual_seed(0)
    denoiser = diffusers.UNet2DConditionModel(
        16, 4, 4, block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=4,
    )  # fmt: skip
    nothing = {"encoder_hidden_states": torch.zeros(3, 6)}
    module = sampler(denoiser.eval(), steps=4, guidance_scale=5.0, unconditional=nothing)
    batch = {"seed": torch.arange(2), "encoder_hidden_states": torch.randn(2, 3, 6)}
    before = trainer().predict(module, DataLoader([batch], batch_size=None))[0]
    assert torch.equal(trainer(plain(interval=1)).predict(module, DataLoader([batch], batch_size=None))[0], before)
    cached = plain(interval=2)
    assert cached.point(module).point == "up_blocks.3.attentions.1"
    deep, shallow = ["mid_block.resnets.0", "down_blocks.0.resnets.0"], ["resnets.2", "attentions.2"]
    counts = calls(module, [*deep, *(f"up_blocks.3.{name}" for name in shallow)])
    assert trainer(cached).predict(module, DataLoader([batch], batch_size=None))[0].shape == before.shape
    assert list(counts.values()) == [2, 2, 4, 4]
