"""The fallback of attention: floats on the grid."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_quant.kernels.attention_door import KernelAttention
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AttentionSpec
from lightning_quant.layers import QuantAttention


class SimulatedAttention(Kernel):
    """Computes the attention as it is simulated, to be compared with."""

    name: ClassVar[str] = "float"
    kinds: ClassVar[frozenset[str]] = frozenset({AttentionSpec.FUSED})
    low_bit: ClassVar[bool] = False

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        """Takes everything."""
        return None

    @classmethod
    def of(cls, layer: QuantAttention, packed: bool = False) -> SimulatedAttention:
        """Holds nothing."""
        return cls()

    def run(self, layer: KernelAttention, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the attention."""
        return layer.simulate(*args, **kwargs)
