"""Limit the ranges of outlier channels to what is usual among the channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.solvers.clipping import clipping_error

__all__ = ["best_clip", "clip_outlier_channels"]


def clip_outlier_channels(lo: Tensor, hi: Tensor, k: float) -> tuple[Tensor, Tensor]:
    r"""No upper end above :math:`\mu + k \sigma` of the upper ends of all channels; the lower ends likewise.

    Args:
        lo: lower end of the range of each channel (channels,), not above 0.
        hi: upper end, not below 0.
        k: infinity changes nothing.

    >>> lo, hi = clip_outlier_channels(torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 11.0]), k=1.0)
    >>> [round(x, 2) for x in hi.tolist()]
    [1.0, 1.0, 1.0, 1.0, 7.0]
    """
    if math.isinf(k):
        return lo, hi
    most = hi.mean() + k * hi.std(correction=0)
    least = lo.mean() - k * lo.std(correction=0)
    return torch.maximum(lo, least.clamp(max=0)), torch.minimum(hi, most.clamp(min=0))


def best_clip(
    x: Tensor, weights: Sequence[Tensor], lo: Tensor, hi: Tensor, bits: int, candidates: Sequence[float]
) -> float:
    r"""The k of least :math:`\|x W^\top - \hat x W^\top\|^2`; of equal ones the largest.

    Args:
        x: activations (tokens, channels).
        weights: of the linear layers that read them (out, channels).
        lo: lower end of the range of each channel (channels,).
        hi: upper end.
        bits: of the grid.
        candidates: what k may be.
    """
    gram = sum((w.float().t() @ w.float() for w in weights), torch.zeros(x.shape[1], x.shape[1], device=x.device))

    def error(k: float) -> float:
        return float(clipping_error(x, *clip_outlier_channels(lo, hi, k), 2**bits - 1, gram))

    return min(sorted(candidates, reverse=True), key=error)
