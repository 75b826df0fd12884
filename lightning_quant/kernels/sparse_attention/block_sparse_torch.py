"""Block-sparse attention in plain torch that really skips: the kept keys are gathered, and attention is dense on them.

Query blocks with as many kept blocks are served together, so that a batch is one rectangular call. A batch is small
enough for its keys to stay in the cache between being gathered and being read, and its answers until they are
rectified. That also bounds the memory, of which fresh pages cost as much time as attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.sparse_attention.curve import inverse_order
from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification
from lightning_quant.kernels.sparse_attention.workspace import Workspace

KEYS_PER_BATCH = 2**13
MODE = "sdpa"


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
    workspace: Workspace | None = None,
) -> Tensor:
    """See :func:`~lightning_quant.kernels.sparse_attention.block_sparse.block_sparse_attention`."""
    workspace = workspace or Workspace()
    (batch, heads, length, dim), (key_heads, keys, value_dim) = query.shape, value.shape[1:]
    blocks, device = lists.count.size(-1), query.device
    working = torch.promote_types(query.dtype, torch.float32)  # half precision rounds but once
    # One row is one block of queries of one head of one sample; rows with as many listed blocks stand together.
    count, order = lists.count.flatten().sort(stable=True)
    if ragged := blocks * block - length:
        query = F.pad(query, (0, 0, 0, ragged))
    rows = workspace.rows("rows", query.reshape(-1, block * dim), 0, order).to(working).view(-1, block, dim)
    answers = workspace.empty("answers", (len(rows), block, value_dim), rows)
    sample, head, number = order // blocks // heads, order // blocks % heads, order % blocks

    # Keys are gathered in runs, of as many tokens as the end of no block and of no sequence cuts.
    run = gcd(block, blocked, keys)
    runs, per_block = keys // run, block // run
    key, value = (x.reshape(-1, run * x.size(-1)).to(working) for x in (key, value))
    first = ((sample * key_heads + head // (heads // key_heads)) * runs)[:, None]
    index = lists.index.flatten(0, 2)[order].long() * per_block
    within, everywhere = torch.arange(per_block, device=device), torch.arange(blocked // run, runs, device=device)
    most = max(KEYS_PER_BATCH, lists.index.size(-1) * block + keys - blocked)
    room = workspace.empty("gathered", (most * max(dim, value_dim),), rows)
    score_room = workspace.empty("scores", (most * block,), rows)

    for start, stop, listed in _batches(count, block, keys - blocked):
        these, n = slice(start, stop), stop - start
        at = (index[these, :listed, None] + within).flatten(1)  # (n, runs that are read)
        hidden = None
        if blocked % block or valid is not None or causal:
            inside = F.pad(at < blocked // run, (0, len(everywhere)), value=True)  # a ragged last block ends early
            at = torch.cat([at, everywhere.expand(n, -1)], 1).clamp_(max=runs - 1)
            position = (at.unsqueeze(2) * run + torch.arange(run, device=device)).flatten(1)  # (n, K)
            seen = inside.repeat_interleave(run, 1)
            if valid is not None:
                seen = seen & valid.expand(batch, -1)[sample[these, None], position]
            seen = seen.unsqueeze(1)
            if causal:
                own = number[these, None] * block + torch.arange(block, device=device)
                seen = seen & ((position[:, None] <= own[..., None]) | (position >= blocked)[:, None])
            hidden = None if bool(seen.all()) else ~seen  # (n, 1 or block, K)
        elif len(everywhere):
            at = torch.cat([at, everywhere.expand(n, -1)], 1)
        place, near = (first[these] + at).flatten(), at.size(1) * run

        scores = score_room[: n * block * near].view(n, block, near)
        near_key = _gather(key, place, room).view(n, near, dim)
        torch.baddbmm(scores, rows[these], near_key.mT, beta=0, alpha=scale, out=scores)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        torch.softmax(scores, -1, out=scores)
        if hidden is not None and (valid is not None or causal):
            scores.masked_fill_(hidden, 0.0)  # a query may have nothing to see
        near_value = _gather(value, place, room).view(n, near, value_dim)
        torch.bmm(scores, near_value, out=answers[these])

    if rectification is not None:
        factor, addend = (x.flatten(0, 2)[order, None] for x in rectification)
        torch.addcmul(addend, answers, factor.unsqueeze(2), out=answers)
    out = answers.index_select(0, inverse_order(order)).to(query.dtype)
    return out.view(batch, heads, blocks * block, value_dim)[:, :, :length]


def _batches(count: Tensor, block: int, everywhere: int) -> Iterator[tuple[int, int, int]]:
    """From which row to which, and how many blocks each of them lists, in batches of a bounded number of keys.

    Threads take whole rows, so a batch has as many for each of them.
    """
    threads, start = torch.get_num_threads(), 0
    for listed, amount in zip(*(x.tolist() for x in count.unique_consecutive(return_counts=True)), strict=True):
        most = max(1, KEYS_PER_BATCH // max(1, listed * block + everywhere))
        end = start + amount
        while start < end:
            size = min(most, end - start)
            size = size // threads * threads or size
            yield start, start + size, listed
            start += size


def _gather(source: Tensor, place: Tensor, room: Tensor) -> Tensor:
    """These rows of the source, written into the room."""
    out = room[: len(place) * source.size(1)].view(len(place), source.size(1))
    return torch.index_select(source, 0, place, out=out)
