"""A second opinion on what a network computes, and on which of it is quantized; knows nothing of the package.

Every matrix product and convolution that really reaches torch's kernels is counted, whoever calls it. It counts as
quantized when the *numbers* that it multiplies say so: both operands, sampled, are whole multiples of one step, at most
255 of them. So a layer that was meant to be quantized and is not, or a quantizer whose result nobody uses, shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MATRIX = {aten.mm.default: 0, aten.addmm.default: 1}  # position of the input; the weight stands behind it
BATCHED = {aten.bmm.default: 0, aten.baddbmm.default: 1}
FUSED = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"}


@dataclass(frozen=True)
class Product:
    """One product: in which module, between activations or with a layer's weight, how large, and of which numbers."""

    module: str
    attention: bool
    macs: int
    quantized: bool


class MacCounter(TorchDispatchMode):
    """Counts the products of everything that runs while it is active.

    Args:
        module: names what is found; the innermost of its submodules that runs gives the name.

    Attributes:
        products: what was found, in the order of the calls.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.products: list[Product] = []
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.inside: list[str] = []

    @contextmanager
    def counting(self) -> Iterator[MacCounter]:
        """Count meanwhile, without gradients and without torch's fused encoder layers, which would hide products."""
        handles = []
        for name, child in self.module.named_modules():
            handles.append(child.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name)))
            handles.append(child.register_forward_hook(self._leave, always_call=True))
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), self:
                yield self
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MATRIX:
            x, weight = args[MATRIX[func] :][:2]  # (rows, in), (in, out)
            rounded = on_a_grid(weight.t())
            # Neither a parameter nor a rounded one: two activations meet, as the embeddings of CLIP's towers do.
            between_activations = not rounded and weight.untyped_storage().data_ptr() not in self.parameters
            self._add(between_activations, x.shape[0] * weight.numel(), rounded and on_a_grid(x.reshape(1, -1)))
        elif func is aten.convolution.default:
            x, weight = args[:2]
            positions = (x if args[6] else out)[0, 0].numel() * x.shape[0]  # a transposed one visits its input
            self._add(False, positions * weight.numel(), on_a_grid(x.reshape(1, -1)) and on_a_grid(weight.flatten(1)))
        elif func in BATCHED:
            a, b = args[BATCHED[func] :][:2]  # (batch, rows, in), (batch, in, out)
            # A linear layer of a strided input comes as a batch of products with one and the same weight.
            attention = len(b) == 1 or b.stride(0) != 0
            second = on_a_grid(b.reshape(1, -1) if attention else b[0].t())
            self._add(attention, a.numel() * b.shape[2], on_a_grid(a.reshape(1, -1)) and second)
        elif func.overloadpacket.__name__ in FUSED:
            query, key, value = args[:3]  # (..., tokens, channels)
            pairs = math.prod(query.shape[:-1]) * key.shape[-2]
            self._add(True, pairs * (query.shape[-1] + value.shape[-1]), False)
        return out

    def _add(self, attention: bool, macs: int, quantized: bool) -> None:
        self.products.append(Product(self.inside[-1] if self.inside else "", attention, macs, quantized))

    def macs(self, attention: bool, quantized: bool | None = None) -> int:
        """The sum over linear and convolution layers, or over attention, of all or of (un)quantized products."""
        return sum(p.macs for p in self.products if p.attention is attention and quantized in (None, p.quantized))

    def float_layers(self) -> dict[str, int]:
        """The MACs of linear and convolution layers that multiply float numbers, by module, largest first."""
        found: dict[str, int] = {}
        for product in self.products:
            if not product.attention and not product.quantized:
                found[product.module] = found.get(product.module, 0) + product.macs
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def on_a_grid(rows: Tensor, levels: int = 255, samples: int = 64) -> bool:
    """Whether each row holds only whole multiples of a step, its largest magnitude being at most ``levels`` steps.

    A few rows and a few entries of each are looked at; that numbers which are not rounded pass by accident has a chance
    below 1e-12 from eight entries on.

    >>> x = torch.randn(1, 100)
    >>> on_a_grid(x), on_a_grid((x * 30).round() / 30)
    (False, True)
    """
    if rows.numel() == 0:
        return True
    rows = rows.detach()[torch.linspace(0, len(rows) - 1, min(len(rows), 8)).long()]
    largest = rows.abs().amax(1, keepdim=True).double()
    chosen = torch.randint(rows.shape[1], (samples,), generator=torch.Generator().manual_seed(0))
    picked = (rows if rows.shape[1] <= samples else rows[:, chosen]).double()
    steps = torch.arange(1, levels + 1, dtype=torch.double)
    multiples = (picked / largest.clamp_min(1e-30))[..., None] * steps  # (rows, entries, candidates)
    fits = ((multiples - multiples.round()).abs() < 5e-3).all(1).any(1)
    return bool(fits.all())
