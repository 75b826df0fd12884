"""flex_attention with our lists, on the CPU and uncompiled: what it computes, not how fast."""

import pytest
import torch

from lightning_quant.kernels.sparse_attention import BlockLists
from lightning_quant.kernels.sparse_attention.block_sparse_flex import attend
from lightning_quant.kernels.sparse_attention.rectification import Rectification
from lightning_quant.kernels.sparse_attention.reference import naive_block_sparse
from tests.kernels.block_sparse_cases import CASES, Case


@pytest.mark.parametrize("case", [case for case in CASES if case.dim == case.value_dim], ids=str)
def test_flex_equals_the_definition(case: Case):
    q, k, v, kept = case.tensors()
    options = case.options()
    blocked = case.keys if case.blocked is None else case.blocked
    scale = case.dim**-0.5 if case.scale is None else case.scale
    out = attend(q, k, v, BlockLists.of(kept), case.block, blocked, scale, options["valid"], case.causal, None)
    expected = naive_block_sparse(q, k, v, kept, case.block, **options)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_rectified():
    q, k, v, kept = Case(length=29, keys=29).tensors()
    rectification = Rectification(torch.rand(kept.shape[:3]), torch.randn(*kept.shape[:3], 16))
    plain, rectified = (
        attend(q, k, v, BlockLists.of(kept), 8, 29, 0.25, None, False, r) for r in (None, rectification)
    )
    factor, addend = rectification.rows(8, 29)
    torch.testing.assert_close(rectified, factor * plain + addend)
