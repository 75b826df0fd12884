"""Products of integers outside of training: exact sums, scaled once, to the bit what an integer kernel computes.

A product of floats on two grids is rounded at every addition. However small such an error is, now and then it tips an
activation over to the next code, and twenty layers on it has grown to the size of the quantization noise itself. The
integers of the grids are floats too, and float32 sums their products exactly as long as they stay below 2^24; so they
are what is multiplied, and it does not matter in which order, on which processor, or by which kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, UniformQuantizer

BITS = 8  # of an operand: more would not leave room for sums


def integer_grid(quantizer: Quantizer | None, granularities: tuple[str, ...] = ("tensor",)) -> UniformQuantizer | None:
    """The quantizer, if it is a plain grid of few integers whose scale is known before, and nobody watches it round."""
    if type(quantizer) not in (UniformQuantizer, LearnedQuantizer):
        return None
    assert isinstance(quantizer, UniformQuantizer)
    if quantizer.observer is not None or is_watched(quantizer) or not quantizer.calibrated:
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in quantizer.parameters()):
        return None  # its scale is being learned
    scheme = quantizer.scheme
    plain = scheme.bits <= BITS and not scheme.dynamic and scheme.granularity in granularities
    return quantizer if plain else None


def is_watched(quantizer: Quantizer | None) -> bool:
    """Whether hooks see, and may change, what a quantizer rounds."""
    return quantizer is not None and bool(quantizer._forward_hooks or quantizer._forward_pre_hooks)


def sums_are_exact(*operands: Tensor) -> bool:
    """Whether integers can be multiplied instead: of float32, computed as they are, and nobody asks for gradients."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(operands[0].device.type):
        return False
    learning = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    return not learning and all(operand.dtype == torch.float32 for operand in operands)


def integer_product(layer: QuantizedLayer, x: Tensor, multiply: Callable[..., Any], axis: int = -1) -> Tensor | None:
    r"""A layer's answer from integers, ``None`` if it has to be computed from floats.

    .. math:: y_n = s_x s_n \sum_k \hat x_k \hat w_{nk} + b_n

    where :math:`\hat x = Q(x) / s_x` and :math:`\hat w = Q(w) / s_n` are integers.

    Args:
        layer: the layer.
        x: its input.
        multiply: its product, a function of input, weight and a bias that is ``None``.
        axis: of the answer's channels.
    """
    inputs = integer_grid(layer.input_quantizer)
    weights = integer_grid(layer.weight_quantizer, ("tensor", "channel"))
    if inputs is None or weights is None or layer.low_rank_branch() is not None:
        return None
    weight = layer.quantized()
    if not sums_are_exact(x, weight):
        return None
    out: Tensor = multiply(inputs.integers(x), layer.weight_integers(weight), None)
    channels = [1] * out.dim()
    channels[axis] = -1
    scale, bias = weights.scale * inputs.scale, layer.full_bias()
    out = out.mul_(scale.view(channels) if scale.dim() else scale)
    return out if bias is None else out.add_(bias.view(channels))
