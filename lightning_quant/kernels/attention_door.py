"""The doors through which another attention comes into a model while it predicts.

A quantized attention gets a subclass of its own class whose ``forward`` is a kernel's; its copies and pickles are
simulated ones unless the kernel is kept. In a float model, like a quantized attention site
(:class:`~lightning_quant.layers.AttentionSite`), a module that attends gets a subclass of its own class whose
``forward`` routes the calls of ``scaled_dot_product_attention``; here they go to a function that was handed in. Copies
and pickles of the module are copies of the original.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.kernels.kernel import Kernel
from lightning_quant.layers import AttentionSite, QuantAttention, QuantMultiheadAttention
from lightning_quant.layers.integers import is_watched
from lightning_quant.layers.routing import Route

AttentionFunction = Callable[..., Tensor]


class KernelAttention(QuantAttention):
    """A quantized attention that a kernel answers for."""

    kernel: Kernel

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the kernel, unless somebody watches how operands are rounded."""
        if any(is_watched(quantizer) for quantizer in self.activation_quantizers().values()):
            return self.simulate(*args, **kwargs)
        return cast(Tensor, self.kernel.run(self, *args, **kwargs))

    def simulate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the attention as it simulates it."""
        return super().forward(*args, **kwargs)

    @property
    def kept(self) -> bool:
        """Whether the kernel stays when predict ends."""
        return "kernel" in self._modules

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the simulated attention, unless the kernel is kept."""
        make, args, state, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if not self.kept:
            state = {name: value for name, value in state.items() if name != "kernel"}
            if make is copyreg.__newobj__:  # type: ignore[attr-defined]
                make, args = _new, (QuantAttention,)
        return (make, args, state, *rest)


def attend_on(attention: QuantAttention, kernel: Kernel, keep: bool = False) -> None:
    """Let a kernel answer for a quantized attention."""
    attention.__class__ = KernelAttention
    if keep:
        attention.add_module("kernel", kernel)
    else:
        attention.__dict__["kernel"] = kernel  # no child of the attention: its state dict stays as it is


def simulate_attention(attention: nn.Module) -> None:
    """Let an attention simulate again; one whose kernel is kept stays as it is."""
    if isinstance(attention, KernelAttention) and not attention.kept:
        del attention.__dict__["kernel"]
        attention.__class__ = QuantAttention  # type: ignore[assignment]


class RoutedAttention(nn.Module):
    """A module whose ``scaled_dot_product_attention`` is answered by ``attention_function``."""

    routed_class: ClassVar[type[nn.Module]]
    attention_function: AttentionFunction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its attention routed."""
        with Route({F.scaled_dot_product_attention: self._attend}):
            return super().forward(*args, **kwargs)

    def _attend(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.attention_function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the original: the subclass is made on the fly and has no import path."""
        make, args, state, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        state = {name: value for name, value in state.items() if name != "attention_function"}
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = _new, (self.routed_class,)
        return (make, args, state, *rest)


def _new(module_class: type[nn.Module]) -> nn.Module:
    return module_class.__new__(module_class)


def route_attention(module: nn.Module, function: AttentionFunction) -> None:
    """Answer the attention calls in a module's forward by a function with the arguments of the fused call.

    >>> class Attend(nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x)
    >>> import torch
    >>> module = Attend()
    >>> route_attention(module, lambda query, key, value, **kwargs: value.mean(-2, keepdim=True).expand_as(value))
    >>> module(torch.tensor([[1.0], [3.0]])).tolist()
    [[2.0], [2.0]]
    >>> give_back_attention(module)
    >>> type(module).__name__
    'Attend'
    """
    if reason := why_not_routable(module):
        raise TypeError(f"cannot route the attention of a {type(module).__name__}: {reason}")
    module.__class__ = _routed_class(cast(Hashable, type(module)))
    assert isinstance(module, RoutedAttention)
    module.attention_function = function


def why_not_routable(module: nn.Module) -> str | None:
    """Why another function must not answer a module's attention, or ``None`` if it may."""
    if isinstance(module, RoutedAttention):
        return "another callback has routed it already"
    if attends_quantized(module):
        return "its attention is quantized"
    return "it has a forward of its own on the instance" if "forward" in module.__dict__ else None


def attends_quantized(module: nn.Module) -> bool:
    """Whether a module's calls of fused attention go to quantizers."""
    if isinstance(module, QuantMultiheadAttention):
        return True
    return isinstance(module, AttentionSite) and len(module.attention_quantizers) > len(module.spelled)


def give_back_attention(module: nn.Module) -> None:
    """Give a module its own attention back."""
    if isinstance(module, RoutedAttention):
        del module.attention_function
        module.__class__ = module.routed_class  # type: ignore[assignment]


@functools.cache
def _routed_class(module_class: type[nn.Module]) -> type[RoutedAttention]:
    name = f"Routed{module_class.__name__}"
    return type(name, (RoutedAttention, module_class), {"routed_class": module_class})
