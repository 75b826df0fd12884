"""Whether a function call leaves the channels (the last axis) of a tensor where they are, or cuts some out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_quant.graph.calls import Call

_VIEWS = {
    *("reshape", "view", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze"),
    *("clone", "detach", "expand", "expand_as"),
}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "type"}
_ALONG_ONE_AXIS = {"chunk", "split", "unbind", "roll", "flip", "select", "narrow", "index_select"}


def keeps_channels(call: Call) -> bool:
    """Whether a call only moves whole channel vectors around."""
    name, x = call.name, call.args[0] if call.args else None
    if not isinstance(x, Tensor) or x.dim() == 0:
        return False
    if name == "dropout":
        return not call.argument(2, "training")
    if name in _CASTS:
        return True
    if any(out.dim() == 0 or out.shape[-1] != x.shape[-1] for out in call.gives()):
        return False
    last = {-1, x.dim() - 1}
    if name in _VIEWS:
        return True
    if name == "pad":  # padding by nothing, as window attention does at sizes that fit
        return all(out.shape == x.shape for out in call.gives())
    if name in {"transpose", "swapaxes"}:
        return not last & set(call.args[1:3])
    if name == "permute":
        return _listed(call.args[1] if len(call.args) == 2 else call.args[1:])[-1] in last
    if name in _ALONG_ONE_AXIS:
        return not last & set(_listed(_axis(call)))
    if name == "__getitem__":
        return _keeps_last(call.args[1], x.dim())
    return False


def channel_range(call: Call) -> list[tuple[Tensor, int, int]] | None:
    """The pieces that ``chunk`` or ``split`` cuts along the last axis, as (piece, start, stop); else ``None``."""
    x = call.args[0] if call.args else None
    if (
        call.name not in {"chunk", "split"}
        or not isinstance(x, Tensor)
        or not {-1, x.dim() - 1} & set(_listed(_axis(call)))
    ):
        return None
    pieces, start = [], 0
    for piece in call.gives():
        pieces.append((piece, start, start + piece.shape[-1]))
        start += piece.shape[-1]
    return pieces


def _axis(call: Call) -> Any:
    second = {"unbind", "select", "narrow", "index_select"}  # these take the axis as their second argument
    for key in ("dim", "dims"):
        if key in call.kwargs:
            return call.kwargs[key]
    if call.name in second:
        return call.args[1] if len(call.args) > 1 else 0
    return call.args[2] if len(call.args) > 2 else 0


def _keeps_last(index: Any, dims: int) -> bool:
    """Whether an index takes the last axis whole."""
    index = index if isinstance(index, tuple) else (index,)
    plain = [i for i in index if not isinstance(i, Tensor)]
    if any(i is Ellipsis for i in plain):
        return index[-1] is Ellipsis or (not isinstance(index[-1], Tensor) and index[-1] == slice(None))
    taken = sum(1 for i in index if i is not None)
    return taken < dims or (not isinstance(index[-1], Tensor) and index[-1] == slice(None))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
