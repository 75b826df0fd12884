"""W8A8 and W8A16 by torchao's ``Int8Tensor``, on any device."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.int8_attention import sums_are_exact
from lightning_quant.kernels.int8_linear import FLOATS, MATRICES, output_dtype, signed_codes
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.kernels.torchao.needs import why_no_torchao
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Scheme, UniformQuantizer

DEVICES = ("cpu", "cuda")


class TorchaoInt8(Kernel):
    """A symmetric weight with one scale for each output, held by torchao."""

    kinds: ClassVar[frozenset[str]] = frozenset(MATRICES)
    backends: ClassVar[frozenset[str]] = frozenset({"torchao"})
    automatic: ClassVar[bool] = False

    tensor: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        from torchao.quantization.quantize_.workflows import Int8Tensor

        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        codes, _ = signed_codes(quantizer, layer.weight_rows())
        self.middle_code = 2 ** (quantizer.scheme.bits - 1)
        self.shape = tuple(codes.shape)
        scale, whole_row = quantizer.scale.float().expand(len(codes)).unsqueeze(1).contiguous(), [1, codes.shape[1]]
        bias, dtype = layer.full_bias(), layer.weight_rows().dtype
        tensor = Int8Tensor(codes.to(torch.int8), scale, whole_row, dtype, **self.inputs_as_torchao_says(layer))
        self.register_buffer("tensor", tensor, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def inputs_as_torchao_says(self, layer: QuantizedLayer) -> dict[str, Any]:
        """What its tensor is told about the input."""
        return {}

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for any device."""
        return isinstance(spec, LayerSpec) and spec.kind in cls.kinds and spec.device in DEVICES

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes symmetric weights per tensor or channel."""
        weights = spec.weights
        if weights is None or weights.kind != "int" or weights.bits > 8:
            return f"its weights are {weights or 'float'}"
        if weights.granularity == "group" or not weights.symmetric or not weights.signed:
            return f"its weights are {weights}, not symmetric with one scale per channel"
        if spec.dtype not in FLOATS:
            return f"its float weights are {spec.dtype}, not float32 or bfloat16".replace("torch.", "")
        if spec.stepwise:
            return "the scale of its input depends on the step of the trajectory"
        return spec.why_not_plain_grid() or why_no_torchao()

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> TorchaoInt8:
        """Hand the layer's codes over."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (..., in) -> (..., out)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        dtype = output_dtype(x)
        rows = x.reshape(-1, self.shape[1]).to(self.dtype_of_product(dtype))
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(rows, self.tensor, bias)
        return out.to(dtype).view(*x.shape[:-1], self.shape[0])

    def dtype_of_product(self, dtype: torch.dtype) -> torch.dtype:
        """What torchao is to compute in where this is answered."""
        return dtype

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        integers: Tensor = self.tensor.qdata  # type: ignore[attr-defined]
        return cast(Tensor, integers.to(torch.int32) + self.middle_code)


class TorchaoInt8Linear(TorchaoInt8):
    r"""Products of integers; scale and zero point of the activations are known before, or found by torchao.

    .. math:: y_{mn} = s_n ( s_m \sum_k \hat c_{mk} w_{nk} - z_m s_m \sum_k w_{nk} ) + b_n

    Asymmetric scales that torchao finds for a token or a batch are those of the simulated layer.
    """

    name: ClassVar[str] = "int8 (torchao)"

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for quantized inputs."""
        return super().considers(spec) and isinstance(spec, LayerSpec) and spec.inputs is not None

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes 7 or 8 bits with one scale per tensor, or a dynamic asymmetric one per token."""
        inputs = spec.inputs
        assert inputs is not None
        if inputs.kind != "int" or inputs.bits not in (7, 8):
            return f"its inputs are {inputs}, and torchao rounds to 7 or 8 bits"
        if inputs.granularity not in ("tensor", "token"):
            return f"its inputs are {inputs}, not with one scale per tensor or token"
        if inputs.dynamic and (inputs.symmetric or not inputs.signed):
            return f"its inputs are {inputs}, and torchao finds other scales for them than were simulated"
        if spec.device == "cpu" and not sums_are_exact():
            return "sums of products of signed bytes are not exact on this CPU"
        return super().why_not(spec)

    def inputs_as_torchao_says(self, layer: QuantizedLayer) -> dict[str, Any]:
        """How the input is rounded, with scale and zero point where they are known."""
        from torchao.quantization.granularity import PerRow, PerTensor
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

        quantizer = cast(UniformQuantizer, layer.input_quantizer)
        scheme: Scheme = quantizer.scheme
        said: dict[str, Any] = {
            "act_quant_kwargs": QuantizeTensorToInt8Kwargs(
                granularity=PerRow() if scheme.granularity == "token" else PerTensor(),
                mapping_type=MappingType.ASYMMETRIC,  # of which zero points of 0 are a case
                reduce_range=scheme.bits == 7,
            )
        }
        if not scheme.dynamic:
            middle = scheme.qmin + 2 ** (scheme.bits - 1)
            said["act_quant_scale"] = quantizer.scale.float().view(1, 1)
            said["act_quant_zero_point"] = (quantizer.zero_point - middle).to(torch.int32).view(1, 1)
        return said

    def dtype_of_product(self, dtype: torch.dtype) -> torch.dtype:
        """It rounds, and subtracts what stands for 0, in the type of its input: in bfloat16 the difference is lost."""
        return torch.float32


class TorchaoInt8Weights(TorchaoInt8):
    r"""Float inputs and integer weights, which become floats in front of the product; for models that wait for memory.

    .. math:: y_{mn} = s_n \sum_k x_{mk} w_{nk} + b_n
    """

    name: ClassVar[str] = "int8 weights (torchao)"

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for inputs that are not quantized."""
        return super().considers(spec) and isinstance(spec, LayerSpec) and spec.inputs is None
