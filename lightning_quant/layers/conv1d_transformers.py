"""The quantized twin of transformers' ``Conv1D`` (GPT-2); imported only where a model holds one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lightning_quant.layers.base import QuantizedLayer, through
from lightning_quant.layers.integers import integer_product


class QuantConv1D(QuantizedLayer, Conv1D):
    """transformers' ``Conv1D``: a linear layer whose weight is stored as (in, out)."""

    float_class = Conv1D
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        exact = integer_product(self, x, lambda steps, weight, bias: steps @ weight)
        if exact is not None:
            return exact
        x = through(self.input_quantizer, x)
        bias = cast(Tensor, self.full_bias())
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), self.quantized()).view(*x.shape[:-1], self.nf)
