"""Layer-wise relevance propagation: how much of an answer comes through each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["relevance_rules"]

EPSILON = 1e-9
Function = Callable[..., Any]


def relevance_rules() -> TorchFunctionMode:
    r"""A forward inside makes a graph whose backward, outside, propagates relevance instead of gradients.

    Beginning with the relevance of the outputs, ``backward`` brings to each tensor the relevance that lands on it:

    - a linear layer, convolution or matrix product shares by the positive products,
      :math:`R_j = \sum_k \frac{(x_j w_{jk})^+}{\sum_i (x_i w_{ik})^+} R_k`, or by the negative ones where there is no
      other; a product of two activations gives half to each operand;
    - a sum shares by :math:`|a| : |b|`;
    - norms, softmax and activation functions hand relevance on as it is, and so do products with a constant.

    What no gradient reaches takes no relevance, so with frozen parameters the sum stays the same from layer to layer.

    >>> x = torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    >>> weight = torch.tensor([[3.0, -1.0, 1.0], [0.0, 2.0, 1.0]])
    >>> with relevance_rules():
    ...     y = F.relu(F.linear(x, weight))
    >>> y.backward(torch.tensor([[1.0, 0.0]]))
    >>> x.grad
    tensor([[1., 0., 0.]])
    """
    return _Rules()


class _Rules(TorchFunctionMode):
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None or not isinstance(out, Tensor) or not out.requires_grad:
            return out
        return rule(func, out, args, kwargs)


class _Relevance(torch.autograd.Function):
    """An output that was computed already, with a backward of our own for some of what it came from."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, shares: Callable[[Tensor], tuple[Tensor, ...]], *operands: Tensor) -> Tensor:
        ctx.shares = shares
        return out.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.shares(gradients[0]))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _hand_on(func: Function, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """All of it to the first operand that a gradient reaches."""
    x = next(x for x in _tensors(args, kwargs) if x.requires_grad)
    if x.shape != out.shape:
        return out
    return _apply(out, lambda r: (r,), x)


def _share(func: Function, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """By size: what a residual path and its branch contribute."""
    operands = [x for x in _tensors(args, kwargs)[:2] if x.requires_grad]
    if len(operands) < 2:
        return _hand_on(func, out, args, kwargs)
    a, b = (x.detach().abs() for x in operands)

    def shares(r: Tensor) -> tuple[Tensor, ...]:
        whole = (a + b).clamp(min=EPSILON)
        return _summed(r * a / whole, operands[0]), _summed(r * b / whole, operands[1])

    return _apply(out, shares, *operands)


def _linear(func: Function, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """By the positive products of input and weight; the bias has no part in it."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight = named.pop("input"), named.pop("weight")
    if "bias" in named:
        named["bias"] = None
    rest = args[3:]
    if not x.requires_grad:
        return out
    return _apply(out, lambda r: (_positive(x, weight, r, lambda a, b: _bare(func, a, b, named, rest))[0],), x)


def _bare(func: Function, x: Tensor, weight: Tensor, named: dict[str, Any], rest: tuple[Any, ...]) -> Tensor:
    keywords = {key: value for key, value in named.items() if key != "bias"}
    out: Tensor = func(x, weight, None, *rest, **keywords)
    return out


def _product(func: Function, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Half to each operand, if gradients reach both."""
    a, b = _tensors(args, kwargs)[:2]

    def shares(r: Tensor) -> tuple[Tensor, ...]:
        both = _positive(a, b, r, torch.matmul)
        known = [part for part, x in zip(both, (a, b), strict=True) if x.requires_grad]
        return tuple(part / len(known) for part in known)

    return _apply(out, shares, *(x for x in (a, b) if x.requires_grad))


def _positive(a: Tensor, b: Tensor, r: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What both factors get of the relevance of a product: by its positive terms, or by the others if there is none."""
    a, b = a.detach(), b.detach()
    to_a, to_b, none = _by_positive_terms(a, b, r, multiply)
    if bool(none.any()):
        more_a, more_b, _ = _by_positive_terms(-a, b, r * none, multiply)
        to_a, to_b = to_a + more_a, to_b + more_b
    return to_a, to_b


def _by_positive_terms(
    a: Tensor, b: Tensor, r: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of both factors, and where there is no positive term."""
    parts = [(a.clamp(min=0), b.clamp(min=0)), (a.clamp(max=0), b.clamp(max=0))]
    with torch.enable_grad():
        leaves = [(x.requires_grad_(), w.requires_grad_()) for x, w in parts]
        z = multiply(*leaves[0]) + multiply(*leaves[1])
        none = z.detach() <= EPSILON
        shared = torch.where(none, 0.0, r / z.detach().clamp(min=EPSILON))
        gradients = torch.autograd.grad(z, [leaf for pair in leaves for leaf in pair], shared)
    (xp, wp), (xn, wn) = parts
    gx, gw, hx, hw = gradients
    return (xp * gx + xn * hx).detach(), (wp * gw + wn * hw).detach(), none


def _apply(out: Tensor, shares: Callable[[Tensor], tuple[Tensor, ...]], *operands: Tensor) -> Tensor:
    return _Relevance.apply(out, shares, *operands)  # type: ignore[no-any-return, no-untyped-call]


def _summed(r: Tensor, like: Tensor) -> Tensor:
    """Over the axes along which an operand was broadcast."""
    return r.sum_to_size(like.shape)


SUMS: set[Function] = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
PRODUCTS: set[Function] = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
LINEAR: set[Function] = {F.linear, F.conv1d, F.conv2d, F.conv3d}
HANDED_ON: set[Function] = {
    F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.rms_norm, F.gelu, F.relu, F.silu, F.softmax,
    torch.softmax, Tensor.softmax, torch.relu, Tensor.relu, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh,
    F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.mish, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
    torch.div, Tensor.div, Tensor.__truediv__, torch.sub, Tensor.sub, Tensor.__sub__,
}  # fmt: skip
RULES: dict[Function, Callable[..., Tensor]] = {
    **dict.fromkeys(SUMS, _share),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(HANDED_ON, _hand_on),
}
