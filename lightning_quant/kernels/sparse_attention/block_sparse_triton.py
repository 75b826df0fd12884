"""Block-sparse flash attention in Triton: a program walks the list of one query block, and rectifies in its epilogue.

Imported only when it is about to serve. With ``TRITON_INTERPRET=1`` in the environment before that, it runs on the CPU.
"""

# The arguments of a kernel are pointers, numbers and constants of the compiler, for which there are no annotations.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification

LOG2_E = 1.4426950408889634


@triton.jit
def _attend_to_tile(
    q, q_scale, m, l, acc, k_base, k_scale_base, v_base, stride_k, stride_v, valid_base, row, column, limit, first, dim,
    value_dim, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys at ``column``, which lie between ``first`` and ``limit``."""
    inside = (column >= first) & (column < limit)
    channel, value_channel = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    k = tl.load(
        k_base + column[None, :] * stride_k + channel[:, None],
        mask=inside[None, :] & (channel[:, None] < dim),
        other=0,
    )  # (DIM, columns)
    v = tl.load(
        v_base + column[:, None] * stride_v + value_channel[None, :],
        mask=inside[:, None] & (value_channel[None, :] < value_dim),
        other=0.0,
    )  # (columns, VALUE_DIM)
    seen = inside
    if PADDED:
        seen = seen & (tl.load(valid_base + column, mask=inside, other=0) != 0)
    # The scale goes onto the float32 scores: folded into half precision queries it would round them.
    if INT8:
        k_scale = tl.load(k_scale_base + column, mask=inside, other=0.0)
        products = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        scores = products * (q_scale[:, None] * scale) * k_scale[None, :]
    else:
        scores = tl.dot(q, k, input_precision="ieee") * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet: not inf - inf
    shrink = tl.exp2(m - base)
    p = tl.exp2(scores - base[:, None])
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return highest, l, acc


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, index_ptr, count_ptr, valid_ptr, factor_ptr, addend_ptr, q_scale_ptr, k_scale_ptr,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_valid,
    heads, group, queries, keys, blocked, blocks, longest, dim, value_dim, scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, RECTIFIED: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    number, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    list_row = batch_head.to(tl.int64) * blocks + number

    within = tl.arange(0, ROWS)
    row = number * BLOCK + within
    real = (within < BLOCK) & (row < queries)
    channel, value_channel = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    q = tl.load(
        q_ptr + batch * stride_qb + head * stride_qh + row[:, None] * stride_q + channel[None, :],
        mask=real[:, None] & (channel[None, :] < dim),
        other=0,
    )
    k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh
    valid_base = valid_ptr + batch * stride_valid
    k_scale_base = k_scale_ptr + (batch * (heads // group) + head // group) * keys
    q_scale = scale  # not read
    if INT8:
        q_scale = tl.load(q_scale_ptr + batch_head.to(tl.int64) * queries + row, mask=real, other=0.0)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    count = tl.load(count_ptr + list_row)
    for step in range(0, count * TILES):
        block = tl.load(index_ptr + list_row * longest + step // TILES)
        column = block * BLOCK + (step % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        end = tl.minimum((block + 1) * BLOCK, blocked)
        m, l, acc = _attend_to_tile(
            q, q_scale, m, l, acc, k_base, k_scale_base, v_base, stride_k, stride_v, valid_base, row, column, end, 0,
            dim, value_dim, scale, DIM, VALUE_DIM, CAUSAL, PADDED, INT8,
        )  # fmt: skip
    for start in range(blocked, keys, COLUMNS):  # what every query sees
        column = start + tl.arange(0, COLUMNS)
        m, l, acc = _attend_to_tile(
            q, q_scale, m, l, acc, k_base, k_scale_base, v_base, stride_k, stride_v, valid_base, row, column, keys,
            blocked, dim, value_dim, scale, DIM, VALUE_DIM, False, PADDED, INT8,
        )  # fmt: skip

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if RECTIFIED:
        factor = tl.load(factor_ptr + list_row)
        addend = tl.load(addend_ptr + list_row * value_dim + value_channel, mask=value_channel < value_dim, other=0.0)
        out = out * factor + addend[None, :]
    tl.store(
        out_ptr + batch * stride_ob + head * stride_oh + row[:, None] * stride_o + value_channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (value_channel[None, :] < value_dim),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    block: int,
    blocked: int,
    scale: float,
    valid: Tensor | None,
    causal: bool,
    rectification: Rectification | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See :func:`~lightning_quant.kernels.sparse_attention.block_sparse.block_sparse_attention`.

    With the scales of its tokens, (B, Hq, L) and (B, Hkv, S), queries and keys are codes of 8 bits.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    (batch, heads, queries, dim), value_dim = query.shape, value.size(-1)
    out = value.new_empty(batch, heads, queries, value_dim)
    index, count = lists.index.contiguous(), lists.count.contiguous()
    blocks, longest = index.shape[-2:]
    mask = None if valid is None else valid.expand(batch, -1).to(torch.uint8).contiguous()
    factor, addend = (None, None) if rectification is None else (x.float().contiguous() for x in rectification)
    q_scale, k_scale = (None, None) if scales is None else (x.float().contiguous() for x in scales)
    columns = max(16, min(64, triton.next_power_of_2(block)))
    # An argument that is not read still needs a pointer: `count` stands in.
    _forward[(blocks, batch * heads)](
        query, key, value, out, index, count,
        count if mask is None else mask, count if factor is None else factor, count if addend is None else addend,
        count if q_scale is None else q_scale, count if k_scale is None else k_scale,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        0 if mask is None else mask.stride(0),
        heads, heads // key.size(1), queries, key.size(2), blocked, blocks, longest, dim, value_dim, scale * LOG2_E,
        BLOCK=block, ROWS=max(16, triton.next_power_of_2(block)), COLUMNS=columns, TILES=triton.cdiv(block, columns),
        DIM=max(16 if scales is None else 32, triton.next_power_of_2(dim)),
        VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
        CAUSAL=causal, PADDED=mask is not None, RECTIFIED=factor is not None, INT8=q_scale is not None,
        num_warps=4 if dim <= 64 else 8, num_stages=3 if dim <= 64 else 2,
    )  # fmt: skip
    return out
