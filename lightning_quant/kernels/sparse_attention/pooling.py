"""What a block of tokens looks like from afar: its mean, and how far its tokens lie from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.cuda.needs import why_no_triton


class Pooled(NamedTuple):
    """Blocks of tokens, pooled.

    Args:
        mean: of the valid tokens of each block, in float32: (B, H, N, d).
        deviation: mean distance of the valid tokens from it, per channel: (B, H, N, d).
        size: how many valid tokens a block has: (B, N), or (1, N) where all samples are alike.
    """

    mean: Tensor
    deviation: Tensor
    size: Tensor


def pool_blocks(x: Tensor, block: int, valid: Tensor | None = None) -> Pooled:
    """Pool the tokens of x block by block; the last block may be ragged, and counts with the tokens that it has.

    Args:
        x: tokens, (B, H, L, d).
        block: tokens per block.
        valid: which tokens are not padding: (B, L) bool.

    >>> pooled = pool_blocks(torch.tensor([0.0, 2.0, 5.0]).view(1, 1, 3, 1), block=2)
    >>> pooled.mean.flatten().tolist(), pooled.deviation.flatten().tolist(), pooled.size.tolist()
    ([1.0, 5.0], [1.0, 0.0], [[2, 1]])
    """
    length, ragged = x.size(2), -x.size(2) % block
    if x.is_cuda and why_no_triton() is None:
        from lightning_quant.kernels.sparse_attention.pooling_triton import pool  # slow to import, or not there

        inside = torch.ones(1, length, device=x.device) if valid is None else valid.expand(len(x), -1)
        return Pooled(*pool(x, block, valid), F.pad(inside, (0, ragged)).unflatten(1, (-1, block)).sum(-1).long())
    if ragged or valid is not None:
        valid = torch.ones(1, length, dtype=torch.bool, device=x.device) if valid is None else valid
        x, valid = F.pad(x, (0, 0, 0, ragged)), F.pad(valid, (0, ragged))
        inside = valid.unflatten(1, (-1, block))  # (B, N, block)
        size = inside.sum(-1)
        inside, divisor = inside[:, None, :, :, None], size.clamp(min=1)[:, None, :, None]
        blocks = x.unflatten(2, (-1, block)).float().masked_fill(~inside, 0.0)
        mean = blocks.sum(3) / divisor
        deviation = (blocks - mean.unsqueeze(3)).abs_().mul_(inside).sum(3) / divisor
        return Pooled(mean, deviation, size)
    blocks = x.unflatten(2, (-1, block)).float()  # (B, H, N, block, d)
    mean = blocks.mean(3)
    deviation = (blocks - mean.unsqueeze(3)).abs_().mean(3)
    return Pooled(mean, deviation, torch.full((1, length // block), block, device=x.device))


def mean_blocks(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Only the means of :func:`pool_blocks`."""
    ragged = -x.size(2) % block
    if ragged or x.is_cuda or valid is not None:
        return pool_blocks(x, block, valid).mean
    mean: Tensor = x.unflatten(2, (-1, block)).mean(3, dtype=torch.float32)
    return mean
