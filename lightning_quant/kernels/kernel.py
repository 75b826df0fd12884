"""What every kernel shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from lightning_quant.kernels.spec import AnySpec
from lightning_quant.layers import QuantizedLayer

M = TypeVar("M", bound=nn.Module)


class Kernel(nn.Module, ABC):
    """Computes what one quantized layer, or one quantized attention, simulates.

    A kernel is made from a calibrated layer and holds the weights in its own form, so that the float ones may go away;
    input quantizers stay with the layer. Several threads may run it at a time.

    Attributes:
        name: as tables show it.
        kinds: the float classes of the layers that it is for.
        device: the type of device that it runs on.
        backends: the names under which ``KernelSwap`` takes it.
        automatic: whether ``"auto"`` takes it, too.
        low_bit: whether its products are of integers, rather than of floats on the grid.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    device: ClassVar[str] = "cpu"
    backends: ClassVar[frozenset[str]] = frozenset({"torch"})
    automatic: ClassVar[bool] = True
    low_bit: ClassVar[bool] = True

    @classmethod
    def considers(cls, spec: AnySpec) -> bool:
        """Whether a layer is of its kind and on its device, so that it should say why it does not take it."""
        return spec.kind in cls.kinds and spec.device == cls.device

    @classmethod
    @abstractmethod
    def why_not(cls, spec: Any) -> str | None:
        """Why this kernel does not take a layer that it considers, or ``None`` if it does."""

    @classmethod
    @abstractmethod
    def of(cls, layer: Any, packed: bool = False) -> Kernel:
        """The kernel of a calibrated layer; ``packed`` where the float weights are dropped and memory counts."""

    @abstractmethod
    def run(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer the layer's ``forward``."""

    def codes(self, layer: QuantizedLayer, weight: str) -> Tensor:
        """The codes of a weight, as its quantizer encodes it: (out, ...) int32."""
        raise TypeError(f"the kernel {self.name} holds no weights")

    def weight(self, layer: QuantizedLayer, name: str) -> Tensor:
        """A weight on its grid, as the layer stores it."""
        quantizer = layer.weight_quantizers()[name]
        rows = quantizer.decode(self.codes(layer, name)).to(getattr(layer, name).dtype)
        return rows.t() if layer.transposed else rows

    def in_steps(self, layer: QuantizedLayer, weight: Tensor) -> Tensor:
        """The same weight as integers, for a layer that simulates."""
        return QuantizedLayer.weight_integers(layer, weight)


def sharing(module: M) -> M:
    """Another module with the very same tensors, in which others can be put in the place of each."""
    found = object.__new__(type(module))
    own = {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    found.__dict__.update({**module.__dict__, **own})
    return found
