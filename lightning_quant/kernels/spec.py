"""What a kernel is asked for: the formats, the shape and the place of one quantized layer, or of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_quant.layers import QuantAttention, QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, Scheme, StepQuantizer, UniformQuantizer


@dataclass(frozen=True)
class LayerSpec:
    """A quantized layer as a kernel sees it.

    Args:
        kind: name of the float class: ``"Linear"``, ``"Conv2d"`` ...
        device: type of its device.
        dtype: of its float weight, which is that of its output.
        shape: of the weight, output channels first.
        weights: format of the weight, ``None`` for float.
        inputs: format of the input, ``None`` for float.
        plain: whether both are plain grids: no noise, parts or fractional zero points, no weight shared by two formats.
        stepwise: whether the input's scale depends on the step of a denoising trajectory.
        conv: stride, padding, dilation, groups and padding mode of a convolution.
        capability: compute capability of its GPU; (0, 0) elsewhere.
    """

    kind: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    weights: Scheme | None
    inputs: Scheme | None
    plain: bool = True
    conv: tuple[Any, ...] | None = None
    stepwise: bool = False
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, layer: QuantizedLayer) -> LayerSpec:
        """The spec of a calibrated layer."""
        name = layer.present_weights()[0]
        rows = layer.weight_rows(name)
        weights, inputs = getattr(layer, f"{name}_quantizer"), None
        if layer.input_quantizers:
            inputs = getattr(layer, layer.input_quantizers[0])
        conv = None
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            conv = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return cls(
            layer.float_class.__name__,
            rows.device.type,
            rows.dtype,
            tuple(rows.shape),
            None if weights is None else weights.scheme,
            None if inputs is None else inputs.scheme,
            layer.low_rank_branch() is None
            and layer.dilated_by is None
            and all(quantizer is None or _is_plain(quantizer) for quantizer in (weights, inputs)),
            conv,
            isinstance(inputs, StepQuantizer),
            torch.cuda.get_device_capability(rows.device) if rows.is_cuda else (0, 0),
        )

    @property
    def formats(self) -> str:
        """The formats in words: ``"int8_sym_channel x int8_asym_tensor"``."""
        return f"{self.weights or 'float'} x {self.inputs or 'float'}"

    def why_not_plain_integers(self) -> str | None:
        """Why the weight or the input is not held as integers of at most 8 bits, or ``None`` if both are."""
        for what, scheme in (("weights", self.weights), ("inputs", self.inputs)):
            if scheme is None:
                return f"its {what} are float"
            if not _has_bytes(scheme):
                return f"its {what} are {scheme}"
        if self.stepwise:
            return "the scale of its input depends on the step of the trajectory"
        return self.why_not_plain_grid()

    def why_not_plain_grid(self) -> str | None:
        """What the weight or the input has beside integers and scales, or ``None``."""
        if self.plain:
            return None
        return "its grid has noise, parts, a fractional zero point, a branch beside it or a dilation"


@dataclass(frozen=True)
class AttentionSpec:
    """A quantized attention as a kernel sees it.

    Args:
        kind: whether it is one fused call, or spelled out.
        device: type of its device.
        operands: formats by name; ``None`` for float.
        plain: names of the operands on plain grids.
        stepwise: whether a scale depends on the step of a denoising trajectory.
    """

    FUSED: ClassVar[str] = "attention"
    SPELLED: ClassVar[str] = "attention that is spelled out as matmul and softmax"

    kind: str
    device: str
    operands: dict[str, Scheme | None]
    plain: frozenset[str]
    stepwise: bool = False

    @classmethod
    def of(cls, attention: QuantAttention, spelled: bool = False) -> AttentionSpec:
        """The spec of a calibrated attention."""
        quantizers = {name: getattr(attention, f"{name}_quantizer") for name in attention.OPERANDS}
        known = {name: quantizer for name, quantizer in quantizers.items() if quantizer is not None}
        device = next((quantizer.scale.device.type for quantizer in known.values()), "cpu")
        return cls(
            cls.SPELLED if spelled else cls.FUSED,
            device,
            {name: None if quantizer is None else quantizer.scheme for name, quantizer in quantizers.items()},
            frozenset(
                name
                for name, found in known.items()
                if isinstance(found, UniformQuantizer) and not isinstance(found, StepQuantizer) and _is_plain(found)
            ),
            any(isinstance(found, StepQuantizer) for found in known.values()),
        )

    @property
    def formats(self) -> str:
        """The formats in words: ``"query int8_asym_tensor, key ..."``, or one if they are the same."""
        said = {name: str(scheme or "float") for name, scheme in self.operands.items()}
        if len(set(said.values())) == 1:
            return f"q, k, p, v {said['query']}"
        return ", ".join(f"{name[0]} {scheme}" for name, scheme in said.items())

    def why_not_integers(self, operand: str) -> str | None:
        """Why an operand is not of at most 8 bits with one scale that is known before, or ``None`` if it is."""
        scheme = self.operands[operand]
        if scheme is None:
            return f"its {operand} is float"
        if not _has_bytes(scheme) or scheme.granularity != "tensor" or scheme.dynamic:
            return f"its {operand} is {scheme}, not of at most 8 bits with one scale that is known before"
        if operand in self.plain:
            return None
        what = "depends on the step of the trajectory" if self.stepwise else "is not a plain one"
        return f"the grid of its {operand} {what}"


AnySpec = LayerSpec | AttentionSpec


def _has_bytes(scheme: Scheme) -> bool:
    return scheme.kind == "int" and scheme.bits <= 8


def _is_plain(quantizer: Quantizer) -> bool:
    if type(quantizer) not in (UniformQuantizer, LearnedQuantizer, StepQuantizer):
        return not isinstance(quantizer, UniformQuantizer)  # other formats are named by their scheme
    assert isinstance(quantizer, UniformQuantizer)
    return torch.equal(quantizer.zero_point, quantizer.zero_point.round())
