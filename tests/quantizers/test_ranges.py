from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import Distribution, Histogram, RangeRule, build_quantizer, search
from lightning_quant.quantizers import ranges as ranges_module

NAMES = ["minmax", "percentile", "mse", "lp", "percentile_mse", "running", "kl"]
FORMATS = ["int4_sym", "int3_asym", "uint4_sym", "fp4_e2m1", "fp8_e4m3", "logsqrt2_3"]


def heavy_tails(*shape):
    return torch.distributions.StudentT(3.0).sample(shape)


def error(text, x, rule, axis=None, norm=2.0):
    quantizer = build_quantizer(text, axis)
    quantizer.fit(x, rule)
    return (quantizer(x) - x).abs().pow(norm)


# ---------------------------------------------------------------- rules


def test_rules_by_name():
    for name in NAMES:
        rule = RangeRule.parse(name)
        assert rule.name == name
        assert RangeRule.parse(rule) is rule
    assert RangeRule.parse("mse").norm == 2.0
    assert RangeRule.parse("lp").norm == 2.4
    assert RangeRule.parse("percentile_mse").percentiles == (0.999, 0.9999, 0.99999)
    assert [name for name in NAMES if not RangeRule.parse(name).include_zero] == ["percentile_mse"]


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match='"mean" is not a range rule; the rules are minmax, percentile, mse'):
        RangeRule.parse("mean")
    for wrong in ({"percentiles": ()}, {"percentiles": (0.4,)}, {"candidates": 0}, {"momentum": 0.0}, {"norm": -1.0}):
        with pytest.raises(ValueError, match=r"percentiles|candidates"):
            RangeRule("mse", **wrong)


# ---------------------------------------------------------------- search


@given(seed=st.integers(0, 2**31), text=st.sampled_from(FORMATS))
def test_searched_error_is_never_above_minmax(seed, text):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(211, generator=generator) * torch.rand(211, generator=generator).pow(3)
    x = x.abs() if text.startswith(("log", "uint")) else x
    # Up to the rounding of the sums that are compared.
    assert error(text, x, "mse").sum() <= error(text, x, "minmax").sum() * 1.0001
    assert error(text, x, "lp", norm=2.4).sum() <= error(text, x, "minmax", norm=2.4).sum() * 1.0001


@pytest.mark.parametrize("text", ["int4_asym", "int4_sym", "fp4_e2m1"])
def test_percentiles_beat_minmax_on_heavy_tails(text):
    x = heavy_tails(40_000)
    for rule in ("percentile", "percentile_mse", "mse"):
        assert error(text, x, rule).mean() < 0.8 * error(text, x, "minmax").mean()


def test_percentile_mse_equals_the_search_of_repq_vit():
    """The paper's rule in plain torch: three pairs of quantiles, the least mean squared error."""
    x = torch.randn(3, 9001) * torch.tensor([[1.0], [0.01], [2.0]]) + torch.tensor([[0.0], [1.0], [-20.0]])
    quantizer = build_quantizer("int4_asym_channel", axis=0)
    quantizer.fit(x, "percentile_mse")
    for row in range(3):
        best = None
        for p in (0.999, 0.9999, 0.99999):
            hi, lo = torch.quantile(x[row], p), torch.quantile(x[row], 1 - p)
            scale = (hi - lo) / 15
            zero_point = torch.round(-lo / scale)
            y = (torch.clamp(torch.round(x[row] / scale) + zero_point, 0, 15) - zero_point) * scale
            loss = float((x[row] - y).square().mean())
            if best is None or loss < best[0]:
                best = (loss, float(scale), float(zero_point))
        assert float(quantizer.scale[row]) == pytest.approx(best[1], rel=1e-6)
        assert float(quantizer.zero_point[row]) == best[2]
    assert abs(float(quantizer.zero_point[2])) > 15, "the range does not include 0, so the zero point leaves the codes"


def test_mse_candidates_are_shrunken_ranges_and_the_first_wins_ties():
    quantizer = build_quantizer("int8_sym")
    quantizer.fit(torch.tensor([-1.0, 1.0, 0.0]), "mse")
    assert float(quantizer.scale) == pytest.approx(1 / 127)
    x = torch.cat([torch.randn(50_000), torch.tensor([12.0])])
    lo, hi = search(Distribution.of(x[None]), RangeRule.parse("mse"), build_quantizer("int2_sym"))
    assert float(hi) == pytest.approx(2.52), "the narrowest candidate"
    assert float(lo) == pytest.approx(float(x.min()) * 0.21)
    finer = RangeRule("mse", candidates=160)
    lo, hi = search(Distribution.of(x[None]), finer, build_quantizer("int2_sym"))
    assert float(hi) == pytest.approx(2.46)


def test_include_zero():
    x = torch.rand(1000) + 5
    distribution = Distribution.of(x[None])
    for name in ("minmax", "percentile", "mse"):
        lo, _ = search(distribution, RangeRule.parse(name), build_quantizer("int8_asym"))
        assert float(lo) == 0
    lo, _ = search(distribution, RangeRule("minmax", include_zero=False), build_quantizer("int8_asym"))
    assert float(lo) == float(x.min())


@pytest.mark.parametrize("rule", ["mse", "lp", "percentile_mse", "kl"])
def test_tiles_do_not_change_the_result(rule, monkeypatch):
    x = heavy_tails(5, 997)
    whole, tiled = build_quantizer("int4_channel", 0), build_quantizer("int4_channel", 0)
    whole.fit(x, rule)
    monkeypatch.setattr(ranges_module, "TILE", 100)
    tiled.fit(x, rule)
    assert torch.equal(whole.scale, tiled.scale)


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("text", FORMATS)
def test_hard_data(rule, text):
    for x in (torch.zeros(7), torch.full((7,), 3.0), torch.tensor([2.0]), torch.tensor([1e-38, 1e38, 0.0])):
        quantizer = build_quantizer(text)
        quantizer.fit(x, rule)
        assert bool(quantizer.scale.isfinite())
        assert bool(quantizer(x).isfinite().all())


def test_counted_values_are_scored_like_repeated_ones():
    values = torch.randn(2, 60).sort(1).values
    counts = torch.randint(0, 5, (2, 60))
    counts[:, 0] = counts[:, -1] = 1
    for rule in ("mse", "lp", "percentile_mse"):
        rule = RangeRule.parse(rule)
        quantizer = build_quantizer("int3_asym_channel", axis=0)
        lo, hi = search(Distribution(values, counts, values[:, 0], values[:, -1]), rule, quantizer)
        for row in range(2):
            repeated = values[row].repeat_interleave(counts[row])[None]
            expected = search(Distribution.of(repeated), rule, quantizer)
            assert float(lo[row]) == pytest.approx(float(expected[0]), rel=1e-4)
            assert float(hi[row]) == pytest.approx(float(expected[1]), rel=1e-4)


def test_divergence_clips_outliers_and_keeps_a_uniform_range():
    x = torch.cat([torch.randn(100_000), torch.tensor([25.0])])
    quantizer = build_quantizer("int8_sym")
    quantizer.fit(x, "kl")
    assert 3 < float(quantizer.scale) * 127 < 10
    uniform = torch.linspace(-1, 1, 100_001)
    quantizer.fit(uniform, "kl")
    assert float(quantizer.scale) * 127 > 0.95


def test_divergence_of_counts_equals_divergence_of_values():
    x = heavy_tails(1, 50_000)
    quantizer = build_quantizer("int4_asym")
    histogram = Distribution.of_histogram(Histogram.of(x, 4096))
    for ours, expected in zip(
        search(Distribution.of(x), RangeRule.parse("kl"), quantizer),
        search(histogram, RangeRule.parse("kl"), quantizer),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_room_reaches_beyond_what_was_found():
    quantizer, x = build_quantizer("int8_asym"), Distribution.of(torch.tensor([[-1.0, 0.5, 2.0]]))
    lo, hi = search(x, RangeRule("minmax", room=1.5), quantizer)
    assert (float(lo), float(hi)) == (-1.5, 3.0)
    with pytest.raises(ValueError, match="room is at least 1"):
        RangeRule("minmax", room=0.9)
