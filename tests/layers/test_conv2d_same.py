"""timm's TensorFlow-like convolutions, and their kernels."""

import pytest
import torch
from torch import nn

from lightning_quant.kernels.int8_conv import Int8Conv
from lightning_quant.kernels.layer_door import run_on
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import as_float, quantize_layer, restore
from lightning_quant.quantizers import Scheme
from tests.kernels.layers import calibrated

timm = pytest.importorskip("timm.layers")

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "stride": 2},
    "5x5 depthwise": {"kernel_size": 5, "stride": 2, "groups": 6},
    "oblong": {"kernel_size": (1, 4), "stride": (3, 2)},
    "dilated": {"kernel_size": 3, "stride": 2, "dilation": 2},
    "pixels": {"kernel_size": 1, "stride": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (17, 14), (7, 5)], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_it_pads_as_timm_does_and_its_kernel_answers_bit_for_bit(kind, size):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size) + 0.5
    layer = timm.Conv2dSame(6, 12, **CONVOLUTIONS[kind])
    exact = layer(x)
    calibrated(layer, "int8_sym_channel", "int7_asym_tensor", x)
    assert isinstance(layer, timm.Conv2dSame) and type(layer).__name__ == "QuantConv2dSame"
    with as_float(layer):
        assert torch.equal(layer(x), exact)
    simulated = layer(x)
    assert (simulated - exact).norm() < 0.1 * exact.norm()
    assert choose(LayerSpec.of(layer)).kernel is Int8Conv
    run_on(layer, Int8Conv.of(layer))
    assert torch.equal(layer(x), simulated)
    assert torch.equal(layer(x[0]), simulated[0])


def test_it_becomes_float_again():
    layer = timm.Conv2dSame(3, 4, 3, stride=2)
    weight = layer.weight
    quantize_layer(layer, Scheme.parse("int8_sym_channel"), Scheme.parse("int8_asym_tensor"))
    restore(layer)
    assert type(layer) is timm.Conv2dSame and layer.weight is weight


def test_other_descendants_of_convolutions_are_left_alone():
    class Own(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match="no quantized twin for a Own"):
        quantize_layer(Own(3, 4, 3), Scheme.parse("int8_sym_channel"), None)
