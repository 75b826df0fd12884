"""Calibrated layers, and what a kernel of theirs has to answer."""

import torch
from torch import nn

from lightning_quant.kernels.layer_door import give_back, run_on
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Scheme


def calibrated(layer: nn.Module, weights: str | None, inputs: str | None, x: torch.Tensor):
    layer = quantize_layer(
        layer, None if weights is None else Scheme.parse(weights), None if inputs is None else Scheme.parse(inputs)
    )
    if layer.weight_quantizer is not None:
        layer.weight_quantizer.fit(layer.weight_rows(), "minmax")
    if layer.input_quantizer is not None:
        layer.input_quantizer.fit(x * 0.9, "minmax")  # some inputs are clipped
    return layer.eval()


def assert_same(layer, kernel, x, **tolerance):
    """The kernel's answer is the layer's but for the rounding of floats, and so are the weights it holds."""
    simulated, codes, before = layer(x), layer.weight_quantizer.encode(layer.weight_rows()), layer.quantized().clone()
    run_on(layer, kernel.of(layer))
    out = layer(x)
    torch.testing.assert_close(out, simulated, **tolerance)
    assert out.dtype == simulated.dtype
    assert torch.equal(layer.kernel.codes(layer, "weight"), codes)
    assert torch.equal(layer.quantized(), before)
    give_back(layer)
    assert torch.equal(layer(x), simulated)


def skewed(*shape: int) -> torch.Tensor:
    """Activations with a few loud channels and a mean that is not 0."""
    x = torch.randn(*shape) + 0.7
    x[..., :3] *= 8
    return x
