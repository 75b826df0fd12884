"""The quantized twin of timm's ``Conv2dSame`` (EfficientNet, MobileNet); imported only where a model holds one."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor

from lightning_quant.layers.conv import QuantConv2d, same_padding


class QuantConv2dSame(QuantConv2d, Conv2dSame):
    """A convolution that pads as TensorFlow does: as much as the image needs, more at its end than at its beginning."""

    float_class = Conv2dSame  # type: ignore[assignment]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        margins = same_padding(input.shape[-2:], weight.shape[-2:], self.stride, self.dilation)
        return F.conv2d(F.pad(input, margins), weight, bias, self.stride, 0, self.dilation, self.groups)
