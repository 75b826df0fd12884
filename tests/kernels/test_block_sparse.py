"""Every backend of block-sparse attention against dense attention under the expanded mask."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.kernels.sparse_attention import BlockLists, block_sparse_attention, block_sparse_torch
from lightning_quant.kernels.sparse_attention.rectification import Rectification
from lightning_quant.kernels.sparse_attention.reference import naive_block_sparse
from tests.kernels.block_sparse_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("keys_per_batch", [1, 40, 2**14])
def test_torch_equals_the_definition(case: Case, keys_per_batch, monkeypatch):
    monkeypatch.setattr(block_sparse_torch, "KEYS_PER_BATCH", keys_per_batch)
    q, k, v, kept = case.tensors()
    out = block_sparse_attention(q, k, v, BlockLists.of(kept), case.block, backend="torch", **case.options())
    expected = naive_block_sparse(q, k, v, kept, case.block, **case.options())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_in_half_precision(dtype):
    q, k, v, kept = Case(dtype=dtype, length=150, keys=150, block=16).tensors()
    out = block_sparse_attention(q, k, v, BlockLists.of(kept), 16, backend="torch")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), naive_block_sparse(q, k, v, kept, 16), atol=2e-2, rtol=2e-2)


def test_full_lists_are_dense_attention():
    q, k, v, kept = Case().tensors()
    out = block_sparse_attention(q, k, v, BlockLists.of(torch.ones_like(kept)), 8)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_rectification_is_a_factor_and_an_addend_per_block():
    q, k, v, kept = Case(length=29, keys=29).tensors()
    lists = BlockLists.of(kept)
    rectification = Rectification(torch.rand(*kept.shape[:3]), torch.randn(*kept.shape[:3], v.size(-1)))
    plain = block_sparse_attention(q, k, v, lists, 8)
    factor, addend = rectification.rows(8, 29)
    rectified = block_sparse_attention(q, k, v, lists, 8, rectification=rectification)
    torch.testing.assert_close(rectified, factor * plain + addend)


def test_an_empty_list_answers_the_addend():
    q, k, v, kept = Case().tensors()
    kept[0, 0, 1] = False
    rectification = Rectification(torch.ones(kept.shape[:3]), torch.full((*kept.shape[:3], v.size(-1)), 0.5))
    out = block_sparse_attention(q, k, v, BlockLists.of(kept), 8, rectification=rectification)
    assert (out[0, 0, 8:16] == 0.5).all()


def test_keys_that_no_list_names_are_not_read():
    """Infinite keys and values in dropped blocks leave no trace: they are skipped, not multiplied by zero."""
    q, k, v, kept = Case().tensors()
    kept[..., 2] = False
    expected = block_sparse_attention(q, k, v, BlockLists.of(kept), 8)
    k[:, :, 16:24], v[:, :, 16:24] = float("nan"), float("inf")
    assert torch.equal(block_sparse_attention(q, k, v, BlockLists.of(kept), 8), expected)


def test_key_blocks_may_be_listed_in_another_order():
    q, k, v, kept = Case(length=32, keys=32).tensors()
    moved = torch.tensor([2, 0, 3, 1])
    token = (moved[:, None] * 8 + torch.arange(8)).flatten()
    out = block_sparse_attention(q, k[:, :, token], v[:, :, token], BlockLists.of(kept[..., moved]), 8)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, BlockLists.of(kept), 8))


def test_lists_hold_what_the_mask_holds():
    kept = torch.rand(2, 3, 5, 7) < 0.4
    kept[0, 0, 0] = False
    lists = BlockLists.of(kept)
    assert torch.equal(lists.mask(7), kept)
    assert torch.equal(lists.finer(3).mask(21), kept.repeat_interleave(3, -1))


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_a_backend_that_cannot_serve_says_why(backend):
    q, k, v, kept = Case().tensors()
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve this attention: the tensors are on cpu"):
        block_sparse_attention(q, k, v, BlockLists.of(kept), 8, backend=backend)
