"""Learned rounding: where it starts, what it costs, and what it hardens to."""

import pytest
import torch

from lightning_quant.quantizers import build_quantizer, levels, to_steps
from lightning_quant.solvers import ROUNDINGS, FreeRounding, JointRounding, Reconstruction, SoftRounding, TrainedWeight

FORMATS = [
    "int4_sym_channel",
    "int4_asym_channel",
    "int2_sym_tensor",
    "uint3_asym_channel",
    "int4_sym_g8",
    "int4_asym_g5",
    "fp4_e2m1",
]


def weight_and_quantizer(scheme, seed=0, rule="mse"):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    quantizer = build_quantizer(scheme, axis=0)
    quantizer.fit(weight, rule)
    return weight, quantizer


@pytest.mark.parametrize("scheme", FORMATS)
def test_soft_rounding_starts_at_the_float_weight_within_the_range(scheme):
    weight, quantizer = weight_and_quantizer(scheme)
    soft = SoftRounding(quantizer, weight).weight()
    place, marks = to_steps(quantizer, weight), levels(quantizer)
    inside = (place >= marks[0]) & (place <= marks[-1])
    assert inside.float().mean() > 0.7
    assert torch.allclose(soft[inside], weight[inside], atol=1e-5)
    assert torch.allclose(soft[~inside], quantizer(weight)[~inside], atol=1e-6)  # an end of the grid


@pytest.mark.parametrize("scheme", FORMATS)
def test_hardened_at_once_it_is_rounding_to_the_nearest(scheme):
    weight, quantizer = weight_and_quantizer(scheme)
    nearest = quantizer(weight)
    SoftRounding(quantizer, weight).harden(quantizer)
    off = (quantizer(weight) - nearest).abs() > 1e-6
    assert not off.any() or (to_steps(quantizer, weight)[off] % 1 - 0.5).abs().max() < 1e-4  # ties only


@pytest.mark.parametrize("scheme", FORMATS)
def test_every_weight_hardens_to_one_of_its_two_neighbours(scheme):
    weight, quantizer = weight_and_quantizer(scheme)
    rounding = SoftRounding(quantizer, weight)
    with torch.no_grad():
        rounding.choice.normal_(generator=torch.Generator().manual_seed(1))
    up = rounding.choice >= 0
    rounding.harden(quantizer)
    solved, marks = quantizer(weight), levels(quantizer)
    place, found = to_steps(quantizer, weight), to_steps(quantizer, solved).round(decimals=3)
    assert torch.isin(found, marks).all()
    inside = (place >= marks[0]) & (place <= marks[-1])
    up = rounding._as_weight(up)
    assert (found[inside & up] >= place[inside & up] - 1e-3).all()
    assert (found[inside & ~up] <= place[inside & ~up] + 1e-3).all()


def test_the_penalty_is_nothing_for_decided_weights_and_one_for_each_in_the_middle():
    weight, quantizer = weight_and_quantizer("int4_sym_channel", rule="minmax")
    rounding = SoftRounding(quantizer, weight)
    with torch.no_grad():
        rounding.choice.fill_(30.0)
    assert rounding.penalty(2.0) == 0
    with torch.no_grad():
        rounding.choice.fill_(0.0)
    assert torch.isclose(rounding.penalty(2.0), (rounding.gap > 0).sum().float())


def test_gradients_reach_the_choice_but_not_beyond_the_range():
    quantizer = build_quantizer("int2_sym", axis=0)
    quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    rounding = SoftRounding(quantizer, torch.tensor([0.3, 5.0, -9.0]))
    rounding.weight().sum().backward()
    assert rounding.choice.grad.flatten()[0] > 0 and rounding.choice.grad.flatten()[1:].eq(0).all()


def test_the_step_size_of_joint_rounding_leaves_the_integers_alone():
    weight, quantizer = weight_and_quantizer("int3_asym_channel")
    rounding = JointRounding(quantizer, weight)
    before = rounding.weight().detach()
    with torch.no_grad():
        rounding.scale.mul_(1.1)
    assert torch.allclose(rounding.weight(), before * 1.1, atol=1e-6)
    codes = quantizer.encode(weight)
    rounding.harden(quantizer)
    assert torch.allclose(quantizer.scale, rounding.scale.flatten().detach())
    assert (quantizer.encode(weight) == codes).float().mean() > 0.99


def test_a_trained_weight_is_rounded_to_the_nearest():
    weight, quantizer = weight_and_quantizer("int4_sym_channel")
    rounding = TrainedWeight(quantizer, weight)
    assert torch.equal(rounding.weight(), quantizer(weight))
    rounding.weight().sum().backward()
    assert rounding.trained.grad.abs().sum() > 0
    with torch.no_grad():
        rounding.trained.add_(0.1)
    want = quantizer(weight + 0.1)
    rounding.harden(quantizer)
    assert torch.allclose(quantizer(weight), want)


UNIFORM = [scheme for scheme in FORMATS if "int" in scheme]


@pytest.mark.parametrize("scheme", UNIFORM)
def test_free_rounding_begins_and_ends_at_the_nearest(scheme):
    weight, quantizer = weight_and_quantizer(scheme)
    rounding, nearest = FreeRounding(quantizer, weight), quantizer(weight)
    assert rounding.weight().shape == weight.shape
    off = (rounding.weight() - nearest).abs() > 1e-6
    assert not off.any() or (to_steps(quantizer, weight)[off] % 1 - 0.5).abs().max() < 1e-4  # ties only
    rounding.harden(quantizer)
    assert torch.allclose(quantizer(weight)[~off], nearest[~off])


@pytest.mark.parametrize("scheme", UNIFORM)
def test_weight_scale_and_zero_point_move_freely_and_harden_to_what_was_computed_with(scheme):
    weight, quantizer = weight_and_quantizer(scheme)
    rounding = FreeRounding(quantizer, weight)
    optimizer = torch.optim.Adam(rounding.groups(0.3, 0.05 * quantizer.scale.mean().item()))
    target = weight + 3.4 * quantizer.scale.mean()  # several steps away
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append((rounding.weight() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    soft = rounding.weight().detach()
    rounding.harden(quantizer)
    assert torch.allclose(quantizer(weight), soft, atol=1e-5)
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
    assert rounding.zero_point.requires_grad != bool(quantizer.scheme.symmetric)


def test_the_gradient_of_scale_and_zero_point_is_that_of_the_formula():
    quantizer = build_quantizer("uint2_asym", axis=0)
    quantizer.freeze(torch.tensor(-1.0), torch.tensor(2.0))  # step 1, zero point 1: values -1, 0, 1, 2
    rounding = FreeRounding(quantizer, torch.tensor([0.3, 1.6, 9.0]))
    rounding.weight().sum().backward()
    # inside: the integer less the place, 0 - 0.3 and 2 - 1.6; beyond: the end of the grid, which the zero point moves
    assert torch.allclose(rounding.scale.grad, torch.tensor([[-0.3 + 0.4 + 2.0]]))
    assert torch.allclose(rounding.zero_point.grad, torch.tensor([[-1.0]]))
    assert rounding.trained.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_only_uniform_weights_have_a_zero_point_to_move():
    weight, quantizer = weight_and_quantizer("fp4_e2m1")
    with pytest.raises(ValueError, match="takes formats like 'int4'"):
        FreeRounding(quantizer, weight)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_diverged_rounding_is_refused(name):
    weight, quantizer = weight_and_quantizer("int4_sym_channel")
    rounding = ROUNDINGS[name](quantizer, weight)
    with torch.no_grad():
        next(iter(rounding.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="lower learning_rate="):
        rounding.harden(quantizer)


def test_an_uncalibrated_quantizer_has_nothing_to_round_with():
    with pytest.raises(ValueError, match="calibrate it first"):
        SoftRounding(build_quantizer("int4_sym", axis=0), torch.ones(2))


def test_presets_are_what_their_papers_say():
    adaround, brecq, qdrop = map(Reconstruction.parse, ("adaround", "brecq", "qdrop"))
    assert (adaround.granularity, adaround.phases, adaround.keep) == ("layer", ["weights"], 1.0)
    assert (brecq.granularity, brecq.phases, brecq.inputs) == ("block", ["weights", "activations"], "quantized")
    assert (qdrop.phases, qdrop.keep, qdrop.inputs) == (["joint"], 0.5, "mixed")
    for preset in (adaround, brecq, qdrop):
        assert preset.sharpness == (20.0, 2.0) and preset.warmup == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, "rounding='up' is none of"),
        ({"granularity": "net"}, "name patterns go in a list"),
        ({"phases": []}, "must be of 'weights'"),
        ({"phases": ["weights", "joint"]}, "more than once"),
        ({"keep": 1.5}, "from 0 to 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**arguments)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="none of 'adaround', 'brecq', 'qdrop'"):
        Reconstruction.parse("gptq")
