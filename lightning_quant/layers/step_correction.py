"""A line for each step and output channel behind a quantized layer, for the channels of its input that are kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.conv import QuantConv2d
from lightning_quant.quantizers import Steps


class StepCorrection(nn.Module):
    r"""Corrects what a quantized layer makes of the first channels of its input, differently at each step.

    .. math:: y = \alpha_t \, \hat W_0 \hat x_0 + \beta_t + \hat W_1 \hat x_1 + b

    where :math:`x_0` are the first ``channels`` channels, of which no bias is a part, and :math:`\alpha_t, \beta_t` are
    numbers for each output channel. It is a child of the layer and its forward hook.

    Args:
        channels: how many of the input's channels are corrected for.
        outputs: how many channels the layer gives.
        steps: where the trajectory is.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, outputs: int, steps: Steps) -> None:
        super().__init__()
        self.channels, self.steps = channels, steps
        self.register_buffer("scale", torch.ones(steps.groups, outputs))
        self.register_buffer("shift", torch.zeros(steps.groups, outputs))

    def hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The forward hook of the layer; a layer that computes in floats is not corrected."""
        assert isinstance(layer, QuantizedLayer)
        if any(quantizer.observer is not None for quantizer in layer.weight_quantizers().values()):
            return None
        weight = layer.quantized()  # also where a kernel holds it
        part = corrected_part(layer, args[0], self.channels, weight=weight.t() if layer.transposed else weight)
        rows = torch.tensor(self.steps.rows, device=output.device)
        rows = rows.repeat_interleave(len(output) // len(rows)) if len(rows) > 1 else rows
        shape = [len(rows)] + [1] * (output.dim() - 1)
        shape[1 if isinstance(layer, QuantConv2d) else -1] = -1
        scale, shift = (table[rows].to(output.dtype).view(shape) for table in (self.scale, self.shift))
        return output + (scale - 1) * part + shift


def corrected_part(
    layer: QuantizedLayer, x: Tensor, channels: int, exact: bool = False, weight: Tensor | None = None
) -> Tensor:
    """What a layer makes of the first channels of its input, without its bias.

    Args:
        layer: linear, or a convolution of one group.
        x: its input.
        channels: how many of its channels.
        exact: in floats, or quantized, whatever the layer does at present.
        weight: its quantized weight, output channels first, if that is known.
    """
    axis, inputs, weights = layer.input_axis, layer.input_quantizer, layer.weight_quantizer
    if not exact and inputs is not None:
        x = inputs.rounded(x)
    if weight is None:
        weight = layer.weight_rows()
        weight = weight if exact or weights is None else weights.rounded(weight)
    x, weight = x.narrow(axis, 0, channels), weight.narrow(1, 0, channels)
    if isinstance(layer, QuantConv2d):
        return cast(Tensor, layer._conv_forward(x, weight, None))
    return nn.functional.linear(x, weight)


def add_correction(layer: nn.Module, channels: int, steps: Steps) -> None:
    """Put a correction that changes nothing yet behind a quantized layer."""
    assert isinstance(layer, QuantizedLayer)
    correction = StepCorrection(channels, len(layer.weight_rows()), steps).to(layer.device)
    layer.step_correction = correction.train(layer.training)
    layer.register_forward_hook(correction.hook)


def drop_correction(layer: nn.Module) -> None:
    """Take it away."""
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), StepCorrection):
            del layer._forward_hooks[key]
    if isinstance(getattr(layer, "step_correction", None), StepCorrection):
        del layer.step_correction
