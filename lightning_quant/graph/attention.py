"""Where a model attends: fused calls, and the pattern matmul, softmax, matmul."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.layers import MATMULS, SOFTMAXES, softmax_is_last


@dataclass
class AttentionCalls:
    """How one module attends in one forward.

    Args:
        fused: how often it calls ``scaled_dot_product_attention``.
        spelled: attention spelled out: the positions of the first matmul, the softmax and the second matmul among all
            matmuls and softmaxes of its forward.
    """

    fused: int = 0
    spelled: list[tuple[int, int, int]] = field(default_factory=list)


class _Origin(NamedTuple):
    """Where a followed tensor comes from."""

    kind: str  # "scores" or "probabilities"
    site: str
    scores: int
    softmax: int


class AttentionWatcher(Watcher):
    """Finds attention by following the result of a matmul to a softmax, and from there to another matmul."""

    def __init__(self) -> None:
        self.sites: dict[str, AttentionCalls] = {}
        self._frames: list[tuple[str, AttentionCalls, dict[str, int]]] = []  # of each running forward
        self._followed: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()

    def enter(self, name: str) -> None:
        """Count anew for this forward."""
        self._frames.append((name, AttentionCalls(), {"matmul": 0, "softmax": 0}))

    def leave(self, name: str) -> None:
        """Keep the forward of this module that attended most."""
        _, calls, _ = self._frames.pop()
        known = self.sites.get(name, AttentionCalls())
        if calls.fused + len(calls.spelled) > known.fused + len(known.spelled):
            self.sites[name] = calls
        if not self._frames:
            self._followed.clear()

    def saw(self, call: Call) -> None:
        """Count, and follow."""
        if not self._frames:
            return
        if call.func is F.scaled_dot_product_attention:
            self._frames[-1][1].fused += 1
        elif call.func in MATMULS:
            self._saw_matmul(call)
            self._count("matmul")
        elif call.func in SOFTMAXES:
            self._saw_softmax(call)
            self._count("softmax")
        else:
            self._follow_elementwise(call)

    def _count(self, what: str) -> None:
        for _, _, counts in self._frames:
            counts[what] += 1

    def _saw_matmul(self, call: Call) -> None:
        site, calls, counts = self._frames[-1]
        operands = call.reads()
        origin = self._origin(operands[0]) if operands else None
        if origin is not None and origin.kind == "probabilities" and origin.site == site:
            calls.spelled.append((origin.scores, origin.softmax, counts["matmul"]))
        else:
            self._follow(call.out, _Origin("scores", site, counts["matmul"], -1))

    def _saw_softmax(self, call: Call) -> None:
        origin = self._origin(call.reads()[0])
        if origin is None or origin.kind != "scores" or not softmax_is_last(call.args, call.kwargs):
            return
        for site, _, counts in self._frames:
            if site == origin.site:  # the softmax may be a child module; it is counted in the forward that attends
                self._follow(call.out, _Origin("probabilities", site, origin.scores, counts["softmax"]))

    def _follow_elementwise(self, call: Call) -> None:
        origins = [(x, origin) for x in call.reads() if (origin := self._origin(x)) is not None]
        gives = call.gives()
        if len(origins) == 1 and len(gives) == 1 and gives[0].numel() == origins[0][0].numel():
            self._follow(gives[0], origins[0][1])

    def _origin(self, x: Tensor) -> _Origin | None:
        return self._followed.get(x)

    def _follow(self, x: Tensor, origin: _Origin) -> None:
        self._followed[x] = origin
