"""Every kernel of a layer against the layer that it stands for."""

import copy

import pytest
import torch
from torch import nn

from lightning_quant.kernels import int8_product
from lightning_quant.kernels.decoded import DecodedWeights
from lightning_quant.kernels.int8_conv import Int8Conv
from lightning_quant.kernels.int8_linear import Int8Linear
from lightning_quant.kernels.layer_door import run_on
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.kernels.weight_only import Int4Weights, Int8Weights
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Pattern, Scheme
from tests.kernels.layers import assert_same, calibrated, skewed

WEIGHTS = [
    "int8_sym_channel",
    "int8_asym_channel",
    "int8_sym_tensor",
    "int4_sym_channel",
    "uint4_asym_channel",
    "int3_asym_channel",
]
STATIC = ["int8_asym_tensor", "int8_sym_tensor", "uint8_asym_tensor", "uint4_asym_tensor", "int7_asym_tensor"]
DYNAMIC = ["int8_sym_token", "int8_asym_token", "int8_asym_tensor_dynamic", "int6_sym_tensor_dynamic"]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "make", [lambda bias: nn.Linear(16, 8, bias=bias), lambda bias: nn.Conv2d(16, 8, 1, bias=bias)]
)
def test_a_bias_that_was_found_is_added(make, own):
    torch.manual_seed(0)
    x = torch.randn(4, 16) if type(make(own)) is nn.Linear else torch.randn(4, 16, 3, 3)
    for inputs, kernels in (("int8_asym_tensor", None), ("int8_sym_token", Int8Linear)):
        if inputs == "int8_sym_token" and x.dim() == 4:
            continue
        layer = calibrated(make(own), "int8_sym_channel", inputs, x)
        layer.set_quantizer("bias_quantizer", Scheme.parse("int16_sym_tensor"), axis=0)
        layer.settle_bias(torch.randn(8))
        assert_same(layer, kernels or choose(LayerSpec.of(layer)).kernel, x)


@pytest.fixture(params=["this CPU", "windowed"], autouse=True)
def any_cpu(request, monkeypatch):
    if request.param == "windowed":
        monkeypatch.setattr(int8_product, "saturates", lambda: True)


@torch.no_grad()
@pytest.mark.parametrize("inputs", STATIC + DYNAMIC)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear(weights, inputs):
    x = skewed(3, 7, 50)
    layer = calibrated(nn.Linear(50, 33, bias=weights != "int8_sym_tensor"), weights, inputs, x)
    assert choose(LayerSpec.of(layer)).kernel is Int8Linear
    assert_same(layer, Int8Linear, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(50,), (1, 50), (0, 50), (2, 3, 4, 50)], ids=str)
def test_any_batch_shape(shape):
    layer = calibrated(nn.Linear(50, 33), "int8_sym_channel", "int8_asym_tensor", skewed(20, 50))
    assert_same(layer, Int8Linear, skewed(*shape), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_models_and_autocast():
    x = skewed(30, 64)
    layer = calibrated(nn.Linear(64, 32), "int8_sym_channel", "int8_asym_tensor", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(layer, Int8Linear, x, rtol=2e-2, atol=2e-2)
    assert_same(layer.to(torch.bfloat16), Int8Linear, x.to(torch.bfloat16), rtol=2e-2, atol=5e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 10, 1),
        nn.Conv2d(6, 10, 1, stride=2),
        nn.Conv2d(6, 10, 4, stride=4),
        nn.Conv2d(6, 10, (2, 3), stride=(2, 3), bias=False),
    ],
    ids=["pointwise", "strided pointwise", "patches", "oblong patches"],
)
def test_convolutions_whose_windows_do_not_overlap(conv):
    x = skewed(2, 6, 13, 14)
    layer = calibrated(copy.deepcopy(conv), "int8_sym_channel", "int8_asym_tensor", x)
    pixels = conv.kernel_size == (1, 1) and not int8_product.saturates()
    assert choose(LayerSpec.of(layer)).kernel is (Int8Conv if pixels else Int8Linear)
    assert_same(layer, Int8Linear, x, rtol=1e-4, atol=1e-4)
    assert_same(layer, Int8Linear, x[0], rtol=1e-4, atol=1e-4)
    assert_same(layer, Int8Linear, x.contiguous(memory_format=torch.channels_last), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 10, 3, padding=1),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 6, 7, padding=3, groups=6),
        nn.Conv2d(6, 10, 3, stride=2, padding=(0, 2), dilation=2),
    ],
    ids=["3x3", "depthwise 3x3", "depthwise 7x7", "dilated"],
)
@pytest.mark.parametrize("inputs", ["int7_asym_tensor", "int7_sym_tensor", "uint4_asym_tensor"])
def test_convolutions_whose_windows_overlap(conv, inputs):
    x = skewed(2, 6, 13, 14)
    layer = calibrated(copy.deepcopy(conv), "int8_sym_channel", inputs, x)  # 7 bits are exact on any CPU
    assert choose(LayerSpec.of(layer)).kernel is Int8Conv
    assert_same(layer, Int8Conv, x, rtol=1e-4, atol=1e-4)
    assert_same(layer, Int8Conv, x[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8_sym_channel", "int8_sym_tensor", "int4_sym_channel"])
@pytest.mark.parametrize("inputs", ["int8_asym_tensor", "int8_sym_tensor", "int7_asym_tensor", "uint4_asym_tensor"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda bias: nn.Linear(50, 33, bias=bias), (3, 7, 50)),
        (lambda bias: nn.Conv2d(6, 10, 1, bias=bias), (2, 6, 13, 14)),
        (lambda bias: nn.Conv2d(6, 10, 3, padding=1, bias=bias), (2, 6, 13, 14)),
        (lambda bias: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), (2, 6, 13, 14)),
        (lambda bias: nn.Conv2d(6, 10, 2, stride=2, bias=bias), (2, 6, 13, 14)),
    ],
    ids=["linear", "pointwise", "3x3", "depthwise", "patches"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_symmetric_weights_and_static_inputs_answer_bit_for_bit(make, shape, weights, inputs, bias):
    x = skewed(*shape)
    layer = calibrated(make(bias), weights, inputs, x)
    simulated = layer(x)
    run_on(layer, choose(LayerSpec.of(layer)).kernel.of(layer))
    assert torch.equal(layer(x), simulated)


@torch.no_grad()
def test_a_convolution_that_is_also_pruned():
    x = skewed(2, 6, 13, 14)
    layer = nn.Conv2d(6, 10, 3, padding=1)
    quantize_layer(layer, None, None, Pattern.parse("2:4"))
    layer.prune(torch.rand(layer.weight.shape) > 0.5)
    calibrated(layer, "int8_sym_channel", "int7_asym_tensor", x)
    assert (layer.quantized() == 0).float().mean() > 0.4
    simulated = layer(x)
    run_on(layer, Int8Conv.of(layer))
    assert torch.equal(layer(x), simulated)


@pytest.mark.parametrize(
    ("layer", "weights", "inputs", "why"),
    [
        (nn.Linear(8, 8), "fp8_e4m3", "fp8_e4m3", "its weights are fp8_e4m3"),
        (nn.Linear(8, 8), "int8_g4", "int8_asym_tensor", "not with one scale per channel"),
        (nn.Linear(8, 8), "int8_sym_channel", None, "its inputs are float"),
        (nn.Linear(8, 8), "int12_sym_channel", "int8", "its weights are int12"),
        (nn.Linear(8, 8), "int12_sym_channel", None, "its weights are int12"),
        (nn.Linear(32, 16), "int4_g32", None, 'not bfloat16: precision="bf16-true"'),
        (nn.Linear(32, 16).bfloat16(), "fp8_e4m3", None, "its weights are fp8_e4m3"),
        (nn.Linear(80, 16).bfloat16(), "int4_g64", None, "its 80 inputs are 1.25 groups of 64"),
        (nn.Linear(96, 16).bfloat16(), "int4_g48", None, "its 96 inputs are 2 groups of 48, not"),
        (nn.Linear(40, 16).bfloat16(), "int4_channel", None, "no groups of 32, 64, 128 or 256"),
        (nn.Linear(32, 8).bfloat16(), "int4_g32", None, "its 8 outputs are no multiple of 16"),
        (nn.Linear(32, 8).bfloat16(), "int8_g32", None, "not symmetric with one scale per channel"),
        (nn.Linear(40, 8).bfloat16(), "int8_channel", None, "its 40 inputs are no multiple of 32"),
        (nn.Linear(8, 8), "int8_sym_channel", "int8_asym_channel", "its inputs are int8_asym_channel"),
        (nn.Linear(8, 8).double(), "int8_sym_channel", "int8", "float64"),
        (nn.Conv2d(4, 4, 3, padding="same"), "int8_sym_channel", "int8", "padding"),
        (nn.Conv2d(4, 4, 3), "int8_sym_channel", "int8_asym_tensor_dynamic", "known before"),
        (nn.Conv1d(4, 4, 3), "int8_sym_channel", "int8", "no low-bit kernel for Conv1d"),
        (nn.Embedding(8, 4), "int8_sym_channel", None, "no low-bit kernel for Embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_that_no_kernel_takes_says_why(layer, weights, inputs, why):
    layer = quantize_layer(copy.deepcopy(layer), Scheme.parse(weights), Scheme.parse(inputs) if inputs else None)
    choice = choose(LayerSpec.of(layer))
    assert choice.kernel is DecodedWeights
    assert why in choice.why_not


def test_overlapping_convolutions_of_eight_bits_need_exact_sums():
    layer = quantize_layer(nn.Conv2d(4, 4, 3), Scheme.parse("int8_sym_channel"), Scheme.parse("int8_asym_tensor"))
    choice = choose(LayerSpec.of(layer))
    if int8_product.saturates():
        assert "saturate on this CPU" in choice.why_not and "7 bits" in choice.why_not
    else:
        assert choice.kernel is Int8Conv


WEIGHTS_ALONE = {
    "int4_sym_g32": Int4Weights,
    "int4_asym_g64": Int4Weights,
    "uint4_asym_channel": Int4Weights,
    "int4_sym_tensor": Int4Weights,
    "int3_asym_g128": Int4Weights,
    "int2_asym_g32": Int4Weights,
    "int8_sym_channel": Int8Weights,
    "int6_sym_tensor": Int8Weights,
}


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 128), (128,), (0, 128), (2, 3, 128)], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS_ALONE)
def test_weights_alone_in_bfloat16(weights, shape):
    x = skewed(*shape).bfloat16()
    layer = calibrated(nn.Linear(128, 48, bias=shape != (128,)).bfloat16(), weights, None, x)
    assert choose(LayerSpec.of(layer)).kernel is WEIGHTS_ALONE[weights]
    exact = layer.float()(x.float())
    layer.bfloat16()
    assert_same(layer, WEIGHTS_ALONE[weights], x, rtol=4e-2, atol=0.1)
    run_on(layer, WEIGHTS_ALONE[weights].of(layer))
    assert (layer(x) - exact).norm() <= 8e-3 * exact.norm()  # inputs of bfloat16 have 8 bits of precision


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@pytest.mark.parametrize("weights", ["int4_g8", "int8_sym_channel", "fp8_e4m3", "fp4_e2m1", "int3_asym_channel"])
def test_the_fallback_is_the_simulated_layer_bit_for_bit(weights, packed):
    x = skewed(5, 32)
    layer = calibrated(nn.Linear(32, 16), weights, "int8_asym_tensor", x)
    simulated, codes = layer(x), layer.weight_quantizer.encode(layer.weight)
    run_on(layer, DecodedWeights.of(layer, packed=packed), keep=packed)
    assert torch.equal(layer(x), simulated)
    assert torch.equal(layer.kernel.codes(layer, "weight"), codes)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(32, 16), (5, 32)), (nn.Conv1d(4, 8, 3), (2, 4, 9))], ids=["linear", "conv"]
)
def test_the_fallback_rounds_weights_to_integers_once(layer, shape, packed):
    x = skewed(*shape)
    layer = calibrated(copy.deepcopy(layer), "int8_sym_channel", "int8_asym_tensor", x)
    simulated, integers = layer(x), layer.weight_integers(layer.quantized())
    assert torch.equal(integers, integers.round()) and integers.abs().max() <= 128
    run_on(layer, DecodedWeights.of(layer, packed=packed), keep=packed)
    found = [layer.weight_integers(layer.quantized()) for _ in range(2)]
    assert torch.equal(found[0], integers)
    assert (found[0] is found[1]) is not packed
    assert torch.equal(layer(x), simulated)
