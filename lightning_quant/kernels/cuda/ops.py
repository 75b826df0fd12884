"""The products as operators of torch, which a network that is compiled calls: no compiler has to look into them.

Called one by one they would cost more time than a small product takes, so only compiled networks do.
"""

# torch reads the types of an operator's arguments where it is defined, so they are not postponed here.
from importlib import import_module

import torch
from torch import Tensor

from lightning_quant.kernels.cuda.operands import Int4Weight, Int8Inputs, Int8Weight


def multiply_int8(x: Tensor, weight: Int8Weight, inputs: Int8Inputs, dtype: torch.dtype) -> Tensor:
    """The int8 product, by Triton: (rows, in) -> (rows, out)."""
    if torch.compiler.is_compiling():
        called: Tensor = _int8_product(
            x, weight.codes, weight.scale, weight.totals, weight.offset, weight.bias,
            inputs.bits, inputs.grid, inputs.scale, inputs.zero, inputs.wide, dtype,
        )  # fmt: skip
        return called
    # Imported when it first serves: triton may be absent, and is slow to import.
    out: Tensor = import_module(f"{__package__}.int8_triton").multiply(x, weight, inputs, dtype)
    return out


def multiply_int4(x: Tensor, weight: Int4Weight) -> Tensor:
    """The int4 product, by Triton: (rows, in) -> (rows, out)."""
    if torch.compiler.is_compiling():
        zeros, zero = (weight.zero, 0) if isinstance(weight.zero, Tensor) else (None, weight.zero)
        called: Tensor = _int4_product(
            x, weight.packed, weight.scale, zeros, zero, weight.inputs, weight.group, weight.bias
        )
        return called
    out: Tensor = import_module(f"{__package__}.int4_triton").multiply(x, weight)
    return out


@torch.library.custom_op("lightning_quant::int8_product", mutates_args=())
def _int8_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    totals: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    grid: str,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    wide: bool,
    dtype: torch.dtype,
) -> Tensor:
    weight = Int8Weight(codes, scale, totals, offset, bias)
    return multiply_int8(x, weight, Int8Inputs(bits, grid, input_scale, input_zero, wide), dtype)  # type: ignore[arg-type]


@_int8_product.register_fake
def _(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    dtype = rest[-1]
    assert isinstance(dtype, torch.dtype)
    return x.new_empty(len(x), len(codes), dtype=dtype)


@torch.library.custom_op("lightning_quant::int4_product", mutates_args=())
def _int4_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    zero: int,
    inputs: int,
    group: int,
    bias: Tensor | None,
) -> Tensor:
    return multiply_int4(x, Int4Weight(packed, scale, zero if zeros is None else zeros, inputs, group, bias))


@_int4_product.register_fake
def _(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(len(x), len(packed))
