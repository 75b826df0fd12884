"""Block-sparse attention by torch's ``flex_attention``, whose block mask takes our lists as they are."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)  # uncompiled it would make all scores


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    block: int,
    blocked: int,
    scale: float,
    valid: Tensor | None,
    causal: bool,
    rectification: Rectification | None,
) -> Tensor:
    """See :func:`~lightning_quant.kernels.sparse_attention.block_sparse.block_sparse_attention`."""
    batch, heads, queries, _ = query.shape
    keys, blocks = key.size(2), lists.count.size(-1)
    behind = keys - blocked
    # Keys that everyone sees begin a block of their own, and all lengths are whole blocks.
    first, last = -blocked % block, -behind % block
    key, value = (
        F.pad(torch.cat([F.pad(x[:, :, :blocked], (0, 0, 0, first)), x[:, :, blocked:]], 2), (0, 0, 0, last))
        for x in (key, value)
    )
    seen = query.new_zeros(batch, key.size(2), dtype=torch.bool)
    seen[:, :blocked] = True if valid is None else valid[:, :blocked]
    seen[:, blocked + first : keys + first] = True if valid is None else valid[:, blocked:]

    everywhere = torch.arange((blocked + first) // block, key.size(2) // block, device=query.device)
    kept = F.pad(lists.mask((blocked + first) // block), (0, len(everywhere)), value=True)
    kept = kept & seen.unflatten(1, (-1, block)).any(-1)[:, None, None]
    whole = BlockLists.of(kept)
    index = F.pad(whole.index, (0, kept.size(-1) - whole.index.size(-1)))

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_sight = seen[b, k]
        if not query.is_cuda:  # uncompiled, flex_attention does not look at the lists
            in_sight = in_sight & kept[b, h, q // block, k // block]
        return in_sight & ((q >= k) | (k >= blocked)) if causal else in_sight

    query = F.pad(query, (0, 0, 0, blocks * block - queries))
    block_mask = BlockMask.from_kv_blocks(whole.count, index, BLOCK_SIZE=block, mask_mod=mask)
    attention = _compiled() if query.is_cuda else flex_attention
    out: Tensor = attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=heads > key.size(1))
    if rectification is not None:
        factor, addend = rectification.rows(block, blocks * block)
        out = torch.addcmul(addend, out.float(), factor).to(out.dtype)
    return out[:, :, :queries]
