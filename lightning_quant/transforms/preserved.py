"""Whether a model still computes what it did before its weights were rewritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["require_same"]


def require_same(before: Any, after: Any, cure: str) -> None:
    """Refuse a rewriting that was to preserve the function and did not.

    Args:
        before: what the model returned for a batch.
        after: what it returns for the same batch now.
        cure: what to do about it, for the error.

    Raises:
        ValueError: if a float tensor differs by more than rounding can explain.

    >>> require_same(torch.ones(2), torch.tensor([1.0, 1.2]), "set skip=")
    Traceback (most recent call last):
        ...
    ValueError: the model computes something else now: an output of up to 1 is off by 0.2; set skip=
    """
    for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if not isinstance(old, Tensor) or not old.is_floating_point() or old.numel() == 0:
            continue
        tolerance = 1e-3 if old.dtype in (torch.float32, torch.float64) else 5e-2
        difference, size = (old - new).abs().max(), old.abs().max()
        if not bool(difference <= tolerance * size):
            raise ValueError(
                f"the model computes something else now: an output of up to {size:.3g} is off by {difference:.3g}; "
                f"{cure}"
            )
