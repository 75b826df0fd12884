"""Levels for attention maps, chosen by what attention makes of the error."""

import pytest
import torch

from lightning_quant.quantizers import TangentQuantizer
from lightning_quant.solvers import fit_attention_levels

FORMATS = ["tan_4", "atan_4", "log2_4", "logsqrt2_4", "uint4_asym"]


def attention(sharpness, heads=2):
    torch.manual_seed(0)
    maps = torch.softmax(sharpness * torch.randn(3, heads, 11, 13), -1)
    return maps, torch.randn(3, heads, 13, 5)


@pytest.mark.parametrize("sharpness", [0.5, 2, 6])
def test_the_error_is_that_of_the_product(sharpness):
    maps, values = attention(sharpness)
    for text, (error, quantizer) in fit_attention_levels(maps, values, FORMATS, queries=11).items():
        assert str(quantizer.scheme).startswith(text)
        assert error == pytest.approx(float(((quantizer(maps) - maps) @ values).square().sum()), rel=1e-5)
        assert error < float((maps @ values).square().sum())


def test_curvature_and_largest_level_are_the_best_of_the_grid():
    maps, values = attention(3)
    curvatures, percentiles = (0.3, 0.9, 1.3), (0.9, 1.0)
    best = fit_attention_levels(maps, values, ["tan_4"], percentiles, curvatures, queries=11)["tan_4"]
    for curvature in curvatures:
        for percentile in percentiles:
            only = fit_attention_levels(maps, values, ["tan_4"], (percentile,), (curvature,), queries=11)["tan_4"]
            assert best.error <= only.error * 1.000001
    assert isinstance(best.quantizer, TangentQuantizer)
    assert any(float(best.quantizer.curvature) == pytest.approx(curvature) for curvature in curvatures)


def test_values_shared_by_several_heads():
    maps, values = attention(3, heads=4)
    shared = fit_attention_levels(maps, values[:, ::2], ["tan_4"])["tan_4"]
    repeated = fit_attention_levels(maps, values[:, ::2].repeat_interleave(2, 1), ["tan_4"])["tan_4"]
    assert shared.error == pytest.approx(repeated.error)


def test_values_in_another_layout_leave_the_error_of_the_map():
    maps, values = attention(3)
    error, quantizer = fit_attention_levels(maps, values.transpose(1, 2), ["log2_4"], queries=11)["log2_4"]
    assert error == pytest.approx(float((quantizer(maps) - maps).square().sum()), rel=1e-5)
