"""W8A8 on a CPU: convolutions."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.codes import Grid
from lightning_quant.kernels.epilogue import Epilogue
from lightning_quant.kernels.int8_linear import FLOATS, output_dtype
from lightning_quant.kernels.int8_product import may_saturate
from lightning_quant.kernels.pending import PatientKernel, Pending
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.layers.conv import same_padding
from lightning_quant.quantizers import UniformQuantizer


class Int8Conv(PatientKernel):
    """A convolution of activation codes with weight codes, scaled once. What is padded is an exact zero.

    BatchNorm, activation and the rounding for the next kernel are taken into the same pass.
    """

    name: ClassVar[str] = "int8 conv (oneDNN)"
    kinds: ClassVar[frozenset[str]] = frozenset({"Conv2d", "Conv2dSame"})

    packed: Tensor
    scale: Tensor
    _layout: tuple[torch.Size, tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer, row: UniformQuantizer | None = None) -> None:
        super().__init__()
        weights, inputs = layer.weight_quantizer, layer.input_quantizer if row is None else row
        assert isinstance(weights, UniformQuantizer) and isinstance(inputs, UniformQuantizer)
        assert isinstance(layer, torch.nn.Conv2d) and not isinstance(layer.padding, str)
        self.lowest_weight = weights.scheme.qmin
        codes = (weights.encode(layer.weight_rows().detach()) + self.lowest_weight).to(torch.int8)
        self.same = layer.float_class.__name__ == "Conv2dSame"
        self.place = [*layer.stride, *layer.padding, *layer.dilation, layer.groups]
        self.grid = Grid.of(inputs)
        scale = (weights.scale * inputs.scale).expand(len(codes)).contiguous()
        self.register_buffer("scale", scale, persistent=False)
        self._pack(codes)
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int64), persistent=False)
        bias = layer.full_bias()
        bias = None if bias is None else bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Not the patches of a transformer, which are a linear layer."""
        return super().considers(spec) and not _is_of_patches(spec)

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes symmetric weights per tensor or channel, and static inputs per tensor."""
        assert spec.conv is not None
        if isinstance(spec.conv[1], str) or spec.conv[4] != "zeros":
            return f"its padding is {spec.conv[1]!r} {spec.conv[4]!r}, not a number of zeros"
        if spec.dtype not in FLOATS:
            return f"its float weights are {spec.dtype}, not float32 or bfloat16".replace("torch.", "")
        if reason := spec.why_not_plain_integers():
            return reason
        assert spec.weights is not None and spec.inputs is not None
        if spec.weights.granularity == "group" or not spec.weights.symmetric or not spec.weights.signed:
            return f"its weights are {spec.weights}, not symmetric with one scale per channel"
        if spec.inputs.granularity != "tensor" or spec.inputs.dynamic:
            return f"its inputs are {spec.inputs}, not with one scale per tensor that is known before"
        if may_saturate(spec.inputs.bits, spec.weights.bits):
            return (
                f"sums of {spec.inputs.bits} x {spec.weights.bits} bits saturate on this CPU, which has no VNNI; "
                f"7 bits for either would not"
            )
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> Int8Conv:
        """Pack the layer's codes."""
        return cls(layer)

    def with_inputs(self, layer: QuantizedLayer, inputs: UniformQuantizer) -> Int8Conv:
        """The same packed weights beside inputs on another grid."""
        found, weights = self.sharing(), cast(UniformQuantizer, layer.weight_quantizer)
        found.grid = Grid.of(inputs)
        found.scale = (weights.scale * inputs.scale).expand(len(self.scale)).contiguous()
        return found

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer: (B, C, H, W) or (C, H, W)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        compiles = torch.compiler.is_compiling()
        handed_on = not compiles and isinstance(x, Pending)
        image = not handed_on and x.dim() == 3
        codes = cast(Pending, x).codes_on(self.grid) if handed_on else self._codes(x.unsqueeze(0) if image else x)
        if self.same and any(margins := self._margins(codes)):
            codes = F.pad(codes, margins, value=self.grid.zero_point)
        dtype = torch.float32 if handed_on and not torch.is_autocast_enabled("cpu") else output_dtype(x)
        if dtype == torch.float32 and not compiles and not image:
            return self.answer(codes)
        convolve = _compiled_convolve if compiles else _convolve
        out: Tensor = convolve(codes, self.packed, self.scale, self.bias, self.grid.zero_point, self.place, dtype)
        return out.squeeze(0) if image else out

    def finish(self, codes: Tensor, epilogue: Epilogue, grid: Grid | None = None) -> Tensor:
        """The convolution and what follows it, in one pass."""
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            codes,
            1.0,
            self.grid.zero_point,
            self.packed,
            epilogue.scale,
            self.zeros,
            epilogue.bias,
            *_where(self.place),
            *epilogue.ending_on(grid),
        )
        return out

    @property
    def bare(self) -> Epilogue:
        """What follows the sum of integers in the layer itself."""
        return Epilogue(self.scale, self.bias)

    def layout_of(self, codes: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of that: channels last."""
        layout = self._layout
        if layout is None or layout[0] != codes.shape:
            b, c, (h, w) = codes.shape[0], self.scale.shape[0], _image(codes, self.packed, self.place)
            layout = self._layout = codes.shape, ((b, c, h, w), (c * h * w, 1, w * c, c))
        return layout[1]

    def _pack(self, codes: Tensor) -> None:
        packed = torch.ops.onednn.qconv_prepack(codes, self.scale, 1.0, self.grid.zero_point, *_where(self.place), None)
        self.register_buffer("packed", packed, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Packed weights cannot be saved; their integers can."""
        return {**self.__dict__, "_buffers": {**self._buffers, "packed": None}, "_integers": self.packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the integers again."""
        integers = state.pop("_integers")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(integers)

    def _codes(self, x: Tensor) -> Tensor:
        """Channels last, and laid out one after the other while they are rounded: (B, C, H, W)."""
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return self.grid.unsigned(rows).permute(0, 3, 1, 2)

    def _margins(self, codes: Tensor) -> list[int]:
        """What ``F.pad`` adds."""
        stride, _, dilation, _ = _where(self.place)
        return same_padding(codes.shape[2:], self.packed.shape[2:], stride, dilation)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return self.packed.to_dense().to(torch.int32) - self.lowest_weight


def _convolve(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: int,
    place: list[int],
    dtype: torch.dtype,
) -> Tensor:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    out: Tensor = torch.ops.onednn.qconv_pointwise(
        codes, 1.0, zero_point, packed, scale, zeros, bias, *_where(place), 1.0, 0, dtype, "none", [], ""
    )
    return out


def _is_of_patches(spec: AnySpec) -> bool:
    """Whether the windows lie side by side; those of one pixel are handed on from layer to layer as images."""
    assert isinstance(spec, LayerSpec) and spec.conv is not None
    stride, padding, *_ = spec.conv
    return tuple(stride) == spec.shape[2:] != (1, 1) and padding in ("valid", (0, 0))


def _image(codes: Tensor, packed: Tensor, place: list[int]) -> tuple[int, int]:
    """Height and width of what a convolution answers."""
    sizes = zip(codes.shape[2:], packed.shape[2:], place[0:2], place[2:4], place[4:6], strict=True)
    height, width = ((size + 2 * p - d * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, d in sizes)
    return height, width


def _where(place: list[int]) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups."""
    return place[0:2], place[2:4], place[4:6], place[6]


@torch.library.custom_op("lightning_quant::onednn_convolution", mutates_args=())
def _compiled_convolve(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: int,
    place: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The same as an operator that the compiler does not look into."""
    return _convolve(codes, packed, scale, bias, zero_point, place, dtype)


@_compiled_convolve.register_fake
def _shape_of_convolution(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: int,
    place: list[int],
    dtype: torch.dtype,
) -> Tensor:
    image = _image(codes, packed, place)
    return codes.new_empty(len(codes), len(scale), *image, dtype=dtype).to(memory_format=torch.channels_last)
