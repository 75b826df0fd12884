"""The cross step between that of a token and that of a channel."""

import pytest
import torch

from lightning_quant.quantizers import CrossQuantizer, build_quantizer, kernel_share


def crossed(x, alpha, bits=8):
    quantizer = CrossQuantizer(f"int{bits}_sym_token", alpha=alpha)
    quantizer.set_reach(x.abs().flatten(0, -2).amax(0))
    return quantizer


def outliers(tokens=40, channels=12):
    x = torch.randn(tokens, channels)
    x[:, 3] *= 50
    return x


@pytest.mark.parametrize("bits", [4, 8])
def test_at_its_ends_it_is_a_step_per_token_and_one_per_channel(bits):
    x = outliers()
    torch.testing.assert_close(crossed(x, 1.0, bits)(x), build_quantizer(f"int{bits}_sym_token", -1)(x))
    channel = build_quantizer(f"int{bits}_sym_channel", -1)
    channel.fit(x, "minmax")
    torch.testing.assert_close(crossed(x, 0.0, bits)(x), channel(x))


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.6, 1.0])
def test_is_the_formula_and_clips_nothing_that_it_has_seen(alpha):
    x = outliers().double()
    step = x.abs().amax(1, keepdim=True) ** alpha * x.abs().amax(0) ** (1 - alpha) / 127
    codes = (x / step).round()
    assert codes.abs().max() <= 127
    torch.testing.assert_close(crossed(x, alpha)(x), codes * step, rtol=1e-6, atol=0)


def test_fewer_numbers_become_zero_than_with_a_step_per_token():
    x = outliers()
    shares = [kernel_share(x, crossed(x, alpha, 4).state_for(x)[0]) for alpha in (1.0, 0.5, 0.15)]
    assert shares[0] > 0.8 and shares[2] < shares[1] < shares[0] and shares[2] < 0.3


def test_the_channels_factor_can_move_into_the_weight():
    x, weight = outliers().double(), torch.randn(5, 12, dtype=torch.float64)
    quantizer = crossed(x, 0.15)
    step = quantizer.state_for(x)[0]
    codes = (x / step).round()
    token = x.abs().amax(1, keepdim=True) ** 0.15 / 127
    folded = token * (codes @ (weight * quantizer.scale).T)
    torch.testing.assert_close(folded, quantizer(x) @ weight.T, rtol=1e-5, atol=1e-8)


def test_dead_channels_and_dead_tokens_give_no_nan():
    x = outliers()
    x[:, 5], x[7] = 0, 0
    quantizer = crossed(x, 0.15)
    assert quantizer(x).isfinite().all() and quantizer(x)[7].eq(0).all()
    later = x.clone()
    later[:, 5] = 1.0
    assert quantizer(later)[:7, 5].sub(1).abs().max() < 0.1


def test_the_state_is_saved_and_an_uncalibrated_one_hands_floats_on():
    x = outliers()
    quantizer, fresh = crossed(x, 0.15), CrossQuantizer("int8_sym_token", alpha=0.15)
    assert torch.equal(fresh(x), x) and not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize("scheme", ["int8_sym_tensor", "int8_asym_token", "uint8_sym_token"])
def test_other_formats_are_refused(scheme):
    with pytest.raises(ValueError, match="int8_sym_token"):
        CrossQuantizer(scheme)
