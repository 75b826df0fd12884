"""Queries and keys in 8 bits, with one scale for every block, so that their product is one of integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Int8Blocks(NamedTuple):
    """Tokens as ``codes * scale``.

    Args:
        codes: (B, H, L, d) int8.
        scale: the same for all tokens of a block, (B, H, L) float32.
    """

    codes: Tensor
    scale: Tensor

    def floats(self) -> Tensor:
        """What the codes stand for."""
        return self.codes * self.scale.unsqueeze(-1)


def int8_blocks(
    query: Tensor, key: Tensor, block: int, blocked: int, valid: Tensor | None = None
) -> tuple[Int8Blocks, Int8Blocks]:
    """Queries and keys whose products are the scores, but for a shift that is the same for all keys of a query.

    The mean of all keys is taken away before: softmax does not see it, and 8 bits have less to cover.

    Args:
        query: (B, Hq, L, d).
        key: (B, Hkv, S, d).
        block: tokens per block.
        blocked: how many of the keys stand in blocks; those behind begin a block of their own.
        valid: which keys are not padding, (B, S) bool.

    >>> query, key = torch.randn(1, 2, 8, 16), 10 + torch.randn(1, 2, 8, 16)
    >>> rounded = int8_blocks(query, key, block=4, blocked=8)
    >>> exact, near = query @ (key - key.mean(2, keepdim=True)).mT, rounded[0].floats() @ rounded[1].floats().mT
    >>> bool((exact - near).norm() < 0.02 * exact.norm())
    True
    """
    key = key.float()
    if valid is None:
        key = key - key.mean(2, keepdim=True)
    else:
        real = valid[:, None, :, None]
        mean = key.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        key = (key - mean).masked_fill(~real, 0.0)  # whatever stands in the padding sets no scale
    parts = [to_int8(part, block) for part in (key[:, :, :blocked], key[:, :, blocked:])]
    return to_int8(query.float(), block), Int8Blocks(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def to_int8(x: Tensor, block: int) -> Int8Blocks:
    """Round tokens (B, H, L, d) to 8 bits, symmetrically; the last block may be ragged."""
    length = x.size(2)
    blocks = F.pad(x, (0, 0, 0, -length % block)).unflatten(2, (-1, block))  # (B, H, N, block, d)
    scale = blocks.abs().amax((3, 4), keepdim=True) / 127 + 1e-7
    codes = (blocks / scale).round().to(torch.int8)
    scales = scale.squeeze(4).expand(*blocks.shape[:-1])
    return Int8Blocks(codes.flatten(2, 3)[:, :, :length], scales.flatten(2, 3)[:, :, :length])
