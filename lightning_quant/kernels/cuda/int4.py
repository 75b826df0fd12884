"""W4A16 on a GPU: weights of few bits and float inputs, by Triton, for models that wait for memory."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_quant.kernels.cuda.int8 import FLOATS
from lightning_quant.kernels.cuda.needs import why_no_triton, why_not_capable
from lightning_quant.kernels.cuda.nibbles import RUN, from_nibbles, to_nibbles
from lightning_quant.kernels.cuda.operands import Int4Weight
from lightning_quant.kernels.cuda.ops import multiply_int4
from lightning_quant.kernels.int8_linear import MATRICES, output_dtype
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer
from lightning_quant.quantizers.own_precision import OwnPrecision


class TritonInt4Weights(OwnPrecision, Kernel):
    r"""Weights of up to 4 bits, two in a byte, with a scale and a zero point for each group of inputs.

    .. math:: y_{mn} = \sum_k x_{mk} \, s_{ng} (w_{nk} - o_{ng}) + b_n \qquad g = \lfloor k / G \rfloor

    The weights that are multiplied are those of the simulated layer, bit for bit. The last group of a row may have
    fewer inputs than the others.
    """

    name: ClassVar[str] = "int4 weights (Triton)"
    kinds: ClassVar[frozenset[str]] = frozenset(MATRICES)
    device: ClassVar[str] = "cuda"
    backends: ClassVar[frozenset[str]] = frozenset({"triton"})

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        quantizer, rows = layer.weight_quantizer, layer.weight_rows().detach()
        assert isinstance(quantizer, UniformQuantizer)
        outputs, self.inputs = rows.shape
        size = quantizer.scheme.group_size
        self.group = size or -(-self.inputs // 128) * 128  # one that holds all of them
        groups = (-(-self.inputs // self.group), outputs)
        scale, zero = (
            (value.t() if value.dim() == 2 else value.expand(outputs)).expand(groups).contiguous()
            for value in (quantizer.scale, quantizer.zero_point - quantizer.scheme.qmin)
        )
        first = int(zero.flatten()[0])
        self.same_zero = first if bool((zero == first).all()) else None
        small = zero.to(torch.int8 if bool(zero.abs().max() < 128) else torch.int32)
        bias = layer.full_bias()
        self.register_buffer("packed", to_nibbles(quantizer.encode(rows)), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero", small if self.same_zero is None else None, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for weights of so many bits beside inputs that are not quantized."""
        return (
            super().considers(spec)
            and isinstance(spec, LayerSpec)
            and spec.inputs is None
            and spec.weights is not None
            and spec.weights.kind == "int"
            and spec.weights.bits <= 4
        )

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes groups of a multiple of 32 inputs, or a scale for each output."""
        assert spec.weights is not None
        if reason := spec.why_not_plain_grid():
            return reason
        if spec.dtype not in FLOATS:
            return f"its inputs are {spec.dtype}, not float32, bfloat16 or float16".replace("torch.", "")
        size = spec.weights.group_size
        if size is not None and size % RUN:
            return f"its groups of {size} inputs are no multiple of {RUN}"
        return why_not_capable(spec, (8, 0), "products in Triton") or why_no_triton()

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> TritonInt4Weights:
        """Pack the layer's codes."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (..., in) -> (..., out)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        zero = self.same_zero if self.zero is None else self.zero
        assert zero is not None
        weight = Int4Weight(self.packed, self.scale, zero, self.inputs, self.group, self.bias)
        out = multiply_int4(x.reshape(-1, self.inputs).to(output_dtype(x)), weight)
        return out.view(*x.shape[:-1], len(self.packed))

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return from_nibbles(self.packed, self.inputs)
