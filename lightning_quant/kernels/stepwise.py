"""W8A8 on a CPU where the scale of the input depends on the step of a denoising trajectory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor

from lightning_quant.kernels.int8_conv import Int8Conv
from lightning_quant.kernels.int8_linear import Int8Linear
from lightning_quant.kernels.int8_product import may_saturate
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.layer_door import KernelLayer
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import StepQuantizer


class StepwiseKernel(Kernel):
    """A kernel for each row of the table of scales; all have the same packed weights.

    A batch whose samples are at different steps is simulated.
    """

    kernel: ClassVar[type[Int8Linear | Int8Conv]]
    first: Int8Linear | Int8Conv

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.first = self.kernel(layer, _table(layer).at(0))
        self._rows: dict[int, Int8Linear | Int8Conv] = {}

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Only what depends on the step."""
        return isinstance(spec, LayerSpec) and spec.stepwise and cls.kernel.considers(spec)

    @classmethod
    def why_not(cls, spec: LayerSpec) -> str | None:
        """Takes what the kernel of one step does."""
        if reason := cls.kernel.why_not(replace(spec, stepwise=False)):
            return reason
        assert spec.weights is not None and spec.inputs is not None
        bits = spec.inputs.bits, spec.weights.bits
        if may_saturate(*bits):
            return (
                f"its inputs have a scale for each step, and sums of {bits[0]} x {bits[1]} bits saturate on this CPU, "
                f"which has no VNNI; 7 bits for either would not"
            )
        return None

    @classmethod
    def of(cls, layer: QuantizedLayer, packed: bool = False) -> StepwiseKernel:
        """Pack the layer's codes."""
        return cls(layer)

    def run(self, layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer on the row that the trajectory is at."""
        table = _table(layer)
        if len(table.steps.rows) > 1:
            return cast(Tensor, cast(KernelLayer, layer).simulate(*args, **kwargs))
        row = table.steps.rows[0]
        if row not in self._rows:
            self._rows[row] = self.first.with_inputs(layer, table.at(row))
        return self._rows[row].run(layer, *args, **kwargs)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of the weight."""
        return self.first.codes(layer, weight)

    def __getstate__(self) -> dict[str, Any]:
        """The rows are made again when they are needed."""
        return {**self.__dict__, "_rows": {}}


class StepwiseLinear(StepwiseKernel):
    """Linear layers, and convolutions whose windows do not overlap."""

    name, kernel = f"{Int8Linear.name}, by step", Int8Linear


class StepwiseConv(StepwiseKernel):
    """Convolutions."""

    name, kernel = f"{Int8Conv.name}, by step", Int8Conv


def _table(layer: QuantizedLayer) -> StepQuantizer:
    return cast(StepQuantizer, layer.input_quantizer)
