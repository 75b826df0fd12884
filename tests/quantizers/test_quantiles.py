from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import quantile


@given(
    n=st.integers(1, 400),
    q=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_torch_quantile(n, q, seed, dtype):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=dtype).mul(4).round()  # with ties
    expected = torch.quantile(x, torch.tensor(q, dtype=dtype), dim=1)
    assert torch.equal(quantile(x, q, dim=1), expected)
    assert torch.equal(quantile(x, q[0]), torch.quantile(x, torch.tensor(q[0], dtype=dtype)))
    assert torch.equal(quantile(x.t(), q, dim=0), expected)


@pytest.mark.parametrize("q", [0.999, 0.9999, 0.99999, 0.001, 0.5])
def test_equals_torch_quantile_on_a_million(q):
    x = torch.randn(1_000_003)
    assert torch.equal(quantile(x, q), torch.quantile(x, q))


def test_more_elements_than_torch_takes():
    n = 2**24 + 5
    x = torch.arange(n, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.5)
    for q in (1e-5, 0.999, 0.99999):
        assert float(quantile(x, q)) == pytest.approx(q * (n - 1), abs=2)
    assert quantile(x, [0.0, 1.0]).tolist() == [0.0, float(n - 1)]


def test_quantile_of_nan_half_precision_and_nonsense():
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 3.0, 2.0]])
    result = quantile(x, 0.5, dim=1)
    assert bool(result[0].isnan())
    assert float(result[1]) == 2
    assert quantile(x[1].bfloat16(), 0.75).dtype == torch.float32
    for bad, q in ((torch.empty(0), 0.5), (x, 1.5), (x, [-0.1])):
        with pytest.raises(ValueError, match="quantiles lie from 0 to 1"):
            quantile(bad, q)
