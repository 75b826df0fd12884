"""Quantized convolutions. Channels are axis 1 of the input; padding comes after quantization, with exact zeros."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_quant.layers.base import QuantizedLayer, through
from lightning_quant.layers.integers import integer_product


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with quantized weight and input."""

    float_class = nn.Conv1d
    input_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        exact = integer_product(self, input, self._conv_forward, axis=1 - self.weight.dim())
        if exact is not None:
            return exact
        out: Tensor = self._conv_forward(through(self.input_quantizer, input), self.quantized(), self.full_bias())
        return out


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantized weight and input."""

    float_class = nn.Conv2d
    input_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        exact = integer_product(self, input, self._conv_forward, axis=1 - self.weight.dim())
        if exact is not None:
            return exact
        out: Tensor = self._conv_forward(through(self.input_quantizer, input), self.quantized(), self.full_bias())
        return out
