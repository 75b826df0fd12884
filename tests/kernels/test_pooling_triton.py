"""The pooling kernel by Triton's interpreter, against pooling in torch."""

import pytest
import torch

from lightning_quant.kernels.sparse_attention.pooling import pool_blocks
from tests.kernels.interpreter import interpreted


@pytest.fixture(scope="module")
def pool():
    with interpreted("lightning_quant.kernels.sparse_attention.pooling_triton") as (kernels,):
        yield kernels.pool


@pytest.mark.parametrize(
    ("length", "block", "dim", "padded"),
    [(32, 8, 16, False), (29, 8, 24, False), (29, 8, 16, True), (21, 7, 72, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_and_deviations_of_blocks(length, block, dim, padded, dtype, pool):
    x = torch.randn(2, length, 3, dim).to(dtype).transpose(1, 2)  # as most models have them
    valid = torch.rand(2, length) < 0.6 if padded else None
    if padded:
        valid[0, :block] = False  # a block of nothing but padding
        x = x.masked_fill(~valid[:, None, :, None], 1e4)  # which is not looked at
    expected = pool_blocks(x, block, valid)
    mean, deviation = pool(x, block, valid)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(deviation, expected.deviation)
