"""BatchNorms that are the only reader of one convolution or linear layer, so that the layer can make up for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.costs import CONVOLUTIONS
from lightning_quant.graph.owners import Owners


class BatchNormWatcher(Watcher):
    """Follows what convolutions and linear layers give to who reads it."""

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self._given: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self._readers: dict[str, list[str | None]] = {}  # layer -> norms, None for any other reader
        self._calls: Counter[str] = Counter()

    def saw(self, call: Call) -> None:
        """Note who gives a tensor, and who reads it."""
        for x in call.reads():
            if (given := self._given.get(x)) is not None:
                is_norm = call.func is F.batch_norm and x is call.argument(0, "input")
                self._readers[given].append(call.inside if is_norm else None)
        linear = call.linear()
        weight = call.argument(1, "weight") if call.func in CONVOLUTIONS else None if linear is None else linear[1]
        layer = None if weight is None else self.owners.of(weight, call.stack)
        if layer is not None and weight is not None:
            self._calls[layer] += 1
            self._readers.setdefault(layer, [None] if self.owners.is_tied(weight) else [])
            self._given[call.out] = layer

    def finish(self, output: Any) -> None:
        """Whatever the model returns is read by somebody we cannot see."""
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and (given := self._given.get(x)) is not None:
                self._readers[given].append(None)

    def result(self) -> dict[str, str]:
        """The layer before each BatchNorm, by the norm's name."""
        alone = {
            layer: readers[0]
            for layer, readers in self._readers.items()
            if len(readers) == 1 == self._calls[layer] and readers[0] is not None
        }
        shared = Counter(alone.values())
        return {norm: layer for layer, norm in alone.items() if norm is not None and shared[norm] == 1}
