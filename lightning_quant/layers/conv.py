"""Quantized convolutions. Channels are axis 1 of the input; padding comes after quantization, with exact zeros."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_quant.layers.base import QuantizedLayer, through
from lightning_quant.layers.integers import integer_product


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with quantized weight and input."""

    float_class = nn.Conv1d
    input_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        x = self.narrowed(input)
        exact = integer_product(self, x, self._conv_forward, axis=1 - self.weight.dim())
        if exact is not None:
            return exact
        out: Tensor = self._conv_forward(through(self.input_quantizer, x), self.quantized(), self.full_bias())
        return out


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantized weight and input."""

    float_class = nn.Conv2d
    input_axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        x = self.narrowed(input)
        exact = integer_product(self, x, self._conv_forward, axis=1 - self.weight.dim())
        if exact is not None:
            return exact
        out: Tensor = self._conv_forward(through(self.input_quantizer, x), self.quantized(), self.full_bias())
        return out


def same_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """What ``F.pad`` adds to an image so that it is divided by the stride and nothing else, as TensorFlow does.

    Args:
        size: of the image: height, width.
        kernel: of the window.
        stride: of the convolution.
        dilation: of the window.

    >>> same_padding((112, 7), (3, 3), (2, 2), (1, 1))
    [1, 1, 0, 1]
    """
    margins: list[int] = []
    for length, window, step, apart in zip(size, kernel, stride, dilation, strict=True):
        missing = max((-(-length // step) - 1) * step + (window - 1) * apart + 1 - length, 0)
        margins = [missing // 2, missing - missing // 2, *margins]  # the last axis comes first
    return margins
