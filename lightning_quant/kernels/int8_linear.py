"""W8A8 on a CPU: linear layers, and convolutions whose windows do not overlap."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_quant.kernels.codes import Grid, to_uint8
from lightning_quant.kernels.epilogue import Epilogue
from lightning_quant.kernels.int8_product import Int8Product
from lightning_quant.kernels.pending import PatientKernel, Pending, plain
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer

FLOATS = (torch.float32, torch.bfloat16)
MATRICES = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")


class Int8Linear(PatientKernel):
    r"""Products of activation codes and weight codes, scaled once.

    .. math:: y_{mn} = s_m s_n \sum_k (c_{mk} - z_m) (w_{nk} - o_n) + b_n

    Scale and zero point of the activations are known before, or found in each batch or for each token. Between floats
    of bfloat16 a GELU behind it, and the rounding for the next kernel, are taken into the product.
    """

    name: ClassVar[str] = "int8 (oneDNN)"
    kinds: ClassVar[frozenset[str]] = frozenset({*MATRICES, "Conv2d"})

    bias: Tensor | None
    totals: Tensor

    def __init__(self, layer: QuantizedLayer, row: UniformQuantizer | None = None) -> None:
        super().__init__()
        weights, inputs = layer.weight_quantizer, layer.input_quantizer if row is None else row
        assert isinstance(weights, UniformQuantizer) and isinstance(inputs, UniformQuantizer)
        scheme = inputs.scheme
        codes, offset = signed_codes(weights, layer.weight_rows())
        self.lowest_code = -(2 ** (weights.scheme.bits - 1))
        self.weight_shape = tuple(codes.shape)
        self.stride = cast(tuple[int, ...], getattr(layer, "stride", ()))
        bias = layer.full_bias()
        bias = None if bias is None else bias.detach().float()
        codes = codes.flatten(1)  # (out, in)
        if scheme.dynamic:  # what depends on the batch is applied behind the product, and the bias behind that
            self.product = Int8Product(
                codes, weights.scale, None, -scheme.qmin, offset, scheme.bits, weights.scheme.bits
            )
            totals = codes.sum(1) - codes.shape[1] * offset
            self.register_buffer("totals", totals * weights.scale, persistent=False)
            self.register_buffer("bias", bias, persistent=False)
        else:
            self.grid, scale = Grid.of(inputs), weights.scale * inputs.scale
            self.product = Int8Product(
                codes, scale, bias, self.grid.zero_point, offset, scheme.bits, weights.scheme.bits
            )

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """A convolution only if its windows do not overlap."""
        return super().considers(spec) and (spec.kind in MATRICES or _windows_do_not_overlap(spec))

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes weights per tensor or channel, and inputs per tensor or token."""
        matrix = spec.kind in MATRICES
        if spec.dtype not in FLOATS:
            return f"its float weights are {spec.dtype}, not float32 or bfloat16".replace("torch.", "")
        if reason := spec.why_not_plain_integers():
            return reason
        assert spec.weights is not None and spec.inputs is not None
        if spec.weights.granularity == "group":
            return f"its weights are {spec.weights}, not with one scale per channel"
        if spec.inputs.granularity not in (("tensor", "token") if matrix else ("tensor",)):
            return f"its inputs are {spec.inputs}, not with one scale per tensor{' or token' * matrix}"
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> Int8Linear:
        """Pack the layer's codes."""
        return cls(layer)

    def with_inputs(self, layer: QuantizedLayer, inputs: UniformQuantizer) -> Int8Linear:
        """The same packed weights beside inputs on another grid, which is known before."""
        found, weights = self.sharing(), cast(UniformQuantizer, layer.weight_quantizer)
        found.grid = Grid.of(inputs)
        found.product = self.product.with_inputs(weights.scale * inputs.scale, found.grid.zero_point)
        return found

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        inputs = cast(UniformQuantizer, layer.input_quantizer)
        if inputs.scheme.dynamic or len(self.weight_shape) == 4:
            x = plain(x)
        return self._on_patches(x, inputs) if len(self.weight_shape) == 4 else self._on_rows(x, inputs)

    @property
    def bare(self) -> Epilogue:
        """What follows the sum of integers in the layer itself."""
        return Epilogue(self.product.scale, self.product.bias, dtype=torch.bfloat16)

    def finish(self, codes: Tensor, epilogue: Epilogue, grid: Grid | None = None) -> Tensor:
        """The product and what follows it, in one pass: (..., in) -> (..., out)."""
        return self.product.finished(codes, epilogue.scale, epilogue.bias, *epilogue.ending_on(grid))

    def folded(self, norm: Any) -> None:
        """Never: the channels that are normed are those of axis 1, and those of rows are the last ones."""

    def layout_of(self, codes: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of that: one row after the other."""
        shape = (*codes.shape[:-1], len(self.product.scale))
        return shape, tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return cast(Tensor, self.product.integers().view(self.weight_shape).to(torch.int32) - self.lowest_code)

    def _on_rows(self, x: Tensor, inputs: UniformQuantizer) -> Tensor:
        """(..., in) -> (..., out)."""
        scheme = inputs.scheme
        if not scheme.dynamic:
            dtype = output_dtype(x)
            compact = dtype == torch.bfloat16
            codes = x.codes_on(self.grid) if isinstance(x, Pending) else self.grid.unsigned(x, exact=not compact)
            if compact and self.product.takes_what_follows and not torch.compiler.is_compiling():
                return self.answer(codes)
            return cast(Tensor, self.product(codes, dtype))
        scale, zero_point = inputs.state_for(x.float())
        steps = torch.mul(x.float(), scale.reciprocal()).round_().add_(zero_point - scheme.qmin)
        out = cast(Tensor, self.product(to_uint8(steps.clamp_(0, scheme.qmax - scheme.qmin))))
        if not scheme.symmetric:
            out -= zero_point * self.totals
        out *= scale
        out = out if self.bias is None else out + self.bias
        return out.to(output_dtype(x))

    def _on_patches(self, x: Tensor, inputs: UniformQuantizer) -> Tensor:
        """A convolution whose windows do not overlap: (B, C, H, W) -> (B, out, H / kh, W / kw)."""
        _, channels, kh, kw = self.weight_shape
        if kh == kw == 1:
            x = x[..., :: self.stride[0], :: self.stride[1]]
        *batch, _, h, w = x.shape
        h, w = h // kh, w // kw
        patches = x[..., : h * kh, : w * kw].unflatten(-1, (w, kw)).unflatten(-3, (h, kh))  # (..., C, h, kh, w, kw)
        patches = patches.movedim((-4, -2), (-5, -4))  # (..., h, w, C, kh, kw)
        rows = patches.reshape(*batch, h, w, channels * kh * kw)
        return self._on_rows(rows, inputs).movedim(-1, -3)


def signed_codes(quantizer: UniformQuantizer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a weight as signed integers (out, ...), and the integer that stands for 0 in each row (out,)."""
    half = 2 ** (quantizer.scheme.bits - 1)
    codes = quantizer.encode(rows.detach()) - half
    offset = quantizer.zero_point - quantizer.scheme.qmin - half
    return codes, offset.expand(len(codes)).to(torch.int32)


def output_dtype(x: Tensor) -> torch.dtype:
    """What a float layer would answer in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _windows_do_not_overlap(spec: AnySpec) -> bool:
    assert isinstance(spec, LayerSpec) and spec.conv is not None
    stride, padding, dilation, groups, _ = spec.conv
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    apart = tuple(stride) == spec.shape[2:] or set(spec.shape[2:]) == {1}
    return bool(apart and unpadded and set(dilation) == {1} and groups == 1)
