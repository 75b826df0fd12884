"""Bars around a grid: nothing is lost, and the grid is where it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import build_quantizer, to_steps
from lightning_quant.reports import TensorError, bars


def error_of(scheme, x, axis=None):
    quantizer = build_quantizer(scheme, axis)
    quantizer.fit(x)
    error = TensorError("input", quantizer)
    error.add(x)
    return error


@pytest.mark.parametrize("scheme", ["int2", "uint8_asym", "int8_sym", "fp8_e5m2", "fp4_e2m1", "log2_4", "int16"])
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    outlier=st.sampled_from([0.0, 1e-30, 1e30]),
)
def test_every_value_is_in_a_bar_or_beside_them(scheme, values, outlier):
    x = torch.tensor(values).abs() + 1e-3
    error = error_of(scheme, x)
    more = torch.tensor([outlier])
    error.add(more)
    cut = bars(error)
    seen = x.numel() + int(to_steps(error.quantizer, more).isfinite())
    assert sum(cut.counts) + cut.below + cut.above == seen
    assert len(cut.counts) <= 200
    assert cut.start <= cut.levels[0] and cut.end >= cut.levels[-1]


def test_ends_of_the_grid_in_values():
    x = torch.linspace(-1, 3, 101)
    error = error_of("int4_asym", x)
    cut = bars(error)
    places = dict(cut.values)
    assert list(places) == [0.0, float(error.quantizer.zero_point), 15.0]
    assert places[0.0] == pytest.approx(-1, abs=0.2) and places[15.0] == pytest.approx(3, abs=0.2)
    assert places[float(error.quantizer.zero_point)] == 0


def test_channels_share_a_ruler_but_no_values():
    weight = torch.randn(3, 50) * torch.tensor([[1.0], [10.0], [100.0]])
    cut = bars(error_of("int4_sym_channel", weight, axis=0))
    assert cut.values is None
    assert cut.levels == [float(q) for q in range(-8, 8)]
    assert cut.below == cut.above == 0
    assert cut.start < -7 and cut.end > 7 and cut.end - cut.start < 25


def test_nothing_finite_gives_no_bars():
    quantizer = build_quantizer("int4_sym")
    quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    error = TensorError("input", quantizer)
    assert bars(error) is None
    error.add(torch.full((3,), float("nan")))
    assert bars(error) is None


def test_facts_are_small_for_a_fine_grid():
    cut = bars(error_of("int16_sym", torch.randn(1000)))
    assert cut.facts["levels"] == 65536 and cut.facts["first_and_last_level"] == [-32768.0, 32767.0]
    assert len(str(cut.facts)) < 2000
