"""The uniform (affine) grid: integers times a scale, shifted by a zero point."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer

__all__ = ["UniformQuantizer", "dequantize", "fake_quantize", "quantize", "round_to_integers", "uniform_state"]

# The smallest normal float32: its reciprocal is finite, so a range of 0 never divides by zero.
TINY = torch.finfo(torch.float32).tiny
# Beyond this size a float32 no longer holds every integer plus a code, so a zero point could not be exact.
LARGEST_ZERO_POINT = 2**22


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    r"""Rounds ``x`` to the nearest value of a uniform grid.

    .. math:: \hat x = s \cdot \mathrm{clamp}(\mathrm{round}(x / s),\; q_{min} - z,\; q_{max} - z)

    where :math:`s` is the scale and :math:`z` the zero point. For an integer z this is the usual "round, add z, clamp,
    subtract z" in fewer passes; z may lie outside the code range or be fractional. Ties round to even, and
    :math:`x / s` is a product with the float32 reciprocal, which makes the result equal to ``torch.fake_quantize_*``
    bit for bit (but NaN stays NaN). Gradients pass straight through inside the range and are 0 outside; a scale or zero
    point that requires grad gets the gradient of learned step size quantization (LSQ).

    Args:
        x: Floats.
        scale: Positive step width, broadcastable against ``x``.
        zero_point: The integer that stands for 0, broadcastable against ``x``.
        qmin: Lowest integer.
        qmax: Highest integer.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(0.0), 0, 15)
        tensor([0.0000, 0.5000, 7.5000])
    """
    scale, zero_point = scale.to(x.dtype), zero_point.to(x.dtype)
    learned = scale.requires_grad or zero_point.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or learned):
        return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, learned)  # type: ignore[no-any-return, no-untyped-call]
    return round_to_integers(x, scale, zero_point, qmin, qmax).mul_(scale)


def round_to_integers(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    r"""The integers, as floats, that :func:`fake_quantize` multiplies by the scale: 0 where ``x`` is 0.

    Example:
        >>> round_to_integers(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(0.0), 0, 15)
        tensor([ 0.,  1., 15.])
    """
    steps = (x * scale.reciprocal()).round_()
    return _clip_(steps, qmin - zero_point, qmax - zero_point)


def _clip_(steps: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    # maximum and minimum take tensor bounds several times faster than clamp does, and keep NaN.
    if torch.compiler.is_compiling():  # no out= inside a graph, and the compiler fuses the two anyway
        return torch.minimum(torch.maximum(steps, lowest), highest)
    torch.maximum(steps, lowest, out=steps)
    return torch.minimum(steps, highest, out=steps)


class _FakeQuantize(torch.autograd.Function):
    """Keeps one mask for the backward pass; the floats too only if the scale or the zero point is learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, learned: bool) -> Tensor:
        steps = (x * scale.reciprocal()).round_()
        clipped = _clip_(steps.clone(), qmin - zero_point, qmax - zero_point)
        inside = steps == clipped
        ctx.save_for_backward(inside, *((x, scale, zero_point, clipped) if learned else ()))
        return clipped * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, *saved = ctx.saved_tensors
        grad_x = grads[0] * inside
        if not saved:
            return grad_x, None, None, None, None, None
        x, scale, zero_point, clipped = saved
        # Straight through, x^ = s * (x / s + rounding error) inside and s * (an end of the grid - z) outside.
        grad_scale = (grads[0] * clipped - grad_x * x * scale.reciprocal()).sum_to_size(scale.shape)
        grad_zero_point = None
        if ctx.needs_input_grad[2]:
            grad_zero_point = ((grad_x - grads[0]) * scale).sum_to_size(zero_point.shape)
        return grad_x, grad_scale, grad_zero_point, None, None, None


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Returns the int32 integers of ``x`` on the grid, from ``qmin`` to ``qmax``.

    Args:
        x: Floats without NaN.
        scale: Positive step width, broadcastable against ``x``.
        zero_point: The integer that stands for 0, broadcastable against ``x``.
        qmin: Lowest integer.
        qmax: Highest integer.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(2.0), 0, 15)
        tensor([ 0,  3, 15], dtype=torch.int32)
    """
    steps = (x * scale.reciprocal()).round_()
    return (torch.clamp(steps, qmin - zero_point, qmax - zero_point) + zero_point).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the floats ``(q - zero_point) * scale`` that integers stand for.

    Example:
        >>> dequantize(torch.tensor([0, 3, 15]), torch.tensor(0.5), torch.tensor(2.0))
        tensor([-1.0000,  0.5000,  6.5000])
    """
    return q.to(scale.dtype, copy=True).sub_(zero_point).mul_(scale)


def uniform_state(lo: Tensor, hi: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    r"""Returns the scale and the zero point of the grid that covers a range.

    Asymmetric: :math:`s = (hi - lo) / (q_{max} - q_{min})`, :math:`z = q_{min} + \mathrm{round}(-lo / s)`. Symmetric:
    :math:`s = \max(|lo|, |hi|) / q_{max}` if the grid has negative integers, :math:`s = hi / q_{max}` if it starts at
    0; :math:`z = 0`.

    A scale is never below the smallest normal float32. An asymmetric range so narrow and so far from 0 that its zero
    point would not be an exact float32 integer (a constant channel) is widened to include 0.

    Args:
        lo: Lower ends.
        hi: Upper ends, in the same shape.
        qmin: Lowest integer.
        qmax: Highest integer.
        symmetric: Whether the zero point is 0.

    Example:
        >>> uniform_state(torch.tensor(-1.0), torch.tensor(14.0), 0, 15, symmetric=False)
        (tensor(1.), tensor(1.))
    """
    if symmetric:
        reach = torch.maximum(lo.abs(), hi.abs()) if qmin < 0 else hi
        scale = (reach / qmax).clamp(min=TINY)
        return scale, torch.zeros_like(scale)
    steps = qmax - qmin
    # Halves first: hi - lo overflows for ranges beyond half of float32.
    scale = ((hi / 2 - lo / 2) / steps * 2).clamp(min=TINY)
    far = (lo / scale).abs() > LARGEST_ZERO_POINT
    lo, hi = torch.where(far, lo.clamp(max=0), lo), torch.where(far, hi.clamp(min=0), hi)
    scale = torch.where(far, ((hi / 2 - lo / 2) / steps * 2).clamp(min=TINY), scale)
    return scale, qmin + torch.round(-lo / scale)


class UniformQuantizer(Quantizer):
    r"""Integers times a scale: ``intN`` and ``uintN``.

    Codes are the integers counted from the lowest one, ``code = q - qmin``: a symmetric signed int8 weight of 0 has
    code 128. The zero point is an integer after :meth:`freeze` and :meth:`fit`; a fractional one may be set by hand,
    but then there are no integer codes.

    Args:
        scheme: An ``intN`` or ``uintN`` format; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.

    Example:
        >>> quantizer = UniformQuantizer("uint4_asym")
        >>> quantizer.freeze(torch.tensor(-1.0), torch.tensor(14.0))
        >>> quantizer(torch.tensor([-3.0, 0.2, 6.7]))
        tensor([-1.,  0.,  7.])
        >>> quantizer.encode(torch.tensor([-3.0, 0.2, 6.7]))
        tensor([0, 1, 8], dtype=torch.int32)
    """

    kind: ClassVar[str] = "int"
    state_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    zero_point: Tensor

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point; see :func:`uniform_state`."""
        return uniform_state(lo, hi, self.scheme.qmin, self.scheme.qmax, bool(self.scheme.symmetric))

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the grid; see :func:`fake_quantize`."""
        scale, zero_point = state
        return fake_quantize(x, scale, zero_point, self.scheme.qmin, self.scheme.qmax)

    def integers(self, x: Tensor) -> Tensor:
        """The integers of ``x``, 0 where it is 0, as floats; see :func:`round_to_integers`."""
        view = self._view(x)
        scale, zero_point = self.state_for(view)
        return self._unview(round_to_integers(view, scale, zero_point, self.scheme.qmin, self.scheme.qmax), x.shape)

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns the integers of ``x``, counted from the lowest one."""
        scale, zero_point = state
        if not torch.equal(zero_point, zero_point.round()):
            raise ValueError(f"{self!r} has a fractional zero point, so there are no integer codes; round it first.")
        return quantize(x, scale, zero_point, self.scheme.qmin, self.scheme.qmax) - self.scheme.qmin

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the floats of codes counted from the lowest integer."""
        scale, zero_point = state
        return dequantize(codes, scale, zero_point - self.scheme.qmin)
