"""The levels of a quantizer as marks on a ruler, for looking at how data lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer
from lightning_quant.quantizers.floating import FloatQuantizer, float_grid
from lightning_quant.quantizers.logarithmic import STEPS_PER_OCTAVE, LogQuantizer
from lightning_quant.quantizers.noisy import NoisyQuantizer
from lightning_quant.quantizers.tangent import TangentQuantizer
from lightning_quant.quantizers.twin import TwinQuantizer
from lightning_quant.quantizers.twin_log import TwinLogQuantizer

__all__ = ["from_steps", "levels", "to_steps"]


def levels(quantizer: Quantizer) -> Tensor:
    r"""Returns where the levels of a format are on its own ruler, in ascending order.

    The ruler is the same for all elements, however many scales there are: the integers :math:`q` of a uniform grid,
    the values of a float format, :math:`n \log_2 (x / d)` of a logarithmic one (whose 0 has no place on it), and the
    codes of a tangent one.

    Args:
        quantizer: Calibrated or not.

    Example:
        >>> from lightning_quant.quantizers import build_quantizer
        >>> levels(build_quantizer("int2_sym"))
        tensor([-2., -1.,  0.,  1.])
        >>> levels(build_quantizer("log2_2"))
        tensor([-3., -2., -1.,  0.])
    """
    scheme = quantizer.scheme
    if isinstance(quantizer, FloatQuantizer):
        return float_grid(quantizer.exponent, quantizer.mantissa)
    if isinstance(quantizer, LogQuantizer):
        return torch.arange(1 - 2**scheme.bits, 1).float()
    if isinstance(quantizer, TangentQuantizer):
        return torch.arange(quantizer.last + 1).float()
    if isinstance(quantizer, TwinLogQuantizer):
        return torch.arange(2**scheme.bits).float() - quantizer.last - 0.5
    if isinstance(quantizer, TwinQuantizer):
        return torch.arange(2**scheme.bits).float() + quantizer.lowest
    return torch.arange(scheme.qmin, scheme.qmax + 1).float()


@torch.no_grad()
def to_steps(quantizer: Quantizer, x: Tensor) -> Tensor:
    r"""Returns where ``x`` lies on the ruler of :func:`levels`, before it is rounded.

    That is :math:`x / s + z` for a uniform format (with its noise added to x), :math:`x / s` for a float one and
    :math:`n \log_2 (x / d)` for a logarithmic one: minus infinity for 0, NaN below. Beyond its levels the ruler of a
    tangent format goes on in a straight line.

    Args:
        quantizer: A calibrated or dynamic quantizer.
        x: A tensor as the quantizer takes it.

    Example:
        >>> from lightning_quant.quantizers import build_quantizer
        >>> quantizer = build_quantizer("int4_asym_channel", axis=0)
        >>> quantizer.freeze(torch.tensor([0.0, -1.0]), torch.tensor([1.5, 14.0]))
        >>> to_steps(quantizer, torch.tensor([[0.25, 9.0], [0.0, 14.0]]))
        tensor([[ 2.5000, 90.0000],
                [ 1.0000, 15.0000]])
    """
    view = quantizer._view(x.to(torch.promote_types(x.dtype, torch.float32)))
    scale, *others = quantizer.state_for(view)
    if isinstance(quantizer, TwinLogQuantizer):
        return quantizer._unview(quantizer.to_ruler(view, scale, *others), x.shape)
    if isinstance(quantizer, NoisyQuantizer):
        view = view + others[1]
    steps = view / scale
    if isinstance(quantizer, LogQuantizer):
        steps = steps.log2_().mul_(STEPS_PER_OCTAVE[quantizer.base])
    elif isinstance(quantizer, TangentQuantizer):
        inside = steps.clamp(0, 1)
        steps = (quantizer.to_ruler(inside, others[0]) + steps - inside) * quantizer.last
    elif isinstance(quantizer, TwinQuantizer):
        steps = quantizer.to_ruler(steps, others[0])
    elif others:
        steps = steps + others[0]
    return quantizer._unview(steps, x.shape)


@torch.no_grad()
def from_steps(quantizer: Quantizer, steps: Tensor) -> Tensor | None:
    """Returns which values places on the ruler stand for, or None if that differs from element to element.

    Args:
        quantizer: A calibrated quantizer.
        steps: Places on the ruler of :func:`levels`.

    Example:
        >>> from lightning_quant.quantizers import build_quantizer
        >>> quantizer = build_quantizer("int4_asym")
        >>> quantizer.freeze(torch.tensor(-1.0), torch.tensor(14.0))
        >>> from_steps(quantizer, torch.tensor([0.0, 15.0]))
        tensor([-1., 14.])
    """
    if quantizer.scheme.dynamic or any(state.numel() != 1 for state in _state(quantizer)):
        return None
    scale, *others = (state.detach().reshape(()).to(steps.device) for state in _state(quantizer))
    if isinstance(quantizer, LogQuantizer):
        return torch.exp2(steps / STEPS_PER_OCTAVE[quantizer.base]) * scale
    if isinstance(quantizer, TangentQuantizer):
        places = steps / quantizer.last
        inside = places.clamp(0, 1)
        return (quantizer.from_ruler(inside, others[0]) + places - inside) * scale
    if isinstance(quantizer, TwinLogQuantizer):
        return quantizer.from_ruler(steps, scale, *others)
    if isinstance(quantizer, TwinQuantizer):
        return quantizer.from_ruler(steps, others[0]) * scale
    return (steps - others[0] if others else steps) * scale


def _state(quantizer: Quantizer) -> list[Tensor]:
    return [getattr(quantizer, name) for name in quantizer.state_names]
