"""How attention and weights are reached that no layer's forward would show us: through the functional call.

Models call :func:`torch.nn.functional.scaled_dot_product_attention`, or spell it out as matmul, softmax, matmul, deep
inside some module. The class of that module is replaced by a subclass whose ``forward`` enters a torch function mode
and then runs the original ``forward``: the calls are routed to our quantizers, and no model needs code of its own here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.layers.attention import QuantAttention
from lightning_quant.layers.base import through

MATMULS: set[Callable[..., Any]] = {
    torch.matmul,
    Tensor.matmul,
    torch.bmm,
    Tensor.bmm,
    torch.einsum,
    torch.baddbmm,
    Tensor.baddbmm,
}
SOFTMAXES: set[Callable[..., Any]] = {torch.softmax, Tensor.softmax, F.softmax}
# The first operand of these is added to the product.
_WITH_ADDEND = {torch.baddbmm, Tensor.baddbmm}


def softmax_is_last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a softmax goes over the last axis, as that of attention does."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in (-1, args[0].dim() - 1)


class Route(TorchFunctionMode):
    """Sends the calls of some torch functions to handlers.

    Args:
        handlers: by function; a handler is given the function, its arguments and its keyword arguments.
    """

    def __init__(self, handlers: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.handlers = handlers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self.handlers.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(func, args, kwargs or {})


class AttentionSite(nn.Module):
    """A module whose ``forward`` calls attention, or reads a layer's weight; mixed in before the module's own class.

    ``attention_quantizers`` serve first the fused calls of one forward, in order, then those that are ``spelled`` out
    as (position of the first matmul, of the softmax, of the second matmul) among those of the forward.
    ``functional`` names children whose weight the forward reads by ``F.linear(x, self.qkv.weight, ...)``, and ``plans``
    counts the methods that want calls routed.
    While a route is active torch also keeps off the fused fast paths that would pass quantized children by.
    """

    float_class: ClassVar[type[nn.Module]]
    attention_quantizers: nn.ModuleList
    spelled: list[tuple[int, int, int]]
    functional: list[str]
    plans: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its calls routed to our quantizers."""
        with Route(_Forward(self).handlers):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class: the subclass is made on the fly and has no import path."""
        reduced = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_new_site, (self.float_class,), *reduced[2:])


class _Forward:
    """The calls within one forward of a site; positions begin anew with each."""

    def __init__(self, site: AttentionSite) -> None:
        quantizers = [cast(QuantAttention, attention) for attention in site.attention_quantizers]
        fused = len(quantizers) - len(site.spelled)
        self.fused, self.fused_calls = quantizers[:fused], 0
        self.matmuls = self.softmaxes = 0
        self.first: dict[int, QuantAttention] = {}
        self.softmax: dict[int, QuantAttention] = {}
        self.second: dict[int, QuantAttention] = {}
        for attention, (first, softmax, second) in zip(quantizers[fused:], site.spelled, strict=True):
            self.first[first], self.softmax[softmax], self.second[second] = attention, attention, attention
        self.handlers: dict[Callable[..., Any], Callable[..., Any]] = {}
        if self.fused:
            self.handlers[F.scaled_dot_product_attention] = self._attend
        if self.first:
            self.handlers.update(dict.fromkeys(MATMULS, self._multiply))
            self.handlers.update(dict.fromkeys(SOFTMAXES, self._normalize))
        self.functional = [site.get_submodule(name) for name in site.functional]
        if self.functional:
            self.handlers[F.linear] = self._linear

    def _attend(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        attention = self.fused[min(self.fused_calls, len(self.fused) - 1)]
        self.fused_calls += 1
        out: Tensor = attention(*args, **kwargs)
        return out

    def _multiply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first, second = self.first.get(self.matmuls), self.second.get(self.matmuls)
        self.matmuls += 1
        operands = list(args)
        left = next(i for i, x in enumerate(args) if isinstance(x, Tensor)) + (func in _WITH_ADDEND)
        if first is not None:
            operands[left] = through(first.query_quantizer, operands[left])
            operands[left + 1] = through(first.key_quantizer, operands[left + 1])
        if second is not None:
            operands[left + 1] = through(second.value_quantizer, operands[left + 1])
        out: Tensor = func(*operands, **kwargs)
        return out

    def _normalize(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        attention = self.softmax.get(self.softmaxes)
        self.softmaxes += 1
        out: Tensor = func(*args, **kwargs)
        return out if attention is None else through(attention.probabilities_quantizer, out)

    def _linear(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``F.linear(x, layer.weight, bias)`` as BEiT calls it: compute the layer, with the bias that was given."""
        x, weight, bias = _linear_arguments(*args, **kwargs)
        layer = next((layer for layer in self.functional if weight is layer.weight), None)
        if layer is None:
            return cast(Tensor, func(*args, **kwargs))
        own, computed = cast(Tensor | None, layer.bias), cast(Tensor, layer(x))
        if bias is own:
            return computed
        return torch.add(computed, bias if own is None else bias - own)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Any = None) -> tuple[Tensor, Tensor, Any]:
    return input, weight, bias


def site_class(float_class: type[nn.Module]) -> type[AttentionSite]:
    """The subclass of a module's class that routes its calls; the same one each time."""
    return _site_class(cast(Hashable, float_class))


@functools.cache
def _site_class(float_class: type[nn.Module]) -> type[AttentionSite]:
    return type(f"Quant{float_class.__name__}", (AttentionSite, float_class), {"float_class": float_class})


def _new_site(float_class: type[nn.Module]) -> nn.Module:
    cls = site_class(float_class)
    return cls.__new__(cls)
