"""What products of few bits multiply, and their slow and obvious definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.cuda.nibbles import from_nibbles

Activation = Literal["none", "gelu", "relu", "silu"]
Grid = Literal["symmetric", "asymmetric", "unsigned"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Int8Weight:
    """A weight of at most 8 bits.

    Args:
        codes: signed integers, (out, in) int8.
        scale: of each output, (out,) float32.
        totals: sums of ``codes - offset`` over the inputs, (out,) int32.
        offset: the code that stands for 0 in each output, (out,) int32; ``None`` where it is 0 everywhere.
        bias: (out,) float32, or ``None``.
    """

    codes: Tensor
    scale: Tensor
    totals: Tensor
    offset: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Int8Inputs:
    """How activations become codes of at most 8 bits, counted from the middle one: -128 to 127.

    Args:
        bits: of a code.
        grid: ``"symmetric"``, ``"asymmetric"``, or ``"unsigned"``: symmetric, with codes for what is not negative only.
        scale: of the whole tensor, () float32; ``None``: of each row, found when it is there.
        zero: the code that stands for 0, () int32; ``None`` with the scale.
        wide: whether the sum of the products may have more than 32 bits, once the zero points are taken out.
    """

    bits: int
    grid: Grid
    scale: Tensor | None = None
    zero: Tensor | None = None
    wide: bool = False

    @property
    def half(self) -> int:
        """How far the lowest code is from the middle one."""
        return int(2 ** (self.bits - 1))


@dataclass(frozen=True)
class Int4Weight:
    """A weight of at most 4 bits, two codes in a byte.

    Args:
        packed: (out, bytes) uint8, as :func:`~lightning_quant.kernels.cuda.nibbles.to_nibbles` makes them.
        scale: of each group of inputs, (groups, out) float32.
        zero: the code that stands for 0 in each group, (groups, out); one for all of them is a number.
        inputs: how many there are.
        group: how many inputs share a scale, a multiple of 32; the last group may have fewer.
        bias: (out,) float32, or ``None``.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | int
    inputs: int
    group: int
    bias: Tensor | None = None


def naive_int8(x: Tensor, weight: Int8Weight, inputs: Int8Inputs, activation: Activation = "none") -> Tensor:
    r"""What the int8 product answers, in float64.

    .. math:: y_{mn} = a\big(s_m s_n \sum_k (c_{mk} - z_m)(w_{nk} - o_n) + b_n\big)

    Args:
        x: (rows, in).
        weight: the other operand.
        inputs: how ``x`` becomes codes.
        activation: behind the bias.
    """
    steps, scale = steps_of(x, inputs)
    y = (naive_integers(steps, weight) * scale * weight.scale).double()
    y = y if weight.bias is None else y + weight.bias
    return ACTIVATIONS[activation](y)


def naive_integers(steps: Tensor, weight: Int8Weight) -> Tensor:
    """The sums of products of integers, in int64: (rows, in), (out, in) -> (rows, out)."""
    offset = 0 if weight.offset is None else weight.offset.long()[:, None]
    return steps.long() @ (weight.codes.long() - offset).T


def steps_of(x: Tensor, inputs: Int8Inputs) -> tuple[Tensor, Tensor]:
    """How many steps of its scale each activation is from 0, as int64, and the scale: (rows, in), () or (rows, 1)."""
    x, half = x.float(), inputs.half
    if inputs.scale is not None and inputs.zero is not None:
        scale, zero = inputs.scale, inputs.zero
    else:
        lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        tiny, zero = torch.finfo(torch.float32).tiny, torch.zeros_like(lo)
        if inputs.grid == "asymmetric":
            scale = ((hi / 2 - lo / 2) / (2 * half - 1) * 2).clamp(min=tiny)
            zero = (-lo / scale).round() - half
        elif inputs.grid == "symmetric":
            scale = (torch.maximum(-lo, hi) / (half - 1)).clamp(min=tiny)
        else:
            scale, zero = (hi / (2 * half - 1)).clamp(min=tiny), zero - half
    codes = (torch.round(x * scale.reciprocal()) + zero).clamp(-half, half - 1)
    return (codes - zero).long(), scale


def naive_int4(x: Tensor, weight: Int4Weight, activation: Activation = "none") -> Tensor:
    r"""What the int4 product answers, in float64.

    .. math:: y_{mn} = a(\sum_k x_{mk} \, s_{ng} (w_{nk} - o_{ng}) + b_n) \qquad g = \lfloor k / G \rfloor

    Args:
        x: (rows, in).
        weight: the other operand; on its grid it is rounded to the precision of ``x``, as the layer does.
        activation: behind the bias.
    """
    codes = from_nibbles(weight.packed, weight.inputs)
    group = torch.arange(weight.inputs, device=x.device) // weight.group
    zero = weight.zero if isinstance(weight.zero, int) else weight.zero.float().T[:, group]
    rows = ((codes.float() - zero) * weight.scale.T[:, group]).to(x.dtype)
    y = x.double() @ rows.double().T
    y = y if weight.bias is None else y + weight.bias
    return ACTIVATIONS[activation](y)
