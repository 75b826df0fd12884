"""The plan of a quantized model: which layer becomes what, as plain strings and numbers.

A plan is made when a model is calibrated, is stored with every checkpoint, and rebuilds the same structure on a float
model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import nn

from lightning_quant.layers.attention import AttentionSchemes, QuantAttention
from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.routing import AttentionSite
from lightning_quant.layers.swap import (
    create_bias,
    drop_bias,
    quantize_attention,
    quantize_layer,
    restore,
    twin_of,
    weight_rows,
    why_not_swappable,
)
from lightning_quant.quantizers import Quantizer, Scheme


@dataclass
class LayerPlan:
    """The formats of one layer's weights and inputs, ``None`` is float; whether noise is added to the inputs."""

    weights: str | None
    inputs: str | None
    noisy: bool = False


@dataclass
class AttentionPlan:
    """The formats of one attention site's operands, and how it attends in one forward; see ``quantize_attention``."""

    query: str | None
    key: str | None
    value: str | None
    probabilities: str | None
    fused: int = 1
    spelled: list[list[int]] = field(default_factory=list)
    functional: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What one callback does to a model.

    Args:
        method: the callback's class name.
        arguments: the arguments that decide the result; a checkpoint made with others is another plan.
        layers: formats by layer name.
        attention: formats by the name of the module that attends.
        created: names of the modules that were given a bias by the method.
        skipped: why a layer stays float, by layer name.
        calibration: on how many samples it was calibrated and where these came from, in words.

    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> plan = Plan("Demo", {}, layers={"0": LayerPlan("int8_sym_channel", None)})
    >>> plan.apply(net)
    >>> type(net[0]).__name__
    'QuantLinear'
    >>> plan.undo(net)
    >>> type(net[0]).__name__
    'Linear'
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    method: str
    arguments: dict[str, Any]
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    calibration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Plan:
        """The plan out of nested dicts."""
        layers = {name: LayerPlan(**layer) for name, layer in stored["layers"].items()}
        attention = {name: AttentionPlan(**site) for name, site in stored["attention"].items()}
        return cls(**{**stored, "layers": layers, "attention": attention})

    def check(self, model: nn.Module) -> None:
        """Refuse a model that lacks a planned layer, before anything is changed.

        Raises:
            ValueError: naming the first layer that is not there or cannot be quantized.
        """
        modules = dict(model.named_modules())
        for name in [*self.layers, *self.attention, *self.created]:
            if name not in modules:
                raise ValueError(
                    f"the plan of {self.method} names a layer `{name}`, which {type(model).__name__} does not have"
                )
        for name in self.layers:
            if twin_of(modules[name]) is None:
                found = type(modules[name]).__name__
                raise ValueError(f"the plan of {self.method} quantizes `{name}`, but here it is a {found}")
            if refusal := why_not_swappable(modules[name]):
                raise ValueError(f"the plan of {self.method} quantizes `{name}`, but here {refusal}")
        for name in self.attention:
            if "forward" in vars(modules[name]):
                raise ValueError(
                    f"attention in `{name or type(model).__name__}` cannot be quantized: it has its own forward on the "
                    f"instance, as a compiled LightningModule has; compile after calibrating or set attention=False"
                )

    def apply(self, model: nn.Module) -> None:
        """Build the quantized structure, uncalibrated, on a float model."""
        for name, layer in self.layers.items():
            twin = quantize_layer(model.get_submodule(name), _scheme(layer.weights), _scheme(layer.inputs))
            if layer.noisy:
                twin.make_noisy()
        for name, site in self.attention.items():
            schemes = AttentionSchemes(*(_scheme(getattr(site, operand)) for operand in QuantAttention.OPERANDS))
            quantize_attention(
                model.get_submodule(name), schemes, site.fused, [(a, b, c) for a, b, c in site.spelled], site.functional
            )
        for name in self.created:
            module = model.get_submodule(name)
            create_bias(module, like=weight_rows(module).reshape(len(weight_rows(module)), -1)[:, 0])

    def undo(self, model: nn.Module) -> None:
        """Give every planned module its float class back; Parameters stay as they are, created biases too."""
        modules = dict(model.named_modules())
        for name in [*self.attention, *self.layers]:
            if name in modules:
                restore(modules[name])

    def forget_created(self, model: nn.Module) -> None:
        """Take the created biases away, because float weights that never knew them are to be loaded."""
        modules = dict(model.named_modules())
        for name in self.created:
            if name in modules:
                drop_bias(modules[name])

    def give_back(self, model: nn.Module, name: str, why: str) -> None:
        """Make one planned layer float again, saying why."""
        restore(model.get_submodule(name))
        self.layers.pop(name, None)
        self.attention.pop(name, None)
        self.skipped[name] = why

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The planned layers and attention sites, by name.

        Raises:
            ValueError: naming one that is no longer what it was quantized to.
        """
        modules = dict(model.named_modules())
        planned = {name: modules.get(name) for name in {**self.layers, **self.attention}}
        for name, module in planned.items():
            if not isinstance(module, (QuantizedLayer, AttentionSite)):
                found = "it is gone" if module is None else f"it is a {type(module).__name__}"
                raise ValueError(
                    f"{self.method} quantized `{name}`, but now {found}: "
                    f"call {self.method}.remove(model) and calibrate again"
                )
        return cast(dict[str, nn.Module], planned)

    def follow_training(self, model: nn.Module) -> None:
        """Put what was added into the training mode of the module that it was added to."""
        for name, module in model.named_modules():
            if name in self.layers or name in self.attention:
                for child_name, child in module.named_children():
                    if child_name.endswith(("_quantizer", "_quantizers")):
                        child.train(module.training)

    def quantized_layers(self, model: nn.Module) -> dict[str, QuantizedLayer]:
        """The planned layers, by name."""
        return {
            name: cast(QuantizedLayer, module) for name, module in self.modules(model).items() if name in self.layers
        }

    def activation_quantizers(self, model: nn.Module) -> dict[str, Quantizer]:
        """The quantizers of layer inputs and attention operands, by full name."""
        found: dict[str, Quantizer] = {}
        for owner, module in self.modules(model).items():
            if isinstance(module, QuantizedLayer):
                found |= {f"{owner}.{name}": quantizer for name, quantizer in module.activation_quantizers().items()}
            elif isinstance(module, AttentionSite):
                for call, attention in enumerate(module.attention_quantizers):
                    quantizers = cast(QuantAttention, attention).activation_quantizers()
                    found |= {f"{owner}.attention_quantizers.{call}.{name}": q for name, q in quantizers.items()}
        return {name.removeprefix("."): q for name, q in found.items()}  # the model itself may be a site

    def quantizers(self, model: nn.Module) -> dict[str, Quantizer]:
        """Every quantizer of the planned modules, by full name."""
        weights = {
            f"{owner}.{name}_quantizer": quantizer
            for owner, layer in self.quantized_layers(model).items()
            for name, quantizer in layer.weight_quantizers().items()
        }
        return weights | self.activation_quantizers(model)


def _scheme(text: str | None) -> Scheme | None:
    return None if text is None else Scheme.parse(text)
