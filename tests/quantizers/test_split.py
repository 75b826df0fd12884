"""Scales for each part of a concatenation: against a plain quantizer for each, and what they refuse."""

import pytest
import torch

from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import Observer, SplitObserver, SplitQuantizer, UniformQuantizer
from lightning_quant.solvers.rounding import FreeRounding, JointRounding, SoftRounding

PARTS = [3, 5, 1]


def joined(axis, shape=(4, 9, 6, 6)):
    """A tensor whose parts differ in their range by factors of 100."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    size = [1] * len(shape)
    size[axis] = 9
    return x * torch.tensor([1.0] * 3 + [0.01] * 5 + [100.0]).view(size)


@pytest.mark.parametrize(("scheme", "axis"), [("int4_asym", 1), ("uint5_sym", 1), ("int4_sym_channel", 0), ("int3", 0)])
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_each_part_is_as_a_quantizer_of_its_own_would_have_it(scheme, axis, rule):
    x, quantizer = joined(1), SplitQuantizer(scheme, axis, PARTS)
    quantizer.fit(x, rule)
    wanted = []
    for part in x.split(PARTS, 1):
        plain = UniformQuantizer(scheme, axis)
        plain.fit(part, rule)
        wanted.append((plain(part), plain.encode(part)))
    values, codes = (torch.cat(parts, 1) for parts in zip(*wanted, strict=True))
    assert torch.equal(quantizer(x), values) and torch.equal(quantizer.encode(x), codes)
    assert torch.equal(quantizer.decode(codes), values)
    assert quantizer.scale.shape == ((4, 3) if "channel" in scheme else (3,))


def test_one_scale_for_all_loses_the_small_part():
    x = joined(-1, (64, 9))
    split, plain = SplitQuantizer("int8_asym", -1, PARTS), UniformQuantizer("int8_asym", -1)
    for quantizer in (split, plain):
        quantizer.fit(x)
    small = slice(3, 8)
    assert sqnr(split(x)[:, small], x[:, small]) > 30 > 0 > sqnr(plain(x)[:, small], x[:, small]) - 1


@pytest.mark.parametrize("rule", ["minmax", "mse", "running"])
def test_an_observer_streams_and_merges_ranks(rule):
    batches = [joined(-1, (8, 9)), 2 * joined(-1, (8, 9)), 0.5 * joined(-1, (8, 9)).flip(0)]
    whole = SplitObserver(SplitQuantizer("int8_asym", -1, PARTS), rule)
    for batch in batches:
        assert whole(batch) is batch
    whole.freeze()
    for i, part in enumerate(range(3)):
        alone = Observer(UniformQuantizer("int8_asym", -1), rule)
        for batch in batches:
            alone(batch.split(PARTS, -1)[part])
        alone.freeze()
        assert whole.quantizer.scale[i] == alone.quantizer.scale
    ranks = [SplitObserver(SplitQuantizer("int8_asym", -1, PARTS), "minmax") for _ in range(2)]
    ranks[0](batches[0]), ranks[1](batches[1])
    ranks[0].merge(ranks[1].state())
    ranks[0].freeze()
    merged = SplitQuantizer("int8_asym", -1, PARTS)
    merged.fit(torch.cat(batches[:2]))
    assert torch.equal(ranks[0].quantizer.scale, merged.scale)


def test_state_survives_and_a_float_state_leaves_it_uncalibrated():
    x, quantizer = joined(-1, (4, 9)), SplitQuantizer("int4_asym", -1, PARTS)
    quantizer.fit(x)
    other = SplitQuantizer("int4_asym", -1, PARTS)
    assert other(x) is x
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    other.load_state_dict({})
    assert not other.calibrated


@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 3, 3)])
def test_rounding_is_learned_on_the_grid_of_each_half(shape):
    weight, quantizer = joined(1, shape), SplitQuantizer("int4_asym_channel", 0, PARTS)
    quantizer.fit(weight)
    rounding = SoftRounding(quantizer, weight)
    scale = torch.cat([quantizer.scale[:, i : i + 1].expand(4, n) for i, n in enumerate(PARTS)], 1)
    scale = scale.view(4, 9, *[1] * (len(shape) - 2))
    # it begins as the float weight; the ends of a range may be outside of the grid, by half a step
    assert (((rounding.weight() - weight) / scale).abs() <= 0.501).all()
    torch.testing.assert_close(rounding.weight().median(), weight.median())
    rounding.choice.data.fill_(9.0)
    rounding.harden(quantizer)
    up = (quantizer(weight) - weight) / scale
    assert (up > -0.501).all() and (up <= 1.001).all() and (up > 0.5).any()


@pytest.mark.parametrize("rounding", [JointRounding, FreeRounding])
def test_what_would_move_scales_apart_is_refused(rounding):
    quantizer = SplitQuantizer("int4_asym_channel", 0, PARTS)
    quantizer.fit(joined(1, (4, 9)))
    with pytest.raises(
        ValueError, match=r"take rounding='adaround', or leave the weight in one piece with split=False"
    ):
        rounding(quantizer, joined(1, (4, 9)))


@pytest.mark.parametrize(
    ("scheme", "axis", "parts"),
    [
        ("int4_channel", 1, PARTS),
        ("int4_dynamic", 1, PARTS),
        ("int4", None, PARTS),
        ("int4", 1, [9]),
        ("int4", 1, [9, 0]),
    ],
)
def test_other_formats_and_parts_are_refused(scheme, axis, parts):
    with pytest.raises(ValueError, match=r"for each part of a concatenation|two parts or more"):
        SplitQuantizer(scheme, axis, parts)


def test_another_width_is_refused():
    quantizer = SplitQuantizer("int4", 1, PARTS)
    with pytest.raises(ValueError, match=r"cuts 9 channels into \[3, 5, 1\].*\(2, 8\) with 8"):
        quantizer.fit(torch.randn(2, 8))
