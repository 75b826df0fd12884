"""The curve visits every token once and steps to a neighbour; permuting tokens along it changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.kernels.sparse_attention.curve import (
    blocks_of_first_frame,
    inverse_order,
    neighbouring_blocks,
    permute_tokens,
    token_order,
)

sizes = st.integers(1, 9)
grids = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes))


def cells(grid, order):
    """Coordinates (tokens, 3) along the curve."""
    _, h, w = (1, 1, 1, *grid)[-3:]
    return torch.stack([order // (h * w), order // w % h, order % w], 1)


@given(grids)
def test_every_token_is_visited_once(grid):
    order = token_order(grid)
    assert torch.equal(order.sort().values, torch.arange(torch.tensor(grid).prod()))
    assert torch.equal(order[inverse_order(order)], torch.arange(len(order)))


@given(grids)
def test_each_step_goes_to_one_of_the_26_neighbours(grid):
    steps = cells(grid, token_order(grid)).diff(dim=0).abs()
    assert steps.numel() == 0 or steps.max() == 1


@given(st.tuples(sizes, sizes))
def test_in_two_dimensions_at_most_one_step_is_diagonal(grid):
    steps = cells(grid, token_order(grid)).diff(dim=0).abs().sum(1)
    assert (steps > 1).sum() <= 1


@pytest.mark.parametrize("grid", [(8, 8), (16, 4), (4, 8, 8), (6, 10, 12)])
def test_even_sizes_have_no_diagonal_step(grid):
    assert (cells(grid, token_order(grid)).diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("grid", [(7,), (5, 7), (3, 5, 4)])
@pytest.mark.parametrize("order", ["gilbert", "raster"])
def test_neighbouring_blocks_by_looking_at_all_pairs(grid, order):
    along, block = token_order(grid, order), 4
    found = neighbouring_blocks(grid, along, block)
    at = cells(grid, along)
    near = (at[:, None] - at).abs().amax(-1) <= 1
    number = torch.arange(len(at)) // block
    expected = torch.zeros_like(found)
    for i, j in near.nonzero().tolist():
        expected[number[i], number[j]] = True
    assert torch.equal(found, expected)


def test_blocks_of_the_first_frame_keep_each_other():
    along = token_order((3, 4, 4))
    pairs = blocks_of_first_frame((3, 4, 4), along, 8)
    holds_first = torch.tensor([bool((part < 16).any()) for part in along.split(8)])
    assert torch.equal(pairs, holds_first[:, None] & holds_first)


def test_a_block_along_the_curve_is_compact():
    """128 tokens of a 64x64 picture: two rows in raster order, about 8x16 along the curve."""
    perimeters = {}
    for order in ("raster", "gilbert"):
        at = cells((64, 64), token_order((64, 64), order)).split(128)
        perimeters[order] = sum(float((block.amax(0) - block.amin(0) + 1)[1:].sum()) for block in at)
    assert perimeters["gilbert"] < 0.5 * perimeters["raster"]


def rotated(x, angles):
    """Rotary embedding: x (B, H, L, d) by a table (L, d / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


@pytest.mark.parametrize("prefix", [0, 3])
def test_tokens_and_rotary_tables_permuted_alike_give_the_same_attention(prefix):
    grid = (3, 5, 4)
    q, k, v = torch.randn(3, 2, 4, prefix + 60, 8)
    angles = torch.randn(prefix + 60, 4)
    order = token_order(grid)
    plain = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
    q, k, v = (permute_tokens(x, order, prefix=prefix) for x in (q, k, v))
    moved = permute_tokens(angles, order, prefix=prefix)
    permuted = F.scaled_dot_product_attention(rotated(q, moved), rotated(k, moved), v)
    torch.testing.assert_close(permute_tokens(permuted, inverse_order(order), prefix=prefix), plain)
