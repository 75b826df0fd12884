"""Levels bent by a tangent, against the formulas element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import bend, build_quantizer, fake_quantize, unbend

CURVATURES = st.floats(0.0625, 1.5, width=32)
TEXTS = [f"{kind}_{bits}" for kind in ("tan", "atan") for bits in (2, 3, 4, 5, 8)]


def curved(text, curvature=1.0, d=1.0):
    quantizer = build_quantizer(text)
    quantizer.freeze(torch.tensor(0.0), torch.tensor(d))
    quantizer.curve(curvature)
    return quantizer


def all_levels(quantizer):
    return quantizer.decode(torch.arange(2**quantizer.scheme.bits))


def formula(kind, x, d, theta, bits):
    """Code and level, as the two formulas say."""
    n, u, tan = 2**bits - 1, min(max(x / d, 0.0), 1.0), math.tan(theta)
    if kind == "tan":
        q = round(n * math.atan(u * tan) / theta)
        return q, d * math.tan(theta * q / n) / tan
    q = round(n * math.tan(theta * u) / tan)
    return q, d * math.atan(tan * q / n) / theta


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("theta", "d"), [(0.3, 1.0), (1.5, 0.37), (1.0, 1e-6)])
def test_equals_the_formulas(text, theta, d):
    quantizer = curved(text, theta, d)
    x = (torch.rand(301, generator=torch.Generator().manual_seed(0)).double().pow(3) * 1.2 - 0.05) * d
    expected = [formula(quantizer.kind, v, d, theta, quantizer.scheme.bits) for v in x.tolist()]
    codes, values = (torch.tensor(column) for column in zip(*expected, strict=True))
    same = quantizer.encode(x) == codes
    assert float(same.float().mean()) > 0.99, "but for ties, which float32 decides"
    assert torch.allclose(quantizer(x)[same], values[same].double(), rtol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@given(theta=CURVATURES, d=st.floats(2**-20, 2**20, width=32), seed=st.integers(0, 2**31))
def test_properties_of_the_levels(text, theta, d, seed):
    quantizer = curved(text, theta, d)
    levels = all_levels(quantizer)
    assert float(levels[0]) == 0.0
    assert float(levels[-1]) == pytest.approx(d, rel=1e-6)
    assert bool((levels.diff() > 0).all()), "monotone"
    x = torch.rand(203, generator=torch.Generator().manual_seed(seed)).pow(4).mul(1.5 * d).sort().values
    y = quantizer(x)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), y), "decode of encode"
    assert torch.equal(quantizer(y), y), "idempotent"
    assert bool((y.diff() >= 0).all()) and bool(torch.isin(y, levels).all())


def test_tan_is_finer_near_zero_and_atan_near_the_largest_level():
    for theta in (0.5, 1.0, 1.5):
        tan, atan = (all_levels(curved(text, theta)).diff() for text in ("tan_4", "atan_4"))
        assert bool((tan.diff() > 0).all()) and bool((atan.diff() < 0).all())
        # the spacing at both ends, from the derivatives of the two maps
        assert float(tan[0]) == pytest.approx(theta / (15 * math.tan(theta)), rel=0.03)
        assert float(tan[0]) < 1 / 15 < float(tan[-1])


@pytest.mark.parametrize("text", ["tan_4", "atan_4"])
def test_without_curvature_it_is_the_uniform_grid(text):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    x = x[((x * 15).frac() - 0.5).abs() > 1e-3]  # ties may fall either way
    uniform = fake_quantize(x, torch.tensor(1 / 15), torch.tensor(0.0), 0, 15)
    assert torch.allclose(curved(text, 1e-4)(x), uniform, atol=1e-6)


@given(theta=CURVATURES, x=st.floats(0, 1, width=32))
def test_bend_and_unbend_are_inverse(theta, x):
    x, theta = torch.tensor(x, dtype=torch.float64), torch.tensor(theta, dtype=torch.float64)
    assert torch.allclose(bend(unbend(x, theta), theta), x, atol=1e-9)
    assert torch.allclose(unbend(bend(x, theta), theta), x, atol=1e-9)


@pytest.mark.parametrize("text", ["tan_4", "atan_4"])
def test_ends_of_the_range_and_nan(text):
    y = curved(text, 1.2, 0.3)(torch.tensor([-0.1, 0.0, 7.0, float("inf"), float("nan")]))
    assert y[:2].tolist() == [0.0, 0.0]
    assert torch.allclose(y[2:4], torch.tensor(0.3)) and bool(y[4].isnan())


@pytest.mark.parametrize("text", ["tan_4", "atan_4"])
def test_gradient_is_straight_through_between_zero_and_the_largest_level(text):
    x = torch.tensor([-1.0, 0.1, 0.7, 3.0], requires_grad=True)
    quantizer = curved(text)
    assert torch.equal(quantizer(x).detach(), quantizer(x.detach()))
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_state_survives_a_state_dict_and_a_new_range_begins_anew():
    quantizer, other = curved("tan_4", 1.3, 0.4), build_quantizer("tan_4")
    other.load_state_dict(quantizer.state_dict())
    x = torch.rand(99)
    assert torch.equal(other(x), quantizer(x)) and float(other.curvature) == pytest.approx(1.3)
    other.fit(x)
    assert float(other.curvature) == 1.0


def test_refusals():
    quantizer = build_quantizer("tan_4")
    with pytest.raises(ValueError, match="not calibrated"):
        quantizer.curve(1.0)
    quantizer.fit(torch.rand(9))
    for curvature in (0.0, -1.0, 1.6):
        with pytest.raises(ValueError, match=r"above 0 and up to 1\.5"):
            quantizer.curve(curvature)
    for text, problem in (
        ("tan_9", "2 to 8 bits"),
        ("atan_4_channel", "one scale per tensor"),
        ("tan_4_asym", "_asym"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_quantizer(text)
