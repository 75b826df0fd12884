"""FP8 on a GPU: weights and activations of fp8_e4m3, multiplied as they are by torch's scaled product."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_quant.kernels.cuda.int8 import FLOATS
from lightning_quant.kernels.cuda.needs import why_not_capable
from lightning_quant.kernels.int8_linear import MATRICES, output_dtype
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import FloatQuantizer, Scheme
from lightning_quant.quantizers.own_precision import OwnPrecision

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
STEP = 16  # what sizes must be multiples of


class Fp8Linear(OwnPrecision, Kernel):
    r"""Products of 8-bit floats, scaled once: by one number, or by one of each row and one of each output.

    .. math:: y_{mn} = s_m s_n \sum_k c_{mk} w_{nk} + b_n
    """

    name: ClassVar[str] = "fp8 (torch)"
    kinds: ClassVar[frozenset[str]] = frozenset(MATRICES)
    device: ClassVar[str] = "cuda"
    backends: ClassVar[frozenset[str]] = frozenset({"torch", "triton"})

    floats: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(weights, FloatQuantizer) and isinstance(inputs, FloatQuantizer)
        self.by_rows = _by_rows(weights.scheme, inputs.scheme)
        codes = weights.encode(layer.weight_rows().detach())  # bit patterns, those of torch's type
        scale = weights.scale.float().expand(1, len(codes)) if self.by_rows else weights.scale.float()
        bias = layer.full_bias()
        self.register_buffer("floats", codes.to(torch.uint8).view(E4M3), persistent=False)
        self.register_buffer("scale", scale.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for weights that are small floats."""
        return (
            super().considers(spec)
            and isinstance(spec, LayerSpec)
            and spec.weights is not None
            and spec.weights.kind == "float"
        )

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes weights per tensor or channel, and inputs per tensor or token."""
        assert spec.weights is not None
        for what, scheme in (("weights", spec.weights), ("inputs", spec.inputs)):
            if scheme is None or (scheme.kind, scheme.exponent, scheme.mantissa) != ("float", 4, 3):
                return f"its {what} are {scheme or 'float'}, not fp8_e4m3"
        assert spec.inputs is not None
        if spec.stepwise:
            return "the scale of its input depends on the step of the trajectory"
        if reason := spec.why_not_plain_grid():
            return reason
        if spec.weights.granularity == "group":
            return f"its weights are {spec.weights}, not with one scale per channel"
        if spec.inputs.granularity not in ("tensor", "token"):
            return f"its inputs are {spec.inputs}, not with one scale per tensor or token"
        for what, size in zip(("outputs", "inputs"), spec.shape, strict=True):
            if size % STEP:
                return f"its {size} {what} are no multiple of {STEP}"
        return cls.why_not_precision(spec) or why_not_capable(spec, (8, 9), "products of fp8")

    @classmethod
    def why_not_precision(cls, spec: LayerSpec) -> str | None:
        """What torch's product does not answer in."""
        assert spec.weights is not None and spec.inputs is not None
        dtype = str(spec.dtype).removeprefix("torch.")
        if not _by_rows(spec.weights, spec.inputs):
            return None if spec.dtype in FLOATS else f"its inputs are {dtype}, not float32, bfloat16 or float16"
        if spec.dtype != torch.bfloat16:
            return (
                f"its scales are of channels or tokens and its inputs are {dtype}, not bfloat16: "
                f'precision="bf16-true" of the Trainer makes them that, and one scale per tensor needs no such thing'
            )
        if spec.capability >= (12, 0):
            return "its GPU has compute capability 12, for which torch has no products with scales of rows"
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> Fp8Linear:
        """Take the layer's codes."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (..., in) -> (..., out)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        outputs, inputs = self.floats.shape
        rows = x.reshape(-1, inputs).float()
        answer = torch.bfloat16 if self.by_rows else output_dtype(x)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], outputs, dtype=output_dtype(x))
        (scale,) = cast(FloatQuantizer, layer.input_quantizer).state_for(rows)
        codes = torch.mul(rows, scale.reciprocal()).clamp_(-LARGEST, LARGEST).to(E4M3)
        if self.by_rows:
            scale = scale.repeat(len(rows) // scale.numel(), 1)
        fused = self.bias is not None and answer != torch.float32  # torch adds no bias to float32
        bias = cast(Tensor, self.bias).to(answer) if fused else None
        out = torch._scaled_mm(codes, self.floats.t(), scale, self.scale, bias=bias, out_dtype=answer)
        out = out if self.bias is None or fused else out + self.bias
        return out.to(output_dtype(x)).view(*x.shape[:-1], outputs)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return self.floats.view(torch.uint8).to(torch.int32)


def _by_rows(weights: Scheme, inputs: Scheme) -> bool:
    return weights.granularity == "channel" or inputs.granularity == "token"
