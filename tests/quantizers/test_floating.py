from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import FloatQuantizer, float_grid, float_max, float_quantize

FORMATS = [(2, 1), (3, 2), (2, 3), (4, 3), (5, 2), (1, 2), (3, 0), (1, 0), (5, 10), (8, 7), (8, 3), (6, 5)]
FORMAT = st.sampled_from(FORMATS)


def nearest(x, grid):
    """The definition: the nearest grid value, to the one with an even code on ties."""
    right = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    below, above = grid[right - 1].double(), grid[right].double()
    # Codes count from 0 in both directions, so the middle of the grid is code 0.
    above_is_even = (right - len(grid) // 2) % 2 == 0
    to_above, to_below = above - x.double(), x.double() - below
    up = (to_above < to_below) | ((to_above == to_below) & above_is_even)
    return torch.where(up, above, below).to(x.dtype)


def frozen(exponent, mantissa, reach=None):
    quantizer = FloatQuantizer(f"fp{1 + exponent + mantissa}_e{exponent}m{mantissa}")
    reach = torch.tensor(float_max(exponent, mantissa) if reach is None else reach)
    quantizer.freeze(-reach, reach)
    return quantizer


@pytest.mark.parametrize(
    ("exponent", "mantissa", "largest"),
    [
        (4, 3, 448.0),
        (5, 2, 57344.0),
        (2, 1, 6.0),
        (3, 2, 28.0),
        (2, 3, 7.5),
        (5, 10, torch.finfo(torch.float16).max),
        (8, 7, torch.finfo(torch.bfloat16).max),
    ],
)
def test_largest_value(exponent, mantissa, largest):
    assert float_max(exponent, mantissa) == largest
    assert float(float_grid(exponent, mantissa)[-1]) == largest


@pytest.mark.parametrize(
    ("exponent", "mantissa", "dtype"),
    [
        (4, 3, torch.float8_e4m3fn),
        (5, 2, torch.float8_e5m2),
        (5, 10, torch.float16),
        (8, 7, torch.bfloat16),
    ],
)
def test_equals_the_cast_of_torch_bit_for_bit(exponent, mantissa, dtype):
    largest = torch.finfo(dtype).max
    smallest = torch.finfo(dtype).smallest_normal
    x = torch.cat([torch.randn(4001) * scale for scale in (smallest / 4, smallest, 1.0, largest / 4)])
    x = x[x.abs() <= largest]
    # Ties between neighbours as well.
    grid = float_grid(exponent, mantissa)
    x = torch.cat([x, grid, grid[:-1] / 2 + grid[1:] / 2])
    assert torch.equal(float_quantize(x, exponent, mantissa), x.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_grid_holds_every_finite_value_of_torchs_type(dtype):
    exponent, mantissa = (4, 3) if dtype == torch.float8_e4m3fn else (5, 2)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    expected = values[values.isfinite()].unique()
    assert torch.equal(float_grid(exponent, mantissa), expected)


@given(form=FORMAT, seed=st.integers(0, 2**31), power=st.integers(-8, 8))
def test_rounds_to_the_nearest_grid_value(form, seed, power):
    grid = float_grid(*form)
    x = torch.randn(301, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    if form[1]:  # without mantissa bits there is no even neighbour to prefer
        x = torch.cat([x, (grid[:-1] / 2 + grid[1:] / 2)[:500]])
    x = x[x.abs() >= torch.finfo(torch.float32).tiny]
    assert torch.equal(float_quantize(x, *form), nearest(x.clamp(grid[0], grid[-1]), grid))


@given(form=FORMAT, reach=st.floats(2**-10, 2**10, width=32), seed=st.integers(0, 2**31))
def test_properties(form, reach, seed):
    quantizer = frozen(*form, reach)
    x = (torch.randn(201, generator=torch.Generator().manual_seed(seed)) * reach).sort().values
    y = quantizer(x)
    assert torch.equal(quantizer(y), y), "idempotent"
    assert bool((y.diff() >= 0).all()), "monotone"
    if form[0] < 8:  # with 8 exponent bits the format reaches as far as float32 itself
        assert float(y.abs().max()) <= reach * 1.0001, "saturates at the range"
        assert torch.equal(frozen(*form, reach * 8)(x * 8), y * 8), "a power of two scales exactly"
    codes = quantizer.encode(x)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**quantizer.scheme.bits
    assert torch.equal(quantizer.decode(codes), y), "decode of encode"
    assert torch.equal(torch.signbit(quantizer.decode(codes)), torch.signbit(y)), "minus zero has its own code"
    assert torch.equal(quantizer(-x), -y), "odd"


@pytest.mark.parametrize("form", FORMATS)
def test_every_bit_pattern_decodes_and_encodes_to_itself(form):
    exponent, mantissa = form
    quantizer = frozen(*form)
    quantizer.scale.fill_(1)
    codes = torch.arange(2 ** (1 + exponent + mantissa), dtype=torch.int32)
    values = quantizer.decode(codes)
    valid = values.abs() <= float_max(*form)
    assert torch.equal(quantizer.encode(values[valid]), codes[valid])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_are_the_bytes_of_torchs_type(dtype):
    quantizer = FloatQuantizer("fp8_e4m3" if dtype == torch.float8_e4m3fn else "fp8_e5m2")
    quantizer.freeze(torch.tensor(0.0), torch.tensor(torch.finfo(dtype).max))
    x = torch.randn(999) * 5
    assert torch.equal(quantizer.encode(x), x.to(dtype).view(torch.uint8).int())


def test_saturates_and_keeps_nan():
    y = float_quantize(torch.tensor([1e9, -1e9, float("inf"), float("nan"), 0.0]), 4, 3)
    assert y[:3].tolist() == [448.0, -448.0, 448.0]
    assert bool(y[3].isnan())
    assert float(y[4]) == 0


def test_float64_is_rounded_in_float64():
    x = torch.tensor([1 + 2**-4 + 1e-12], dtype=torch.float64)  # float32 would see a tie and round down to even
    assert float(float_quantize(x, 4, 3)) == 1.125
    assert float(float_quantize(x.float(), 4, 3)) == 1.0


def test_straight_through_inside_zero_outside():
    x = torch.tensor([-500.0, -3.3, 0.01, 448.0, 1e6], requires_grad=True)
    quantizer = frozen(4, 3)
    y = quantizer(x)
    assert torch.equal(y.detach(), quantizer(x.detach()))
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_learned_scale_gets_a_gradient():
    quantizer = frozen(2, 1, 3.0)
    quantizer.scale.requires_grad_(True)
    quantizer(torch.tensor([10.0, 0.6])).sum().backward()
    scale = 0.5
    assert float(quantizer.scale.grad) == pytest.approx(6 + (1.0 - 0.6 / scale))


@pytest.mark.parametrize("text", ["fp4_e2m1_channel", "fp4_e2m1_g4", "fp8_e4m3_token", "fp4_e2m1_g4_dynamic"])
def test_granularities(text):
    x = torch.randn(6, 8) * torch.logspace(-3, 3, 6).unsqueeze(1)
    quantizer = FloatQuantizer(text, axis=0)
    quantizer.fit(x)
    assert float(((quantizer(x) - x).norm(dim=1) / x.norm(dim=1)).max()) < 0.25


def test_zero_range():
    quantizer = FloatQuantizer("fp4_e2m1")
    quantizer.fit(torch.zeros(4), "mse")
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))
