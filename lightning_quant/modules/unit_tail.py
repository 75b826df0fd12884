"""What the float model makes of a unit's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_quant.calibration import Signature, reordered, sample_count, sample_output
from lightning_quant.calibration.samples import merge_batches
from lightning_quant.layers import as_float


class FloatTail:
    """The float model behind a unit: its own output as a function of the unit's.

    The whole float model runs on the samples, and where the unit answers, another output takes the place of its own.
    So whatever the model does with it, and with what it computed before, is done here as well, and gradients come back
    through frozen float layers.

    Args:
        model: the quantized model.
        unit: name of the unit.
        batches: the calibration batches.
        run: feeds one batch through the model.
        signature: how the unit is called.

    Raises:
        ValueError: if the unit is called more than once in a forward, or the model's output has no entry per sample.
    """

    def __init__(
        self,
        model: nn.Module,
        unit: str,
        batches: Sequence[Any],
        run: Callable[[Any], Any],
        signature: Signature,
    ) -> None:
        self.model, self.unit, self.batches, self.run, self.signature = model, unit, batches, run, signature
        if signature.calls > 1:
            raise ValueError(
                f"`{unit}` runs {signature.calls} times in one forward, so nothing lies behind all of its outputs: "
                f"set global_weight=0, or name units that hold all of its calls with granularity=[...]"
            )
        self.starts = [0]
        for batch in batches:
            self.starts.append(self.starts[-1] + sample_count(batch))
        with torch.no_grad(), as_float(model):
            self.exact = torch.cat([self._output(batch) for batch in batches])

    def __call__(self, rows: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The model's output where the unit gives these tensors for these samples, and that of the float model.

        Args:
            rows: which samples, ascending.
            outputs: what the unit gives for them, samples first.
        """
        parts = []
        for first, last, batch in zip(self.starts, self.starts[1:], self.batches, strict=False):
            inside = rows[(rows >= first) & (rows < last)] - first
            if len(inside):
                parts.append(reordered(batch, inside.tolist()))

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = tree_flatten(output)
            remaining = iter(outputs)
            axes = self.signature.outputs
            filled = [
                leaf if axis is None else axis.back(next(remaining)).to(leaf.dtype)
                for leaf, axis in zip(leaves, axes, strict=True)
            ]
            return tree_unflatten(filled, spec)

        handle = self.model.get_submodule(self.unit).register_forward_hook(replace)
        try:
            with as_float(self.model):
                found = self._output(merge_batches(parts))
        finally:
            handle.remove()
        return found, self.exact[rows.to(self.exact.device)]

    def _output(self, batch: Any) -> Tensor:
        return sample_output(self.model, batch, self.run, "set global_weight=0")
