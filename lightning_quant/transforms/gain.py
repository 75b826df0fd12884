"""Scale the channels of an activation so that what its error loses is what the weights' error gains (PTQ4ARVG)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.quantizers import RangeRule, Scheme, UniformQuantizer
from lightning_quant.transforms.smoothing import smoothing

__all__ = ["Gain", "gain_factors", "gain_projection", "symmetric_shift"]

SMALLEST, LARGEST = 1e-4, 1e4  # of a factor


class Gain(NamedTuple):
    """What :func:`gain_projection` found, for :func:`~lightning_quant.transforms.fold_pair`.

    Args:
        divisor: what the tensor is to be divided by (C,).
        shift: what is to be added before (C,).
    """

    divisor: Tensor
    shift: Tensor


def gain_factors(x_norm: Tensor, weight_error: Tensor, x_error: Tensor, weight_norm: Tensor, loudest: Tensor) -> Tensor:
    r"""How much each channel is divided by: the least of what both quantizers lose.

    .. math:: s_i = s_m \left( \frac{\|x_i\|^2 \, \|\Delta W_i\|^2}{\|\Delta x_i\|^2 \, \|Q(W)_i\|^2} \right)^{1/4}

    which is where :math:`a t^2 + b / t^2` is least, for :math:`t = s_i / s_m`,
    :math:`a = \|\Delta x_i\|^2 \|Q(W)_i\|^2` and :math:`b = \|x_i\|^2 \|\Delta W_i\|^2`. A channel without an error of
    its own has 1.

    Args:
        x_norm: :math:`\|x_i\|^2` (C,).
        weight_error: :math:`\|\Delta W_i\|^2` (C,).
        x_error: :math:`\|\Delta x_i\|^2` (C,), on the grid of the loudest channel.
        weight_norm: :math:`\|Q(W)_i\|^2` (C,).
        loudest: :math:`s_m`, of the channel whose range is the largest.

    >>> one = torch.ones(1)
    >>> gain_factors(16 * one, one, one, one, torch.tensor(3.0))
    tensor([6.])
    """
    lost = x_error * weight_norm
    factors = loudest * (x_norm * weight_error / lost.where(lost > 0, torch.ones_like(lost))).pow(0.25)
    return torch.where(lost > 0, factors, torch.ones_like(factors)).clamp(SMALLEST, LARGEST)


def symmetric_shift(x: Tensor, bits: int, rule: RangeRule) -> Tensor:
    r"""The middle of each channel's range, :math:`(2^{b-1} - 1 - z_i) \, \delta_i` (C,), to be taken off.

    Args:
        x: rows (n, C).
        bits: of the activations.
        rule: how the range of a channel is found.
    """
    quantizer = UniformQuantizer(Scheme("int", bits, symmetric=False, granularity="channel"), axis=-1)
    quantizer.fit(x, rule)
    middle: Tensor = (2 ** (bits - 1) - 1 - quantizer.zero_point) * quantizer.scale
    return middle


def gain_projection(x: Tensor, weights: Sequence[Tensor], bits: tuple[int, int], rule: RangeRule) -> Gain:
    r"""GPS: smooth the channels, take their middle off, and scale them by :func:`gain_factors`.

    .. math:: x' = \left( x / s^0 - m \right) / s

    where :math:`s^0` is SmoothQuant's with :math:`\alpha = 1/2`, m is :func:`symmetric_shift`, and
    :math:`s_m = \sqrt{\text{range}(x_m) / \text{range}(W_m)}`.

    Args:
        x: what the layers read (n, C).
        weights: of the layers that read it (out, C).
        bits: of weights and of activations.
        rule: how ranges are found.
    """
    x, weight = x.double(), torch.cat([weight.detach().double() for weight in weights])
    first = smoothing(x.amin(0), x.amax(0), [weight], 0.5, centre=False).divisor
    x, weight = x / first, weight * first
    shift = symmetric_shift(x, bits[1], rule).double()
    x = x - shift

    reach = x.amax(0) - x.amin(0)
    loud = int(reach.argmax())
    own = UniformQuantizer(Scheme("int", bits[1], symmetric=False))
    own.fit(x[:, loud], rule)
    rows = UniformQuantizer(Scheme("int", bits[0], symmetric=False, granularity="channel"), axis=0)
    rows.fit(weight, rule)
    rounded = rows(weight)
    column = weight[:, loud]
    loudest = (reach[loud] / (column.max() - column.min()).clamp(min=1e-12)).sqrt().clamp(SMALLEST, LARGEST)
    factors = gain_factors(
        x.square().sum(0),
        (weight - rounded).square().sum(0),
        (x - own(x)).square().sum(0),
        rounded.square().sum(0),
        loudest,
    )
    factors[loud] = loudest
    return Gain(first * factors, -first * shift)
