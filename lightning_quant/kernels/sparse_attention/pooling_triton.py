"""Pooling in Triton: a program reads the tokens of one block once, and gives their mean and their deviation from it.

In plain torch the same takes several passes over all tokens, and a copy of them in float32.
"""

# The arguments of a kernel are pointers, numbers and constants of the compiler, for which there are no annotations.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pool(
    x_ptr, valid_ptr, mean_ptr, deviation_ptr, stride_b, stride_h, stride, stride_valid, heads, length, blocks, dim,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    number, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    within, channel = tl.arange(0, ROWS), tl.arange(0, DIM)
    row = number * BLOCK + within
    real = (within < BLOCK) & (row < length)
    if PADDED:
        real = real & (tl.load(valid_ptr + batch * stride_valid + row, mask=real, other=0) != 0)
    x = tl.load(
        x_ptr + batch * stride_b + head * stride_h + row[:, None] * stride + channel[None, :],
        mask=real[:, None] & (channel[None, :] < dim),
        other=0.0,
    ).to(tl.float32)
    size = tl.maximum(tl.sum(real.to(tl.float32), 0), 1.0)
    mean = tl.sum(x, 0) / size
    deviation = tl.sum(tl.where(real[:, None], tl.abs(x - mean[None, :]), 0.0), 0) / size
    place = (batch_head.to(tl.int64) * blocks + number) * dim + channel
    tl.store(mean_ptr + place, mean, mask=channel < dim)
    tl.store(deviation_ptr + place, deviation, mask=channel < dim)


def pool(x: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of ``pool_blocks``, (B, H, N, d) each."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, heads, length, dim), blocks = x.shape, triton.cdiv(x.size(2), block)
    mean, deviation = (x.new_empty(batch, heads, blocks, dim, dtype=torch.float32) for _ in range(2))
    mask = None if valid is None else valid.expand(batch, -1).to(torch.uint8).contiguous()
    # An argument that is not read still needs a pointer: `mean` stands in.
    _pool[(blocks, batch * heads)](
        x, mean if mask is None else mask, mean, deviation, *x.stride()[:3], 0 if mask is None else mask.stride(0),
        heads, length, blocks, dim, BLOCK=block, ROWS=triton.next_power_of_2(block), DIM=triton.next_power_of_2(dim),
        PADDED=mask is not None, num_warps=8,
    )  # fmt: skip
    return mean, deviation
