"""The fallback of every layer: float products on the grid, with weights that are decoded once."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.layer_door import KernelLayer
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers.packing import pack, unpack


class DecodedWeights(Kernel):
    """Computes the simulated layer bit for bit, without rounding its weights in every forward.

    Where the float weights are dropped it holds packed codes, and decodes them whenever they are needed.
    """

    name: ClassVar[str] = "float"
    kinds: ClassVar[frozenset[str]] = frozenset()  # all
    low_bit: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, torch.Size] = {}
        self.decoded: dict[str, Tensor] = {}
        self._integers: Tensor | None = None

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes everything."""
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> DecodedWeights:
        """Decode the layer's weights, or pack their codes; of one that is only pruned, what is kept."""
        if packed and layer.low_rank_branch() is not None:
            raise ValueError("a weight with a low-rank branch cannot be packed: set keep=False")
        kernel, quantizers = cls(), layer.weight_quantizers()
        for name in {**quantizers, **layer.masks()}:
            rows = layer.weight_rows(name).detach()
            kernel.shapes[name] = rows.shape
            if not packed:
                kernel.decoded[name] = layer.quantized(name).detach()
            elif name in quantizers:
                codes = pack(quantizers[name].encode(rows), quantizers[name].scheme.bits).to(rows.device)
                kernel.register_buffer(f"packed_{name}", codes, persistent=False)
            else:
                kernel.register_buffer(f"kept_{name}", rows[layer.masks()[name].keep], persistent=False)
        return kernel

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer as it simulates it; it asks back for its weights."""
        assert isinstance(layer, KernelLayer)
        return layer.simulate(*args, **kwargs)

    def weight(self, layer: QuantizedLayer, name: str) -> Tensor:
        """A weight on its grid, or without what is pruned, as the layer stores it."""
        if name in self.decoded:
            return self.decoded[name]
        kept = self._buffers.get(f"kept_{name}")
        if kept is None:
            return super().weight(layer, name)
        rows = kept.new_zeros(self.shapes[name]).masked_scatter_(layer.masks()[name].keep, kept)
        return rows.t() if layer.transposed else rows

    def in_steps(self, layer: QuantizedLayer, weight: Tensor) -> Tensor:
        """A weight as integers: rounded once, as the weight was, unless only packed codes are held."""
        if weight is not self.decoded.get("weight"):
            return super().in_steps(layer, weight)
        if self._integers is None:
            self._integers = super().in_steps(layer, weight)
        return self._integers

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of a weight."""
        quantizer = layer.weight_quantizers()[weight]
        if weight in self.decoded:
            return quantizer.encode(layer.weight_rows(weight).detach())
        packed: Tensor = getattr(self, f"packed_{weight}")
        return unpack(packed, quantizer.scheme.bits, tuple(self.shapes[weight])).to(packed.device)
