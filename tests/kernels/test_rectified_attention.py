"""The invariants of rectified sparse attention, and the method against its own definition."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.kernels.sparse_attention import (
    Blocks,
    KeyMask,
    Sparsity,
    TokenLayout,
    Workspace,
    attention_facts,
    find_layout,
    read_mask,
    rectified_sparse_attention,
)
from lightning_quant.kernels.sparse_attention import attention as method
from lightning_quant.kernels.sparse_attention.pooling import pool_blocks
from lightning_quant.kernels.sparse_attention.reference import naive_rectified
from lightning_quant.kernels.sparse_attention.selection import choose_blocks, implicit_attention, pooling_is_worth_it

LAYOUTS = [
    TokenLayout((7, 9)),
    TokenLayout((24, 5), prefix=1),  # a class token first
    TokenLayout((3, 7, 5), prefix=4, suffix=6),
    TokenLayout((4, 4, 6), suffix=8),  # text last
]


def qkv(layout, heads=4, key_heads=2, dim=24, value_dim=20):
    return (
        torch.randn(2, heads, layout.tokens, dim),
        torch.randn(2, key_heads, layout.tokens, dim),
        torch.randn(2, key_heads, layout.tokens, value_dim),
    )


def smooth(layout, heads=2, dim=16):
    """Queries, keys and values that vary slowly over the grid, with noise: (1, heads, tokens, dim) each."""
    coarse = [max(2, size // 4) for size in layout.grid]
    mode = {2: "bilinear", 3: "trilinear"}[len(coarse)]

    def field():
        x = F.interpolate(torch.randn(heads, dim, *coarse), size=layout.grid, mode=mode, align_corners=True)
        return x.flatten(2).mT[None]

    shared, value = field(), field()
    q, k, v = (x + 0.3 * torch.randn_like(x) for x in (2 * shared, 2 * shared, value))
    text = torch.randn(3, 1, heads, layout.prefix, dim)
    return tuple(torch.cat([t, x], 2) for t, x in zip(text, (q, k, v), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ["gilbert", "raster"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_dropped_is_dense_attention(layout, order, padded):
    q, k, v = qkv(layout)
    mask = None
    if padded:  # another number of valid tokens, text and visual, in each sample
        mask = torch.rand(2, 1, 1, layout.tokens) < torch.tensor([0.9, 0.6]).view(2, 1, 1, 1)
    dense = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    blocks, read = Blocks(layout, 8, order), read_mask(mask, layout.tokens, layout.tokens)
    attended = rectified_sparse_attention(q, k, v, blocks, Sparsity(drop_rate=0.0), read)
    torch.testing.assert_close(attended.output, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_dropped_is_dense_attention_under_a_causal_mask(padded):
    layout = find_layout(43, prefix=3, causal=True)
    q, k, v = qkv(layout)
    mask = torch.ones(43, 43, dtype=torch.bool).tril()
    if padded:
        valid = torch.rand(2, 43) < 0.8
        valid[:, 0] = True
        mask = mask & valid[:, None, None]
    dense = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    attended = rectified_sparse_attention(
        q, k, v, Blocks(layout, 8, "raster"), Sparsity(drop_rate=0.0), read_mask(mask, 43, 43)
    )
    torch.testing.assert_close(attended.output, dense, atol=1e-5, rtol=1e-5)


def test_a_sparse_causal_query_never_sees_a_later_token():
    layout = find_layout(60, causal=True)
    q, k, v = qkv(layout)
    blocks, mask = Blocks(layout, 8, "raster"), KeyMask(causal=True)
    before = rectified_sparse_attention(q, k, v, blocks, Sparsity(0.7, 0.1), mask).output
    later = torch.arange(60) >= 40
    q, k, v = (torch.where(later[:, None], torch.randn_like(x), x) for x in (q, k, v))
    after = rectified_sparse_attention(q, k, v, blocks, Sparsity(0.7, 0.1), mask).output
    torch.testing.assert_close(after[:, :, :40], before[:, :, :40])


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], TokenLayout((5, 8), prefix=2)], ids=str)
@pytest.mark.parametrize("drop_rate", [0.5, 0.9, 1.0])
def test_blocks_of_equal_tokens_give_dense_attention_at_any_sparsity(layout, drop_rate):
    """Pooling loses nothing there, so every dropped block is worth its mean; the last block may be ragged."""
    blocks = Blocks(layout, 8)
    q, k, v = qkv(layout)
    for x in (q, k, v):
        for tokens in blocks.visual.split(8):
            x[:, :, tokens] = x[:, :, tokens[:1]]
    attended = rectified_sparse_attention(q, k, v, blocks, Sparsity(drop_rate, p_remain=0.0))
    assert not attended.selection.kept.all()
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attended.output, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_weights_of_every_row_sum_to_one(layout):
    """With values of one everywhere the output is the sum of the weights."""
    q, k, v = qkv(layout)
    attended = rectified_sparse_attention(q, k, torch.ones_like(v), Blocks(layout, 8), Sparsity(0.8, 0.1))
    torch.testing.assert_close(attended.output, torch.ones_like(attended.output))
    factor = attended.selection.rectification.factor
    assert (factor > 0).all() and (factor < 1 + 1e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("drop_rate", [0.0, 0.5, 0.8])
def test_it_is_what_the_definition_says(layout, drop_rate):
    q, k, v = qkv(layout)
    blocks = Blocks(layout, 8)
    attended = rectified_sparse_attention(q, k, v, blocks, Sparsity(drop_rate, 0.1))
    visual, text = blocks.visual, blocks.text
    for b in range(2):
        for h in range(4):
            key, value = k[b, h // 2], v[b, h // 2]
            out, kept, weights = naive_rectified(
                q[b, h, visual], key[visual], value[visual], 8, drop_rate, 0.1, blocks.always, key[text], value[text]
            )
            assert torch.equal(attended.selection.kept[b, h], kept)
            torch.testing.assert_close(attended.output[b, h, visual].double(), out, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(weights, torch.ones_like(weights))
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attended.output[:, :, text], dense[:, :, text])


def test_padding_is_as_if_it_were_not_there():
    """A padded sample gives what it gives alone and unpadded, whatever stands in the padding."""
    short, long = TokenLayout((4, 12), suffix=5), TokenLayout((4, 12), suffix=9)
    q, k, v = qkv(long)
    mask = torch.ones(2, 1, 1, long.tokens, dtype=torch.bool)
    mask[0, ..., short.tokens :] = False  # the first sample has less text than the second
    k[0, :, short.tokens :], v[0, :, short.tokens :] = 50.0, -50.0
    sparsity = Sparsity(0.7, 0.1)
    both = rectified_sparse_attention(q, k, v, Blocks(long, 8), sparsity, read_mask(mask, long.tokens, long.tokens))
    first = [x[:1, :, : short.tokens] for x in (q, k, v)]
    alone = rectified_sparse_attention(*first, Blocks(short, 8), sparsity).output
    torch.testing.assert_close(both.output[:1, :, : short.tokens], alone)
    second = rectified_sparse_attention(*(x[1:] for x in (q, k, v)), Blocks(long, 8), sparsity).output
    torch.testing.assert_close(both.output[1:], second)


@pytest.mark.parametrize("layout", [TokenLayout((24, 24), prefix=1), TokenLayout((4, 12, 12))], ids=str)
def test_rectified_is_nearer_to_dense_than_plain(layout):
    q, k, v = smooth(layout)
    dense = F.scaled_dot_product_attention(q, k, v)
    error = {}
    for parts in ((), ("critical", "noncritical")):
        out = rectified_sparse_attention(q, k, v, Blocks(layout, 16), Sparsity(0.8, 0.1, parts)).output
        error[parts] = float((out - dense).norm() / dense.norm())
    assert error["critical", "noncritical"] < error[()]


def test_blocks_along_the_curve_keep_more_mass_than_rows():
    layout = TokenLayout((32, 32))
    q, k, v = smooth(layout)
    mass = {}
    for order in ("gilbert", "raster"):
        blocks = Blocks(layout, 32, order)
        blocks.always.zero_()  # the same number of blocks in both orders
        sparsity = Sparsity(0.8, 0.0)
        attended = rectified_sparse_attention(q, k, v, blocks, sparsity)
        facts = attention_facts(q, k, v, blocks, attended, KeyMask(), 0.25, rows=1024)
        assert attended.selection.kept.sum(-1).unique().tolist() == [6]
        mass[order] = float(facts.kept_mass.mean())
    assert mass["gilbert"] > mass["raster"]


def test_the_facts_are_what_dense_attention_says():
    layout = TokenLayout((6, 8), prefix=2)
    q, k, v = qkv(layout)
    blocks = Blocks(layout, 8)
    attended = rectified_sparse_attention(q, k, v, blocks, Sparsity(0.6, 0.1))
    facts = attention_facts(q, k, v, blocks, attended, KeyMask(), 24**-0.5, rows=48)
    key, value = (x.repeat_interleave(2, 1) for x in (k, v))
    weights = (q[:, :, blocks.visual] @ key.mT * 24**-0.5).softmax(-1)
    seen = torch.ones_like(weights)
    seen[..., blocks.visual] = attended.selection.kept.repeat_interleave(8, 2).repeat_interleave(8, 3).float()
    torch.testing.assert_close(facts.kept_mass, (weights * seen).sum(-1).mean((0, 2)))
    torch.testing.assert_close(facts.kept_share, seen.mean((0, 2, 3)))
    dense = weights @ value
    distance = (attended.output[:, :, blocks.visual] - dense).square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(facts.error, distance / dense.square().sum((0, 2, 3)).sqrt())
    assert facts.kept.shape == (4, 6, 6)


def test_implicit_attention_counts_tokens_and_leaves_text_single():
    """With equal keys everywhere each block has as much as it has tokens, and each text key as much as one."""
    query, key, text = torch.randn(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 5, 4)
    size = torch.tensor([[8, 8, 4]])
    _, blocks, share = implicit_attention(query, key, size, 0.5, text, torch.tensor([[True, True, True, False, False]]))
    torch.testing.assert_close(blocks[0, 0, 0], torch.tensor([8, 8, 4]) / 23)
    torch.testing.assert_close(share[0, 0, 0], torch.tensor(3 / 23))


def test_the_block_that_crosses_the_line_is_kept_and_the_share_is_a_floor():
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)

    def kept(drop_rate, p_remain, text=None):
        return choose_blocks(shares, text, drop_rate, p_remain).flatten().tolist()

    assert kept(1.0, 0.0) == [True, False, False, False]
    assert kept(1.0, 0.45) == [True, True, False, False]
    assert kept(0.25, 0.0) == [True, True, True, False]
    assert kept(0.0, 0.0) == [True, True, True, True]
    assert kept(1.0, 1.0) == [True, True, True, True]
    # text that is ahead of all blocks takes the first place
    assert kept(1.0, 0.3, torch.full((1, 1, 1), 0.6)) == [False, False, False, False]


def test_pooling_is_not_worth_it_where_the_tokens_of_a_block_contradict_each_other():
    key = torch.tensor([[3.0, 0.0], [3.0, 0.0], [5.0, 0.0], [-4.0, 0.0]]).view(1, 1, 4, 2)
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    pooled_query, pooled_key = pool_blocks(query, 2), pool_blocks(key, 2)
    logits = pooled_query.mean @ pooled_key.mean.mT  # 3 and 0.5, of which the second hides 5 and -4
    assert pooling_is_worth_it(logits, pooled_query, pooled_key).flatten().tolist() == [True, False]


def test_pooling_looks_at_valid_tokens_only():
    x, valid = torch.randn(2, 3, 21, 4), torch.rand(2, 21) < 0.6
    pooled = pool_blocks(x, 8, valid)
    for b in range(2):
        for n, (tokens, inside) in enumerate(zip(x[b].split(8, 1), valid[b].split(8), strict=True)):
            assert pooled.size[b, n] == inside.sum()
            tokens = tokens[:, inside]
            torch.testing.assert_close(pooled.mean[b, :, n], tokens.mean(1))
            torch.testing.assert_close(pooled.deviation[b, :, n], (tokens - tokens.mean(1, True)).abs().mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float(dtype):
    layout = TokenLayout((24, 5), prefix=1)
    q, k, v = smooth(layout)
    blocks, sparsity = Blocks(layout, 16), Sparsity(0.0)
    exact = rectified_sparse_attention(q, k, v, blocks, sparsity).output
    out = rectified_sparse_attention(*(x.to(dtype) for x in (q, k, v)), blocks, sparsity).output
    assert out.dtype == dtype
    assert (out.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_heads_may_be_served_one_after_the_other(layout, monkeypatch):
    q, k, v = qkv(layout)
    blocks = Blocks(layout, 8)
    expected = rectified_sparse_attention(q, k, v, blocks, Sparsity())
    monkeypatch.setattr(method, "TOKENS_AT_ONCE", 1)
    found = rectified_sparse_attention(q, k, v, blocks, Sparsity())
    torch.testing.assert_close(found.output, expected.output)
    assert torch.equal(found.selection.kept, expected.selection.kept)
    for one, other in zip(found.selection.rectification, expected.selection.rectification, strict=True):
        torch.testing.assert_close(one, other)


def test_an_answer_is_no_part_of_the_workspace():
    """What was answered stays, though the memory it was made in is used by the next call, of any type and size."""
    workspace, layout = Workspace(), LAYOUTS[2]
    blocks, (q, k, v) = Blocks(layout, 8), qkv(layout)
    with torch.inference_mode():
        first = rectified_sparse_attention(q, k, v, blocks, Sparsity(), workspace=workspace)
        kept, output = first.selection.kept.clone(), first.output.clone()
    for dtype, group in ((torch.float32, slice(1)), (torch.bfloat16, slice(2)), (torch.float32, slice(2))):
        again = [(-x[group]).to(dtype) for x in (q, k, v)]
        rectified_sparse_attention(*again, blocks, Sparsity(), workspace=workspace)
    assert torch.equal(first.output, output) and torch.equal(first.selection.kept, kept)
    fresh = rectified_sparse_attention(q, k, v, blocks, Sparsity(), workspace=workspace)
    torch.testing.assert_close(fresh.output, output)
