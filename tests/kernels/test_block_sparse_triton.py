"""The Triton kernel by Triton's interpreter: the arithmetic, not the speed."""

import pytest
import torch

from lightning_quant.kernels.sparse_attention import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification
from lightning_quant.kernels.sparse_attention.reference import naive_block_sparse
from tests.kernels.block_sparse_cases import CASES, Case
from tests.kernels.interpreter import interpreted

NAME = "lightning_quant.kernels.sparse_attention.block_sparse_triton"


@pytest.fixture(scope="module")
def attend():
    with interpreted(NAME) as (kernel,):
        yield kernel.attend


def run(attend, case, rectification=None):
    q, k, v, kept = case.tensors()
    options = case.options()
    blocked = case.keys if case.blocked is None else case.blocked
    scale = case.dim**-0.5 if case.scale is None else case.scale
    lists = BlockLists.of(kept)
    out = attend(q, k, v, lists, case.block, blocked, scale, options["valid"], case.causal, rectification)
    return out, naive_block_sparse(q, k, v, kept, case.block, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_equals_the_definition(case: Case, attend):
    out, expected = run(attend, case)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("block of several tiles", batch=1, heads=1, key_heads=1, length=150, keys=150, block=128, dim=32),
        Case("head dim 72", batch=1, heads=2, key_heads=1, length=29, keys=29, dim=72, value_dim=72),
        Case("head dim 128", batch=1, heads=1, key_heads=1, length=20, keys=20, dim=128, value_dim=128),
    ],
    ids=str,
)
def test_other_tiles(case, attend):
    out, expected = run(attend, case)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_half_precision(attend):
    """The interpreter does not do bfloat16."""
    out, expected = run(attend, Case(length=29, keys=41, blocked=29, dtype=torch.float16))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


def test_the_epilogue_rectifies(attend):
    case = Case("grouped", key_heads=2, length=29, keys=41, blocked=29, padded=True, value_dim=24)
    shape = (2, 4, 4)
    rectification = Rectification(torch.rand(shape), torch.randn(*shape, 24))
    out, plain = run(attend, case, rectification)
    factor, addend = rectification.rows(8, 29)
    torch.testing.assert_close(out.double(), factor * plain + addend, atol=1e-5, rtol=1e-5)


def test_an_empty_list_answers_zero(attend):
    q, k, v, kept = Case().tensors()
    kept[0, 1, 2] = False
    out = attend(q, k, v, BlockLists.of(kept), 8, 32, 0.25, None, False, None)
    assert (out[0, 1, 16:24] == 0).all() and (out[0, 1, 8:16] != 0).any()
