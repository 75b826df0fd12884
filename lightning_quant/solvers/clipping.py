"""Learn where the range of each channel ends, by what the linear layers behind it make of the error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.quantizers import straight_through

__all__ = ["clipping_error", "learn_clips"]

NEARLY_ALL = 0.98  # a sigmoid reaches 1 only at infinity, and hardly moves near it


def clipping_error(x: Tensor, lo: Tensor, hi: Tensor, steps: int, gram: Tensor) -> Tensor:
    r"""Mean of :math:`\|(x - \hat x) W^\top\|^2` over tokens, with a range for each channel.

    Args:
        x: activations (tokens, channels).
        lo: lower end of the range (channels,), not above 0.
        hi: upper end, not below 0.
        steps: steps of the grid between the two, 2^bits - 1.
        gram: :math:`W^\top W` of the layers that read ``x``, summed (channels, channels).
    """
    scale = ((hi - lo) / steps).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = _rounded(-lo / scale)
    rounded = (_rounded(x / scale) + zero_point).clamp(0, steps)
    error = x - (rounded - zero_point) * scale
    return ((error @ gram) * error).sum(-1).mean()


def learn_clips(
    x: Tensor,
    weights: Sequence[Tensor],
    lo: Tensor,
    hi: Tensor,
    bits: int,
    steps: int = 300,
    learning_rate: float = 5e-2,
    tokens: int = 1024,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Learn both ends of the range of every channel, as parts of the extremes.

    .. math:: hi_j = \sigma(a_j) \max_t x_{tj}, \quad lo_j = \sigma(b_j) \min_t x_{tj}, \quad
              \min_{a, b} \|x W^\top - \hat x W^\top\|^2

    by Adam with a cosine. The best of what was seen is returned, so the error on ``x`` is never above that of the
    start.

    Args:
        x: activations (tokens, channels).
        weights: of the linear layers that read them (out, channels); none weighs all channels alike.
        lo: where to start (channels,).
        hi: where to start.
        bits: of the grid.
        steps: how often to step; 0 returns the start.
        learning_rate: of Adam.
        tokens: how many random tokens a step takes.
        seed: of the tokens.

    Example:
        >>> x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
        >>> x[0, 2] = 40.0  # one outlier stretches the grid of its channel
        >>> lo, hi = learn_clips(x, [], x.amin(0), x.amax(0), bits=4)
        >>> bool(hi[2] < 38)
        True
    """
    x = x.detach().float()
    identity = torch.eye(x.shape[1], device=x.device)
    gram = sum((w.detach().float().t() @ w.detach().float() for w in weights), torch.zeros_like(identity))
    gram = gram if weights else identity
    top, bottom = x.amax(0).clamp(min=0), x.amin(0).clamp(max=0)
    levels = 2**bits - 1
    random = torch.Generator(x.device).manual_seed(seed)
    upper, lower = (_part(*ends).requires_grad_() for ends in ((hi, top), (lo, bottom)))
    optimizer = torch.optim.Adam([upper, lower], learning_rate)
    best = (lo.detach().clamp(max=0), hi.detach().clamp(min=0))
    least = clipping_error(x, *best, levels, gram)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(x), (min(tokens, len(x)),), generator=random, device=x.device)
        with torch.enable_grad():
            loss = clipping_error(x[rows], lower.sigmoid() * bottom, upper.sigmoid() * top, levels, gram)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step % 25 == 24 or step == steps - 1:
            ends = ((lower.sigmoid() * bottom).detach(), (upper.sigmoid() * top).detach())
            error = clipping_error(x, *ends, levels, gram)
            if error < least:
                best, least = ends, error
    return best


def _part(end: Tensor, extreme: Tensor) -> Tensor:
    """The logit of the part of the extreme at which an end stands."""
    part = torch.where(extreme == 0, 1.0, end / torch.where(extreme == 0, 1.0, extreme))
    return torch.logit(part.detach().clamp(0.01, NEARLY_ALL))


def _rounded(x: Tensor) -> Tensor:
    return straight_through(x, x.detach().round())
