"""Consecutive elements that share a scale."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["in_groups", "out_of_groups"]


def in_groups(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Cut the last axis into groups; where the size does not divide it, the last group is shorter and is filled up.

    Zeros are right for what looks for ranges: every range holds 0, which a format with a zero point has exactly.

    Args:
        x: (..., elements).
        size: elements in a group.
        fill: what stands in the places that are left over.

    Returns:
        (..., groups, size).

    >>> in_groups(torch.tensor([1.0, 2.0, 3.0]), size=2)
    tensor([[1., 2.],
            [3., 0.]])
    """
    lacking = -x.shape[-1] % size
    filled = F.pad(x, (0, lacking), value=fill) if lacking else x
    groups: Tensor = filled.unflatten(-1, (-1, size))
    return groups


def out_of_groups(groups: Tensor, elements: int) -> Tensor:
    """The inverse of :func:`in_groups`, which forgets what was filled in.

    Args:
        groups: (..., groups, size).
        elements: how many there were.

    Returns:
        (..., elements).
    """
    return groups.flatten(-2)[..., :elements]
