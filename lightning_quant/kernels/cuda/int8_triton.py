"""W8A8 in Triton: activations become codes in the prologue, integers are multiplied, and scaled once in the epilogue.

For a few rows one kernel does all of it. For many, rounding them again for every tile of outputs would take longer than
the products, so a kernel of its own rounds them first.

Imported only when it is about to serve. With ``TRITON_INTERPRET=1`` in the environment before that, it runs on the CPU.
"""

# The arguments of a kernel are pointers, numbers and constants of the compiler, for which there are no annotations.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.cuda.operands import Activation, Int8Inputs, Int8Weight
from lightning_quant.kernels.cuda.tiles import DECODE_ROWS, activated, config, launch, require_device, tile_of

# Added and taken away again, it leaves the nearest integer of a float32 of at most 2^22, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2**23)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

DECODE = (
    config(16, 32, 256, 4, 4),
    config(16, 64, 128, 4, 4),
    config(16, 128, 128, 4, 3),
    config(16, 64, 256, 8, 3),
)
PREFILL = (
    config(64, 64, 128, 4, 4),
    config(64, 128, 64, 4, 4),
    config(128, 64, 64, 4, 4),
    config(128, 128, 64, 8, 3),
    config(128, 128, 128, 8, 3),
    config(128, 256, 64, 8, 3),
)
KEYS = ("bucket", "outputs", "inputs", "INPUTS")


@triton.jit
def _divided(x, y, RECIPROCAL: tl.constexpr):
    """As torch divides a tensor by a number, which on a GPU is a product with the reciprocal."""
    if RECIPROCAL:
        return x * tl.div_rn(1.0, y)
    else:
        return tl.div_rn(x, y)


@triton.jit
def _found(
    base, real, inputs,
    HALF: tl.constexpr, GRID: tl.constexpr, RECIPROCAL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scale and zero of each row, as the quantizer finds them from its smallest and largest input and 0."""
    lo, hi = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, inputs, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = real[:, None] & (column[None, :] < inputs)
        x = tl.load(base[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        lo, hi = tl.minimum(lo, tl.min(x, 1)), tl.maximum(hi, tl.max(x, 1))
    zero = tl.zeros([ROWS], tl.int32)
    if GRID == "symmetric":
        scale = tl.maximum(_divided(tl.maximum(-lo, hi), tl.full([ROWS], HALF - 1, tl.float32), RECIPROCAL), _TINY)
    elif GRID == "unsigned":
        scale = tl.maximum(_divided(hi, tl.full([ROWS], 2 * HALF - 1, tl.float32), RECIPROCAL), _TINY)
        zero -= HALF
    else:
        steps = tl.full([ROWS], 2 * HALF - 1, tl.float32)
        scale = tl.maximum(_divided(hi * 0.5 - lo * 0.5, steps, RECIPROCAL) * 2, _TINY)
        zero = ((tl.div_rn(-lo, scale) + _ROUNDER) - _ROUNDER).to(tl.int32) - HALF
    return scale, zero


@triton.jit
def _codes_of(x, scale, zero, HALF: tl.constexpr):
    """The codes of floats (rows, inputs), from -HALF to HALF - 1."""
    inverse, zero = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), zero.to(tl.float32)
    steps = tl.maximum(x.to(tl.float32) * inverse[:, None], (-HALF - zero)[:, None])
    steps = tl.minimum(steps, (HALF - 1 - zero)[:, None])
    return (((steps + _ROUNDER) - _ROUNDER) + zero[:, None]).to(tl.int8)


@triton.jit
def _encode(
    x_ptr, code_ptr, scale_ptr, zero_ptr, inputs, stride_x, found_scale_ptr, found_zero_ptr,
    HALF: tl.constexpr, GRID: tl.constexpr, RECIPROCAL: tl.constexpr, FOUND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program turns one row into codes, with the scale that is given or the one that it finds and writes."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    base = x_ptr + row * stride_x
    if FOUND:
        scale, zero = _found(base, row >= 0, inputs, HALF, GRID, RECIPROCAL, 1, DEPTH)
        tl.store(found_scale_ptr + row, scale)
        tl.store(found_zero_ptr + row, zero)
    else:
        scale, zero = tl.load(scale_ptr + row * 0), tl.load(zero_ptr + row * 0)
    for start in range(0, inputs, DEPTH):
        column = start + tl.arange(0, DEPTH)[None, :]
        x = tl.load(base[:, None] + column, mask=column < inputs, other=0.0)
        tl.store(code_ptr + row[:, None] * inputs + column, _codes_of(x, scale, zero, HALF), mask=column < inputs)


@triton.jit(do_not_specialize=["bucket"])
def _multiply(
    x_ptr, w_ptr, out_ptr, scale_ptr, zero_ptr, column_scale_ptr, total_ptr, offset_ptr, bias_ptr,
    rows, outputs, inputs, bucket, stride_x, stride_scale,
    HALF: tl.constexpr, GRID: tl.constexpr, RECIPROCAL: tl.constexpr, INPUTS: tl.constexpr, SHIFTED: tl.constexpr,
    BIASED: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the output. INPUTS says what ``x_ptr`` holds: codes, floats with a scale, or floats without one."""
    tile_row, tile_column = tile_of(rows, outputs, ROWS, COLUMNS)
    m = tile_row * ROWS + tl.arange(0, ROWS)
    n = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    real_m, real_n = m < rows, n < outputs
    base = x_ptr + m.to(tl.int64) * stride_x
    w_base = w_ptr + n.to(tl.int64) * inputs

    if INPUTS == "floats":
        scale, zero = _found(base, real_m, inputs, HALF, GRID, RECIPROCAL, ROWS, DEPTH)
    else:
        scale = tl.load(scale_ptr + m * stride_scale, mask=real_m, other=1.0)
        zero = tl.load(zero_ptr + m * stride_scale, mask=real_m, other=0)

    acc = tl.zeros([ROWS, COLUMNS], tl.int32)
    sums = tl.zeros([ROWS], tl.int32)
    for start in range(0, inputs, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = real_m[:, None] & (k[None, :] < inputs)
        codes = tl.load(base[:, None] + k[None, :], mask=inside, other=0)
        if INPUTS != "codes":
            codes = tl.where(inside, _codes_of(codes, scale, zero, HALF), 0).to(tl.int8)
        w = tl.load(w_base[None, :] + k[:, None], mask=real_n[None, :] & (k[:, None] < inputs), other=0)
        acc = tl.dot(codes, w, acc, out_dtype=tl.int32)
        if SHIFTED:
            sums += tl.sum(codes.to(tl.int32), 1)

    total = tl.load(total_ptr + n, mask=real_n, other=0)
    if WIDE:
        acc, total, zero, sums = acc.to(tl.int64), total.to(tl.int64), zero.to(tl.int64), sums.to(tl.int64)
    acc -= zero[:, None] * total[None, :]
    if SHIFTED:
        offset = tl.load(offset_ptr + n, mask=real_n, other=0)
        acc -= sums[:, None] * offset[None, :]
    target = out_ptr + m.to(tl.int64)[:, None] * outputs + n[None, :]
    real = real_m[:, None] & real_n[None, :]
    if out_ptr.dtype.element_ty.is_int():
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=real)
    else:
        column_scale = tl.load(column_scale_ptr + n, mask=real_n, other=0.0)
        y = acc.to(tl.float32) * (scale[:, None] * column_scale[None, :])
        if BIASED:
            y += tl.load(bias_ptr + n, mask=real_n, other=0.0)[None, :]
        tl.store(target, activated(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=real)


def multiply(
    x: Tensor,
    weight: Int8Weight,
    inputs: Int8Inputs,
    dtype: torch.dtype,
    activation: Activation = "none",
    fused: bool | None = None,
) -> Tensor:
    """See :func:`~lightning_quant.kernels.cuda.operands.naive_int8`.

    Args:
        x: floats, (rows, in).
        weight: the other operand.
        inputs: how ``x`` becomes codes.
        dtype: of the answer; an integer one asks for the sums themselves, without scales, bias and activation.
        activation: behind the bias.
        fused: whether the product rounds ``x`` itself; default: for a few rows.
    """
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, depth), outputs = x.shape, len(weight.codes)
    out = x.new_empty(rows, outputs, dtype=dtype)
    if not out.numel():
        return out
    scale, zero, stride, holds = inputs.scale, inputs.zero, 0, "floats" if inputs.scale is None else "scaled"
    grid = {"HALF": inputs.half, "GRID": inputs.grid, "RECIPROCAL": x.is_cuda}
    if not (rows <= DECODE_ROWS if fused is None else fused):
        x, scale, zero = _encoded(x, scale, zero, grid)
        holds, stride = "codes", int(inputs.scale is None)
    # An argument that is not read still needs a pointer: another one stands in.
    launch(
        _multiply, DECODE if rows <= DECODE_ROWS else PREFILL, KEYS, out,
        x, weight.codes, out, weight.scale if scale is None else scale, weight.totals if zero is None else zero,
        weight.scale, weight.totals, weight.totals if weight.offset is None else weight.offset,
        weight.scale if weight.bias is None else weight.bias,
        rows, outputs, depth, triton.next_power_of_2(rows), x.stride(0), stride,
        **grid, INPUTS=holds, SHIFTED=weight.offset is not None, BIASED=weight.bias is not None, WIDE=inputs.wide,
        ACTIVATION=activation,
    )  # fmt: skip
    return out


def _encoded(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, grid: Mapping[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of (rows, in), with their scale and zero: those that are given, or one of each row."""
    rows, depth = x.shape
    codes = x.new_empty(rows, depth, dtype=torch.int8)
    found = scale is None
    if scale is None or zero is None:
        scale, zero = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)
    with torch.cuda.device_of(x):
        _encode[(rows,)](
            x, codes, scale, zero, depth, x.stride(0), scale, zero,
            **grid, FOUND=found, DEPTH=min(4096, max(32, triton.next_power_of_2(depth))), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, zero
