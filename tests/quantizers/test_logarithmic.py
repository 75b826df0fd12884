from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import (
    LogQuantizer,
    log_dequantize,
    log_dequantize_by_parity,
    log_fake_quantize,
    log_quantize,
)

SCALE = st.floats(2**-20, 2**20, width=32)
TEXTS = [f"log{base}_{bits}" for base in ("2", "sqrt2") for bits in (2, 3, 4, 5, 8)]


def paper(x, d, bits):
    """RepQ-ViT's formula for base sqrt(2), element by element."""
    if x <= 0:
        return 0.0
    k = round(-2 * math.log2(x / d))
    if k >= 2**bits:
        return 0.0
    q = max(k, 0)
    return d * 2 ** -math.ceil(q / 2) * (math.sqrt(2) if q % 2 else 1)


def frozen(text, d=1.0):
    quantizer = LogQuantizer(text)
    quantizer.freeze(torch.tensor(0.0), torch.tensor(d))
    return quantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("d", [1.0, 0.37, 1e-6])
def test_equals_the_formula_of_the_paper(bits, d):
    x = torch.rand(301).pow(6) * 1.2 * d
    x[:3] = torch.tensor([0.0, d, 1e-38])
    expected = torch.tensor([paper(v, d, bits) for v in x.double().tolist()])
    assert torch.allclose(log_fake_quantize(x, torch.tensor(d), bits, "sqrt2"), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@given(d=SCALE)
def test_parity_form_equals_direct_form_bit_for_bit(bits, d):
    codes, scale = torch.arange(2**bits + 1, dtype=torch.int32), torch.tensor(d)
    direct = log_dequantize(codes, scale, bits, "sqrt2")
    normal = (direct == 0) | (direct / max(d, 1) > torch.finfo(torch.float32).tiny)
    assert torch.equal(log_dequantize_by_parity(codes, scale, bits)[normal], direct[normal])
    assert float(direct[-1]) == 0


@pytest.mark.parametrize("text", TEXTS)
@given(d=SCALE, seed=st.integers(0, 2**31))
def test_properties_of_the_levels(text, d, seed):
    quantizer = frozen(text, d)
    x = torch.rand(203, generator=torch.Generator().manual_seed(seed)).pow(8).mul(1.5 * d).sort().values
    y = quantizer(x)
    assert torch.equal(quantizer(y), y), "idempotent"
    assert bool((y.diff() >= 0).all()), "monotone"
    codes = quantizer.encode(x)
    assert torch.equal(quantizer.decode(codes), y), "decode of encode"
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 2**quantizer.scheme.bits
    levels = quantizer.decode(torch.arange(2**quantizer.scheme.bits + 1))
    assert bool(torch.isin(y, levels).all()), "grid membership"
    ratio = (x / y)[(y > 0) & (x <= d)]
    half_step = 2 ** (0.5 / (2 if quantizer.base == "sqrt2" else 1))
    assert bool(((ratio <= half_step * 1.0001) & (ratio >= 0.9999 / half_step)).all()), "at most half a step off"


@pytest.mark.parametrize("text", TEXTS)
def test_ends_of_the_range(text):
    d = 0.3
    y = frozen(text, d)(torch.tensor([0.0, -0.1, 1e-45, d, 7.0, float("inf")]))
    assert y[:2].tolist() == [0.0, 0.0]
    assert float(y[2]) <= 1e-37
    assert torch.equal(y[3:], torch.full((3,), d))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("power", [-9, 5])
def test_scaling_by_a_power_of_two_is_exact(text, power):
    x, factor = torch.rand(99).pow(5), 2.0**power
    assert torch.equal(frozen(text, factor)(x * factor), frozen(text)(x) * factor)


def test_nan_stays_nan():
    x = torch.tensor([float("nan"), 0.5])
    assert bool(frozen("log2_4")(x).isnan()[0])
    assert bool(frozen("log2_4")(x.requires_grad_()).isnan()[0])


def test_gradient_is_straight_through_between_the_lowest_level_and_the_scale():
    x = torch.tensor([0.0, 1e-9, 0.1, 0.7, 3.0], requires_grad=True)
    quantizer = frozen("log2_4")
    y = quantizer(x)
    assert torch.equal(y.detach(), quantizer(x.detach()))
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_learned_scale_gets_a_gradient():
    scale = torch.tensor(1.0, requires_grad=True)
    log_fake_quantize(torch.tensor([0.1, 3.0]), scale, 4, "2").sum().backward()
    assert float(scale.grad) == pytest.approx((0.125 - 0.1) + 1)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "lp", "percentile_mse"])
def test_fits_softmax_probabilities(rule):
    x = torch.softmax(torch.randn(3, 5, 37, 37) * 3, -1)
    quantizer = LogQuantizer("logsqrt2_4")
    quantizer.fit(x, rule)
    assert 0 < float(quantizer.scale) <= float(x.max())
    assert float((quantizer(x) - x).square().mean()) < float(x.square().mean()) * 0.05


def test_all_zero_and_dynamic():
    quantizer = LogQuantizer("log2_4")
    quantizer.fit(torch.zeros(5))
    assert torch.equal(quantizer(torch.zeros(5)), torch.zeros(5))
    dynamic = LogQuantizer("log2_4_dynamic")
    x = torch.rand(50)
    assert float(dynamic(x).max()) == float(x.max())


def test_integer_kernel_form():
    """Shifting V right by ceil(q / 2) and choosing one of two scales is what the float product does."""
    d, bits = torch.tensor(1.0), 4
    q = log_quantize(torch.rand(64).pow(3), d, bits, "sqrt2").long()
    v = torch.randint(-128, 128, (64,))
    wide = 16  # shifted left first, or the small terms would vanish
    shifted = (v << wide) >> ((q + 1) // 2)
    alive = q < 2**bits
    even, odd = shifted[alive & (q % 2 == 0)].sum(), shifted[alive & (q % 2 == 1)].sum()
    kernel = (even + math.sqrt(2) * odd) / 2**wide
    simulated = (log_dequantize(q, d, bits, "sqrt2").double() * v).sum()
    assert float(kernel) == pytest.approx(float(simulated), rel=1e-6)
