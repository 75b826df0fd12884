"""The fastest way to codes, beside the exact one."""

import pytest
import torch

from lightning_quant.kernels import codes
from lightning_quant.kernels.codes import PIECE, Grid
from lightning_quant.quantizers import UniformQuantizer


def grid(scheme: str, lo: float, hi: float) -> Grid:
    quantizer = UniformQuantizer(scheme)
    quantizer.freeze(torch.tensor(lo), torch.tensor(hi))
    return Grid.of(quantizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "lo", "hi"),
    [
        ("int8_asym_tensor", -1.0, 3.0),
        ("int8_sym_tensor", -2.0, 2.0),
        ("uint8_asym_tensor", 0.0, 5.0),
        ("int7_asym_tensor", -1.0, 3.0),
        ("int8_asym_tensor", 1.0, 3.0),
    ],
)
def test_the_fastest_way_differs_at_ties_alone(scheme, lo, hi, dtype):
    torch.manual_seed(0)
    found, x = grid(scheme, lo, hi), (torch.randn(2 * PIECE + 100) * 2 + 1).to(dtype)
    fast, exact = found.unsigned(x, exact=False).int(), found.unsigned(x).int()
    off = fast != exact
    assert off.float().mean() < 5e-3 and (fast - exact).abs().max() <= 1
    steps = x[off].float() * found.inverse
    assert ((steps - steps.floor() - 0.5).abs() < 1e-4).all()


def test_rows_that_are_not_contiguous():
    found, x = grid("int8_asym_tensor", -1.0, 3.0), torch.randn(40, 30, dtype=torch.bfloat16).t()
    assert (found.unsigned(x, exact=False).int() - found.unsigned(x).int()).abs().max() <= 1


def test_without_the_operator_it_is_the_exact_way(monkeypatch):
    monkeypatch.setattr(codes, "_has_operator", lambda: False)
    found, x = grid("int8_asym_tensor", -1.0, 3.0), torch.randn(1000)
    assert torch.equal(found.unsigned(x, exact=False), found.unsigned(x))
