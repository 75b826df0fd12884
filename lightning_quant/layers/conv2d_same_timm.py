"""The quantized twin of timm's ``Conv2dSame`` (EfficientNet, MobileNet); imported only where a model holds one."""

from __future__ import annotations

from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from torch import Tensor

from lightning_quant.layers.conv import QuantConv2d


class QuantConv2dSame(QuantConv2d, Conv2dSame):
    """A convolution that pads as TensorFlow does: as much as the image needs, more at its end than at its beginning."""

    float_class = Conv2dSame

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = conv2d_same(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return out
