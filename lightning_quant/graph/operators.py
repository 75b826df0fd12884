"""The operators that ran in one forward, each with the shapes that say what it computes and moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.costs import CONVOLUTIONS
from lightning_quant.graph.owners import Owners
from lightning_quant.graph.residual import norm_kind
from lightning_quant.graph.trace import watch

_ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "tanh", "leaky_relu", "hardswish"}
_PAIRS = {"add", "add_", "radd", "__add__", "__iadd__", "mul", "rmul", "__mul__", "mul_"}


@dataclass(frozen=True)
class Operator:
    """What one operator does for one token of one sample; attention also says what it does for a pair of tokens.

    Args:
        name: of the layer, or of the module in which it ran.
        kind: ``"linear"``, ``"attention"``, ``"norm"`` or ``"elementwise"``.
        ops: operations a token, two for a multiplication and its addition.
        weights: numbers of its weight, loaded once.
        reads: activations that it loads a token.
        writes: activations that it stores a token.
        heads: query heads of attention.
        kv_heads: heads of its keys and values.
        head_size: channels of a head.
        last_only: whether only the last token of a prompt needs it, as the head of a language model.
    """

    name: str
    kind: Literal["linear", "attention", "norm", "elementwise"]
    ops: float = 0.0
    weights: int = 0
    reads: float = 0.0
    writes: float = 0.0
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    last_only: bool = False


@dataclass(frozen=True)
class Traced:
    """The operators of a model, and of how many samples and tokens the batch was.

    Args:
        operators: in the order in which they ran.
        samples: in the batch.
        tokens: of a sample: the sequence that attention saw, or what the linear layers did.
    """

    operators: list[Operator]
    samples: int
    tokens: int


def trace_operators(module: nn.Module, run: Callable[[], Any], samples: int) -> Traced:
    """Run a model once and tell its operators.

    Args:
        module: the module whose names are used.
        run: runs one forward of the module, or of something that contains it.
        samples: how many samples that forward has.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> found = trace_operators(net, lambda: net(torch.ones(2, 5, 4)), samples=2)
    >>> [(operator.kind, operator.ops, operator.weights) for operator in found.operators], found.tokens
    ([('linear', 64.0, 32), ('elementwise', 8.0, 0), ('linear', 64.0, 32)], 5)
    """
    watcher = _OperatorWatcher(module, samples)
    watch(module, (watcher,), run)
    return watcher.result()


class _OperatorWatcher(Watcher):
    """Counts linear functions, convolutions, attention, norms, sums, products and activation functions."""

    def __init__(self, module: nn.Module, samples: int) -> None:
        self.owners, self.samples = Owners(module), samples
        self.norms = {name for name, child in module.named_modules() if norm_kind(child) is not None}
        self.calls: list[tuple[Call, str, str]] = []
        self.tokens: list[int] = []
        self.seen: list[tuple[Operator, int]] = []  # with the tokens in which it was counted
        self.inside: set[str] = set()

    def leave(self, name: str) -> None:
        """A norm may run again, and then counts again."""
        self.inside.discard(name)

    def saw(self, call: Call) -> None:
        """Count one call."""
        inside = call.inside or ""
        if inside in self.norms:
            if inside not in self.inside:  # once for all that it spells out
                self.inside.add(inside)
                size = call.gives()[0].numel()
                self._add(inside, "norm", call.gives()[0], ops=7 * size, reads=size, writes=size)
        elif (linear := call.linear()) is not None or call.func in CONVOLUTIONS:
            x, weight = linear if linear is not None else (call.argument(0, "input"), call.argument(1, "weight"))
            name = self.owners.of(weight, call.stack) or inside
            macs = call.out.numel() * (x.shape[-1] if linear is not None else weight[0].numel())
            self._add(
                name,
                "linear",
                call.out,
                ops=2 * macs,
                reads=x.numel(),
                writes=call.out.numel(),
                weights=weight.numel(),
                channels_last=linear is not None,
            )
        elif call.func is F.scaled_dot_product_attention:
            q, k = call.argument(0, "query"), call.argument(1, "key")
            self.tokens.append(k.shape[-2])
            heads = q.shape[-3] if q.dim() > 3 else 1
            kv_heads = self._kv_heads(inside, k)
            operator = Operator(inside, "attention", heads=heads, kv_heads=kv_heads, head_size=q.shape[-1])
            self.seen.append((operator, 1))
        elif call.name in _ACTIVATIONS | _PAIRS:
            tensors = [x for x in call.reads() if x.dim() in (2, 3, 4)]
            out = call.gives()[0]
            full = [x for x in tensors if x.shape == out.shape]
            if out.is_floating_point() and out.dim() == 3 and len(full) == (1 if call.name in _ACTIVATIONS else 2):
                size = out.numel()
                self._add(inside, "elementwise", out, ops=size, reads=len(full) * size, writes=size)

    def result(self) -> Traced:
        """The operators, per token."""
        tokens = max(self.tokens) if self.tokens else max((count for _, count in self.seen), default=1)
        operators = []
        for operator, _ in self.seen:
            if operator.kind == "attention":
                operators.append(operator)
            else:
                scale = 1 / (self.samples * tokens)
                operators.append(
                    Operator(
                        operator.name,
                        operator.kind,
                        operator.ops * scale,
                        operator.weights,
                        operator.reads * scale,
                        operator.writes * scale,
                    )
                )
        if self.tokens and operators and operators[-1].kind == "linear" and self.seen[-1][1] == tokens:
            operators[-1] = Operator(**{**vars(operators[-1]), "last_only": True})
        return Traced(operators, self.samples, tokens)

    def _add(
        self,
        name: str,
        kind: Literal["linear", "norm", "elementwise"],
        out: Tensor,
        ops: float,
        reads: float,
        writes: float,
        weights: int = 0,
        channels_last: bool = True,
    ) -> None:
        rows = out.numel() // (out.shape[-1] if channels_last else out.shape[1]) // self.samples
        self.seen.append((Operator(name, kind, ops, weights, reads, writes), max(1, rows)))

    def _kv_heads(self, inside: str, k: Tensor) -> int:
        """Heads before they were repeated for the queries: those that the layers in the same module give."""
        heads = k.shape[-3] if k.dim() > 3 else 1
        for operator, _ in reversed(self.seen):
            if operator.kind == "linear" and operator.name.startswith(f"{inside}."):
                given = operator.writes / (self.samples * k.shape[-2] * k.shape[-1])
                if given == int(given) and 1 <= given <= heads:
                    return int(given)
        return heads
