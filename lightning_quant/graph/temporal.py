"""The part of a denoiser that never sees the sample: what it makes of the timestep alone, or of that and a label.

In a U-Net that is the embedding of the timestep and its projection in each block, in a diffusion transformer the
modulation of the norms. A timestep is one of finitely many, and so is all that comes of it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.costs import CONVOLUTIONS
from lightning_quant.graph.owners import Owners
from lightning_quant.layers import timestep_argument


@dataclass(frozen=True)
class Temporal:
    """What depends on the timestep, and not on the sample. Names are relative to the traced module.

    Args:
        denoiser: the network that takes the timestep.
        layers: linear layers and convolutions in the order of their first call.
        outputs: those of them whose answer goes to the sample, and to no other of them.
    """

    denoiser: str
    layers: tuple[str, ...]
    outputs: tuple[str, ...]


class TemporalWatcher(Watcher):
    """Follows the timestep of the outermost network that takes one, as long as nothing of the sample joins it.

    Integers beside it, such as labels, are finitely many as well; floats are part of the sample.

    Attributes:
        made: what each tensor is made of: the layers that the timestep came through, or ``None`` if also the sample.
        readers: names of the layers that read the noisy sample itself, before any other layer has made something of it.
    """

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.denoiser: str | None = None
        self.made = WeakTensorKeyDictionary()
        self.readers: dict[str, None] = {}
        self._sample = WeakTensorKeyDictionary()  # the sample, also scaled or reshaped
        self._layers: dict[str, None] = {}
        self._mixed: set[str] = set()  # layers that see the sample, too
        self._inner: set[str] = set()  # layers that others of them read

    def given(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first network that is given a timestep is the one."""
        if self.denoiser not in (None, name):
            return
        argument = timestep_argument(module)
        if argument is None:
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        timestep = given.pop(argument, None)
        if not isinstance(timestep, Tensor):
            return
        self.denoiser = name
        floats = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for leaf in floats:
            self.made[leaf] = None
        for leaf in floats[:1]:
            self._sample[leaf] = True
        self.made[timestep] = frozenset()

    def saw(self, call: Call) -> None:
        """What comes of a call is made of all that went in."""
        if self.denoiser is None:
            return
        found = [self.made[x] for x in call.reads() if x in self.made]
        if not found:
            return
        layer = self.layer(call)
        self._follow_sample(call, layer)
        made = None if None in found else frozenset[str]().union(*found)
        if layer is not None and made is None:
            self._mixed.add(layer)
        elif layer is not None and made is not None:
            self._layers.setdefault(layer)
            self._inner |= made
            made |= {layer}
        for out in call.gives():
            self.made[out] = made

    def _follow_sample(self, call: Call, layer: str | None) -> None:
        known = [x for x in call.reads() if x in self.made]
        if not any(x in self._sample for x in known):
            return
        if layer is not None:
            self.readers.setdefault(layer)
        elif all(x in self._sample or self.made[x] == frozenset() for x in known):
            for out in call.gives():
                self._sample[out] = True

    def layer(self, call: Call) -> str | None:
        """The layer that a call belongs to."""
        if (linear := call.linear()) is not None:
            return self.owners.of(linear[1], call.stack)
        return self.owners.of(call.argument(1, "weight"), call.stack) if call.func in CONVOLUTIONS else None

    def result(self) -> Temporal | None:
        """What was found; ``None`` if nothing depends on a timestep alone."""
        layers = [name for name in self._layers if name not in self._mixed]
        if self.denoiser is None or not layers:
            return None
        return Temporal(self.denoiser, tuple(layers), tuple(name for name in layers if name not in self._inner))
