"""The residual stream of a transformer: who writes into it, which norms read it, and who reads those.

Embeddings and linear layers whose outputs are added up write the stream; a norm reads it, and linear layers read the
norm. Beside that, which linear layer gives an attention its values, and which one reads what it attends to. A norm may
be ``F.layer_norm``, ``F.rms_norm``, or a module that spells it out, as those of transformers do: what such a module
computes is found out by trying.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.channels import channel_range, keeps_channels
from lightning_quant.graph.norms import Rows
from lightning_quant.graph.owners import Owners
from lightning_quant.graph.trace import watch
from lightning_quant.layers import QuantizedLayer

_SUMS = {"add", "radd", "__add__", "__radd__", "add_", "__iadd__", "iadd"}
_HEADS = {
    *("transpose", "swapaxes", "permute", "reshape", "view", "unflatten", "flatten", "unsqueeze", "squeeze"),
    *("expand", "repeat_interleave", "contiguous", "clone", "__getitem__", "to"),
}


@dataclass
class HeadPair:
    """The rows of a linear layer that are an attention's values, and the layer that reads what is attended to."""

    values: Rows
    reader: str
    head_size: int


@dataclass
class Residual:
    """What one forward told about the residual stream.

    Args:
        width: its channels; 0 if there is none.
        writers: embeddings and linear layers that are added up in it.
        norms: the linear layers that read each norm, by the norm's name; the norm reads the stream.
        kinds: whether a norm takes the mean off, ``"layer"``, or not, ``"rms"``.
        heads: values and readers of attention.
        obstacles: why the stream cannot be rotated, by the name of who is in the way.
        tied: of the writers and readers, those that share their weight with another layer.
    """

    width: int = 0
    writers: list[str] = field(default_factory=list)
    norms: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, Literal["layer", "rms"]] = field(default_factory=dict)
    heads: list[HeadPair] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Origin:
    """What a tensor is: what a layer returned, the stream, a norm's output, or values and what they became."""

    kind: Literal["written", "stream", "norm", "values", "attended"]
    name: str = ""
    rows: Rows | None = None


def residual_stream(module: nn.Module, run: Callable[[], Any]) -> Residual:
    """Run a model once and tell what writes and reads its residual stream.

    Args:
        module: the module whose names are used.
        run: runs one forward of the module, or of something that contains it.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
    ...         self.linear, self.last, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9)
    ...
    ...     def forward(self, ids):
    ...         x = self.table(ids)
    ...         x = x + self.linear(self.norm(x))
    ...         return self.head(self.last(x))
    >>> net = Net()
    >>> found = residual_stream(net, lambda: net(torch.arange(3)[None]))
    >>> found.writers, found.norms
    (['table', 'linear'], {'norm': ['linear'], 'last': ['head']})
    """
    watcher = _ResidualWatcher(module)
    watch(module, (watcher,), run)
    return watcher.found


def norm_kind(module: nn.Module) -> Literal["layer", "rms"] | None:
    """What kind of norm over the last axis a module computes: it is tried out; ``None`` if it is none.

    >>> norm_kind(nn.LayerNorm(4)), norm_kind(nn.RMSNorm(4)), norm_kind(nn.Linear(4, 4))
    ('layer', 'rms', None)
    """
    weight = getattr(module, "weight", None)
    if type(module) is nn.LayerNorm:
        return "layer" if weight is not None and len(module.normalized_shape) == 1 else None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
        return None
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator).to(weight)
    try:
        with torch.no_grad():
            got = module(x)
    except Exception:  # whatever it is, it is no norm of one tensor
        return None
    want = x * x.square().mean(-1, keepdim=True).rsqrt() * weight
    return "rms" if got.shape == x.shape and torch.allclose(got, want, rtol=1e-2, atol=1e-3) else None


class _ResidualWatcher(Watcher):
    """Follows what embeddings and linear layers return to sums, norms and attention."""

    def __init__(self, module: nn.Module) -> None:
        self.owners = Owners(module)
        self.found = Residual()
        modules = dict(module.named_modules())
        self.modules = modules
        for name, child in modules.items():
            if name and (kind := norm_kind(child)) is not None:
                self.found.kinds[name] = kind
        self._followed: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()
        self._seen: set[int] = set()  # tensors of the stream that somebody but a norm or a sum has read
        self._read: dict[str, str] = {}  # writer -> who else reads what it returns
        self._values: dict[str, tuple[Rows, int]] = {}

    def saw(self, call: Call) -> None:
        """Follow one call."""
        inside = call.inside or ""
        if inside in self.found.kinds:
            self._in_norm(call, inside)
        elif call.func is F.embedding and (layer := self.owners.of(call.argument(1, "weight"), call.stack)):
            self._write(call, layer, call.argument(1, "weight"))
        elif (linear := call.linear()) is not None:
            self._linear(call, *linear)
        elif call.func is F.scaled_dot_product_attention:
            self._attention(call)
        else:
            self._other(call)

    def finish(self, output: Any) -> None:
        """What the model returns is read by somebody we cannot see."""
        for x in tree_leaves(output):
            origin = self._origin(x)
            if origin is not None and origin.kind in ("stream", "norm"):
                self._obstruct(origin, "the caller: it is an output of the model")
        found = self.found
        written = dict(found.norms)  # only norms that read the stream were entered
        found.kinds = {name: kind for name, kind in found.kinds.items() if name in written}
        for writer in found.writers:
            if writer in self._read:
                found.obstacles.setdefault(writer, f"what it adds to the stream is also read by {self._read[writer]}")
        for name in (*found.writers, *(name for readers in found.norms.values() for name in readers)):
            if self.owners.is_tied(self.modules[name].weight):
                found.tied.add(name)

    # ---------------------------------------------------------------- private

    def _in_norm(self, call: Call, norm: str) -> None:
        for x in call.reads():
            origin = self._origin(x)
            if origin is not None and origin.kind in ("stream", "written"):
                if origin.kind == "written":  # a stream of one writer so far
                    self._joins(origin)
                self.found.norms.setdefault(norm, [])
                self.found.width = x.shape[-1]
            elif origin is not None and origin.kind == "norm" and origin.name != norm:
                self._obstruct(origin, f"another norm, `{norm}`: its output is the residual stream")
        if norm in self.found.norms and any(x is self.modules[norm].weight for x in call.reads()):
            self._follow(call.out, _Origin("norm", norm))

    def _write(self, call: Call, layer: str, weight: Tensor) -> None:
        self._follow(call.out, _Origin("written", layer, Rows(layer, 0, call.out.shape[-1])))

    def _linear(self, call: Call, x: Tensor, weight: Tensor) -> None:
        layer = self.owners.of(weight, call.stack)
        if layer is None and isinstance(self.modules.get(call.inside or ""), QuantizedLayer):
            layer = call.inside  # which may hand on a view of its weight
        origin = self._origin(x)
        if origin is not None and origin.kind == "norm":
            if layer is None or layer not in call.stack:
                self._obstruct(origin, "a linear function whose layer is not called")
            elif layer not in self.found.norms[origin.name]:
                self.found.norms[origin.name].append(layer)
        elif origin is not None and origin.kind == "attended" and layer is not None:
            rows, size = self._values[origin.name]
            self.found.heads.append(HeadPair(rows, layer, size))
        elif origin is not None:
            self._reads(origin, f"`{layer}`, without a norm between them")
        if layer is not None:
            self._write(call, layer, weight)

    def _attention(self, call: Call) -> None:
        for x in call.reads():
            origin = self._origin(x)
            if origin is not None and origin.kind in ("stream", "norm"):
                self._obstruct(origin, "attention")
        value = call.argument(2, "value")
        origin = self._origin(value)
        if origin is not None and origin.rows is not None and origin.kind in ("values", "written"):
            name = f"{call.inside}#{len(self._values)}"
            self._values[name] = (origin.rows, value.shape[-1])
            self._follow(call.out, _Origin("attended", name))

    def _other(self, call: Call) -> None:
        found = [(x, origin) for x in call.reads() if (origin := self._origin(x)) is not None]
        if not found:
            return
        kinds = {origin.kind for _, origin in found}
        if call.name in _SUMS and kinds <= {"written", "stream"} and len(found) == 2 and "alpha" not in call.kwargs:
            for _, origin in found:
                self._joins(origin)
            self._follow(call.out, _Origin("stream"))
            return
        if len(found) == 1:
            origin = found[0][1]
            pieces = channel_range(call)
            if origin.kind in ("written", "values") and pieces is not None and origin.rows is not None:
                for piece, start, stop in pieces:
                    rows = Rows(origin.rows.linear, origin.rows.start + start, origin.rows.start + stop)
                    self._follow(piece, _Origin("values", origin.name, rows))
                self._reads(origin, f"`{call.name}`")
                return
            if keeps_channels(call):
                for out in call.gives():
                    self._follow(out, origin)
                return
            if origin.kind in ("written", "values", "attended") and call.name in _HEADS:
                kind: Literal["values", "attended"] = "attended" if origin.kind == "attended" else "values"
                self._follow(call.out, _Origin(kind, origin.name, origin.rows))
                self._reads(origin, f"`{call.name}`")
                return
        for _, origin in found:
            self._reads(origin, f"`{call.name}`")

    def _joins(self, origin: _Origin) -> None:
        """What a layer returned becomes part of the stream."""
        if origin.kind == "written" and origin.name not in self.found.writers:
            self.found.writers.append(origin.name)

    def _reads(self, origin: _Origin, reader: str) -> None:
        if origin.kind in ("stream", "norm"):
            self._obstruct(origin, reader)
        elif origin.kind == "written":
            self._read.setdefault(origin.name, reader)

    def _obstruct(self, origin: _Origin, reader: str) -> None:
        name = origin.name or "the residual stream"
        self.found.obstacles.setdefault(name, f"it is also read by {reader}")

    def _origin(self, x: Any) -> _Origin | None:
        return self._followed.get(x) if isinstance(x, Tensor) else None

    def _follow(self, x: Any, origin: _Origin) -> None:
        if isinstance(x, Tensor):
            self._followed[x] = origin
