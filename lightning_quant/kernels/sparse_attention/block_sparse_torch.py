"""Block-sparse attention in plain torch that really skips: the kept keys are gathered, and attention is dense on them.

Query blocks with about as many kept keys are served together, so that a batch is one rectangular call. A batch is small
enough for its keys to stay in the cache between being gathered and being read, which also bounds the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification

KEYS_PER_BATCH = 2**13


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
    (batch, heads, length, dim), (key_heads, keys) = query.shape, key.shape[1:3]
    count, device = lists.count.flatten().long(), query.device
    blocks = lists.count.size(-1)
    # One row is one block of queries of one head of one sample; rows with many keys come first.
    ragged = blocks * block - length
    rows = (F.pad(query, (0, 0, 0, ragged)) if ragged else query).reshape(-1, 1, block, dim)
    order = count.argsort(descending=True)
    count, index = count[order], lists.index.flatten(0, 2)[order].long()
    sample, head = order // blocks // heads, order // blocks % heads
    first_key = (sample * key_heads + head // (heads // key_heads)) * keys
    everywhere = torch.arange(blocked, keys, device=device)
    within = torch.arange(block, device=device)

    # Keys and values are gathered together, and into the same memory each time: fresh pages cost as much as attention.
    both = torch.cat([key, value], -1).flatten(0, 2)
    spans = _spans(count, block, len(everywhere))
    room = max((len(span) * (int(count[span.start]) * block + len(everywhere)) for span in spans), default=0)
    gathered = both.new_empty(room, both.size(-1))
    answers = []
    for span in spans:
        these, longest = slice(span.start, span.stop), int(count[span.start])
        if longest == 0 and not len(everywhere):
            answers.append(rows.new_zeros(len(span), 1, block, value.size(-1)))
            continue
        listed = torch.arange(longest, device=device) < count[these, None]
        # Shorter lists repeat their first block, unseen: a block that no list names is never read.
        numbers = torch.where(listed, index[these, :longest], index[these, :1])
        at = (numbers.unsqueeze(2) * block + within).flatten(1)  # (n, longest * block) positions of keys
        seen = listed.repeat_interleave(block, 1) & (at < blocked)
        if len(everywhere):
            at = torch.cat([at, everywhere.expand(len(span), -1)], 1)
            seen = F.pad(seen, (0, len(everywhere)), value=True)
        at = at.clamp(max=keys - 1)
        if valid is not None:
            seen = seen & valid.expand(batch, -1)[sample[these, None], at]
        tokens = (first_key[these, None] + at).flatten()
        pairs = torch.index_select(both, 0, tokens, out=gathered[: len(tokens)]).view(len(span), 1, at.size(1), -1)
        mask = None if bool(seen.all()) else seen[:, None, None]  # (n, 1, 1, K)
        if causal:
            position = (order[these] % blocks * block)[:, None] + within
            not_later = (at[:, None] <= position[..., None]) | (at >= blocked)[:, None]  # (n, block, K)
            mask = (not_later & seen[:, None])[:, None]
        answer = F.scaled_dot_product_attention(
            rows[order[these]], pairs[..., :dim], pairs[..., dim:], mask, scale=scale
        )
        if mask is not None and (valid is not None or causal or not bool(count[span.stop - 1])):
            # Kernels differ in what they answer where there is nothing to see.
            answer = answer.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        answers.append(answer)

    ordered = torch.cat(answers)
    if rectification is not None:
        factor, addend = (x.flatten(0, 2)[order] for x in rectification)
        ordered = ordered.to(torch.promote_types(query.dtype, factor.dtype))  # half precision rounds but once
        ordered = ordered.mul_(factor[:, None, None, None]).add_(addend[:, None, None]).to(query.dtype)
    out = torch.empty_like(ordered).index_copy_(0, order, ordered)
    return out.view(batch, heads, blocks * block, -1)[:, :, :length]


def _spans(count: Tensor, block: int, everywhere: int) -> list[range]:
    """Cut rows with falling counts into batches of a bounded number of gathered keys."""
    counts = count.tolist()
    spans, start = [], 0
    while start < len(counts):
        size = max(1, KEYS_PER_BATCH // max(1, counts[start] * block + everywhere))
        spans.append(range(start, min(start + size, len(counts))))
        start += size
    return spans
