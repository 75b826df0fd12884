"""Rectified sparse attention from end to end: pool, choose, attend, rectify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.sparse_attention.block_sparse import Backend, block_sparse_attention
from lightning_quant.kernels.sparse_attention.layout import Blocks
from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.masks import KeyMask
from lightning_quant.kernels.sparse_attention.pooling import mean_blocks, pool_blocks
from lightning_quant.kernels.sparse_attention.rectification import Rectification, rectify
from lightning_quant.kernels.sparse_attention.selection import choose_blocks, implicit_attention, pooling_is_worth_it
from lightning_quant.kernels.sparse_attention.workspace import Workspace

TOKENS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Sparsity:
    """How sparse, and what is done about it.

    Args:
        drop_rate: share of the key blocks that may be dropped.
        p_remain: share of the implicit attention that is kept at least.
        parts: what is rectified: ``"critical"``, ``"noncritical"``.
        backend: of the block-sparse kernel.
        int8_scores: whether it rounds queries and keys to 8 bits.
    """

    drop_rate: float = 0.8
    p_remain: float = 0.3
    parts: tuple[str, ...] = ("critical", "noncritical")
    backend: Backend = "auto"
    int8_scores: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not 0 <= self.drop_rate <= 1 or not 0 <= self.p_remain <= 1:
            raise ValueError(f"drop_rate and p_remain are shares from 0 to 1, found {self.drop_rate}, {self.p_remain}")
        if unknown := {*self.parts} - {"critical", "noncritical"}:
            raise ValueError(f'rectify takes "critical" and "noncritical", found {sorted(unknown)}')
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend is one of {', '.join(get_args(Backend))}, found {self.backend!r}")


class Selection(NamedTuple):
    """What was decided for one call of attention.

    Args:
        kept: (B, H, N, N) bool.
        rectification: factor and addend per query block.
        size: valid keys per block, (B, N) or (1, N).
    """

    kept: Tensor
    rectification: Rectification
    size: Tensor


class Attended(NamedTuple):
    """The result of one call.

    Args:
        output: (B, H, L, dv).
        selection: which blocks it attended to.
    """

    output: Tensor
    selection: Selection


def select(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, sparsity: Sparsity, scale: float, mask: KeyMask
) -> Selection:
    """Choose the kept blocks, and find their rectification.

    Args:
        query: visual queries in the order of the blocks, (B, Hq, L, d).
        key: keys in the same order, with those of the text behind them, (B, Hkv, L + T, d).
        value: values alike, (B, Hkv, L + T, dv).
        blocks: the tables of the layout.
        sparsity: how sparse.
        scale: of the softmax.
        mask: which keys are valid, in this order, and whether attention is causal.
    """
    group, visual = query.size(1) // key.size(1), query.size(2)
    valid = None if mask.valid is None else mask.valid[:, :visual]
    pooled_query = pool_blocks(query, blocks.size, valid)
    pooled_key = pool_blocks(key[:, :, :visual], blocks.size, valid)
    values = mean_blocks(value[:, :, :visual], blocks.size, valid).repeat_interleave(group, 1)
    mean, deviation = (x.repeat_interleave(group, 1) for x in (pooled_key.mean, pooled_key.deviation))
    pooled_key = pooled_key._replace(mean=mean, deviation=deviation)
    size = pooled_key.size
    text = key[:, :, visual:].float().repeat_interleave(group, 1) if len(blocks.text) else None
    text_valid = None if mask.valid is None else mask.valid[:, visual:]
    logits, shares, text_share = implicit_attention(
        pooled_query.mean, pooled_key.mean, size, scale, text, text_valid, mask.causal
    )
    visible = (size > 0)[:, None, None]
    if mask.causal:
        visible = visible & torch.ones_like(blocks.always).tril()
    known_text = None if text is None else text_share
    kept = choose_blocks(shares, known_text, sparsity.drop_rate, sparsity.p_remain, blocks.always, visible)
    worth_it = pooling_is_worth_it(logits, pooled_query, pooled_key)
    return Selection(kept, rectify(shares, known_text, kept, worth_it, values, sparsity.parts), size)


def rectified_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    sparsity: Sparsity,
    mask: KeyMask | None = None,
    scale: float | None = None,
    workspace: Workspace | None = None,
) -> Attended:
    """Self-attention in which each block of visual queries attends to few blocks of visual keys, and to all text.

    Text queries attend to everything. Padding may lie anywhere and differ between samples; under a causal mask the
    layout has to be one row without suffix.

    Args:
        query: (B, Hq, L, d).
        key: (B, Hkv, L, d); Hq is a multiple of Hkv.
        value: (B, Hkv, L, dv).
        blocks: the layout of the sequence, cut into blocks.
        sparsity: how sparse.
        mask: which keys are valid, and whether attention is causal.
        scale: of the softmax; default: ``d ** -0.5``.
        workspace: memory that is used on the way, and left to later calls.

    >>> from lightning_quant.kernels.sparse_attention.layout import TokenLayout
    >>> x = torch.randn(1, 2, 1 + 64, 16)
    >>> blocks = Blocks(TokenLayout((8, 8), prefix=1), block=16)
    >>> dense = F.scaled_dot_product_attention(x, x, x)
    >>> torch.allclose(rectified_sparse_attention(x, x, x, blocks, Sparsity(drop_rate=0.0)).output, dense, atol=1e-5)
    True
    """
    mask = mask or KeyMask()
    scale = query.size(-1) ** -0.5 if scale is None else scale
    workspace = workspace or Workspace()
    group, (batch, key_heads, length, _) = query.size(1) // key.size(1), key.shape
    # A CPU takes few heads at once: what is made of them on the way is small, and near.
    at_once = key_heads if query.is_cuda else max(1, TOKENS_AT_ONCE // (batch * group * length))
    if at_once >= key_heads:
        return _attend(query, key, value, blocks, sparsity, mask, scale, workspace)
    output, selections = query.new_empty(*query.shape[:3], value.size(-1)), []
    parts = (x.split(at_once * heads, 1) for x, heads in ((query, group), (key, 1), (value, 1), (output, group)))
    for near_query, near_key, near_value, out in zip(*parts, strict=True):
        attended = _attend(near_query, near_key, near_value, blocks, sparsity, mask, scale, workspace)
        out.copy_(attended.output)
        selections.append(attended.selection)
    kept = torch.cat([selection.kept for selection in selections], 1)
    factors, addends = zip(*(selection.rectification for selection in selections), strict=True)
    rectification = Rectification(torch.cat(factors, 1), torch.cat(addends, 1))
    return Attended(output, Selection(kept, rectification, selections[0].size))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    sparsity: Sparsity,
    mask: KeyMask,
    scale: float,
    workspace: Workspace,
) -> Attended:
    """The same for some of the heads."""
    visual_query = workspace.rows("query", query, 2, blocks.visual)
    ordered_key = workspace.rows("key", key, 2, blocks.order)  # the text comes last
    ordered_value = workspace.rows("value", value, 2, blocks.order)
    valid = None if mask.valid is None else mask.valid[:, blocks.order]
    selection = select(visual_query, ordered_key, ordered_value, blocks, sparsity, scale, KeyMask(valid, mask.causal))
    visual = block_sparse_attention(
        visual_query,
        ordered_key,
        ordered_value,
        BlockLists.of(selection.kept),
        blocks.size,
        blocked=len(blocks.visual),
        scale=scale,
        valid=valid,
        causal=mask.causal,
        rectification=selection.rectification if sparsity.parts else None,
        int8_scores=sparsity.int8_scores,
        backend=sparsity.backend,
        workspace=workspace,
    )
    if not len(blocks.text):
        return Attended(blocks.join(visual, None), selection)
    seen = None if mask.valid is None else mask.valid[:, None, None]
    if mask.causal:
        not_later = blocks.text[:, None] >= torch.arange(key.size(2), device=key.device)
        seen = not_later if seen is None else seen & not_later
    text_query = query.index_select(2, blocks.text)
    text = F.scaled_dot_product_attention(
        text_query, key, value, seen, scale=scale, enable_gqa=query.size(1) > key.size(1)
    )
    return Attended(blocks.join(visual, text), selection)
