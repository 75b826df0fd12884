"""W4A16 on a GPU by torchao's tile-packed tensor. Not measured: there has been no GPU."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.cuda.needs import why_not_capable
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.kernels.torchao.needs import why_no_torchao
from lightning_quant.kernels.weight_only import Int4Weights, WeightOnly, grouped
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer

TILES = 8  # in a row of tiles, as torchao packs them
ROW, COLUMN = 1024, 8  # sizes are padded to multiples of these


class TorchaoInt4Weights(WeightOnly):
    r"""Weights of up to 4 bits with a scale and a zero point for each group of inputs, by the tinygemm kernel of torch.

    .. math:: y_{mn} = \sum_k x_{mk} ( s_{ng} (w_{nk} - 8) + t_{ng} ) + b_n \qquad g = \lfloor k / G \rfloor

    Scales :math:`s` and shifts :math:`t` are rounded to bfloat16.
    """

    name: ClassVar[str] = "int4 weights (torchao)"
    bits: ClassVar[range] = range(1, 5)
    device: ClassVar[str] = "cuda"
    backends: ClassVar[frozenset[str]] = frozenset({"torchao"})
    automatic: ClassVar[bool] = False

    tensor: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor

        quantizer = cast(UniformQuantizer, layer.weight_quantizer)
        self.group = Int4Weights.group_of(quantizer.scheme.group_size, self.shape[1])
        pairs, scales = padded(*grouped(layer, self.group), self.group)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, TILES)
        tensor = Int4TilePackedTo4dTensor(packed, scales, [1, self.group], torch.Size(self.shape))
        self.register_buffer("tensor", tensor, persistent=False)

    @classmethod
    def why_not_shape(cls, spec: LayerSpec) -> str | None:
        """Takes groups of 32, 64, 128 or 256 inputs, or a scale for each output."""
        assert spec.weights is not None
        return (
            Int4Weights.why_not_groups(spec.weights.group_size, spec.shape[1])
            or why_not_capable(spec, (8, 0), "tinygemm's products")
            or why_no_torchao()
        )

    def product(self, rows: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        return F.linear(rows, self.tensor)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight: what the product makes of unit vectors, which it computes exactly."""
        packed: Tensor = self.tensor.qdata  # type: ignore[attr-defined]
        plain = torch.zeros_like(self.tensor.scale_and_zero)  # type: ignore[attr-defined]
        plain[..., 0] = 1
        units = torch.eye(self.shape[1], dtype=torch.bfloat16, device=packed.device)
        units = F.pad(units, (0, -self.shape[1] % ROW))
        centred = torch.ops.aten._weight_int4pack_mm(units, packed, self.group, plain)[:, : self.shape[0]]
        return cast(Tensor, centred.t().to(torch.int32) + self.middle_code)


def padded(codes: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A grouped weight as tinygemm's packing takes it: two codes in a byte, and sizes it can tile.

    Args:
        codes: (out, in).
        scales: scale and shift (groups, out, 2).
        group: how many inputs share them.

    >>> pairs, scales = padded(torch.arange(64).view(2, 32) % 16, torch.ones(1, 2, 2), 32)
    >>> pairs.shape, scales.shape, [hex(pair) for pair in pairs[0, :3]]
    (torch.Size([8, 512]), torch.Size([32, 8, 2]), ['0x1', '0x23', '0x45'])
    """
    outputs, inputs = codes.shape
    rows, columns = -outputs % COLUMN, -inputs % ROW
    codes = F.pad(codes, (0, columns, 0, rows))
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
    return pairs, F.pad(scales, (0, 0, 0, rows, 0, columns // group))
