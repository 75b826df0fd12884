"""The faster of two kernels, as measured on some of what the layer is really given."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.pending import Pending, plain
from lightning_quant.kernels.spec import AnySpec
from lightning_quant.layers import QuantizedLayer

ROUNDS = 3  # the first one warms up
ENOUGH = 2**17  # elements of the input


class Fastest(Kernel):
    """Runs two kernels side by side in the layer's first call, and then only the faster one.

    Args:
        first: answers the first call, and all others unless the second one is faster.
        second: the other one.

    Attributes:
        seconds: of the first and the second in the first call; empty before it.
    """

    name = "the fastest"

    def __init__(self, first: Kernel, second: Kernel) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.seconds: tuple[float, ...] = ()

    @property
    def chosen(self) -> Kernel:
        """The faster one, as far as that is known."""
        return self.second if self.seconds and self.seconds[1] < self.seconds[0] else self.first

    @classmethod
    def why_not(cls, spec: AnySpec) -> str | None:
        """Is made of kernels, not chosen by a spec."""
        return "it is made of two kernels"

    @classmethod
    def of(cls, layer: Any, packed: bool = False) -> Kernel:
        """Is made of kernels, not of a layer."""
        raise TypeError("Fastest is made of two kernels")

    def run(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer the layer's ``forward``; the first call also measures."""
        if not self.seconds and any(isinstance(x, Tensor) and x.numel() for x in (*args, *kwargs.values())):
            self._measure(
                layer, *(_few(layer, x) for x in args), **{name: _few(layer, x) for name, x in kwargs.items()}
            )
        return self.chosen.run(layer, *args, **kwargs)

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of a weight."""
        return self.first.codes(layer, weight)

    def weight(self, layer: QuantizedLayer, name: str) -> Tensor:
        """A weight on its grid, as the layer stores it."""
        return self.second.weight(layer, name)

    def in_steps(self, layer: QuantizedLayer, weight: Tensor) -> Tensor:
        """The same weight as integers."""
        return self.second.in_steps(layer, weight)

    def _measure(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in (*args, *kwargs.values()))
        plain(self.first.run(layer, *args, **kwargs))  # before it sees the floats of what is handed on in codes
        floats = tuple(map(plain, args)), {name: plain(x) for name, x in kwargs.items()}
        seconds = [torch.inf, torch.inf]
        for _ in range(ROUNDS):
            for place, (kernel, given) in enumerate(((self.first, (args, kwargs)), (self.second, floats))):
                began = time.perf_counter()
                plain(kernel.run(layer, *given[0], **given[1]))
                if on_gpu:  # which has only been told to run it
                    torch.cuda.synchronize()
                seconds[place] = min(seconds[place], time.perf_counter() - began)
        self.seconds = tuple(seconds)


def _few(layer: nn.Module, x: Any) -> Any:
    """The first samples of an input, if there are more than it takes to tell which kernel is faster."""
    dims = layer.weight.dim() if isinstance(layer, nn.modules.conv._ConvNd) else 2
    if not isinstance(x, Tensor) or x.is_cuda or x.dim() < dims or x.numel() <= ENOUGH:
        return x
    samples = max(1, len(x) * ENOUGH // x.numel())
    return x.few(samples) if isinstance(x, Pending) else x[:samples]
