"""A fixed noise in front of a uniform grid."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.quantizers import NoisyQuantizer, UniformQuantizer, build_quantizer


def with_noise(quantizer, noise):
    quantizer.set_state(quantizer.scale, quantizer.zero_point, noise)


def noisy(text="int4_asym", x=None, noise=None):
    x = torch.randn(50, 6) if x is None else x
    quantizer = NoisyQuantizer(text, axis=-1)
    quantizer.fit(x)
    if noise is not None:
        with_noise(quantizer, noise)
    return quantizer


@pytest.mark.parametrize("text", ["int4_asym", "int4_sym", "uint6_asym", "int4_asym_channel"])
def test_without_noise_it_is_the_uniform_quantizer(text):
    x = torch.randn(50, 6)
    plain = build_quantizer(text, axis=-1)
    plain.fit(x)
    for quantizer in (noisy(text, x), noisy(text, x, torch.zeros(6))):
        assert torch.equal(quantizer(x), plain(x))
        assert torch.equal(quantizer.encode(x), plain.encode(x))


@pytest.mark.parametrize("text", ["int4_asym", "int4_asym_channel"])
def test_codes_are_those_of_the_noisy_tensor_and_the_noise_is_taken_off(text):
    x, noise = torch.randn(50, 6), torch.randn(6) * 0.1
    quantizer, plain = noisy(text, x, noise), build_quantizer(text, axis=-1)
    plain.fit(x)
    assert torch.equal(quantizer(x), plain(x + noise) - noise)
    assert torch.equal(quantizer.encode(x), plain.encode(x + noise))
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x))
    assert not torch.equal(quantizer(x), plain(x))


@pytest.mark.parametrize(("x", "change"), [(0.1, -0.477), (0.9, 0.323)])
def test_error_changes_as_the_formula_says(x, change):
    """D = n^2/3 - (b/n)(n - x)^2 with bins of width 2b = 2, a value x beside an edge, and noise in (-1, 1).

    The error without noise is (b - x)^2; over the noise it is on average by D larger.
    """
    b = n = 1.0
    assert n**2 / 3 - (b / n) * (n - x) ** 2 == pytest.approx(change, abs=1e-3)
    channels = 200_001
    quantizer = NoisyQuantizer("int4_sym", axis=-1)
    quantizer.freeze(torch.tensor(-14.0), torch.tensor(14.0))  # a step of 2: edges at odd numbers
    values = torch.full((1, channels), 1 + x)
    before = (quantizer(values) - values).square().mean()
    with_noise(quantizer, (torch.arange(channels) + 0.5) / channels * 2 * n - n)
    after = (quantizer(values) - values).square().mean()
    assert float(after - before) == pytest.approx(change, abs=2e-3)


def test_state_survives_a_state_dict_and_a_new_range_has_no_noise():
    x = torch.randn(50, 6)
    quantizer, other = noisy(x=x, noise=torch.randn(6)), NoisyQuantizer("int4_asym", axis=-1)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x)) and other.noise.shape == (6,)
    other.fit(x)
    assert float(other.noise) == 0.0


def test_refusals():
    for text in ("int4_token", "int8_dynamic"):
        with pytest.raises(ValueError, match="takes no noise"):
            NoisyQuantizer(text, axis=-1)
    with pytest.raises(ValueError, match="takes no noise"):
        NoisyQuantizer("int4_asym", axis=0)
    quantizer = NoisyQuantizer("int4_asym", axis=-1)
    with pytest.raises(ValueError, match="not calibrated"):
        with_noise(quantizer, torch.zeros(3))
    quantizer.fit(torch.randn(5, 3))
    with pytest.raises(ValueError, match="finite noise"):
        with_noise(quantizer, torch.tensor([0.0, float("nan"), 0.0]))
    assert isinstance(quantizer, UniformQuantizer)
