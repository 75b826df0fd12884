"""GPS: the closed form against a search, and the error of a layer behind it."""

import pytest
import torch
from torch import nn

from lightning_quant.quantizers import RangeRule, UniformQuantizer
from lightning_quant.transforms import fold_pair, gain_factors, gain_projection, smoothing, symmetric_shift

RULE = RangeRule("percentile_mse", percentiles=(0.999, 0.9999, 0.99999, 1.0))


def outliers(rows=600, channels=24):
    """Channels of different reach and middle, two of them far beyond the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator) * (0.3 + torch.rand(channels, generator=generator))
    x = x + torch.randn(channels, generator=generator)
    x[:, 3] = 20 * x[:, 3] + 30
    x[:, 11] *= 12
    return x, torch.randn(16, channels, generator=generator) * 0.1


def test_the_closed_form_is_the_least_of_all_factors():
    generator = torch.Generator().manual_seed(1)
    x_norm, weight_error, x_error, weight_norm = torch.rand(4, 7, generator=generator).double() + 0.1
    loudest = torch.tensor(2.0).double()
    t = torch.logspace(-2, 2, 40001).double()[:, None]
    lost = x_error * weight_norm * t**2 + x_norm * weight_error / t**2
    best = loudest * t[lost.argmin(0), 0]
    torch.testing.assert_close(
        gain_factors(x_norm, weight_error, x_error, weight_norm, loudest), best, rtol=1e-3, atol=0
    )


def test_a_channel_without_error_keeps_its_size_and_factors_stay_finite():
    one, none = torch.ones(2), torch.tensor([0.0, 1e-30])
    found = gain_factors(one, one, none, one, torch.tensor(5.0))
    assert found[0] == 1 and found[1] == 1e4


def test_the_middle_of_a_channel_comes_to_zero():
    x, _ = outliers()
    centred = x - symmetric_shift(x, 8, RULE)
    middle, reach = (centred.amax(0) + centred.amin(0)) / 2, centred.amax(0) - centred.amin(0)
    assert (middle.abs() < 0.02 * reach).all()


def test_the_layer_loses_less_than_smoothed_and_than_plain():
    x, weight = outliers()
    exact = x @ weight.T

    def error(divisor, shift):
        inputs, rows = UniformQuantizer("int6_asym"), UniformQuantizer("int6_asym_channel", axis=0)
        moved, scaled = (x + shift) / divisor, weight * divisor
        inputs.fit(moved, RULE)
        rows.fit(scaled, RULE)
        return float((inputs(moved) @ rows(scaled).T - shift @ weight.T - exact).square().mean())

    gain = gain_projection(x, [weight], (6, 6), RULE)
    smooth = smoothing(x.amin(0), x.amax(0), [weight], 0.5, centre=False)
    found = [
        error(gain.divisor.float(), gain.shift.float()),
        error(smooth.divisor.float(), torch.zeros(24)),
        error(torch.ones(24), torch.zeros(24)),
    ]
    assert found[0] < 0.8 * found[1] < 0.8 * found[2]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_folded_into_a_norm_the_function_stays(scale):
    norm, linear = nn.LayerNorm(24).double(), nn.Linear(24, 5).double()
    nn.init.normal_(norm.weight, std=scale)
    x = torch.randn(50, 24).double()
    exact, read = linear(norm(x)), norm(x).detach()
    found = gain_projection(read, [linear.weight], (6, 6), RULE)
    fold_pair(norm, [linear], found.divisor, found.shift)
    torch.testing.assert_close(linear(norm(x)), exact, atol=1e-8, rtol=1e-8)
