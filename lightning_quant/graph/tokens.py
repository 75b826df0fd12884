"""How long the sequences are that a model attends over, and what pictures they may have been made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.trace import watch

_CONVOLUTIONS: set[Callable[..., Any]] = {F.conv2d, F.conv3d}
_JOINS: set[Callable[..., Any]] = {torch.cat, torch.concat, torch.concatenate}


@dataclass(frozen=True)
class AttentionTokens:
    """One call of ``scaled_dot_product_attention``.

    Args:
        site: name of the module in whose forward it happened.
        queries: number of queries.
        keys: number of keys.
        mask: the mask that was given.
        causal: whether the call itself was causal.
        pictures: spatial sizes of the feature maps that convolutions had made by then, latest last.
        joined: lengths of the parts that had been concatenated to as many tokens by then, latest last.
    """

    site: str
    queries: int
    keys: int
    mask: Tensor | None = field(default=None, repr=False)
    causal: bool = False
    pictures: tuple[tuple[int, ...], ...] = ()
    joined: tuple[tuple[int, ...], ...] = ()


def attention_tokens(module: nn.Module, run: Callable[[], Any]) -> list[AttentionTokens]:
    """Run a model once and tell over which tokens it attends.

    The run ends early where a network that attends is entered a second time: a sampler's first step says it all.

    Args:
        module: the module whose names are used.
        run: runs one forward of the module, or of something that contains it.

    >>> class Attend(nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x)
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Attend())
    >>> attention_tokens(net, lambda: net(torch.ones(1, 3, 8, 12)))
    [AttentionTokens(site='2', queries=8, keys=8, causal=False, pictures=((2, 3),), joined=())]
    """
    watcher = _TokenWatcher()
    with contextlib.suppress(_SeenEnough):
        watch(module, (watcher,), run)
    return watcher.calls


class _SeenEnough(BaseException):
    """Ends the run; no error, so that no ``except Exception`` on the way stops it."""


class _TokenWatcher(Watcher):
    def __init__(self) -> None:
        self.calls: list[AttentionTokens] = []
        self._pictures: dict[tuple[int, ...], None] = {}
        self._joined: dict[tuple[int, ...], None] = {}
        self._running: list[str] = []
        self._done: set[str] = set()

    def enter(self, name: str) -> None:
        """Stop where an outermost module that has attended begins anew."""
        if not any(self._running) and name in self._done:
            raise _SeenEnough
        self._running.append(name)

    def leave(self, name: str) -> None:
        """Remember the outermost modules that have attended."""
        self._running.pop()
        if name and not any(self._running) and any(f"{call.site}.".startswith(f"{name}.") for call in self.calls):
            self._done.add(name)

    def saw(self, call: Call) -> None:
        """Note feature maps, joined sequences and attention."""
        if call.func is F.scaled_dot_product_attention:
            query, key = call.argument(0, "query"), call.argument(1, "key")
            self.calls.append(
                AttentionTokens(
                    call.inside or "",
                    query.size(-2),
                    key.size(-2),
                    call.argument(3, "attn_mask"),
                    bool(call.argument(5, "is_causal")),
                    tuple(self._pictures),
                    tuple(parts for parts in self._joined if sum(parts) == query.size(-2)),
                )
            )
        elif call.func in _CONVOLUTIONS:
            _put_last(self._pictures, tuple(call.out.shape[2 if call.out.dim() > 3 else 1 :]))
        elif call.func in _JOINS and call.out.dim() > 2:
            dim = call.argument(1, "dim") or 0
            if dim not in (-1, call.out.dim() - 1):  # tokens never stand on the last axis
                _put_last(self._joined, tuple(part.size(dim) for part in call.argument(0, "tensors")))


def _put_last(seen: dict[tuple[int, ...], None], what: tuple[int, ...]) -> None:
    seen.pop(what, None)
    seen[what] = None
