"""W8A8 on a GPU: linear layers, by Triton."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_quant.kernels.cuda.needs import why_no_triton, why_not_capable
from lightning_quant.kernels.cuda.operands import Grid, Int8Inputs, Int8Weight
from lightning_quant.kernels.cuda.ops import multiply_int8
from lightning_quant.kernels.int8_linear import MATRICES, output_dtype, signed_codes
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Scheme, UniformQuantizer
from lightning_quant.quantizers.own_precision import OwnPrecision

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 2**31 // 2**14  # a sum of so many products of bytes may not fit 32 bits


class TritonInt8Linear(OwnPrecision, Kernel):
    r"""Products of activation codes and weight codes, in one kernel with what makes the codes and what scales them.

    .. math:: y_{mn} = s_m s_n (\sum_k c_{mk} w_{nk} - z_m \sum_k (w_{nk} - o_n) - o_n \sum_k c_{mk}) + b_n

    Scale and zero point of the activations are known before, or found in each batch or for each token. All sums are
    integers and exact.
    """

    name: ClassVar[str] = "int8 (Triton)"
    kinds: ClassVar[frozenset[str]] = frozenset(MATRICES)
    device: ClassVar[str] = "cuda"
    backends: ClassVar[frozenset[str]] = frozenset({"triton"})

    integers: Tensor
    scale: Tensor
    totals: Tensor
    offset: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(weights, UniformQuantizer) and isinstance(inputs, UniformQuantizer)
        codes, offset = signed_codes(weights, layer.weight_rows())
        self.middle_code = 2 ** (weights.scheme.bits - 1)
        bias, known = layer.full_bias(), not inputs.scheme.dynamic
        zero = zero_of(inputs.scheme, inputs.zero_point) if known else None
        distances = codes - offset[:, None]
        buffers = {
            "integers": codes.to(torch.int8).contiguous(),
            "scale": weights.scale.float().expand(len(codes)).contiguous(),
            "totals": distances.sum(1, dtype=torch.int32),
            "offset": offset.contiguous() if bool(offset.any()) else None,
            "bias": None if bias is None else bias.detach().float().contiguous(),
            "input_scale": inputs.scale.clone() if known else None,
            "input_zero": zero,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        half = 2 ** (inputs.scheme.bits - 1)
        farthest = 2 * half if zero is None else half + abs(int(zero))  # from 0, in steps of the activations
        self.wide = codes.shape[1] * farthest * int(distances.abs().max()) >= 2**31

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes weights per tensor or channel, and inputs per tensor or token."""
        if spec.dtype not in FLOATS:
            return f"its float weights are {spec.dtype}, not float32, bfloat16 or float16".replace("torch.", "")
        if reason := spec.why_not_plain_integers():
            return reason
        assert spec.weights is not None and spec.inputs is not None
        if spec.weights.granularity == "group":
            return f"its weights are {spec.weights}, not with one scale per channel"
        if spec.inputs.granularity not in ("tensor", "token"):
            return f"its inputs are {spec.inputs}, not with one scale per tensor or token"
        if spec.shape[1] >= LONGEST:
            return f"sums over its {spec.shape[1]} inputs may not fit 32 bits"
        return why_not_capable(spec, (8, 0), "products of int8 in Triton") or why_no_triton()

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> TritonInt8Linear:
        """Take the layer's codes."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (..., in) -> (..., out)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        rows = x.reshape(-1, self.integers.shape[1])
        weight = Int8Weight(self.integers, self.scale, self.totals, self.offset, self.bias)
        inputs = self._inputs(rows, cast(UniformQuantizer, layer.input_quantizer))
        out = multiply_int8(rows, weight, inputs, output_dtype(x))
        return out.view(*x.shape[:-1], len(self.integers))

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return torch.add(self.integers.to(torch.int32), self.middle_code)

    def _inputs(self, rows: Tensor, quantizer: UniformQuantizer) -> Int8Inputs:
        scheme, scale, zero = quantizer.scheme, self.input_scale, self.input_zero
        if scheme.dynamic and scheme.granularity == "tensor" and rows.numel():
            scale, zero_point = quantizer.state_for(rows.float())
            zero = zero_of(scheme, zero_point)
        return Int8Inputs(scheme.bits, grid_of(scheme), scale, zero, self.wide)


def grid_of(scheme: Scheme) -> Grid:
    """What the grid of an activation is like."""
    if not scheme.symmetric:
        return "asymmetric"
    return "symmetric" if scheme.signed else "unsigned"


def zero_of(scheme: Scheme, zero_point: Tensor) -> Tensor:
    """The code that stands for 0, counted from the middle one, as int32."""
    return torch.sub(zero_point, scheme.qmin + 2 ** (scheme.bits - 1)).to(torch.int32)
