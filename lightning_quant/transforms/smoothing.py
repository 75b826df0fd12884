"""Move the outliers of activation channels into the weights behind them, after centring the channels (MPTQ-ViT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Smoothing", "smoothing"]

# Folding divides by it; a channel that is constant would give 0.
SMALLEST_DIVISOR = 1e-5


class Smoothing(NamedTuple):
    """What :func:`smoothing` found, for :func:`~lightning_quant.transforms.fold_pair`.

    Args:
        divisor: :math:`s` (C,): what the tensor is to be divided by.
        shift: :math:`-b` (C,): what is to be added before.
    """

    divisor: Tensor
    shift: Tensor


def smoothing(lo: Tensor, hi: Tensor, weights: Sequence[Tensor], alpha: float = 0.5, centre: bool = True) -> Smoothing:
    r"""SmoothQuant with bias: how each channel is to be scaled and shifted for :math:`X' = (X - b) / s`.

    .. math::
        b_j = \frac{\max X_j + \min X_j}{2}, \qquad
        s_j = \frac{\max |X_j - b_j|^\alpha}{\max |W_{:,j}|^{1 - \alpha}}

    Then the extremes of every channel of :math:`X'` are as far above 0 as below it, so a symmetric grid wastes nothing.

    Args:
        lo: the least that a channel was (C,).
        hi: the most.
        weights: of the linear layers that read it (out, C).
        alpha: how much of the outliers goes into the weights, 0 to 1.
        centre: whether channels are centred; without, :math:`b = 0` and it is SmoothQuant.

    >>> x, w = torch.tensor([[0.0, -1.0], [8.0, 1.0]]), torch.tensor([[1.0, 4.0]])
    >>> divisor, shift = smoothing(x.amin(0), x.amax(0), [w])
    >>> ((x + shift) / divisor).float()
    tensor([[-2., -2.],
            [ 2.,  2.]])
    """
    lo, hi = lo.double(), hi.double()
    middle = (lo + hi) / 2 if centre else torch.zeros_like(lo)
    reach = torch.maximum((hi - middle).abs(), (lo - middle).abs())
    loudest = torch.stack([weight.detach().double().abs().amax(0) for weight in weights]).amax(0)
    tiny = torch.finfo(torch.float32).tiny
    divisor = reach.clamp(min=tiny).pow(alpha) / loudest.clamp(min=tiny).pow(1 - alpha)
    # A weight column of zeros asks for an infinite divisor; any does, since nobody reads the channel.
    divisor = torch.where(loudest > 0, divisor, reach.clamp(min=tiny))
    return Smoothing(divisor.clamp(min=SMALLEST_DIVISOR), -middle)
