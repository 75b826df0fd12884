"""Layers that read a skip connection: the concatenation of a stream with a tensor that somebody has read before.

The two halves have ranges of their own. In a U-Net it is the shortcut convolution of each layer on the way up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.channels import keeps_channels
from lightning_quant.graph.costs import CONVOLUTIONS
from lightning_quant.graph.owners import Owners

_JOINS = {torch.cat, torch.concat, torch.concatenate}
_SAME_PLACE = {"contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "relu", "silu", "gelu", "leaky_relu"}


class JoinWatcher(Watcher):
    """Follows concatenations of a skip connection to the layers that read them.

    A tensor is a skip connection if it was read before it is joined; sine and cosine of a timestep, which are joined
    too, are not.
    """

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.widths: dict[str, tuple[int, ...] | None] = {}  # by layer; None: it reads something else, too
        self._read = WeakTensorKeyDictionary()
        self._joined = WeakTensorKeyDictionary()  # tensor -> the axis it was joined along, and the widths

    def saw(self, call: Call) -> None:
        """Begin to follow, go on following, or note a reader."""
        if call.func in _JOINS:
            self._saw_join(call)
        elif (read := self._read_by_layer(call)) is not None:
            layer, x, axis = read
            joined = self._joined.get(x)
            widths = joined[1] if joined is not None and joined[0] == axis % x.dim() else None
            if self.widths.setdefault(layer, widths) != widths:
                self.widths[layer] = None
        elif self._goes_on(call):
            for out in call.gives():
                self._joined[out] = self._joined[call.args[0]]
        for x in call.reads():
            self._read[x] = True

    def result(self) -> dict[str, tuple[int, ...]]:
        """How wide each part is, by the layer that reads them."""
        return {layer: widths for layer, widths in self.widths.items() if widths is not None}

    def _saw_join(self, call: Call) -> None:
        tensors, axis = call.argument(0, "tensors"), call.argument(1, "dim") or 0
        parts = [x for x in tensors if x.numel()]
        if len(parts) > 1 and any(x in self._read for x in parts):
            self._joined[call.out] = axis % call.out.dim(), tuple(x.shape[axis] for x in parts)

    def _read_by_layer(self, call: Call) -> tuple[str, Tensor, int] | None:
        """The layer, its input, and which axis of that has the channels."""
        linear = call.linear()
        if linear is not None:
            x, weight = linear
        elif call.func in CONVOLUTIONS and call.out.dim() == call.argument(0, "input").dim():
            x, weight = call.argument(0, "input"), call.argument(1, "weight")
            if weight.shape[1] != x.shape[1]:  # groups, or transposed
                return None
        else:
            return None
        layer = self.owners.of(weight, call.stack)
        return None if layer is None else (layer, x, -1 if linear is not None else 1)

    def _goes_on(self, call: Call) -> bool:
        """Whether a call leaves every element of a concatenation where it is."""
        x = call.args[0] if call.args else None
        if not isinstance(x, Tensor) or x not in self._joined or any(out.shape != x.shape for out in call.gives()):
            return False
        return call.name in _SAME_PLACE or (call.name == "dropout" and keeps_channels(call))
