from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import Histogram

ELEMENT = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 1e-20, 0.1]),
)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("lo", "hi", "exponent", "counts"))


@given(values=st.lists(ELEMENT, min_size=1, max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4), data=st.data())
def test_any_split_in_any_order_gives_the_histogram_of_all(values, cuts, data):
    order = data.draw(st.permutations(values))
    ends = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    parts = [order[a:b] for a, b in itertools.pairwise(ends)]
    histograms = [Histogram.of(torch.tensor([part]), 16) for part in parts]
    whole = Histogram.of(torch.tensor([values]), 16)
    assert same(functools.reduce(Histogram.merge, histograms), whole)
    assert same(functools.reduce(Histogram.merge, reversed(histograms)), whole)
    assert int(whole.counts.sum()) == len(values)


@given(values=st.lists(ELEMENT, min_size=1, max_size=40))
def test_bins_hold_their_values_and_are_as_narrow_as_fits(values):
    bins = 16
    x = torch.tensor(values)
    histogram = Histogram.of(x[None], bins)
    width = 2.0 ** float(histogram.exponent)
    reach = (float(x.max()) - float(x.min())) / (bins + 1)  # bin 0 is twice as wide
    finest = 2.0**-126 + float(x.abs().max()) * 2.0**-23
    assert reach <= width <= max(4 * reach, finest)
    centres, counts = histogram.sorted_bins()
    assert bool((centres.diff() >= 0).all())
    assert float(centres.min()) >= float(x.min())
    assert float(centres.max()) <= float(x.max())
    repeated = centres[0].repeat_interleave(counts[0])
    assert bool(((repeated.double() - x.sort().values.double()).abs() <= width).all())


def test_rows_are_independent():
    rows = torch.randn(5, 300) * torch.logspace(-4, 4, 5).unsqueeze(1)
    together = Histogram.of(rows, 64)
    for row in range(5):
        alone = Histogram.of(rows[row : row + 1], 64)
        assert torch.equal(together.counts[row], alone.counts[0])
        assert int(together.exponent[row]) == int(alone.exponent[0])


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-9, 1.0, 1e30])
def test_all_zeros_then_real_data(size):
    zeros, data = Histogram.of(torch.zeros(1, 10), 64), torch.randn(1, 500) * size
    assert same(zeros.merge(Histogram.of(data, 64)), Histogram.of(torch.cat([torch.zeros(1, 10), data], 1), 64))


def test_number_of_bins_is_a_power_of_two():
    with pytest.raises(ValueError, match="bins=100"):
        Histogram.of(torch.zeros(1, 3), 100)
