"""W4A16 and W8A16 on a CPU: weights of few bits and inputs of bfloat16, for models that wait for memory."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_quant.kernels.int8_linear import MATRICES, signed_codes
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer


class WeightOnly(Kernel):
    """Products of bfloat16 inputs and weight codes, which become floats on their way through the processor's cache.

    The products of float32 that torch has beside them are slower than those of decoded weights, so models that are
    not in bfloat16 are not taken.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(MATRICES)
    bits: ClassVar[range]

    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        assert isinstance(layer.weight_quantizer, UniformQuantizer)
        self.shape = tuple(layer.weight_rows().shape)
        self.middle_code = 2 ** (layer.weight_quantizer.scheme.bits - 1)
        bias = layer.full_bias()
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Is for weights of so many bits beside inputs that are not quantized."""
        return (
            super().considers(spec)
            and isinstance(spec, LayerSpec)
            and spec.inputs is None
            and spec.weights is not None
            and spec.weights.bits in cls.bits
        )

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes plain integers, in models of bfloat16."""
        assert spec.weights is not None
        if spec.weights.kind != "int":
            return f"its weights are {spec.weights}"
        if reason := spec.why_not_plain_grid():
            return reason
        if spec.dtype != torch.bfloat16:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f'its inputs are {dtype}, not bfloat16: precision="bf16-true" of the Trainer makes them that'
        return cls.why_not_shape(spec)

    @classmethod
    @abstractmethod
    def why_not_shape(cls, spec: LayerSpec) -> str | None:
        """What the product of torch does not take."""

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> WeightOnly:
        """Pack the layer's codes."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (..., in) -> (..., out)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        out = self.product(x.reshape(-1, self.shape[1])).to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.shape[0])

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""


class Int4Weights(WeightOnly):
    r"""Weights of up to 4 bits, two in a byte, with a scale and a zero point for each group of inputs.

    .. math:: y_{mn} = \sum_k x_{mk} \, s_{ng} (w_{nk} - o_{ng}) + b_n \qquad g = \lfloor k / G \rfloor

    Scales are rounded to bfloat16.
    """

    name: ClassVar[str] = "int4 weights"
    bits: ClassVar[range] = range(1, 5)
    sizes: ClassVar[tuple[int, ...]] = (256, 128, 64, 32)  # of groups, as the product knows them

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        self.group = self.group_of(quantizer.scheme.group_size, self.shape[1])
        centred, scales = grouped(layer, self.group)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(centred, 1)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def group_of(cls, size: int | None, inputs: int) -> int:
        """The size of the groups that hold one scale each; 0 if there is none that the product knows."""
        return next((known for known in cls.sizes if inputs % known == 0 and size in (None, known)), 0)

    @classmethod
    def why_not_groups(cls, size: int | None, inputs: int) -> str | None:
        """Why the product knows no such groups, or ``None`` if it does."""
        if cls.group_of(size, inputs):
            return None
        known = "32, 64, 128 or 256"
        if size is None:
            return f"its {inputs} inputs are no groups of {known}"
        return f"its {inputs} inputs are {inputs / size:g} groups of {size}, not a number of them of {known}"

    @classmethod
    def why_not_shape(cls, spec: LayerSpec) -> str | None:
        """Takes groups of 32, 64, 128 or 256 inputs, or a scale for each output, and multiples of 16 outputs."""
        assert spec.weights is not None
        outputs, inputs = spec.shape
        if reason := cls.why_not_groups(spec.weights.group_size, inputs):
            return reason
        return None if outputs % 16 == 0 else f"its {outputs} outputs are no multiple of 16"

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        return self._multiplied(rows, self.scales)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight: what the product makes of unit vectors, which it computes exactly."""
        plain = torch.zeros_like(self.scales)
        plain[..., 0] = 1
        units = torch.eye(self.shape[1], dtype=torch.bfloat16, device=self.packed.device)
        return cast(Tensor, self._multiplied(units, plain).t().to(torch.int32) + self.middle_code)

    def _multiplied(self, rows: Tensor, scales: Tensor) -> Tensor:
        rows = rows.to(torch.bfloat16).contiguous()
        return cast(Tensor, torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, scales))


def grouped(layer: QuantizedLayer, group: int) -> tuple[Tensor, Tensor]:
    """A weight of up to 4 bits as torch's products take it, which compute ``(code - 8) * scale + shift``.

    Args:
        layer: whose weight it is.
        group: how many inputs share a scale.

    Returns:
        Codes (out, in) int32, and scale and shift of every group (groups, out, 2) in bfloat16.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, UniformQuantizer)
    middle_code = 2 ** (quantizer.scheme.bits - 1)
    codes = quantizer.encode(layer.weight_rows().detach())
    centred = codes - middle_code + 8  # of fewer bits too, 0 is the 8 of the product
    zero = quantizer.zero_point - quantizer.scheme.qmin - middle_code
    groups = len(codes), codes.shape[1] // group
    state = [
        (value if value.dim() == 2 else value.reshape(-1, 1)).expand(groups)
        for value in (quantizer.scale, -zero * quantizer.scale)
    ]
    return centred, torch.stack(state, -1).transpose(0, 1).bfloat16().contiguous()


class Int8Weights(WeightOnly):
    r"""Weights of 5 to 8 bits, symmetric, with a scale for each output; it is rounded to bfloat16.

    .. math:: y_{mn} = s_n \sum_k x_{mk} w_{nk} + b_n
    """

    name: ClassVar[str] = "int8 weights"
    bits: ClassVar[range] = range(5, 9)
    step: ClassVar[int] = 32  # the product reads beyond rows that are no multiple of this

    integers: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        codes, _ = signed_codes(quantizer, layer.weight_rows())
        self.register_buffer("integers", codes.to(torch.int8), persistent=False)
        scale = quantizer.scale.expand(self.shape[0]).bfloat16().contiguous()
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def why_not_shape(cls, spec: LayerSpec) -> str | None:
        """Takes symmetric weights per tensor or channel, and multiples of 32 inputs."""
        assert spec.weights is not None
        if spec.weights.granularity == "group" or not spec.weights.symmetric or not spec.weights.signed:
            return f"its weights are {spec.weights}, not symmetric with one scale per channel"
        inputs = spec.shape[1]
        return None if inputs % cls.step == 0 else f"its {inputs} inputs are no multiple of {cls.step}"

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        rows = rows.to(torch.bfloat16).contiguous()
        return cast(Tensor, torch.ops.aten._weight_int8pack_mm(rows, self.integers, self.scale))

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return cast(Tensor, self.integers.to(torch.int32) + self.middle_code)
