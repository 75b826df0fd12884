"""Norms that feed linear layers and nobody else, so that a scale and a shift can be folded into them.

Tensors that come out of a norm are followed through views, and who reads them is written down. A norm without an affine
of its own may be modulated, as in diffusion transformers: ``norm(x) * (1 + scale) + shift``, where scale and shift are
rows of another linear layer's output; then that layer can take the fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.channels import channel_range, keeps_channels
from lightning_quant.graph.owners import Owners


class Rows(NamedTuple):
    """A range of a linear layer's output channels."""

    linear: str
    start: int
    stop: int


class Modulation(NamedTuple):
    """The rows that modulate a norm: ``norm(x) * (1 + scale) + shift``."""

    scale: Rows
    shift: Rows


@dataclass(frozen=True)
class NormPair:
    """A norm and the linear layers that are its only readers; the fold goes into the modulation where there is one."""

    norm: str
    linears: tuple[str, ...]
    modulation: Modulation | None = None


class _FromNorm(NamedTuple):
    norm: str
    scale: Rows | None = None
    shift: Rows | None = None


class _FromLinear(NamedTuple):
    rows: Rows
    plus_one: bool = False


class NormWatcher(Watcher):
    """Follows norm outputs to their readers."""

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.has_affine: dict[str, bool] = {}
        self.readers: dict[str, list[str]] = {}  # norm -> linears
        self.modulations: dict[str, set[Modulation | None]] = {}  # norm -> how its readers see it
        self.obstacles: dict[str, str] = {}  # norm -> why it cannot be folded
        self.foreign: dict[str, str] = {}  # linear -> what else it reads
        self.read_elsewhere: set[Rows] = set()  # rows of linears that are more than a modulation
        self._followed: MutableMapping[Tensor, _FromNorm | _FromLinear] = WeakTensorKeyDictionary()

    def saw(self, call: Call) -> None:
        """Begin to follow, go on following, or note a reader."""
        found = [origin for x in call.reads() if (origin := self._origin(x)) is not None]
        if call.func is F.layer_norm:
            self._obstruct(found, "a norm")
            self._saw_norm(call)
        elif (linear := call.linear()) is not None:
            self._saw_linear(call, *linear, found)
        elif found and not self._goes_on(call, found):
            self._obstruct(found, f"`{call.name}`")

    def finish(self, output: Any) -> None:
        """Whatever the model returns is read by somebody we cannot see."""
        self._obstruct(
            [o for x in tree_leaves(output) if (o := self._origin(x))], "the caller: it is an output of the model"
        )

    def result(self) -> tuple[list[NormPair], dict[str, str]]:
        """The pairs, and why the other norms are none."""
        norms_of = Counter(linear for linears in self.readers.values() for linear in linears)
        rows_of = Counter(rows for seen in self.modulations.values() for m in seen if m is not None for rows in m)
        pairs, unfoldable = [], dict(self.obstacles)
        for norm, linears in self.readers.items():
            seen = self.modulations.get(norm, {None})
            modulation = next(iter(seen))
            shared = [name for name in linears if name in self.foreign or norms_of[name] > 1]
            if shared:
                unfoldable.setdefault(norm, f"`{shared[0]}` also reads something else, or shares its weight")
            elif not linears:
                unfoldable.setdefault(norm, "no linear layer reads it")
            elif len(seen) > 1 or (modulation is not None and self.has_affine[norm]):
                unfoldable.setdefault(norm, "its readers see it in several ways, modulated and not")
            elif not self.has_affine[norm] and modulation is None:
                unfoldable.setdefault(norm, "it has no affine, and no modulation that was recognised")
            elif modulation is not None and (
                self.read_elsewhere & set(modulation) or max(rows_of[rows] for rows in modulation) > 1
            ):
                unfoldable.setdefault(norm, f"its modulation by `{modulation.scale.linear}` is used elsewhere too")
            if norm not in unfoldable:
                pairs.append(NormPair(norm, tuple(linears), modulation))
        return pairs, unfoldable

    def _saw_norm(self, call: Call) -> None:
        weight = call.argument(2, "weight")
        norm = call.inside if weight is None else self.owners.of(weight, call.stack)
        if norm is None:
            return
        self.has_affine[norm] = weight is not None
        self.readers.setdefault(norm, [])
        self._follow(call.out, _FromNorm(norm))
        if weight is not None and self.owners.is_tied(weight):
            self.obstacles.setdefault(norm, "its weight is shared with another layer")
        if len(call.argument(1, "normalized_shape")) != 1:
            self.obstacles.setdefault(norm, "it normalises more than the last axis")

    def _saw_linear(self, call: Call, x: Tensor, weight: Tensor, found: list[_FromNorm | _FromLinear]) -> None:
        linear, origin = self.owners.of(weight, call.stack), self._origin(x)
        if linear is None or any(o is not origin for o in found):
            self._obstruct(found, "a linear function whose weight belongs to no layer")
        elif self.owners.is_tied(weight):
            self.foreign.setdefault(linear, "its weight is shared")
        if linear is None:
            return
        if isinstance(origin, _FromNorm):
            if origin.scale is not None and origin.shift is None:
                self.obstacles.setdefault(origin.norm, "it is scaled and not shifted")
            if linear not in self.readers[origin.norm]:
                self.readers[origin.norm].append(linear)
            modulation = Modulation(origin.scale, origin.shift) if origin.scale and origin.shift else None
            self.modulations.setdefault(origin.norm, set()).add(modulation)
        else:
            self.foreign.setdefault(linear, "another tensor")
            self._obstruct([origin] if origin else [], f"`{linear}`")
        self._follow(call.out, _FromLinear(Rows(linear, 0, call.out.shape[-1])))

    def _goes_on(self, call: Call, found: list[_FromNorm | _FromLinear]) -> bool:
        """Follow through a view, a cut, ``1 + scale``, or a modulation; ``False`` if the call is an ordinary reader."""
        origin = found[0]
        if len(found) == 1 and keeps_channels(call):
            for out in call.gives():
                self._follow(out, origin)
            return True
        if len(found) == 1 and isinstance(origin, _FromLinear):
            pieces = channel_range(call)
            if pieces is not None:
                for piece, start, stop in pieces:
                    rows = Rows(origin.rows.linear, origin.rows.start + start, origin.rows.start + stop)
                    self._follow(piece, _FromLinear(rows, origin.plus_one))
                return True
            one = [x for x in call.args if isinstance(x, (int, float))] == [1] and "alpha" not in call.kwargs
            if call.name in {"add", "radd"} and one and not origin.plus_one:
                self._follow(call.out, _FromLinear(origin.rows, plus_one=True))
                return True
        return len(found) == 2 and self._modulates(call, found)

    def _modulates(self, call: Call, found: list[_FromNorm | _FromLinear]) -> bool:
        norms, linears = ([o for o in found if isinstance(o, kind)] for kind in (_FromNorm, _FromLinear))
        if len(norms) != 1 or len(linears) != 1 or call.kwargs:
            return False
        norm, linear = norms[0], linears[0]
        assert isinstance(norm, _FromNorm) and isinstance(linear, _FromLinear)
        if call.name == "mul" and linear.plus_one and norm.scale is None:
            self._follow(call.out, norm._replace(scale=linear.rows))
            return True
        if call.name == "add" and not linear.plus_one and norm.scale is not None and norm.shift is None:
            self._follow(call.out, norm._replace(shift=linear.rows))
            return True
        return False

    def _origin(self, x: Any) -> _FromNorm | _FromLinear | None:
        return self._followed.get(x) if isinstance(x, Tensor) else None

    def _follow(self, x: Tensor, origin: _FromNorm | _FromLinear) -> None:
        self._followed[x] = origin

    def _obstruct(self, origins: list[_FromNorm | _FromLinear], reader: str) -> None:
        for origin in origins:
            if isinstance(origin, _FromNorm):
                self.obstacles.setdefault(origin.norm, f"it is also read by {reader}")
            else:
                self.read_elsewhere.add(origin.rows)
