"""A uniform quantizer whose scale is trained with the network: LSQ, and LSQ+ where the zero point is trained too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.quantizers.base import straight_through
from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.uniform import TINY, UniformQuantizer

__all__ = ["LearnedQuantizer", "scale_gradient"]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns ``x`` exactly, with its gradient multiplied by ``factor``.

    Args:
        x: Any tensor.
        factor: What the gradient is multiplied by.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> scale_gradient(x, 0.5).backward()
        >>> x.grad
        tensor(0.5000)
    """
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class LearnedQuantizer(UniformQuantizer):
    r"""Integers times a scale that is a Parameter (LSQ); with ``offset`` the zero point is one as well (LSQ+).

    With :math:`v = \lfloor x / s \rceil + z`, and rounding passed straight through, the gradients are

    .. math::
        \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
            \lfloor x / s \rceil - x / s & q_{min} \le v \le q_{max} \\
            q_{min} - z & v < q_{min} \\
            q_{max} - z & v > q_{max}
        \end{cases}, \qquad
        \frac{\partial \hat x}{\partial z} = g \cdot \begin{cases}
            0 & q_{min} \le v \le q_{max} \\ -s & \text{else}
        \end{cases}, \qquad g = \frac{1}{\sqrt{N q_{max}}}

    where :math:`N` is the number of weights that share the scale, or of activations of one sample that do.
    :math:`\partial \hat x / \partial x` is left alone.

    The Parameters have their shape from the beginning, so that optimizers and DDP can hold them before anything is
    calibrated. Until then the quantizer hands on floats, and its state dict has the empty tensors of an uncalibrated
    :class:`UniformQuantizer`: the state dicts of the two are interchangeable throughout.

    The scale is positive whatever an optimizer makes of it, and float32 whatever the model is cast to. The zero point
    of LSQ+ is a real number, so there are no integer codes until it is rounded.

    Args:
        scheme: A static ``intN`` or ``uintN`` format; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.
        shape: Shape of the scale: ``()``, ``(channels,)`` or ``(out, groups)``.
        offset: Whether the zero point is learned.

    Raises:
        ValueError: If the format is dynamic, which leaves nothing to learn, or an offset is asked of a symmetric one.

    Example:
        >>> quantizer = LearnedQuantizer("uint2_asym")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(1.5))
        >>> quantizer(torch.tensor([[0.2, 0.3, 9.0]])).sum().backward()
        >>> quantizer.scale.grad  # ((0 - 0.4) + (1 - 0.6) + 3) / sqrt(3 * 3)
        tensor(1.)
    """

    def __init__(
        self, scheme: Scheme | str, axis: int | None = None, shape: tuple[int, ...] = (), offset: bool = False
    ) -> None:
        super().__init__(scheme, axis)
        if self.scheme.dynamic:
            raise ValueError(f'"{self.scheme}" finds its scale anew for every tensor; use a static format to learn it.')
        if offset and self.scheme.symmetric:
            raise ValueError(f'"{self.scheme}" has its zero point at 0; use an asymmetric format to learn an offset.')
        del self.scale, self.zero_point
        self.scale = nn.Parameter(torch.ones(shape))
        if offset:
            self.zero_point = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("zero_point", torch.zeros(shape))
        self._calibrated = False

    @classmethod
    def of(cls, quantizer: UniformQuantizer, offset: bool = False) -> LearnedQuantizer:
        """A learned twin of a calibrated quantizer, with the same state.

        Args:
            quantizer: What to start from; left alone.
            offset: Whether the zero point is learned.
        """
        learned = cls(quantizer.scheme, quantizer.axis, tuple(quantizer.scale.shape), offset)
        learned.to(quantizer.scale.device).train(quantizer.training)
        learned.load_state_dict(quantizer.state_dict())
        return learned

    def settled(self) -> UniformQuantizer:
        """A plain twin with the same state, which is no longer learned."""
        plain = UniformQuantizer(self.scheme, self.axis)
        plain.to(self.scale.device).train(self.training)
        plain.load_state_dict(self.state_dict())
        return plain

    @property
    def calibrated(self) -> bool:
        """Whether forward quantizes."""
        return self._calibrated

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` rounded to the format, or ``x`` itself while observed or uncalibrated."""
        if self.calibrated or self.observer is not None or not torch.is_grad_enabled():
            return super().forward(x)
        # DDP refuses a parameter that has no part in the loss: this one has, and its gradient is 0.
        for parameter in self.parameters():
            x = x + 0 * parameter.sum()
        return x

    def freeze(self, lo: Tensor, hi: Tensor) -> None:
        """Sets the state from a known range; see :meth:`Quantizer.freeze`."""
        super().freeze(lo, hi)
        self._calibrated = True

    def reset(self) -> None:
        """Forgets the state, so that the quantizer is uncalibrated; the Parameters stay."""
        self._calibrated = False

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Turns a scale that an optimizer pushed below 0 around; to be called after each optimizer step."""
        self.scale.abs_().clamp_(min=TINY)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The state in the shape that broadcasts against ``view``, with the gradients of LSQ."""
        samples = 1 if self.axis == 0 or not view.dim() else view.shape[0]
        sharing = max(1.0, view.numel() / max(1, samples * self.scale.numel()))
        factor = 1 / math.sqrt(sharing * self.scheme.qmax)
        scale, zero_point = super().state_for(view)
        scale = straight_through(scale, scale.detach().clamp(min=TINY))
        learned_offset = isinstance(self.zero_point, nn.Parameter)
        return scale_gradient(scale, factor), scale_gradient(zero_point, factor) if learned_offset else zero_point

    def _store(self, name: str, value: Tensor) -> None:
        own = getattr(self, name)  # kept as an object, and where it is: optimizers, DDP and averages refer to it
        if own.shape == value.shape and own.dtype == value.dtype:
            own.data.copy_(value)
        else:
            own.data = value

    # ------------------------------------------------------------------ nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantizer:
        before = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(old.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.calibrated:
            for name in self.state_names:
                destination[prefix + name] = torch.empty(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        calibrated = f"{prefix}scale" in state_dict and state_dict[f"{prefix}scale"].numel() > 0
        if not calibrated:  # a float or an uncalibrated one: nothing is missing, ours stays as it is
            state_dict = {**state_dict, **{prefix + name: getattr(self, name).detach() for name in self.state_names}}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._calibrated = calibrated
