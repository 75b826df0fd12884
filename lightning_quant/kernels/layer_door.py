"""The door through which a kernel comes into a quantized layer, and goes again.

A layer gets a subclass of its own class whose ``forward`` is the kernel's; its quantizers, Parameters, hooks and its
state dict stay as they are. Copies and pickles of such a layer are simulated ones.

Where the float weights are dropped, the kernel becomes a child of the layer, and what is saved are packed codes. Other
code may still ask ``layer.weight`` for its dtype, device and shape; its values are NaN.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Hashable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_quant.kernels.kernel import Kernel
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers.packing import pack


class KernelLayer(QuantizedLayer):
    """A quantized layer that a kernel answers for."""

    simulated_class: ClassVar[type[QuantizedLayer]]
    kernel: Kernel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel."""
        return self.kernel.run(self, *args, **kwargs)

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer as it simulates it."""
        return super().forward(*args, **kwargs)

    def quantized(self, name: str = "weight") -> Tensor:
        """The weight as the quantized layer computes with it."""
        return self.kernel.weight(self, name)

    def weight_integers(self, weight: Tensor) -> Tensor:
        """The same as integers, which the kernel may know already."""
        return self.kernel.in_steps(self, weight)

    @property
    def kept(self) -> bool:
        """Whether the float weights were dropped."""
        return "kernel" in self._modules

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return cast(Tensor, getattr(self, self.present_weights()[0])).device

    def drop_quantizers(self) -> None:
        """Take the kernel and the quantizers out again."""
        require_float_weights(self)
        give_back(self)
        self.drop_quantizers()

    def empty(self, slot: str) -> None:
        """Let the layer simulate again, and empty a slot of it."""
        require_float_weights(self)
        give_back(self)
        self.empty(slot)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kept:
            quantizers = self.weight_quantizers()
            for name, quantizer in quantizers.items():
                destination[f"{prefix}{name}.codes"] = pack(self.kernel.codes(self, name), quantizer.scheme.bits)
            for name in self.masks().keys() - quantizers.keys():
                destination[f"{prefix}{name}"] = self.kernel.weight(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the simulated layer; one without float weights as itself."""
        make, args, state, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = _new, (self.simulated_class, self.kept)
        state = {name: value for name, value in state.items() if name != "kernel"}
        return (make, args, state, *rest)


def run_on(layer: QuantizedLayer, kernel: Kernel, keep: bool = False) -> None:
    """Let a kernel answer for a layer.

    Args:
        layer: a calibrated layer.
        kernel: made from it.
        keep: drop the float weights.

    >>> from lightning_quant.kernels.int8_linear import Int8Linear
    >>> from lightning_quant.layers import quantize_layer
    >>> from lightning_quant.quantizers import Scheme
    >>> layer = quantize_layer(nn.Linear(64, 32), Scheme.parse("int8_sym_channel"), Scheme.parse("uint8_asym"))
    >>> layer.weight_quantizer.fit(layer.weight)
    >>> layer.input_quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    >>> x = torch.rand(4, 64)
    >>> simulated = layer(x)
    >>> run_on(layer, Int8Linear.of(layer))
    >>> torch.testing.assert_close(layer(x), simulated)
    >>> give_back(layer)
    >>> torch.equal(layer(x), simulated)
    True
    """
    layer.__class__ = _kernel_class(cast(Hashable, type(layer)))
    if not keep:
        layer.__dict__["kernel"] = kernel  # no child of the layer: names and state dict stay as they are
        return
    layer.add_module("kernel", kernel)
    quantizers, masks = layer.weight_quantizers(), layer.masks()
    for name in {**quantizers, **masks}:
        if name in quantizers:
            quantizers[name].codes = None  # the kernel has them
        if name in masks:
            masks[name].offset = None  # it has that, too
        weight = layer._parameters.pop(name)
        assert weight is not None
        nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        setattr(layer, name, nothing)


def require_float_weights(model: nn.Module) -> None:
    """Refuse a model whose float weights were dropped.

    Raises:
        ValueError: naming the first layer without them.
    """
    for name, module in model.named_modules():
        if isinstance(module, KernelLayer) and module.kept:
            raise ValueError(
                f"{f'`{name}`' if name else 'this layer'} has no float weights any more, KernelSwap(keep=True) dropped "
                f"them: build the model anew, and load a checkpoint or what save_quantized writes of this one"
            )


def give_back(layer: nn.Module) -> None:
    """Let a layer simulate again; one without float weights keeps its kernel."""
    if isinstance(layer, KernelLayer) and not layer.kept:
        del layer.__dict__["kernel"]
        layer.__class__ = layer.simulated_class  # type: ignore[assignment]


@functools.cache
def _kernel_class(simulated: type[QuantizedLayer]) -> type[KernelLayer]:
    return type(f"Kernel{simulated.__name__}", (KernelLayer, simulated), {"simulated_class": simulated})


def _new(simulated: type[QuantizedLayer], kept: bool) -> nn.Module:
    cls = _kernel_class(cast(Hashable, simulated)) if kept else simulated
    return cls.__new__(cls)
