"""Centred smoothing leaves the function as it was, and makes symmetric what was not."""

import pytest
import torch
from torch import nn

from lightning_quant.quantizers import build_quantizer
from lightning_quant.transforms import fold_pair, smoothing


def lopsided(tokens=203, channels=17):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-1, 1, channels)
    return x.exp().clamp(max=50) + torch.linspace(-5, 9, channels)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha):
    x, w = lopsided(), torch.randn(5, 17)
    divisor, shift = smoothing(x.amin(0), x.amax(0), [w], alpha)
    for j in range(17):
        b = (x[:, j].max() + x[:, j].min()) / 2
        s = (x[:, j] - b).abs().max() ** alpha / w[:, j].abs().max() ** (1 - alpha)
        assert torch.isclose(-shift[j].float(), b, rtol=1e-4) and torch.isclose(divisor[j].float(), s, rtol=1e-4)


def test_channels_reach_as_far_up_as_down():
    x = lopsided()
    divisor, shift = smoothing(x.amin(0), x.amax(0), [torch.randn(5, 17)])
    new = (x.double() + shift) / divisor
    assert torch.allclose(new.amax(0), -new.amin(0), rtol=1e-5)


def test_folded_it_computes_the_same():
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 3, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias, std=3)
    x = torch.randn(50, 8)
    with torch.no_grad():
        y = norm(x)
        want = first(y), second(y)
        found = smoothing(y.amin(0), y.amax(0), [first.weight, second.weight])
        fold_pair(norm, [first, second], found.divisor, found.shift)
        assert norm(x).abs().amax(0).allclose(norm(x).amax(0), rtol=1e-4)
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip((first(norm(x)), second(norm(x))), want, strict=True)
        )


def test_constant_channels_and_empty_columns_stay_finite():
    lo, hi = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    divisor, shift = smoothing(lo, hi, [torch.tensor([[1.0, 0.0, 0.0]])])
    assert divisor.isfinite().all() and (divisor > 0).all() and shift.tolist() == [-2, 0, 0]


def test_centring_makes_a_symmetric_grid_more_exact():
    x, w = lopsided(), torch.randn(5, 17, generator=torch.Generator().manual_seed(1))

    def error(**how):
        divisor, shift = smoothing(x.amin(0), x.amax(0), [w], **how)
        quantizer, new = build_quantizer("int4_sym_tensor"), ((x + shift) / divisor).float()
        quantizer.fit(new, "mse")
        return ((quantizer(new) - new) * divisor @ w.double().t()).square().mean()

    assert error() < 0.5 * error(centre=False)
