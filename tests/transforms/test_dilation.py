"""Weights that grow as far as the ranges of their output channels allow."""

import pytest
import torch
from torch import nn

from lightning_quant.layers import Dilation
from lightning_quant.transforms import dilation


def bounds(weight):
    rows = weight.flatten(1)
    return rows.amax(1).clamp(min=0), rows.amin(1).clamp(max=0)


@pytest.fixture(params=[(5, 40), (3, 17, 3, 2), (7, 9, 5)], ids=str)
def weight(request):
    torch.manual_seed(0)
    return torch.randn(request.param) * torch.rand(request.param[1]).view(-1, *[1] * (len(request.param) - 2))


def widened(weight, factor):
    dilated = Dilation(len(factor))
    dilated.factor.copy_(factor)
    return dilated.widen(weight)


def test_ranges_of_outputs_stay_bit_for_bit_and_nothing_shrinks(weight):
    factor = dilation(weight)
    assert (factor >= 1).all() and (factor > 1).any() and (factor == 1).any()
    assert all(torch.equal(a, b) for a, b in zip(bounds(widened(weight, factor)), bounds(weight), strict=True))
    saturated = factor == 1
    assert torch.equal(widened(weight, factor)[:, saturated], weight[:, saturated])


def test_every_dilated_channel_touches_a_bound(weight):
    factor = dilation(weight)
    wider, (top, bottom) = widened(weight, factor), bounds(weight)
    shape = (-1, *[1] * (weight.dim() - 1))
    room = torch.minimum((wider - top.view(shape)).abs(), (wider - bottom.view(shape)).abs())
    nearest = room.movedim(1, 0).flatten(1).amin(1)  # how far each input channel stays from a bound
    assert (nearest < 1e-5 * weight.abs().amax()).all()


def test_the_smoothing_of_smoothquant_changes_the_ranges_where_this_does_not(weight):
    free = weight.movedim(1, 0).flatten(1).abs().amax(1).rsqrt()  # balances the channels, whatever the bounds
    assert not torch.equal(bounds(widened(weight, free))[0], bounds(weight)[0])


def test_a_channel_of_zeros_and_a_tiny_one_are_no_trouble():
    weight = torch.tensor([[1.0, 0.0, 1e-9], [-1.0, 0.0, 0.0]])
    assert dilation(weight).tolist() == [1.0, 1.0, pytest.approx(1e4)]
    assert dilation(torch.zeros(2, 3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("layer", [nn.Linear(12, 5), nn.Conv2d(12, 5, 3, padding=1)], ids=["linear", "conv"])
def test_the_layer_computes_what_it_did(layer):
    x = torch.randn(2, 6, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 12, 4, 4)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    dilated = Dilation(12)
    dilated.factor.copy_(dilation(layer.weight))
    exact = layer(x)
    with torch.no_grad():
        layer.weight.copy_(dilated.widen(layer.weight))
    torch.testing.assert_close(layer(dilated.narrow(x, axis)), exact, atol=1e-5, rtol=1e-5)
