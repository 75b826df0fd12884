"""From one scale and zero point per channel to one per tensor (RepQ-ViT)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# A channel that is (nearly) constant has a scale of (nearly) 0, and folding divides by it.
SMALLEST_RELATIVE_SCALE = 1e-4


class Reparameterization(NamedTuple):
    r"""What :func:`per_tensor` found.

    Args:
        scale: :math:`\tilde s`, for the whole tensor.
        zero_point: :math:`\tilde z`, for the whole tensor.
        divisor: :math:`r_1` (C,): what the tensor is to be divided by.
        shift: :math:`s \odot r_2` (C,): what is to be added before.
    """

    scale: Tensor
    zero_point: Tensor
    divisor: Tensor
    shift: Tensor


def per_tensor(
    scale: Tensor, zero_point: Tensor, round_zero_point: bool = True, centre: Literal["mean", "median"] = "mean"
) -> Reparameterization:
    r"""Turn per-channel quantization parameters into per-tensor ones for :math:`\tilde X = (X + s \odot r_2) / r_1`.

    .. math::
        \tilde s = \text{mean}(s), \quad \tilde z = \lfloor \text{mean}(z) \rceil, \quad r_1 = s / \tilde s, \quad
        r_2 = z - \tilde z

    Then :math:`\tilde X / \tilde s + \tilde z = X / s + z`: the codes are the same. They are so for any
    :math:`\tilde s`, and what it multiplies :math:`W` by a range per output channel takes out again: only what is
    learned after the fold can tell one :math:`\tilde s` from another.

    Args:
        scale: :math:`s` (C,).
        zero_point: :math:`z` (C,).
        round_zero_point: whether :math:`\tilde z` is rounded; only then are the codes integers that equal the
            per-channel ones.
        centre: ``"median"`` takes the (lower) medians instead of the means: of all :math:`s_j` the one with the least
            mean absolute deviation from the others, which a few extreme channels do not move.

    >>> x, s, z = torch.randn(100, 3), torch.tensor([0.1, 0.2, 0.4]), torch.tensor([7.0, 8.0, 9.0])
    >>> scale, zero_point, divisor, shift = per_tensor(s, z)
    >>> new = (x + shift) / divisor
    >>> bool(((new / scale).round() + zero_point == (x / s).round() + z).float().mean() > 0.99)
    True
    """
    scale, zero_point = scale.double(), zero_point.double()
    floored = scale.clamp(min=SMALLEST_RELATIVE_SCALE * scale.mean())
    zero_point = torch.where(floored > scale, (zero_point * scale / floored).round(), zero_point)
    if centre == "median":
        whole_scale, whole_zero_point = floored.median(), zero_point.median()  # of an even number: the lower one
    else:
        whole_scale, whole_zero_point = floored.mean(), zero_point.mean()
    if round_zero_point:
        whole_zero_point = whole_zero_point.round()
    return Reparameterization(
        whole_scale, whole_zero_point, floored / whole_scale, floored * (zero_point - whole_zero_point)
    )
