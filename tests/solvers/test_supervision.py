"""Errors of layers and of a model's output, and what makes them comparable."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.solvers import Balance, moment_distance, output_distance


def test_the_divergence_is_torch_s_own():
    found, exact = torch.randn(7, 5), torch.randn(7, 5)
    want = F.kl_div(found.log_softmax(-1), exact.softmax(-1), reduction="batchmean")
    assert torch.allclose(output_distance(found, exact), want)
    tokens = output_distance(found.view(7, 1, 5).expand(7, 3, 5), exact.view(7, 1, 5).expand(7, 3, 5))
    assert torch.allclose(tokens, want)  # averaged over tokens, not summed


def test_moments_channel_by_channel():
    found, exact = torch.randn(6, 4, 3) * torch.tensor([1.0, 2.0, 3.0]), torch.randn(6, 4, 3) + 1
    mean, deviation, variance = 0.0, 0.0, 0.0
    for channel in range(3):
        a, b = found[..., channel].flatten(), exact[..., channel].flatten()
        mean += (a.mean() - b.mean()) ** 2
        deviation += (a.std(correction=0) - b.std(correction=0)) ** 2
        variance += b.var(correction=0)
    assert torch.allclose(moment_distance(found, exact), (mean + deviation) / variance, rtol=1e-4)
    assert torch.allclose(
        moment_distance(found.movedim(-1, 1), exact.movedim(-1, 1), channels=1), moment_distance(found, exact)
    )


@pytest.mark.parametrize("exact", [torch.zeros(8, 2), torch.ones(8, 2), torch.arange(2.0).expand(8, 2)])
def test_constant_channels_have_a_gradient(exact):
    found = exact.clone().requires_grad_()
    moment_distance(found, exact).backward()
    assert moment_distance(exact, exact) == 0 and found.grad.isfinite().all()
    assert moment_distance(exact + 1e-3, exact).isfinite()


def test_what_is_0_at_first_does_not_take_over():
    balance = Balance()
    balance.note("far", torch.tensor(0.0), unit=torch.tensor(1.0))
    assert balance("far", torch.tensor(1e-6)) <= 1
