"""Shapes and multiplications of the layers, as they ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.owners import Owners

CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip


@dataclass
class Cost:
    """What one layer costs in one forward.

    Args:
        macs: multiply-accumulates, over all calls.
        calls: how often it ran.
        input: shape of its input in the first call.
        output: shape of its output in the first call.
    """

    macs: int
    calls: int
    input: tuple[int, ...]
    output: tuple[int, ...]


class CostWatcher(Watcher):
    """Counts the multiplications of linear functions and convolutions, and notes who reads a weight directly."""

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.costs: dict[str, Cost] = {}
        self.functional: dict[str, list[str]] = {}

    def saw(self, call: Call) -> None:
        """Look at linear functions, convolutions and the fused call of ``nn.MultiheadAttention``."""
        if call.func is F.multi_head_attention_forward:
            self._saw_multihead(call)
            return
        linear = call.linear()
        if linear is not None:
            x, weight = linear
        elif call.func in CONVOLUTIONS:
            x, weight = call.argument(0, "input"), call.argument(1, "weight")
        else:
            return
        layer = self.owners.of(weight, call.stack)
        if layer is None:
            return
        self._add(layer, self._macs(call, x, weight), x, call.out)
        if linear is not None and layer not in call.stack and call.inside is not None:
            readers = self.functional.setdefault(call.inside, [])
            if layer not in readers:
                readers.append(layer)

    def _macs(self, call: Call, x: Tensor, weight: Tensor) -> int:
        if call.linear() is not None:
            return int(call.out.numel() * x.shape[-1])
        if "transpose" in call.name:  # weight (in, out / groups, ...): every input element meets a whole filter
            return int(x.numel() * weight[0].numel())
        return int(call.out.numel() * weight[0].numel())

    def _saw_multihead(self, call: Call) -> None:
        """Three input projections, counted for the layer, and one output projection, counted for its own."""
        if call.inside is None:
            return
        module = self.owners.module.get_submodule(call.inside)
        out = call.gives()[0]
        if isinstance(module, nn.MultiheadAttention):
            inputs = [call.argument(i, name) for i, name in enumerate(("query", "key", "value"))]
            macs = sum(x.numel() * module.embed_dim for x in inputs)
            self._add(call.inside, macs, inputs[0], out)
            self._add(f"{call.inside}.out_proj", out.numel() * module.embed_dim, out, out)

    def _add(self, layer: str, macs: int, x: Tensor, out: Any) -> None:
        cost = self.costs.setdefault(layer, Cost(0, 0, tuple(x.shape), tuple(out.shape)))
        cost.macs += macs
        cost.calls += 1
