"""One scale for the whole tensor gives the very codes that one scale per channel gave (RepQ-ViT)."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import RangeRule, Scheme, UniformQuantizer
from lightning_quant.transforms import fold_norm, fold_pair, per_tensor

PERCENTILES = RangeRule.parse("percentile_mse")


def per_channel_and_whole(x, bits, round_zero_point=True, rule=PERCENTILES):
    """The quantizer calibrated on X (..., C), what was found, and the quantizer of X~."""
    per_channel = UniformQuantizer(f"int{bits}_asym_channel", axis=-1)
    per_channel.fit(x, rule)
    found = per_tensor(per_channel.scale, per_channel.zero_point, round_zero_point)
    whole = UniformQuantizer(f"int{bits}_asym_tensor")
    whole.scale, whole.zero_point = found.scale, found.zero_point  # as float64, to see the algebra and not its rounding
    return per_channel, found, whole


def codes(x, scale, zero_point, bits):
    return ((x.double() / scale.double()).round() + zero_point.double()).clamp(0, 2**bits - 1)


def ties(x, scale):
    """Where a value lies so near the middle of two codes that the last bit of a float decides."""
    return ((x.double() / scale.double()).frac().abs() - 0.5).abs() < 1e-6


def activations(seed, tokens=40, channels=9, spread=1.5):
    """Norm outputs as trained transformers have them: channels of very different widths and centres."""
    draw = torch.Generator().manual_seed(seed)
    width = torch.exp(spread * torch.randn(channels, generator=draw))
    return torch.randn(tokens, channels, generator=draw) * width + 2 * width * torch.randn(channels, generator=draw)


@given(seed=st.integers(0, 2**16), bits=st.sampled_from([2, 3, 4, 6, 8]), tokens=st.integers(2, 60))
def test_codes_are_the_same_integers(seed, bits, tokens):
    x = activations(seed, tokens)
    per_channel, found, whole = per_channel_and_whole(x, bits)
    scale, zero_point = per_channel.scale, per_channel.zero_point
    assume(bool((scale > 2e-4 * scale.mean()).all()))
    new = (x.double() + found.shift) / found.divisor
    clear = ~ties(x, scale)
    ours, theirs = codes(new, whole.scale, whole.zero_point, bits), codes(x, scale, zero_point, bits)
    assert torch.equal(ours[clear], theirs[clear]) and clear.float().mean() > 0.9
    assert torch.equal(theirs[clear], per_channel.encode(x).double()[clear])  # and the quantizer itself agrees
    assert torch.equal(whole.zero_point, whole.zero_point.round())


@given(seed=st.integers(0, 2**16), bits=st.sampled_from([3, 4, 8]))
def test_dequantized_values_are_moved_as_the_tensor_is(seed, bits):
    x = activations(seed)
    per_channel, found, whole = per_channel_and_whole(x, bits)
    assume(bool((per_channel.scale > 2e-4 * per_channel.scale.mean()).all()))
    new = whole((x.double() + found.shift) / found.divisor)
    want = (per_channel(x.double()) + found.shift) / found.divisor
    clear = ~ties(x, per_channel.scale)
    # Ties aside, the zero point of a far-off channel costs digits: 1e-4 of a step.
    assert float(((new - want).abs() / found.scale)[clear].max()) < 1e-4


def test_formulas():
    scale, zero_point = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([-3.0, 8.0, 9.0])
    found = per_tensor(scale, zero_point)
    assert found.scale == pytest.approx(0.3) and found.zero_point == 5.0  # the mean is 4.67
    assert torch.allclose(found.divisor.float(), scale / 0.3)
    assert torch.allclose(found.shift.float(), scale * (zero_point - 5))
    assert {tensor.dtype for tensor in found} == {torch.float64}
    fractional = per_tensor(scale, zero_point, round_zero_point=False)
    assert fractional.zero_point == pytest.approx(14 / 3)
    assert torch.allclose(fractional.shift.float(), scale * (zero_point - 14 / 3))


def test_the_median_has_the_least_mean_deviation_and_an_outlier_does_not_move_it():
    scale, zero_point = torch.tensor([0.1, 0.6, 0.2, 0.3]), torch.tensor([-3.0, 8.0, 9.0, 2.0])
    found = per_tensor(scale, zero_point, centre="median")
    assert found.zero_point == 2.0  # of an even number of channels: the lower one
    deviation = [float((scale - candidate).abs().mean()) for candidate in scale]
    assert float((scale - found.scale).abs().mean()) == pytest.approx(min(deviation))
    loud = torch.tensor([0.1, 60.0, 0.2, 0.3])
    assert per_tensor(loud, zero_point, centre="median").scale == found.scale
    assert per_tensor(loud, zero_point).scale > 50 * per_tensor(scale, zero_point).scale * 0.9


@given(seed=st.integers(0, 2**16))
def test_codes_do_not_depend_on_the_common_scale(seed):
    x = activations(seed)
    per_channel, mean, _ = per_channel_and_whole(x, 4)
    median = per_tensor(per_channel.scale, per_channel.zero_point, centre="median")
    clear = ~ties(x, per_channel.scale)
    one, other = (
        codes((x.double() + found.shift) / found.divisor, found.scale, found.zero_point, 4) for found in (mean, median)
    )
    assert torch.equal(one[clear], other[clear])


def test_a_fractional_zero_point_moves_codes():
    """What the published code does: its codes are no integers, and here and there another one is nearest."""
    x = activations(3)
    per_channel, found, _ = per_channel_and_whole(x, 4, round_zero_point=False)
    assert found.zero_point != found.zero_point.round()
    new = (x.double() + found.shift) / found.divisor
    ours = codes(new, found.scale, found.zero_point, 4)
    assert not torch.equal(ours, codes(x, per_channel.scale, per_channel.zero_point, 4))
    # Both are roundings of one number, so they lie within a step.
    inside = (ours > 0) & (ours < 15)
    assert float((ours - codes(x, per_channel.scale, per_channel.zero_point, 4))[inside].abs().max()) <= 1.0


def test_one_scale_for_all_channels_changes_nothing():
    scale, zero_point = torch.full((5,), 0.25), torch.full((5,), 7.0)
    found = per_tensor(scale, zero_point)
    assert found.scale == 0.25 and found.zero_point == 7
    assert torch.equal(found.divisor, torch.ones(5).double()) and torch.equal(found.shift, torch.zeros(5).double())


# ---------------------------------------------------------------- dead and nearly dead channels


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-6, 0.7, -40.0])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_dead_channel_gives_no_nan_and_keeps_the_function(value, bits):
    """Gamma is exactly 0, so the channel is a constant and its range 0: DeiT-Tiny has such a channel."""
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    nn.init.uniform_(norm.weight, 0.2, 3)
    norm.weight[2], norm.bias[2] = 0.0, value
    x = torch.randn(50, 6)
    want, normed = linear(norm(x)), norm(x)
    per_channel, found, whole = per_channel_and_whole(normed, bits)
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert float(found.divisor.min()) > 1e-5
    quantize_layer(linear, Scheme.parse("int8_asym_channel"), None)
    fold_pair(norm, [linear], found.divisor, found.shift)
    assert all(bool(p.isfinite().all()) for p in (*norm.parameters(), *linear.parameters()))
    assert float((linear(norm(x)) - want).norm() / want.norm()) < 1e-4
    alive = [0, 1, 3, 4, 5]
    clear = ~ties(normed, per_channel.scale)[:, alive]
    ours = codes(norm(x), whole.scale, whole.zero_point, bits)[:, alive]
    theirs = codes(normed, per_channel.scale, per_channel.zero_point, bits)[:, alive]
    assert float((ours - theirs)[clear].abs().max()) <= 1 and float((ours == theirs)[clear].float().mean()) > 0.98


@pytest.mark.parametrize("narrow", [1e-3, 1e-5, 1e-8, 1e-20])
@torch.no_grad()
def test_a_nearly_dead_channel_does_not_blow_up(narrow):
    """1 / r1 would be 1e8: the scale is floored relative to the mean, and the function stays."""
    norm, linear = nn.LayerNorm(6).double(), nn.Linear(6, 4).double()
    norm.weight[4], norm.bias[4] = narrow, 0.3 * narrow
    x = torch.randn(50, 6).double()
    want = linear(norm(x))
    _, found, _ = per_channel_and_whole(norm(x), 4)
    assert float((1 / found.divisor).max()) <= 1.01e4
    gamma, _ = fold_norm(norm.weight, norm.bias, found.divisor, found.shift)
    assert float(gamma.abs().max()) < 1e3
    fold_pair(norm, [linear], found.divisor, found.shift)
    assert float((linear(norm(x)) - want).norm() / want.norm()) < 1e-9


def test_all_channels_dead():
    found = per_tensor(*of_channels(torch.zeros(10, 3)))
    assert all(bool(tensor.isfinite().all()) for tensor in found) and bool((found.divisor > 0).all())


def of_channels(x):
    quantizer = UniformQuantizer("int4_asym_channel", axis=-1)
    quantizer.fit(x, PERCENTILES)
    return quantizer.scale, quantizer.zero_point


# ---------------------------------------------------------------- what it is for


def test_per_tensor_error_falls_to_the_per_channel_one():
    x = activations(0, tokens=400)
    per_channel, found, whole = per_channel_and_whole(x, 4)
    plain = UniformQuantizer("int4_asym_tensor")
    plain.fit(x, PERCENTILES)
    relative = lambda quantized: float((((quantized - x) / x.std(0)) ** 2).mean())  # noqa: E731
    folded = whole((x.double() + found.shift) / found.divisor) * found.divisor - found.shift
    assert relative(folded) == pytest.approx(relative(per_channel(x)), rel=1e-2)
    assert relative(folded) < relative(plain(x)) / 5
