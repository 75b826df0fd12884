"""How long products take on real kernels, for budgets in milliseconds."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_quant.calibration import merge_across_ranks
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.layer_door import give_back, run_on
from lightning_quant.kernels.pending import plain
from lightning_quant.kernels.registry import FALLBACK, choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers.products import Option, Product, Shapes, Slot

ROUNDS = 5


class KernelLatency:
    """Milliseconds for one sample, on the kernels that :class:`~lightning_quant.KernelSwap` would take, here and now.

    A layer of the same shape with the bits that are asked for runs on inputs of the size of the calibration samples, on
    its low-bit kernel and on the fallback; the faster one counts. What kernels leave to floats whatever its bits are,
    as attention, counts nothing.

    Args:
        model: the calibrated model.
        plan: what was done to it.
        shapes: what was in the slots.
    """

    def __init__(self, model: nn.Module, plan: Plan, shapes: Shapes) -> None:
        self.layers, self.shapes = plan.quantized_layers(model), shapes
        self._measured: dict[tuple[LayerSpec, tuple[int, ...]], float] = {}

    def __call__(self, product: Product, option: Option) -> float:
        """Of all layers that are decided together."""
        owners = {slot.owner for slot in (*product.left, *product.right) if not slot.is_operand}
        return sum(self._of(self.layers[owner], owner, option) for owner in sorted(owners))

    def _of(self, layer: QuantizedLayer, owner: str, option: Option) -> float:
        shapes = self.shapes.of.get(Slot(owner, "inputs"))
        if layer.weight_names != ("weight",) or not shapes:
            return 0.0
        spec = LayerSpec.of(layer)
        spec = replace(spec, weights=_with(spec.weights, option.left), inputs=_with(spec.inputs, option.right))
        if (spec, shapes[0]) not in self._measured:
            seconds = merge_across_ranks(_fastest(layer, spec, torch.randn(shapes[0], device=layer.device)))
            self._measured[spec, shapes[0]] = 1e3 * sum(seconds) / len(seconds) / self.shapes.samples
        return self._measured[spec, shapes[0]] * len(shapes)


def _with(scheme: Scheme | None, bits: int | None) -> Scheme | None:
    return scheme if scheme is None or bits is None else replace(scheme, bits=bits)


def _fastest(layer: QuantizedLayer, spec: LayerSpec, x: Tensor) -> float:
    """Seconds that a layer of this spec takes on the faster one of its kernels."""
    twin = deepcopy(layer)
    twin.set_quantizer("weight_quantizer", spec.weights, axis=0)
    twin.set_quantizer("input_quantizer", spec.inputs, axis=layer.input_axis)
    if twin.weight_quantizer is not None:
        twin.weight_quantizer.fit(twin.weight_rows().detach(), "minmax")
    if twin.input_quantizer is not None:
        twin.input_quantizer.fit(x, "minmax")
    x = x.to(spec.dtype)
    seconds: list[float] = []
    kernels: list[type[Kernel]] = [choose(spec).kernel, FALLBACK]
    for kernel in kernels:
        run_on(twin, kernel.of(twin))
        seconds.append(min(_seconds(twin, x) for _ in range(ROUNDS)))
        give_back(twin)
    return min(seconds)


def _seconds(layer: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    plain(layer(x))
    return time.perf_counter() - began
