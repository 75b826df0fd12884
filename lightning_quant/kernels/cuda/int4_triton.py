"""W4A16 in Triton: codes of 4 bits become floats on their way to the product, with a scale and a zero for each group.

Imported only when it is about to serve. With ``TRITON_INTERPRET=1`` in the environment before that, it runs on the CPU.
"""

# The arguments of a kernel are pointers, numbers and constants of the compiler, for which there are no annotations.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.cuda.operands import Activation, Int4Weight
from lightning_quant.kernels.cuda.tiles import DECODE_ROWS, activated, config, launch, require_device, tile_of

KEYS = ("bucket", "outputs", "inputs", "group")


@functools.cache
def configs(group: int, decode: bool) -> tuple[Any, ...]:
    """Tiles to try: one of them holds inputs of one group only."""
    depth = next(depth for depth in (128, 64, 32) if group % depth == 0)
    if decode:
        return tuple(config(16, columns, depth, 4, 5) for columns in (16, 32, 64, 128))
    sizes = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8))
    return tuple(config(rows, columns, depth, warps, 3) for rows, columns, warps in sizes)


@triton.jit(do_not_specialize=["bucket"])
def _multiply(
    x_ptr, packed_ptr, out_ptr, scale_ptr, zero_ptr, bias_ptr,
    rows, outputs, inputs, bucket, group, zero, stride_x, stride_packed,
    ZEROS: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the output."""
    tile_row, tile_column = tile_of(rows, outputs, ROWS, COLUMNS)
    m = tile_row * ROWS + tl.arange(0, ROWS)
    n = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    real_m, real_n = m < rows, n < outputs
    base = x_ptr + m.to(tl.int64) * stride_x
    packed_base = packed_ptr + n.to(tl.int64) * stride_packed
    byte = tl.arange(0, DEPTH // 2)
    lower = byte // 16 * 32 + byte % 16  # the input in the lower half of a byte; the one in its upper half is 16 on

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, DEPTH):
        place = start // group * outputs + n
        scale = tl.load(scale_ptr + place, mask=real_n, other=0.0)
        if ZEROS:
            nothing = tl.load(zero_ptr + place, mask=real_n, other=0).to(tl.float32)
        else:
            nothing = tl.full([COLUMNS], zero, tl.float32)
        at = start // 2 + byte[:, None]
        packed = tl.load(packed_base[None, :] + at, mask=real_n[None, :] & (at < stride_packed), other=0)
        for upper in tl.static_range(2):
            k = start + lower + 16 * upper
            x = tl.load(base[:, None] + k[None, :], mask=real_m[:, None] & (k[None, :] < inputs), other=0.0)
            codes = (packed >> (4 * upper)) & 15
            w = (codes.to(tl.float32) - nothing[None, :]) * scale[None, :]
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")

    if BIASED:
        acc += tl.load(bias_ptr + n, mask=real_n, other=0.0)[None, :]
    target = out_ptr + m.to(tl.int64)[:, None] * outputs + n[None, :]
    y = activated(acc, ACTIVATION).to(out_ptr.dtype.element_ty)
    tl.store(target, y, mask=real_m[:, None] & real_n[None, :])


def multiply(x: Tensor, weight: Int4Weight, activation: Activation = "none") -> Tensor:
    """See :func:`~lightning_quant.kernels.cuda.operands.naive_int4`; the answer has the precision of ``x``."""
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), (outputs, width) = x.shape, weight.packed.shape
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    zeros, zero = (weight.zero, 0) if isinstance(weight.zero, Tensor) else (None, weight.zero)
    # An argument that is not read still needs a pointer: another one stands in.
    launch(
        _multiply, configs(weight.group, rows <= DECODE_ROWS), KEYS, out,
        x, weight.packed, out, weight.scale, weight.scale if zeros is None else zeros,
        weight.scale if weight.bias is None else weight.bias,
        rows, outputs, inputs, triton.next_power_of_2(rows), weight.group, zero, x.stride(0), width,
        ZEROS=zeros is not None, BIASED=weight.bias is not None, ACTIVATION=activation,
    )  # fmt: skip
    return out
