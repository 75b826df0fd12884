"""TwinLogQuantizer: its levels, its search against one that tries everything, and when it beats a uniform grid."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_quant.quantizers import Scheme, TwinLogQuantizer, build_quantizer, from_steps, levels, to_steps
from lightning_quant.quantizers.packing import pack, unpack
from lightning_quant.quantizers.twin_log import OFFSETS, PERCENTILES


def gaussian(rows=64, columns=1024):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.03


def long_tailed(rows=64, columns=1024):
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


def fitted(weight, text="twinlog_3_channel"):
    quantizer = build_quantizer(text, axis=0)
    quantizer.fit(weight)
    return quantizer


def error(quantizer, weight):
    return float((quantizer(weight) - weight).square().mean() / weight.var())


def by_the_formula(weight, bits, offset, upper, lower):
    """TLQ of one tensor, row by row, as the paper's formulas say it."""
    out, last = np.zeros(weight.shape), 2 ** (bits - 1) - 1
    for row, values in enumerate(weight.double().numpy()):
        for sign, p in ((1, upper), (-1, lower)):
            own = values * sign > 0
            if not own.any():
                continue
            logs = np.log2(np.abs(values[own]) + offset)
            low, high = logs.min(), np.quantile(logs, p)
            step = (high - low) / last
            z = np.round(low / step)
            q = np.clip(np.round(logs / step) - z, 0, last)
            out[row, own] = sign * np.maximum(2 ** ((q + z) * step) - offset, 0)
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_finds_the_best_of_all_offsets_and_percentiles(bits):
    weight = long_tailed(3, 41)
    tried = {
        (offset, up, low): float((by_the_formula(weight, bits, offset, up, low) - weight).square().mean())
        for offset, up, low in itertools.product(OFFSETS, PERCENTILES, PERCENTILES)
    }
    quantizer = fitted(weight, f"twinlog_{bits}_channel")
    assert float((quantizer(weight) - weight).square().mean()) == pytest.approx(min(tried.values()), rel=1e-3)
    assert float(quantizer.offset) == pytest.approx(min(tried, key=tried.get)[0])


@pytest.mark.parametrize("granularity", ["channel", "tensor", "g32"])
def test_codes_fit_the_bits_and_come_back(granularity):
    weight = gaussian(5, 100)
    quantizer = fitted(weight, f"twinlog_4_{granularity}")
    codes = quantizer.encode(weight)
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.equal(unpack(pack(codes, 4), 4, tuple(codes.shape)), codes)
    assert torch.equal(quantizer.decode(codes), quantizer(weight))
    again = build_quantizer(str(quantizer.scheme), axis=0)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(weight), quantizer(weight))


def test_each_row_has_as_many_levels_as_the_bits_tell_and_keeps_signs():
    weight = gaussian(4, 999)
    rounded = fitted(weight)(weight)
    assert max(len(row.unique()) for row in rounded) <= 8
    assert bool((rounded.sign() * weight.sign() >= 0).all())


def test_rows_without_a_sign_without_a_spread_or_without_anything():
    weight = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.2, 0.2, 0.2, 0.2], [-0.3, -0.3, 0.0, -0.3], [0.0, 0.0, 0.0, 0.0]])
    quantizer = fitted(weight)
    rounded = quantizer(weight)
    assert rounded.isfinite().all()
    torch.testing.assert_close(rounded[1], weight[1], atol=1e-5, rtol=0)
    assert (rounded[0] > 0).all()
    mirrored = quantizer(-weight[:1].expand(4, -1))[0]
    torch.testing.assert_close(mirrored, -rounded[0])  # a sign that a row lacked has the levels of the other


def test_long_tails_gain_and_bells_do_not():
    """The figures are shares of the variance; a uniform grid is clipped to the least error in each row."""
    uniform = {w: fitted(make(), "int3_asym_channel") for w, make in (("bell", gaussian), ("tails", long_tailed))}
    found = {w: error(fitted(make()), make()) for w, make in (("bell", gaussian), ("tails", long_tailed))}
    assert found["bell"] == pytest.approx(0.048, abs=0.002) and found["tails"] == pytest.approx(0.106, abs=0.015)
    for name, make in (("bell", gaussian), ("tails", long_tailed)):
        assert found[name] < 0.7 * error(uniform[name], make())
    clipped = {}
    for name, make in (("bell", gaussian), ("tails", long_tailed)):
        quantizer = build_quantizer("int3_sym_channel", axis=0)
        quantizer.fit(make(), "mse")
        clipped[name] = error(quantizer, make())
    assert found["bell"] > clipped["bell"]
    assert found["tails"] < 0.95 * clipped["tails"]


def test_the_ruler_has_its_levels_a_step_apart():
    quantizer = TwinLogQuantizer("twinlog_3")
    quantizer.fit(gaussian(8, 64))
    marks = levels(quantizer)
    assert torch.equal(from_steps(quantizer, marks), quantizer.decode(torch.arange(8)))
    torch.testing.assert_close(to_steps(quantizer, from_steps(quantizer, marks)), marks, atol=1e-3, rtol=0)


def test_the_gradient_passes_inside_and_stops_beyond():
    quantizer = TwinLogQuantizer("twinlog_3")
    quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    x = torch.tensor([-5.0, -0.4, 0.3, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_what_is_no_format():
    assert str(Scheme.parse("twinlog_4_channel")) == "twinlog_4_channel"
    assert Scheme.parse("twinlog_4_g32").group_size == 32
    for text in ("twinlog_9", "twinlog_4_asym"):
        with pytest.raises(ValueError, match=text):
            Scheme.parse(text)
    with pytest.raises(ValueError, match="cannot be dynamic"):
        TwinLogQuantizer("twinlog_4_dynamic")
    with pytest.raises(ValueError, match="finite"):
        TwinLogQuantizer("twinlog_4").fit(torch.tensor([math.nan]))
