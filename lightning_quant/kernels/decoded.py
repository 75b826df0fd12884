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

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes everything."""
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> DecodedWeights:
        """Decode the layer's weights, or pack their codes."""
        kernel = cls()
        for name, quantizer in layer.weight_quantizers().items():
            rows = layer.weight_rows(name).detach()
            kernel.shapes[name] = rows.shape
            if packed:
                codes = pack(quantizer.encode(rows), quantizer.scheme.bits).to(rows.device)
                kernel.register_buffer(f"packed_{name}", codes, persistent=False)
            else:
                kernel.decoded[name] = layer.quantized(name).detach()
        return kernel

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer as it simulates it; it asks back for its weights."""
        assert isinstance(layer, KernelLayer)
        return layer.simulate(*args, **kwargs)

    def weight(self, layer: QuantizedLayer, name: str) -> Tensor:
        """A weight on its grid, as the layer stores it."""
        return self.decoded[name] if name in self.decoded else super().weight(layer, name)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of a weight."""
        quantizer = layer.weight_quantizers()[weight]
        if weight in self.decoded:
            return quantizer.encode(layer.weight_rows(weight).detach())
        packed: Tensor = getattr(self, f"packed_{weight}")
        return unpack(packed, quantizer.scheme.bits, tuple(self.shapes[weight])).to(packed.device)
