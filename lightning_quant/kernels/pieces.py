"""Attention maps made piece by piece, so that they stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_quant.kernels.codes import PIECE


def size_of_piece(heads: int, rows: int, keys: int, elements: int = PIECE) -> tuple[int, int]:
    """How many heads, and how many rows of each, a piece of the maps (heads, rows, keys) holds.

    Several heads, or some rows of one.

    >>> size_of_piece(48, 197, 197), size_of_piece(12, 4096, 4096)
    ((6, 197), (1, 64))
    """
    return max(1, min(heads, elements // max(1, rows * keys))), max(1, min(rows, elements // max(1, keys)))


def pieces(heads: int, rows: int, width: int, height: int) -> Iterator[tuple[slice, slice]]:
    """All heads and rows, ``width`` heads and ``height`` rows at a time."""
    for head in range(0, heads, width):
        for row in range(0, rows, height):
            yield slice(head, min(head + width, heads)), slice(row, min(row + height, rows))


def part_of_mask(mask: Tensor | None, lead: torch.Size, heads: slice, rows: slice) -> Tensor | None:
    """The part of a mask (..., L, S) for some rows of some heads: (n, l, S)."""
    if mask is None:
        return None
    mask = mask[..., rows, :] if mask.size(-2) > 1 else mask
    if mask.dim() == 2:
        return mask
    where = torch.unravel_index(torch.arange(math.prod(lead))[heads], lead)
    return mask.expand(*lead, *mask.shape[-2:])[where]


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """Hide what a mask hides from scores (n, l, S), in place; the rows (n, l, 1) from which it hides everything.

    torch's kernels answer 0 for such a row, a softmax NaN.
    """
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    else:
        scores.add_(mask)
    return scores.isneginf().all(-1, keepdim=True)
