"""Float attention in bfloat16 on a CPU."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.pieces import hide, part_of_mask, pieces, size_of_piece

# The first one warms up, and a busy moment spoils a call or two, but not those of several layers.
MEASURED, ROUNDS = 4, 2


class Bfloat16Attention:
    """Answers the calls of ``F.scaled_dot_product_attention`` by two products and a softmax where that is faster.

    On a CPU without AMX torch's fused kernel takes as long in bfloat16 as in float32, while oneDNN's products are
    several times faster. The first calls of about that size find out. Calls that are not in bfloat16, and those with
    dropout, gradients, a causal mask or shared heads, go to torch as they are.

    >>> attend = Bfloat16Attention()
    >>> q, k, v = (torch.randn(2, 3, 7, 16, dtype=torch.bfloat16) for _ in range(3))
    >>> attend(q, k, v).shape
    torch.Size([2, 3, 7, 16])
    >>> [sorted(seconds) for seconds in attend.seconds.values()]
    [['fused', 'in three steps']]
    """

    name = "bfloat16 attention"

    def __init__(self) -> None:
        self.seconds: dict[Any, dict[str, float]] = {}
        self._measured: Counter[Any] = Counter()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Queries (..., L, E), keys (..., S, E), values (..., S, Ev) -> (..., L, Ev)."""
        q, k, v = query, key, value
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()  # as autocast does in front of the fused kernel
        if dropout_p or is_causal or enable_gqa or not _are_plain(q, k, v):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        with torch.autocast("cpu", enabled=False):
            return self._faster(q, k, v, attn_mask, scale)

    def _faster(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        case = *map(_about, (query.shape[:-2].numel(), query.size(-2), key.size(-2))), value.size(-1), mask is None
        known = self.seconds.setdefault(case, dict.fromkeys(_WAYS, math.inf))
        if self._measured[case] < MEASURED:
            self._measured[case] += 1
            self._measure(known, query, key, value, mask, scale)
        return _WAYS[min(known, key=lambda way: known[way])](query, key, value, mask, scale)

    def _measure(self, seconds: dict[str, float], *operands: Any) -> None:
        for _ in range(ROUNDS):
            for way, attend in _WAYS.items():
                began = time.perf_counter()
                attend(*operands)
                seconds[way] = min(seconds[way], time.perf_counter() - began)


def in_three_steps(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    r"""Attention whose map is rounded to the type of its operands.

    .. math:: \text{out} = \text{softmax}(s \, q k^\top + m) \, v

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        mask: what is added to the scores, or ``False`` where they are hidden; broadcastable to (..., L, S).
        scale: s; its default is that of torch.

    >>> q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    >>> torch.testing.assert_close(in_three_steps(q, k, v), F.scaled_dot_product_attention(q, k, v))
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (x.expand(*lead, -1, -1).reshape(math.prod(lead), *x.shape[-2:]) for x in (query, key, value))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    heads, rows, keys = len(q), q.size(1), k.size(1)
    width, height = size_of_piece(heads, rows, keys)
    out, work = q.new_empty(heads, rows, v.size(2)), q.new_empty(width, height, keys)  # the work is used again
    for some, of in pieces(heads, rows, width, height):
        maps = work[: some.stop - some.start, : of.stop - of.start]
        torch.baddbmm(maps, q[some, of], k[some].transpose(1, 2), beta=0, alpha=scale, out=maps)
        part = part_of_mask(mask, lead, some, of)
        nothing_to_see = None if part is None else hide(maps, part)
        torch.softmax(maps, -1, out=maps)
        if nothing_to_see is not None:
            maps.masked_fill_(nothing_to_see, 0.0)
        torch.bmm(maps, v[some], out=out[some, of])
    return out.view(*lead, rows, v.size(2))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


_WAYS: dict[str, Callable[..., Tensor]] = {"fused": _fused, "in three steps": in_three_steps}


def _about(number: int) -> int:
    """The same within a factor of two: lengths of sentences change with every batch."""
    return number.bit_length()


def _are_plain(*operands: Tensor) -> bool:
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    known = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() for x in operands)
    return known and not learning and not torch.compiler.is_compiling()
