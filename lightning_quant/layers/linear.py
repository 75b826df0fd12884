"""Quantized linear layers and embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_quant.layers.base import QuantizedLayer, through
from lightning_quant.layers.integers import integer_product


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with quantized weight and input: ``Q_x(x) @ Q_w(W)^T + b``."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer on quantized operands."""
        exact = integer_product(self, input, F.linear)
        if exact is not None:
            return exact
        return F.linear(through(self.input_quantizer, input), self.quantized(), self.full_bias())


class QuantOutProjection(QuantLinear, NonDynamicallyQuantizableLinear):
    """The output projection inside ``nn.MultiheadAttention``, which torch gives a class of its own."""

    float_class = NonDynamicallyQuantizableLinear


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with a quantized table; a row is an output channel and has its own scale."""

    float_class = nn.Embedding
    takes_bias = False
    input_quantizers = ()

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up in the quantized table."""
        return F.embedding(
            input,
            self.quantized(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
