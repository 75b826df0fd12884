"""Attention on a CPU whose products are of integers."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from lightning_quant.kernels.codes import PIECE, Grid
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.pieces import hide, part_of_mask, pieces, size_of_piece
from lightning_quant.kernels.spec import AttentionSpec
from lightning_quant.layers import QuantAttention
from lightning_quant.layers.base import through
from lightning_quant.quantizers import UniformQuantizer

ONE_BY_ONE = 2**19  # multiplications from which on a product of bytes by itself is faster than a batch of float ones
LONGEST_FLOAT_SUM = 2**24 // 128**2  # of products of two bytes, so that float32 holds it exactly


class Int8Attention(Kernel):
    r"""Scores and answers are sums of products of 8-bit integers, with the softmax in float32 between them.

    With int8 codes :math:`\tilde q = q / s_q + o_q` and likewise for k, p and v,

    .. math:: \sum_d q_{ld} k_{jd} = s_q s_k ( \sum_d \tilde q_{ld} \tilde k_{jd} - o_q \sum_d \tilde k_{jd}
              - o_k \sum_d \tilde q_{ld} + D \, o_q o_k )

    and so for the probabilities and the values. The map is made piece by piece. Probabilities that are no plain
    integers of at most 8 bits meet the values in float.
    """

    name: ClassVar[str] = "int8 attention (oneDNN)"
    kinds: ClassVar[frozenset[str]] = frozenset({AttentionSpec.FUSED})

    def __init__(self, attention: QuantAttention) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            Grid.of(cast(UniformQuantizer, getattr(attention, f"{operand}_quantizer")))
            for operand in ("query", "key", "value")
        )
        self.probabilities: Grid | None = None
        if AttentionSpec.of(attention).why_not_integers("probabilities") is None:
            self.probabilities = Grid.of(cast(UniformQuantizer, attention.probabilities_quantizer))

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> str | None:
        """Takes query, key and value with one scale per tensor that is known before."""
        for operand in ("query", "key", "value"):
            if reason := spec.why_not_integers(operand):
                return reason
        return None if sums_are_exact() else "sums of products of signed bytes are not exact on this CPU"

    @classmethod
    def of(cls, layer: QuantAttention, packed: bool = False) -> Int8Attention:
        """Read the scales."""
        return cls(layer)

    def run(self, layer: QuantAttention, *args: Any, **kwargs: Any) -> Tensor:
        """Answer ``F.scaled_dot_product_attention``."""
        return self._attend(layer, *args, **kwargs)

    def _attend(
        self,
        attention: QuantAttention,
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
        scale = query.size(-1) ** -0.5 if scale is None else scale
        if enable_gqa:
            shared = query.size(-3) // key.size(-3)
            key, value = key.repeat_interleave(shared, dim=-3), value.repeat_interleave(shared, dim=-3)
        if is_causal:
            attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        q, k, v = (
            grid.signed(x).expand(*lead, -1, -1).reshape(math.prod(lead), *x.shape[-2:])
            for grid, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        out = torch.empty(len(q), q.size(1), v.size(2))
        work, factor = _Work.of(len(q), q.size(1), k.size(1), v.size(2)), self.query.scale * self.key.scale * scale
        for heads, rows in pieces(len(q), q.size(1), *work.sums.shape[:2]):
            piece = work.cut(heads, rows)
            self._scores(piece, q[heads, rows], k[heads], factor)
            maps = piece.softmax(part_of_mask(attn_mask, lead, heads, rows))
            maps = torch.dropout(maps, dropout_p, train=True) if dropout_p else maps
            self._values(piece, attention, maps, v[heads], out[heads, rows])
        return out.view(*lead, *out.shape[1:]).to(query.dtype)

    def _scores(self, piece: _Work, q: Tensor, k: Tensor, factor: float) -> None:
        """(n, l, E) and (n, S, E) int8 -> (n, l, S)."""
        sums = _multiply(q, k.transpose(1, 2), piece.sums, self.query.offset, self.key.offset)
        torch.mul(sums, factor, out=piece.scores)

    def _values(self, piece: _Work, attention: QuantAttention, maps: Tensor, v: Tensor, out: Tensor) -> None:
        """(n, l, S) and (n, S, Ev) int8 -> (n, l, Ev)."""
        if self.probabilities is None:
            maps = through(attention.probabilities_quantizer, maps)
            torch.matmul(maps, v.float().sub_(self.value.offset).mul_(self.value.scale), out=out)
            return
        p = self.probabilities.signed_(maps, piece.codes)
        totals = maps.sum(-1, keepdim=True).to(torch.int32) if self.value.offset else None  # faster than of bytes
        sums = _multiply(p, v, piece.answers, self.probabilities.offset, self.value.offset, totals)
        torch.mul(sums, self.probabilities.scale * self.value.scale, out=out)


class _Work(NamedTuple):
    """Memory for one piece of the map, used again for the next: to ask for it each time takes longer than the sums."""

    sums: Tensor  # (n, l, S) int32
    scores: Tensor  # (n, l, S)
    maps: Tensor  # (n, l, S)
    codes: Tensor  # (n, l, S) int8
    answers: Tensor  # (n, l, Ev) int32

    @classmethod
    def of(cls, heads: int, rows: int, keys: int, channels: int) -> _Work:
        """Room for several heads, or for some rows of one."""
        size = *size_of_piece(heads, rows, keys, PIECE), keys
        types = (torch.int32, torch.float32, torch.float32, torch.int8)
        maps = (torch.empty(size, dtype=dtype) for dtype in types)
        return cls._make([*maps, torch.empty(*size[:2], channels, dtype=torch.int32)])

    def cut(self, heads: slice, rows: slice) -> _Work:
        """Room for just this piece."""
        return _Work._make(room[: heads.stop - heads.start, : rows.stop - rows.start] for room in self)

    def softmax(self, mask: Tensor | None) -> Tensor:
        """The map of the scores, of which a mask (n, l, S) hides some."""
        if mask is None:
            return torch.softmax(self.scores, -1, out=self.maps)
        nothing_to_see = hide(self.scores, mask)
        return torch.softmax(self.scores, -1, out=self.maps).masked_fill_(nothing_to_see, 0.0)


@functools.cache
def sums_are_exact() -> bool:
    """Whether this CPU's sums of products of signed bytes are; found out by trying."""
    left = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(8).unsqueeze(1).expand(16, 64).contiguous()
    right = left.t().contiguous()
    return torch.equal(torch._int_mm(left, right).long(), left.long() @ right.long())


def _multiply(
    left: Tensor, right: Tensor, out: Tensor, left_offset: int, right_offset: int, totals: Tensor | None = None
) -> Tensor:
    """Products of integers that are held with offsets, (n, l, e) and (n, e, s) int8 -> (n, l, s) int32.

    ``totals`` are the sums of the rows of ``left``, where they are known.
    torch has no batched product of bytes: large ones are made one by one, and small ones in float32, which is exact.
    """
    shared = left.size(2)
    if left.size(1) * right.size(2) * shared < ONE_BY_ONE and shared <= LONGEST_FLOAT_SUM:
        out.copy_(left.float() @ right.float())
    else:
        for x, y, answer in zip(left, right, out, strict=True):
            torch._int_mm(x, y, out=answer)
    if left_offset:
        out -= (right.sum(1, keepdim=True, dtype=torch.int32) - shared * right_offset) * left_offset
    if right_offset:
        totals = left.sum(2, keepdim=True, dtype=torch.int32) if totals is None else totals
        out -= totals * right_offset
    return out
