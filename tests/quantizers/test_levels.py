"""The ruler on which the levels of a format are marked."""

import pytest
import torch

from lightning_quant.quantizers import NoisyQuantizer, build_quantizer, from_steps, levels, to_steps

FORMATS = ["int4_asym_channel", "int4_sym_g5", "uint3_asym", "int8_token", "fp4_e2m1_channel", "fp8_e4m3"]


@pytest.mark.parametrize("scheme", ["int3_sym", "uint4_asym", "fp4_e2m1", "logsqrt2_3", "tan_3", "atan_3"])
def test_levels_are_what_the_quantizer_gives(scheme):
    x = torch.rand(1000) + 1e-3
    quantizer = build_quantizer(scheme)
    quantizer.fit(x)
    given_back = quantizer(x).unique()
    on_grid = from_steps(quantizer, levels(quantizer))
    for value in given_back[given_back != 0]:
        assert (on_grid - value).abs().min() <= 1e-6 * value.abs()
    steps = to_steps(quantizer, on_grid[on_grid != 0])
    assert torch.allclose(steps, levels(quantizer)[on_grid != 0], atol=1e-4)


@pytest.mark.parametrize("scheme", FORMATS)
def test_rounding_is_going_to_the_nearest_mark(scheme):
    """Whatever shares a scale: each channel, group or token has its values on one and the same ruler."""
    x = torch.randn(6, 10) * torch.logspace(-2, 2, 6).unsqueeze(1)
    quantizer = build_quantizer(scheme, axis=0)
    quantizer.fit(x)
    marks = levels(quantizer)
    before, after = to_steps(quantizer, x), to_steps(quantizer, quantizer(x))
    assert before.shape == x.shape
    distance = (before.unsqueeze(-1) - marks).abs()
    assert torch.allclose((after - before).abs(), distance.amin(-1), atol=1e-3)


@pytest.mark.parametrize(
    ("scheme", "one"), [("int4", True), ("int4_channel", False), ("int4_g5", False), ("int8_dynamic", False)]
)
def test_steps_stand_for_values_only_where_one_scale_serves_all(scheme, one):
    quantizer = build_quantizer(scheme, axis=0)
    quantizer.fit(torch.randn(4, 10))
    assert (from_steps(quantizer, torch.zeros(1)) is not None) == one


def test_ruler_of_a_logarithm_ends_where_zero_begins():
    quantizer = build_quantizer("log2_3")
    quantizer.freeze(torch.tensor(0.0), torch.tensor(2.0))
    steps = to_steps(quantizer, torch.tensor([2.0, 0.5, 0.0, -1.0]))
    assert steps[:3].tolist() == [0.0, -2.0, -float("inf")] and steps[3].isnan()


def test_the_ruler_of_a_noisy_grid_is_that_of_the_noisy_tensor():
    quantizer = NoisyQuantizer("int4_asym", axis=-1)
    quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
    quantizer.set_state(quantizer.scale, quantizer.zero_point, torch.tensor([0.25, -0.5]))
    assert to_steps(quantizer, torch.tensor([[3.0, 3.0]])).tolist() == [[3.25, 2.5]]
    assert from_steps(quantizer, torch.zeros(1)) is None  # another value in each channel
