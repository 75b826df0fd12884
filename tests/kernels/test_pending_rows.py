"""A linear layer that takes the GELU behind it, and the next layer's rounding, into its product, between bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.int8_linear import Int8Linear
from lightning_quant.kernels.int8_product import saturates
from lightning_quant.kernels.layer_door import run_on
from lightning_quant.kernels.pending import Pending
from tests.cases import Case
from tests.kernels.layers import calibrated, skewed
from tests.models import Sequences, trainer

pytestmark = pytest.mark.skipif(saturates(), reason="sums of bytes saturate here, so they are windowed")


def pair(weights="int8_sym_channel", inputs="int8_asym_tensor", approximate="none"):
    torch.manual_seed(0)
    first, second, x = nn.Linear(64, 128), nn.Linear(128, 32), skewed(3, 7, 64)
    with torch.no_grad():
        hidden = F.gelu(first(x), approximate=approximate)
        return calibrated(first, weights, inputs, x), calibrated(second, weights, inputs, hidden), x


def swap(*layers):
    for layer in layers:
        run_on(layer, Int8Linear.of(layer))


@torch.no_grad()
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("how", ["mixed", "true"])
def test_gelu_and_rounding_are_part_of_the_product(how, approximate):
    first, second, x = pair(approximate=approximate)
    if how == "true":
        first, second, x = first.bfloat16(), second.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "mixed"):
        want = second(F.gelu(first(x), approximate=approximate))
        swap(first, second)
        hidden = F.gelu(first(x), approximate=approximate)
        assert isinstance(hidden, Pending) and hidden.dtype == torch.bfloat16 and hidden.shape == (3, 7, 128)
        out = second(F.dropout(hidden, 0.5, False)) + 0
    assert out.dtype == want.dtype
    assert (out.float() - want.float()).norm() < 0.01 * want.float().norm()
    assert first.kernel.in_words == "int8 (oneDNN) + gelu -> codes"


@torch.no_grad()
def test_whoever_else_reads_is_given_floats():
    first, second, x = pair()
    with torch.autocast("cpu", torch.bfloat16):
        want = first(x), F.gelu(first(x))
        swap(first, second)
        torch.testing.assert_close(first(x) + 0, want[0], rtol=0.02, atol=0.02)
        assert not first.kernel.patient  # nobody waits for a GELU any more
        torch.testing.assert_close(F.gelu(first(x)), want[1], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_between_floats_of_float32_nothing_is_taken_over():
    first, second, x = pair()
    want = second(F.gelu(first(x)))
    swap(first, second)
    assert not isinstance(first(x), Pending)
    assert torch.equal(second(F.gelu(first(x))), want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ("int8_asym_channel", "int8_asym_tensor"),
        ("int8_sym_channel", "int7_asym_tensor"),
        ("int8_sym_channel", "int8_asym_token_dynamic"),
    ],
)
def test_what_one_step_cannot_do_is_done_in_several(weights, inputs):
    first, second, x = pair(weights, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        want = second(F.gelu(first(x)))
        swap(first, second)
        out = second(F.gelu(first(x))) + 0
    assert (out.float() - want.float()).norm() < 0.01 * want.float().norm()
    assert not first.kernel.hands_on


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_predict_says_what_was_taken_over(backend):
    case = Case(PostTrainingQuantization, {"attention": False})
    model = case.quantized()
    simulated = torch.cat(trainer(case(), precision="bf16-mixed").predict(model, datamodule=Sequences())).float()
    swap = KernelSwap(backend)
    out = torch.cat(trainer(case(), swap, precision="bf16-mixed").predict(model, datamodule=Sequences())).float()
    assert (out - simulated).norm() < 0.03 * simulated.norm()
    kernels = {row.layer: row.kernel for row in swap.table.rows}
    assert backend == "auto" or kernels["blocks.0.fc1"] == kernels["blocks.1.fc1"] == "int8 (oneDNN) + gelu -> codes"
    assert kernels["blocks.0.qkv"] in ("int8 (oneDNN)", "float")


@torch.no_grad()
def test_a_clamp_is_taken_over_that_the_first_sample_does_not_need():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 128), torch.randn(16, 64)
    linear.bias.fill_(0.5)
    x[0] = 0  # answers 0.5, so that nothing is cut off
    layer = calibrated(linear, "int8_sym_channel", "int8_asym_tensor", x)
    swap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        bare = layer(x) + 0
        for follow in (F.relu, F.relu6, F.silu, F.hardswish):
            found = follow(layer(x)) + 0
            torch.testing.assert_close(found, follow(bare), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_codes_end_where_a_grid_of_fewer_bits_ends():
    torch.manual_seed(0)
    first, x = nn.Linear(64, 128), torch.randn(16, 64)
    second = calibrated(nn.Linear(128, 32), "int8_sym_channel", "int7_asym_tensor", 0.3 * first(x))
    first = calibrated(first, "int8_sym_channel", "int8_asym_tensor", x)
    swap(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        codes = first(x).codes_on(second.kernel.grid)
    assert codes.min() == 0 and codes.max() == 127


@torch.no_grad()
def test_a_norm_of_another_axis_reads_floats():
    torch.manual_seed(0)
    linear, norm, x = nn.Linear(64, 128), nn.BatchNorm1d(128).eval(), torch.randn(16, 64)
    layer = calibrated(linear, "int8_sym_channel", "int8_asym_tensor", x)
    swap(layer)
    torch.testing.assert_close(norm(layer(x.bfloat16())), norm(layer(x.bfloat16()) + 0))
