"""The mean of inputs beside their second moments, and what a shift makes of both."""

import pytest
import torch
from torch import nn

from lightning_quant.calibration import Moments


@pytest.mark.parametrize("diagonal", [True, False])
def test_shifted_moments_are_those_of_shifted_inputs(diagonal):
    layer, x, shift = nn.Linear(5, 1), torch.randn(3, 40, 5) + 1, torch.randn(5)
    here, there = Moments.of(layer, diagonal), Moments.of(layer, diagonal)
    for batch in x:
        here.add(batch)
        there.add(batch - shift)
    found, before = here.shifted(shift), here.diagonal().clone()
    torch.testing.assert_close(found.diagonal(), there.diagonal(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(), there.mean(), rtol=1e-5, atol=1e-5)
    if not diagonal:
        torch.testing.assert_close(found.matrix(), there.matrix(), rtol=1e-5, atol=1e-5)
    assert torch.equal(here.diagonal(), before)


def test_mean_and_median_are_those_of_all_tokens():
    layer, x = nn.Linear(5, 1), torch.randn(7, 11, 5).exp()
    moments = Moments.of(layer, diagonal=True)
    for batch in x.split(2):
        moments.add(batch)
    moments.reduce()
    torch.testing.assert_close(moments.mean(), x.flatten(0, 1).mean(0))
    torch.testing.assert_close(moments.median(), x.flatten(0, 1).median(0).values)
