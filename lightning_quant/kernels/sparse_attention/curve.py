"""The order in which the tokens of a picture or a video are cut into blocks, and which blocks lie beside each other.

A block of consecutive tokens should hold tokens that are alike. In raster order 128 tokens of a 64 wide picture are
two rows; along a space-filling curve they are a patch of about 8x16. The curve is the generalized Hilbert curve
("Gilbert", J. Červený), which fills a box of any size: the box is cut in halves along its long axes, and the pieces
are turned so that each begins beside the end of the one before.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

Vector = tuple[int, int, int]


def token_order(grid: tuple[int, ...], order: Literal["gilbert", "raster"] = "gilbert") -> Tensor:
    """The raster index of every token, in the order in which they are cut into blocks: (tokens,).

    Args:
        grid: sizes of the token grid, slowest axis first: ``(h, w)`` or ``(t, h, w)``.
        order: along the curve, or as they are.

    >>> token_order((2, 3)).tolist()
    [0, 1, 3, 4, 5, 2]
    >>> token_order((2, 3), "raster").tolist()
    [0, 1, 2, 3, 4, 5]
    """
    t, h, w = (1, 1, 1, *grid)[-3:]
    if order == "raster":
        return torch.arange(t * h * w)
    cells = torch.tensor(_gilbert(w, h, t)).view(-1, 3)  # (tokens, [x, y, z])
    return (cells[:, 2] * h + cells[:, 1]) * w + cells[:, 0]


def inverse_order(order: Tensor) -> Tensor:
    """Where each token has gone: ``x[order][inverse_order(order)]`` is ``x``.

    >>> inverse_order(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def permute_tokens(x: Tensor, order: Tensor, dim: int = -2, prefix: int = 0) -> Tensor:
    """Put the tokens behind a prefix into another order; the rest stays where it is.

    Attention does not ask for the order of its tokens, so a network may be run on permuted tokens from its patch
    embedding to its last block, if its rotary (or other position) tables are permuted alike.

    Args:
        x: tokens, or a table with one row per token.
        order: from :func:`token_order`, or :func:`inverse_order` for the way back.
        dim: the axis of the tokens.
        prefix: how many tokens stand before those that are permuted.

    >>> permute_tokens(torch.tensor([9, 0, 1, 2, 8]), torch.tensor([2, 0, 1]), dim=0, prefix=1).tolist()
    [9, 2, 0, 1, 8]
    """
    index = torch.arange(x.size(dim), device=x.device)
    index[prefix : prefix + len(order)] = order.to(x.device) + prefix
    return x.index_select(dim, index)


def neighbouring_blocks(grid: tuple[int, ...], order: Tensor, block: int) -> Tensor:
    """Which blocks touch: whether a token of block i is one of the 26 neighbours of a token of block j: (N, N) bool.

    Args:
        grid: sizes of the token grid.
        order: from :func:`token_order`.
        block: tokens per block.

    >>> neighbouring_blocks((6,), torch.arange(6), 2).int().tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    shape = (1, 1, 1, *grid)[-3:]
    blocks = (inverse_order(order) // block).view(shape)  # of each token, where it lies in the grid
    count = -(-order.numel() // block)
    touching = torch.eye(count, dtype=torch.bool)
    for shift in itertools.product((-1, 0, 1), repeat=3):
        here = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(shift, shape, strict=True))
        there = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(shift, shape, strict=True))
        touching[blocks[here].flatten(), blocks[there].flatten()] = True
    return touching


def blocks_of_first_frame(grid: tuple[int, ...], order: Tensor, block: int) -> Tensor:
    """Pairs of blocks that both hold tokens of the first frame: (N, N) bool. Image-to-video models look there most.

    >>> blocks_of_first_frame((2, 1, 2), torch.arange(4), 2).int().tolist()
    [[1, 0], [0, 0]]
    """
    _, h, w = (1, 1, 1, *grid)[-3:]
    first = torch.zeros(-(-order.numel() // block), dtype=torch.bool)
    first[(inverse_order(order) // block)[: h * w]] = True
    return first[:, None] & first


def _gilbert(w: int, h: int, d: int) -> list[int]:
    """Coordinates of the cells along the curve, flattened; it begins by walking along the longest axis."""
    axes: list[Vector] = [(w, 0, 0), (0, h, 0), (0, 0, d)]
    axes.insert(0, axes.pop(max(range(3), key=lambda axis: sum(axes[axis]))))  # the first of equals
    cells: list[int] = []
    _fill((0, 0, 0), axes[0], axes[1], axes[2], cells)
    return cells


def _fill(at: Vector, a: Vector, b: Vector, c: Vector, cells: list[int]) -> None:
    """Walk through the box that the vectors a, b, c span from a corner; the walk ends at the far end of a."""
    long_a, long_b, long_c = _length(a), _length(b), _length(c)
    along = next((v for v, rest in ((a, (b, c)), (b, (a, c)), (c, (a, b))) if all(_length(r) == 1 for r in rest)), None)
    if along is not None:
        for step in range(_length(along)):
            cells += _plus(at, _times(_sign(along), step))
        return
    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _minus(a, half_a), _minus(b, half_b), _minus(c, half_c)
    end_a = _plus(at, _minus(a, _sign(a)))  # the far end of a
    if 2 * long_a > 3 * long_b and 2 * long_a > 3 * long_c:  # long: two boxes, one behind the other
        _fill(at, half_a, b, c, cells)
        _fill(_plus(at, half_a), rest_a, b, c, cells)
    elif 3 * long_b > 4 * long_c:  # flat in c: up b, across, down b again
        _fill(at, half_b, c, half_a, cells)
        _fill(_plus(at, half_b), a, rest_b, c, cells)
        _fill(_plus(end_a, _minus(half_b, _sign(b))), _back(half_b), c, _back(rest_a), cells)
    elif 3 * long_c > 4 * long_b:  # flat in b: the same with c
        _fill(at, half_c, half_a, b, cells)
        _fill(_plus(at, half_c), a, b, rest_c, cells)
        _fill(_plus(end_a, _minus(half_c, _sign(c))), _back(half_c), _back(rest_a), b, cells)
    else:  # nearly a cube: all axes are cut
        up, far_c = _minus(half_b, _sign(b)), _minus(c, _sign(c))
        _fill(at, half_b, half_c, half_a, cells)
        _fill(_plus(at, half_b), c, half_a, rest_b, cells)
        _fill(_plus(_plus(at, up), far_c), a, _back(half_b), _back(rest_c), cells)
        _fill(_plus(_plus(end_a, half_b), far_c), _back(c), _back(rest_a), rest_b, cells)
        _fill(_plus(end_a, up), _back(half_b), half_c, _back(rest_a), cells)


def _half(v: Vector) -> Vector:
    """Half of an axis, an even number of steps where there is a choice: then the pieces meet without a jump."""
    length = _length(v)
    half = length // 2
    return _times(_sign(v), half + (half % 2 if length > 2 else 0))


def _length(v: Vector) -> int:
    return abs(v[0]) + abs(v[1]) + abs(v[2])  # one axis only


def _sign(v: Vector) -> Vector:
    x, y, z = ((x > 0) - (x < 0) for x in v)
    return x, y, z


def _plus(v: Vector, u: Vector) -> Vector:
    return v[0] + u[0], v[1] + u[1], v[2] + u[2]


def _minus(v: Vector, u: Vector) -> Vector:
    return v[0] - u[0], v[1] - u[1], v[2] - u[2]


def _times(v: Vector, factor: int) -> Vector:
    return v[0] * factor, v[1] * factor, v[2] * factor


def _back(v: Vector) -> Vector:
    return _times(v, -1)
