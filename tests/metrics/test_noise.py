import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.audio import signal_noise_ratio

from lightning_quant.metrics import SQNR, sqnr


@given(st.integers(0, 99), st.floats(1e-2, 10), st.sampled_from([(7,), (3, 5), (2, 3, 4, 5)]))
def test_equals_numpy_and_torchmetrics(seed, noise, shape):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator)
    quantized = reference + noise * torch.randn(shape, generator=generator)
    r, x = reference.double().numpy(), quantized.double().numpy()
    found = sqnr(quantized, reference).item()
    assert found == pytest.approx(10 * np.log10((r**2).sum() / ((r - x) ** 2).sum()), abs=1e-5)
    # torchmetrics adds an epsilon to both energies, which shows only where there is hardly any noise
    audio = signal_noise_ratio(quantized.double().flatten(), reference.double().flatten())
    assert found == pytest.approx(audio.item(), abs=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_costs_six_decibels_a_bit(bits):
    x = torch.rand(100_000) * 2 - 1
    step = 2 / 2**bits
    uniform = 6.0206 * bits  # 10 log10((1/3) / (step^2 / 12)) of uniform numbers
    assert sqnr((x / step).round() * step, x).item() == pytest.approx(uniform, abs=0.1)


def test_knows_the_scale_and_the_roles():
    x = torch.randn(50)
    assert sqnr(1.1 * x, x).item() == pytest.approx(20.0, abs=1e-4)
    assert sqnr(x, 1.1 * x).item() == pytest.approx(20 * np.log10(11), abs=1e-4)


def test_the_ends_of_the_scale():
    x, zero = torch.randn(5), torch.zeros(5)
    assert sqnr(x, x) == sqnr(zero, zero) == float("inf")
    assert sqnr(x, zero) == -float("inf")
    assert sqnr(x.where(x > x.min(), float("nan")), x).isnan()


def test_sums_do_not_lose_small_batches_behind_a_large_one():
    metric = SQNR()
    metric.update(torch.full((1,), 1e5), torch.full((1,), 1e5))
    for _ in range(1000):
        metric.update(torch.full((1,), 1e-1), torch.full((1,), 1.1e-1))
    assert metric.noise.item() == pytest.approx(1000 * 1e-4, rel=1e-5)
    assert metric.signal.item() - 1e10 == pytest.approx(1000 * 1.21e-2, rel=1e-4)  # float32 would have kept none of it
