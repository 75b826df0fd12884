"""A step width for every element, between that of its token and that of its channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["CrossQuantizer", "kernel_share"]

TINY = torch.finfo(torch.float32).tiny


def kernel_share(x: Tensor, step: Tensor) -> float:
    """Share of the numbers that are rounded to 0, the *quantization kernel*: those smaller than half a step.

    Args:
        x: any tensor.
        step: the width of a step, which broadcasts against it.

    >>> kernel_share(torch.tensor([0.1, -0.6, 2.0, 0.0]), torch.tensor(1.0))
    0.5
    """
    return float((x.abs() < step / 2).double().mean())


class CrossQuantizer(UniformQuantizer):
    r"""Symmetric integers whose step mixes the reach of the token with that of the channel.

    .. math:: \Delta_{ij} = \frac{t_i^\alpha \, c_j^{1 - \alpha}}{q_{max}}, \qquad t_i = \max_j |x_{ij}|

    where :math:`c_j` is the largest magnitude that calibration saw in channel j; the state is :math:`c^{1 - \alpha}`.
    With :math:`\alpha = 1` a token has one step, with :math:`\alpha = 0` a channel has. Where calibration saw the
    largest magnitudes nothing is clipped.

    The factor of the channel can move into the weight that reads it, :math:`\sum_j q_{ij} c_j^{1 - \alpha} w_{oj}`, so
    that the product is one of integers, and the factor of the token in front of it.

    Args:
        scheme: An ``intN_sym_token`` format; see :class:`Scheme`.
        axis: The channel axis, which has to be the last one.
        alpha: How much of the step is the token's, 0 to 1.

    Raises:
        ValueError: If the format is none of these, or the channels are not the last axis.

    Example:
        >>> quantizer = CrossQuantizer("int8_sym_token", alpha=0.0)
        >>> quantizer.set_reach(torch.tensor([127.0, 12.7]))
        >>> quantizer(torch.tensor([[3.3, 3.3]]))
        tensor([[3.0000, 3.3000]])
    """

    state_names: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, scheme: Scheme | str, axis: int | None = -1, alpha: float = 0.15) -> None:
        super().__init__(scheme, axis)
        if self.scheme.granularity != "token" or not self.scheme.symmetric or not self.scheme.signed or axis != -1:
            raise ValueError(
                f'"{self.scheme}" with axis={axis} has no cross step: it needs signed, symmetric integers with a scale '
                f'per token, like "int8_sym_token", and channels on the last axis (axis=-1).'
            )
        self.alpha = alpha

    @property
    def calibrated(self) -> bool:
        """Whether the reach of the channels is known."""
        return self.scale.numel() > 0

    @torch.no_grad()
    def set_reach(self, reach: Tensor) -> None:
        """Sets the largest magnitude of every channel, (C,); that of one that was always 0 is the others' median."""
        reach = reach.detach().float()
        alive = reach[reach > 0]
        usual = alive.median() if len(alive) else reach.new_ones(())
        self.scale = torch.where(reach > 0, reach, usual).pow(1 - self.alpha).to(self.scale.device)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The step of every element."""
        token = view.detach().abs().amax(-1, keepdim=True).clamp(min=TINY).pow(self.alpha)
        step = (token * self.scale.to(view.dtype) / self.scheme.qmax).clamp(min=TINY)
        return step, torch.zeros((), dtype=view.dtype, device=view.device)

    def extra_repr(self) -> str:
        """The format and alpha."""
        return f"{self.scheme}, alpha={self.alpha}" + ("" if self.calibrated else ", uncalibrated")
