"""What every quantized twin of a layer shares.

A float layer becomes its quantized twin *in place*: the object, its Parameters, its hooks, its name and its training
flag stay, only the class changes and quantizers are added as children. So an optimizer built earlier still trains it,
``isinstance(m, nn.Linear)`` still holds, and the way back is to take the quantizers out and to set the class again.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.quantizers import NoisyQuantizer, Quantizer, Scheme, build_quantizer


class QuantizedLayer(nn.Module):
    """A layer that computes with quantized weights and inputs; mixed in before the float class.

    For every weight ``p`` of the layer there is a child ``p_quantizer``, and for every input a child like
    ``input_quantizer``; a child that is ``None`` leaves its tensor float. ``folded`` says whether a neighbouring norm
    has been folded into the weights.
    """

    float_class: ClassVar[type[nn.Module]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    input_quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer",)
    input_axis: ClassVar[int] = -1
    transposed: ClassVar[bool] = False  # whether the weight is stored as (in, out)

    folded: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def add_quantizers(self, weights: Scheme | None, inputs: Scheme | None) -> None:
        """Give the layer uncalibrated quantizers for its weights and inputs."""
        for name in self.present_weights():
            self.set_quantizer(f"{name}_quantizer", weights, axis=0)
        for name in self.input_quantizers:
            self.set_quantizer(name, inputs, axis=self.input_axis)
        self.register_buffer("folded", torch.tensor(False, device=self.device))

    def drop_quantizers(self) -> None:
        """Take the quantizers out again, as far as they were put in: adding them may have been interrupted."""
        for name in [*(f"{name}_quantizer" for name in self.present_weights()), *self.input_quantizers, "folded"]:
            if hasattr(self, name):
                delattr(self, name)

    def set_quantizer(self, name: str, scheme: Scheme | None, axis: int) -> None:
        """Put an uncalibrated quantizer under a name, in the place of what was there."""
        quantizer = None if scheme is None else build_quantizer(scheme, axis)
        self.register_module(name, quantizer)
        if quantizer is not None:
            quantizer.to(self.device).train(self.training)  # born in training mode otherwise

    def make_noisy(self) -> None:
        """Let the input's quantizer have a fixed noise in front of it, none for now."""
        assert self.input_quantizer is not None
        noisy = NoisyQuantizer(self.input_quantizer.scheme, self.input_axis)
        self.input_quantizer = noisy.to(self.device).train(self.training)

    @property
    def device(self) -> torch.device:
        """Where the layer's weights live."""
        return next(self.parameters(recurse=False)).device

    def present_weights(self) -> list[str]:
        """Names of the weight Parameters that this layer has."""
        return [name for name in self.weight_names if getattr(self, name, None) is not None]

    def weight_rows(self, name: str = "weight") -> Tensor:
        """The float weight with output channels first: (out, ...)."""
        weight: Tensor = getattr(self, name)
        return weight.t() if self.transposed else weight

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the weights, by the name of the Parameter."""
        found = {name: getattr(self, f"{name}_quantizer") for name in self.present_weights()}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the inputs, by their own name."""
        found = {name: getattr(self, name) for name in self.input_quantizers}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def quantized(self, name: str = "weight") -> Tensor:
        """The weight as the quantized layer computes with it."""
        return through(getattr(self, f"{name}_quantizer"), getattr(self, name))

    def rounded_rows(self, name: str = "weight") -> Tensor:
        """The same with output channels first: (out, ...)."""
        return through(getattr(self, f"{name}_quantizer"), self.weight_rows(name))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """A float state dict knows nothing of ``folded``: its weights are not."""
        if not any(key.startswith(prefix) and ("quantizer" in key or key == f"{prefix}folded") for key in state_dict):
            state_dict[f"{prefix}folded"] = torch.tensor(False)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)


def through(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """``x`` as the quantizer gives it back, or ``x`` itself where there is none."""
    if quantizer is None:
        return x
    quantized: Tensor = quantizer(x)
    return quantized
