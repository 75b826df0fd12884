from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import UniformQuantizer, dequantize, fake_quantize, quantize, uniform_state

BOUND = st.floats(-1e4, 1e4, width=32)
RANGE = st.tuples(BOUND, BOUND).map(sorted)
FORMAT = st.sampled_from(["int2_sym", "int4_sym", "int8_sym", "int3_asym", "uint8_asym", "uint4_sym", "uint1_asym"])


def naive(x, scale, zero_point, qmin, qmax):
    """The definition: round, add, clamp, subtract, multiply."""
    q = torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)
    return (q - zero_point) * scale


def fitted(text, lo, hi, axis=None):
    quantizer = UniformQuantizer(text, axis)
    quantizer.freeze(torch.as_tensor(lo), torch.as_tensor(hi))
    return quantizer


def samples(lo, hi, n=257):
    width = max(hi - lo, 1e-3)
    return torch.linspace(lo - width, hi + width, n)


# ---------------------------------------------------------------- the grid


@given(bounds=RANGE, text=FORMAT)
def test_properties_of_the_grid(bounds, text):
    lo, hi = min(bounds[0], 0.0), max(bounds[1], 0.0)
    quantizer = fitted(text, lo, hi)
    x = samples(lo, hi)
    y = quantizer(x)
    scale, zero_point = quantizer.scale, quantizer.zero_point
    assert torch.equal(quantizer(y), y), "idempotent"
    assert bool((y.diff() >= 0).all()), "monotone"
    assert torch.equal(zero_point, zero_point.round()), "integer zero point"
    steps = y.double() / scale.double() + zero_point.double()
    assert torch.allclose(steps, steps.round(), atol=1e-3), "grid membership"
    assert steps.min().round() >= quantizer.scheme.qmin
    assert steps.max().round() <= quantizer.scheme.qmax
    lowest, highest = y.min(), y.max()
    inside = (x >= lowest) & (x <= highest)
    assert bool(((x - y).abs()[inside] <= scale * 0.5001).all()), "error at most half a step inside the grid"
    assert float(quantizer(torch.zeros(1))) == 0, "zero is exact"


@given(bounds=RANGE, text=FORMAT, power=st.integers(-20, 20))
def test_scaling_the_data_by_a_power_of_two_scales_the_result_exactly(bounds, text, power):
    lo, hi = bounds
    factor = 2.0**power
    x = samples(lo, hi)
    small, large = fitted(text, lo, hi), fitted(text, lo * factor, hi * factor)
    if small.scale > 1e-30 and large.scale > 1e-30:
        assert torch.equal(large(x * factor), small(x) * factor)


@given(bounds=RANGE, text=FORMAT)
def test_decode_of_encode_is_forward_bit_for_bit(bounds, text):
    quantizer = fitted(text, *bounds)
    x = samples(*bounds)
    codes = quantizer.encode(x)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**quantizer.scheme.bits
    assert torch.equal(quantizer.decode(codes), quantizer(x))


def test_codes_count_from_the_lowest_integer():
    assert fitted("int8_sym", -127.0, 127.0).encode(torch.tensor([-500.0, 0.0, 500.0])).tolist() == [0, 128, 255]


def test_scale_and_zero_point_of_a_range():
    lo, hi = torch.tensor(-1.0), torch.tensor(3.0)
    assert [float(t) for t in uniform_state(lo, hi, 0, 15, symmetric=False)] == pytest.approx([4 / 15, 4])
    assert [float(t) for t in uniform_state(lo, hi, -8, 7, symmetric=True)] == pytest.approx([3 / 7, 0])
    assert [float(t) for t in uniform_state(lo, hi, 0, 15, symmetric=True)] == pytest.approx([3 / 15, 0])


# ---------------------------------------------------------------- agreement with torch


@given(
    scale=st.floats(2**-10, 2**10, width=32),
    bits=st.integers(2, 8),
    zero=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_equals_torch_fake_quantize_bit_for_bit(scale, bits, zero, seed):
    qmin, qmax = 0, 2**bits - 1
    zero_point = round(zero * qmax)
    x = torch.randn(515, generator=torch.Generator().manual_seed(seed)) * scale * qmax
    # Ties, where the rounding rule shows.
    x = torch.cat([x, (torch.arange(-20, 20) + 0.5) * scale])
    ours = fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), qmin, qmax)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("text", ["int8_sym_channel", "int4_asym_channel"])
def test_equals_torch_fake_quantize_per_channel_bit_for_bit(axis, text):
    x = torch.randn(5, 7, 3) * torch.tensor([0.1, 1.0, 30.0])
    quantizer = UniformQuantizer(text, axis)
    quantizer.fit(x)
    scheme = quantizer.scheme
    theirs = torch.fake_quantize_per_channel_affine(
        x, quantizer.scale, quantizer.zero_point.int(), axis % 3, scheme.qmin, scheme.qmax
    )
    assert torch.equal(quantizer(x), theirs)


@pytest.mark.parametrize("zero_point", [-300.0, -1.0, 0.0, 7.0, 16.0, 900.0, 3.25])
def test_zero_points_outside_the_codes_and_fractional_ones(zero_point):
    x, scale, z = torch.randn(1001) * 100, torch.tensor(0.25), torch.tensor(zero_point)
    assert torch.allclose(fake_quantize(x, scale, z, 0, 15), naive(x, scale, z, 0, 15))
    if zero_point == 3.25:
        quantizer = fitted("uint4_asym", 0.0, 1.0)
        quantizer.zero_point.fill_(zero_point)
        with pytest.raises(ValueError, match="fractional zero point"):
            quantizer.encode(x)
    else:
        assert torch.equal(dequantize(quantize(x, scale, z, 0, 15), scale, z), fake_quantize(x, scale, z, 0, 15))


# ---------------------------------------------------------------- hard tensors


@pytest.mark.parametrize("text", ["int4_sym", "int4_asym", "uint4_sym"])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 3e38])
def test_constant_tensors_survive(text, value):
    x = torch.full((9,), value)
    for rule in ("minmax", "mse", "percentile_mse", "kl"):
        quantizer = UniformQuantizer(text)
        quantizer.fit(x, rule)
        y = quantizer(x)
        assert bool(y.isfinite().all())
        assert bool(quantizer.scale > 0)
        if not (text == "uint4_sym" and value < 0):
            assert torch.allclose(y, x, rtol=1e-5, atol=1e-37)


def test_a_narrow_range_far_from_zero_keeps_an_exact_zero_point():
    for width in (1e-1, 1e-3, 1e-5, 0.0):
        scale, zero_point = uniform_state(torch.tensor(100.0), torch.tensor(100.0 + width), 0, 15, symmetric=False)
        assert abs(float(zero_point)) <= 2**22
        y = fake_quantize(torch.tensor(100.0), scale, zero_point, 0, 15)
        assert torch.allclose(y, torch.tensor(100.0), atol=float(scale) / 2)


def test_dead_channel_leaves_the_others_alone():
    weight = torch.randn(3, 8)
    weight[1] = 0
    quantizer = UniformQuantizer("int4_channel", axis=0)
    quantizer.fit(weight, "mse")
    assert torch.equal(quantizer(weight)[1], weight[1])
    assert bool(quantizer(weight).isfinite().all())


@pytest.mark.parametrize("text", ["int8_sym", "int8_asym", "int8_token", "int8_asym_g3_dynamic"])
def test_nan_stays_nan(text):
    quantizer = UniformQuantizer(text)
    if not quantizer.scheme.dynamic:
        quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    assert bool(quantizer(torch.tensor([[float("nan"), 0.5, 1.0]])).isnan()[0, 0])


def test_infinity_saturates():
    y = fitted("int8_sym", -1.0, 1.0)(torch.tensor([float("inf"), -float("inf"), 1e38]))
    assert y.tolist() == pytest.approx([1.0, -128 / 127, 1.0])


# ---------------------------------------------------------------- gradients


def test_straight_through_inside_zero_outside():
    x = torch.tensor([-3.0, -1.0, 0.2, 0.9, 3.0], requires_grad=True)
    quantizer = fitted("int4_sym", -1.0, 1.0)
    y = quantizer(x)
    assert torch.equal(y.detach(), quantizer(x.detach()))
    (y * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_learned_scale_and_zero_point_get_the_lsq_gradient():
    x = torch.tensor([-9.0, 0.3, 0.8, 9.0])
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    fake_quantize(x, scale, zero_point, 0, 7).sum().backward()
    inside = sum(round(v / 0.5) - v / 0.5 for v in (0.3, 0.8))
    assert float(scale.grad) == pytest.approx((0 - 2) + inside + (7 - 2))
    assert float(zero_point.grad) == pytest.approx(-0.5 * 2)  # the two clipped elements


def test_channel_scales_get_gradients_of_their_own_shape():
    x = torch.randn(4, 6, requires_grad=True)
    quantizer = fitted("int4_sym_channel", -torch.ones(4), torch.ones(4), axis=0)
    quantizer.scale.requires_grad_(True)
    quantizer(x).square().sum().backward()
    assert quantizer.scale.grad.shape == (4,)
    assert x.grad.shape == x.shape


def test_gradient_equals_torch_fake_quantize():
    x = torch.randn(101) * 2
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(ours, torch.tensor(0.1), torch.tensor(8.0), 0, 15).square().sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, 0.1, 8, 0, 15).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_input_is_not_touched():
    x = torch.randn(50)
    before = x.clone()
    fitted("int4_sym", -1.0, 1.0)(x)
    assert torch.equal(x, before)
