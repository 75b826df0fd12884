"""How far the weights of an input channel can grow before the range of an output channel would (DilateQuant)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dilation"]


def dilation(weight: Tensor, largest: float = 1e4) -> Tensor:
    r"""The largest multiples of unsaturated input channels that leave the range of every output channel as it is.

    .. math::
        M_j = \max(0, \max_i W_{ji}), \quad m_j = \min(0, \min_i W_{ji}), \qquad
        s_i = \min_j \begin{cases} M_j / W_{ji} & W_{ji} > 0 \\ m_j / W_{ji} & W_{ji} < 0 \end{cases}

    An input channel that attains a bound of some output channel is saturated and has :math:`s = 1`; every other one
    touches a bound after it was multiplied. All taps of a kernel count together. A channel of zeros keeps 1.

    Args:
        weight: (out, in, ...).
        largest: what :math:`s` is capped at.

    >>> dilation(torch.tensor([[4.0, 1.0, -1.0], [-2.0, -0.5, 1.0]]))
    tensor([1.0000, 4.0000, 1.0000])
    """
    taps = weight.detach().double().flatten(2) if weight.dim() > 2 else weight.detach().double().unsqueeze(2)
    highest, lowest = taps.amax(2).clamp(min=0), taps.amin(2).clamp(max=0)  # (out, in)
    top, bottom = highest.amax(1, keepdim=True), lowest.amin(1, keepdim=True)
    above = torch.where(highest > 0, top / highest, torch.inf).amin(0)
    below = torch.where(lowest < 0, bottom / lowest, torch.inf).amin(0)
    room = torch.minimum(above, below)
    room = torch.where(room.isinf(), 1.0, room).clamp(max=largest)
    # a little less, so that rounding to float32 carries no weight over the bound
    return torch.where(room > 1, (room * (1 - 2**-22)).clamp(min=1), 1.0).float()
