"""Queries and keys in 8 bits: what rounding does, and every backend against the definition on what the codes mean."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.kernels.sparse_attention import BlockLists, block_sparse_attention
from lightning_quant.kernels.sparse_attention.int8_scores import int8_blocks, to_int8
from lightning_quant.kernels.sparse_attention.reference import naive_block_sparse
from tests.kernels.block_sparse_cases import CASES, Case
from tests.kernels.test_block_sparse_triton import attend  # noqa: F401  # the fixture

MIXED = {"plain", "grouped heads", "causal, padded, text behind", "head dim 24, values 40", "blocks of 7"}
SOME = [
    *(case for case in CASES if case.name in MIXED),
    Case("block of several tiles", batch=1, heads=1, key_heads=1, length=150, keys=150, block=128, dim=32),
    Case("head dim 72", batch=1, heads=2, key_heads=1, length=29, keys=29, dim=72, value_dim=72),
    Case("half precision", length=29, keys=41, blocked=29, padded=True, dtype=torch.float16),
]


def as_rounded(case):
    """The definition, on queries and keys that have been rounded."""
    q, k, v, kept = case.tensors()
    options = case.options()
    codes = int8_blocks(q, k, case.block, case.keys if case.blocked is None else case.blocked, options["valid"])
    q, k = (x.floats() for x in codes)
    return codes, naive_block_sparse(q, k, v, kept, case.block, **options)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_triton_equals_the_definition(case, attend):  # noqa: F811
    _, _, v, kept = case.tensors()
    options = case.options()
    (q, k), expected = as_rounded(case)
    blocked = case.keys if case.blocked is None else case.blocked
    scale = case.dim**-0.5 if case.scale is None else case.scale
    rest = (case.block, blocked, scale, options["valid"], case.causal, None)
    out = attend(q.codes, k.codes, v, BlockLists.of(kept), *rest, scales=(q.scale, k.scale))
    assert out.dtype == v.dtype
    near = 1e-5 if v.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), expected, atol=near, rtol=near)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_torch_equals_the_definition(case):
    q, k, v, kept = case.tensors()
    lists, options = BlockLists.of(kept), case.options()
    out = block_sparse_attention(q, k, v, lists, case.block, int8_scores=True, backend="torch", **options)
    assert out.dtype == v.dtype
    near = 1e-5 if v.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), as_rounded(case)[1], atol=near, rtol=near)


def test_it_is_near_to_attention_in_floats():
    q, k, v, kept = Case(length=256, keys=256, dim=64, value_dim=64, block=32).tensors()
    exact = block_sparse_attention(q, k, v, BlockLists.of(kept), 32)
    rounded = block_sparse_attention(q, k, v, BlockLists.of(kept), 32, int8_scores=True)
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > 0.999


def test_what_all_keys_have_in_common_costs_no_bits():
    """Some channels of trained keys lie far from zero in all tokens."""
    q, k, v, kept = Case(length=64, keys=64, block=16).tensors()
    k[..., :2] += 10
    exact, lists = naive_block_sparse(q, k, v, kept, 16), BlockLists.of(kept)
    smoothed = block_sparse_attention(q, k, v, lists, 16, int8_scores=True)
    as_they_are = naive_block_sparse(to_int8(q, 16).floats(), to_int8(k, 16).floats(), v, kept, 16)
    assert 2 * (smoothed - exact).norm() < (as_they_are - exact).norm()


def test_every_block_has_its_own_scale():
    x = torch.randn(2, 3, 21, 8) * torch.tensor([1.0, 100.0, 0.0]).repeat_interleave(8)[:21, None]
    rounded = to_int8(x, 8)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 21)):
        block, scale = x[:, :, rows], rounded.scale[:, :, rows]
        largest = block.abs().amax((2, 3))[..., None].expand_as(scale)
        torch.testing.assert_close(scale, largest / 127, atol=2e-7, rtol=1e-6)
        assert ((rounded.floats()[:, :, rows] - block).abs() <= 0.5001 * scale[..., None]).all()


def test_padding_sets_no_scale():
    q, k, v, kept = Case(length=32, keys=32).tensors()
    valid = torch.arange(32).expand(2, -1) < 27
    expected = block_sparse_attention(q, k, v, BlockLists.of(kept), 8, valid=valid, int8_scores=True)
    k[:, :, 27:] = 1e4
    out = block_sparse_attention(q, k, v, BlockLists.of(kept), 8, valid=valid, int8_scores=True)
    assert torch.equal(out, expected)
