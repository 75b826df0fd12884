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
from lightning_quant.layers.positions import PositionPlan
from lightning_quant.layers.rotation import RotationPlan
from lightning_quant.layers.routing import AttentionSite
from lightning_quant.layers.step_correction import drop_correction
from lightning_quant.layers.steps import StepPlan
from lightning_quant.layers.swap import (
    create_bias,
    drop_bias,
    quantize_attention,
    quantize_layer,
    release,
    release_attention,
    twin_of,
    weight_rows,
    why_not_swappable,
)
from lightning_quant.quantizers import Mask, Pattern, Quantizer, Scheme


@dataclass
class LayerPlan:
    """What one method does to one layer.

    Args:
        weights: format of its weights, ``None`` for float.
        inputs: format of its inputs, ``None`` for float.
        noisy: whether noise is added to the inputs.
        pruned: pattern of its pruned weights, ``None`` where none are.
        biases: format of another bias that the method finds; ``None`` where it adds the layer's own.
        low_rank: rank of the branch beside its weight, 0 where there is none.
        split: widths of the parts that its input was joined of, where each has its own scales; empty: in one piece.
        crossed: how much of an input's step is its token's, the rest its channel's; ``None``: no such step.
        dilated: whether weights of unsaturated input channels are multiplied, and these channels divided.
        fed_back: whether it reads the noisy sample of a denoiser itself.
    """

    weights: str | None
    inputs: str | None
    noisy: bool = False
    pruned: str | None = None
    biases: str | None = None
    low_rank: int = 0
    crossed: float | None = None
    dilated: bool = False
    fed_back: bool = False
    split: list[int] = field(default_factory=list)

    @property
    def slots(self) -> list[str]:
        """Where in the layer something is put; see :class:`~lightning_quant.layers.QuantizedLayer`."""
        return [slot for slot in QuantizedLayer.SLOTS if getattr(self, slot) is not None]


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

    @property
    def quantized(self) -> bool:
        """Whether an operand is quantized."""
        return any(getattr(self, operand) is not None for operand in QuantAttention.OPERANDS)


@dataclass
class Plan:
    """What one callback does to a model.

    Args:
        method: the callback's class name.
        arguments: the arguments that decide the result; a checkpoint made with others is another plan.
        layers: formats by layer name.
        attention: formats by the name of the module that attends.
        created: names of the modules that were given a bias by the method.
        rotations: what was rotated, and where that runs online.
        skipped: why a layer stays float, by layer name.
        calibration: on how many samples it was calibrated and where these came from, in words.
        step: what was done to float weights: ``"rewrite"``, ``"absorb"`` or ``"decide"``.
        steps: which scales depend on the step of a denoising trajectory, ``None`` for none.
        positions: which depend on the position of a token in its sequence, ``None`` for none.

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
    rotations: list[RotationPlan] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    calibration: str = ""
    step: str = "decide"
    steps: StepPlan | None = None
    positions: PositionPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Plan:
        """The plan out of nested dicts."""
        layers = {name: LayerPlan(**layer) for name, layer in stored["layers"].items()}
        attention = {name: AttentionPlan(**site) for name, site in stored["attention"].items()}
        rotations = [RotationPlan.from_dict(rotation) for rotation in stored.get("rotations", ())]
        steps = StepPlan(**stored["steps"]) if stored.get("steps") else None
        positions = PositionPlan(**stored["positions"]) if stored.get("positions") else None
        parts = {"layers": layers, "attention": attention, "rotations": rotations}
        return cls(**{**stored, **parts, "steps": steps, "positions": positions})

    def check(self, model: nn.Module) -> None:
        """Refuse a model that lacks a planned layer, before anything is changed.

        Raises:
            ValueError: naming the first layer that is not there or cannot be quantized.
        """
        modules = dict(model.named_modules())
        rotated = [name for rotation in self.rotations for name in rotation.names]
        tables = [] if self.steps is None else [self.steps.denoiser, *self.steps.owners]
        tables += [] if self.positions is None else [self.positions.decoder or "", *self.positions.owners]
        for name in [*self.layers, *self.attention, *self.created, *rotated, *tables]:
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
        for rotation in self.rotations:
            rotation.put_online(model)
        for name, layer in self.layers.items():
            pruned = None if layer.pruned is None else Pattern.parse(layer.pruned)
            module = model.get_submodule(name)
            try:
                formats = _scheme(layer.weights), _scheme(layer.inputs), pruned, _scheme(layer.biases)
                twin = quantize_layer(module, *formats)
                if layer.split:
                    twin.make_split(layer.split)
            except ValueError as error:
                raise ValueError(f"`{name}` cannot take what {self.method} wants to do: {error}") from None
            if layer.noisy:
                twin.make_noisy()
            if layer.low_rank:
                twin.add_low_rank(layer.low_rank)
            if layer.dilated:
                twin.make_dilated()
            if layer.crossed is not None:
                twin.make_crossed(layer.crossed)
        for name, site in self.attention.items():
            schemes = AttentionSchemes(*(_scheme(getattr(site, operand)) for operand in QuantAttention.OPERANDS))
            quantize_attention(
                model.get_submodule(name), schemes, site.fused, [(a, b, c) for a, b, c in site.spelled], site.functional
            )
        for name in self.created:
            module = model.get_submodule(name)
            create_bias(module, like=weight_rows(module).reshape(len(weight_rows(module)), -1)[:, 0])
        for tables in (self.steps, self.positions):
            if tables is not None:
                tables.apply(model)
        for name in [name for name, layer in self.layers.items() if layer.fed_back]:
            for quantizer in cast(QuantizedLayer, model.get_submodule(name)).activation_quantizers().values():
                quantizer.keeps_range = True

    def undo(self, model: nn.Module) -> None:
        """Take out what was planned; Parameters stay as they are, created biases too."""
        modules = dict(model.named_modules())
        for name, site in self.attention.items():
            if name in modules:
                release_attention(modules[name], site.quantized)
        for name, layer in self.layers.items():
            if name in modules:
                release(modules[name], layer.slots)
        for rotation in self.rotations:
            rotation.take_offline(model)
        for tables in (self.steps, self.positions):
            if tables is not None:
                tables.undo(model)

    def forget_created(self, model: nn.Module) -> None:
        """Take the created biases away, because float weights that never knew them are to be loaded."""
        modules = dict(model.named_modules())
        for name in self.created:
            if name in modules:
                drop_bias(modules[name])

    def give_back(self, model: nn.Module, name: str, why: str) -> None:
        """Leave one layer as it was, saying why."""
        module = model.get_submodule(name)
        layer, site = self.layers.pop(name, None), self.attention.pop(name, None)
        if site is not None:
            release_attention(module, site.quantized)
        if layer is not None:
            release(module, layer.slots)
        self.skipped[name] = why
        if self.positions is not None:
            self.positions.owners.pop(name, None)
        if self.steps is not None and name in self.steps.owners:
            self.steps.owners.remove(name)
            drop_correction(model.get_submodule(name))
            self.steps.corrected.pop(name, None)

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
                    if child_name.endswith(("_quantizer", "_quantizers", "_pruning")):
                        child.train(module.training)

    def quantized_layers(self, model: nn.Module) -> dict[str, QuantizedLayer]:
        """The planned layers, by name."""
        return {
            name: cast(QuantizedLayer, module) for name, module in self.modules(model).items() if name in self.layers
        }

    def activation_quantizers(self, model: nn.Module) -> dict[str, Quantizer]:
        """The planned quantizers of layer inputs and attention operands, by full name."""
        found: dict[str, Quantizer] = {}
        for owner, module in self.modules(model).items():
            if isinstance(module, QuantizedLayer):
                inputs = owner in self.layers and self.layers[owner].inputs is not None
                attention = owner in self.attention and self.attention[owner].quantized
                found |= {
                    f"{owner}.{name}": quantizer
                    for name, quantizer in module.activation_quantizers().items()
                    if (attention if name.startswith("attention_quantizers.") else inputs)
                }
            elif isinstance(module, AttentionSite) and self.attention[owner].quantized:
                for call, attending in enumerate(module.attention_quantizers):
                    quantizers = cast(QuantAttention, attending).activation_quantizers()
                    found |= {f"{owner}.attention_quantizers.{call}.{name}": q for name, q in quantizers.items()}
        return {name.removeprefix("."): q for name, q in found.items()}  # the model itself may be a site

    def quantizers(self, model: nn.Module) -> dict[str, Quantizer]:
        """Every planned quantizer, by full name."""
        weights = {
            f"{owner}.{name}_quantizer": quantizer
            for owner, layer in self.quantized_layers(model).items()
            for name, quantizer in (layer.weight_quantizers() if self.layers[owner].weights else {}).items()
        }
        biases = {
            f"{owner}.bias_quantizer": layer.bias_quantizer
            for owner, layer in self.quantized_layers(model).items()
            if self.layers[owner].biases and layer.bias_quantizer is not None
        }
        return weights | biases | self.activation_quantizers(model)

    def masks(self, model: nn.Module) -> dict[str, Mask]:
        """Every planned mask, by full name."""
        return {
            f"{owner}.{name}_pruning": mask
            for owner, layer in self.quantized_layers(model).items()
            for name, mask in (layer.masks() if self.layers[owner].pruned else {}).items()
        }

    def lacking(self, model: nn.Module) -> list[str]:
        """Names of the quantizers and masks that nothing is known of yet."""
        found: dict[str, Quantizer | Mask] = {**self.quantizers(model), **self.masks(model)}
        return [name for name, state in found.items() if not state.calibrated]


def _scheme(text: str | None) -> Scheme | None:
    return None if text is None else Scheme.parse(text)
