r"""Our quantizers as OpenVINO's ``FakeQuantize``, which its CPU plugin turns into products of bytes.

``FakeQuantize`` rounds to so many levels between two ends. A uniform grid with scale :math:`s` and zero point
:math:`z` has the ends :math:`s (q_{min} - z)` and :math:`s (q_{max} - z)`, wherever the zero point is. Only 256 levels
become bytes, so a grid of fewer bits is laid on one of 256 levels with the same step: weights are on it already,
inputs are clamped to their own ends first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

import torch
from torch import Tensor

from lightning_quant.layers import QuantAttention, QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, UniformQuantizer

LEVELS = 256


@torch.library.custom_op("lightning_quant::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, lowest: Tensor, highest: Tensor, owner: str) -> Tensor:
    """Rounds ``x`` to 256 levels between two ends; ``owner`` names the layer whose operand this is.

    >>> fake_quantize(torch.tensor([-9.0, 1.2, 3.0]), torch.tensor(0.0), torch.tensor(255.0), "head").tolist()
    [0.0, 1.0, 3.0]
    """
    step = (highest - lowest) / (LEVELS - 1)
    return ((x.clamp(lowest, highest) - lowest) / step).round() * step + lowest


@fake_quantize.register_fake
def _(x: Tensor, lowest: Tensor, highest: Tensor, owner: str) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def as_fake_quantize(places: Mapping[str, QuantizedLayer | QuantAttention]) -> Iterator[None]:
    """Let quantizers call :func:`fake_quantize` wherever they round to integers of at most 8 bits.

    What has another format rounds as it always does: weights once, here, and inputs whenever they come.

    Args:
        places: the layers and attentions whose quantizers these are, by name.
    """
    with ExitStack() as stack, torch.no_grad():
        for name, place in places.items():
            if isinstance(place, QuantizedLayer):
                for weight, quantizer in place.weight_quantizers().items():
                    rows = quantizer.rounded(place.weight_rows(weight)).detach()
                    stack.enter_context(quantizer.observed_by(_weight(quantizer, rows, name)))
                if place.takes_bias and place.bias_quantizer is not None:
                    bias = place.bias_quantizer.rounded(place.float_bias()).detach()
                    stack.enter_context(place.bias_quantizer.observed_by(_constant(bias)))
            for quantizer in place.activation_quantizers().values():
                if _is_one_grid_of_bytes(quantizer):
                    stack.enter_context(quantizer.observed_by(_input(quantizer, name)))
        yield


def has_bytes(layer: QuantizedLayer) -> bool:
    """Whether OpenVINO can multiply the bytes of a layer: one grid for its input, and weights whose middle is 0."""
    inputs, weights = layer.activation_quantizers().values(), layer.weight_quantizers()
    return (
        bool(inputs and weights)
        and all(_is_one_grid_of_bytes(quantizer) for quantizer in inputs)
        and all(_has_zero_in_the_middle(weights.get(name)) for name in layer.present_weights())
    )


def _has_zero_in_the_middle(quantizer: Quantizer | None) -> bool:
    if quantizer is None or not _is_grid_of_bytes(quantizer):
        return False
    lowest, highest = (end - quantizer.zero_point for end in (quantizer.scheme.qmin, quantizer.scheme.qmax))
    return bool((lowest >= -LEVELS // 2).all() and (highest < LEVELS // 2).all())


def _is_grid_of_bytes(quantizer: Quantizer) -> TypeGuard[UniformQuantizer]:
    scheme = quantizer.scheme
    if type(quantizer) not in (UniformQuantizer, LearnedQuantizer) or scheme.bits > 8 or scheme.dynamic:
        return False
    assert isinstance(quantizer, UniformQuantizer)
    return scheme.granularity != "group" and torch.equal(quantizer.zero_point, quantizer.zero_point.round())


def _is_one_grid_of_bytes(quantizer: Quantizer) -> TypeGuard[UniformQuantizer]:
    return _is_grid_of_bytes(quantizer) and quantizer.scheme.granularity == "tensor"


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: value


def _weight(quantizer: Quantizer, rows: Tensor, owner: str) -> Callable[[Tensor], Tensor]:
    """Gives back the rounded weight, on its grid where that is one of bytes."""
    if not _is_grid_of_bytes(quantizer) or rows.dtype != torch.float32:
        return _constant(rows)
    scale, zero_point = (state.detach() for state in quantizer.state_for(rows))
    lowest, highest = quantizer.scheme.qmin - zero_point, quantizer.scheme.qmax - zero_point
    if _has_zero_in_the_middle(quantizer):
        lowest, highest = torch.full_like(scale, -LEVELS // 2), torch.full_like(scale, LEVELS // 2 - 1)
    lowest, highest = lowest * scale, highest * scale

    def on_bytes(x: Tensor) -> Tensor:
        on_grid: Tensor = fake_quantize(rows, lowest, highest, owner)
        return on_grid

    return on_bytes


def _input(quantizer: UniformQuantizer, owner: str) -> Callable[[Tensor], Tensor]:
    """Rounds an input to its grid."""
    scheme, scale, zero_point = quantizer.scheme, quantizer.scale.detach(), quantizer.zero_point.detach()
    lowest, highest = (scheme.qmin - zero_point) * scale, (scheme.qmax - zero_point) * scale
    within, last = (lowest.item(), highest.item()), lowest + (LEVELS - 1) * scale

    def rounds(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return quantizer.rounded(x)
        rounded: Tensor = fake_quantize(x if scheme.bits == 8 else x.clamp(*within), lowest, last, owner)
        return rounded

    return rounds
