"""Everything that a report tells, before anything is drawn."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.checkpoint import record_of
from lightning_quant.layers import Plan
from lightning_quant.quantizers import Scheme
from lightning_quant.reports.errors import LayerError, ModelErrors, TensorError
from lightning_quant.reports.sizes import Sizes, model_sizes


@dataclass
class Findings:
    """What was found out about a quantized model.

    Args:
        model: the class of the model, with that of the network inside it.
        plans: what was done to it, each with the name of the part that it was done to.
        layers: the errors of its layers, in the order in which they ran.
        output: SQNR of what the model returns, in dB; None if that was not to be had.
        sizes: its bytes.
        before: metrics of the float model, by name.
        after: metrics of the quantized model.
        made: how it was measured, and by what; words by words.
        worst: how many layers to look at closely.
    """

    model: str
    plans: list[tuple[str, Plan]]
    layers: list[LayerError]
    output: float | None
    sizes: Sizes
    before: Mapping[str, float]
    after: Mapping[str, float]
    made: dict[str, Any] = field(default_factory=dict)
    worst: int = 5

    @classmethod
    def of(
        cls,
        model: nn.Module,
        errors: ModelErrors | None,
        before: Mapping[str, float],
        after: Mapping[str, float],
        made: dict[str, Any],
        worst: int = 5,
    ) -> Findings:
        """Look at a model that was measured; ``errors`` is None if nothing in it is quantized."""
        layers, output = ([], None) if errors is None else (errors.layers(), errors.output_sqnr)
        return cls(described(model), plans_of(model), layers, output, model_sizes(model), before, after, made, worst)

    @property
    def method(self) -> str:
        """The callbacks that quantized the model."""
        return " + ".join(dict.fromkeys(plan.method for _, plan in self.plans)) or "Quantization"

    @property
    def bits(self) -> str:
        """The usual bits of weights and activations, ``W4A4``."""
        weights = Counter(tensor.bits for layer in self.layers for tensor in layer.weights)
        inputs = Counter(tensor.bits for layer in self.layers for tensor in layer.inputs)
        usual = [f"{letter}{found.most_common(1)[0][0]}" for letter, found in (("W", weights), ("A", inputs)) if found]
        return "".join(usual)

    @property
    def worst_layers(self) -> list[LayerError]:
        """The layers of lowest SQNR, the worst first."""
        measured = [layer for layer in self.layers if layer.sqnr is not None]
        return sorted(measured, key=lambda layer: -layer.badness)[: self.worst]

    @property
    def loaded(self) -> bool:
        """Whether the weights are exactly what their codes stand for, as they are once they were saved as codes."""
        weights = [tensor.sqnr for layer in self.layers for tensor in layer.weights]
        return bool(weights) and all(sqnr == math.inf for sqnr in weights)

    @property
    def skipped(self) -> dict[str, str]:
        """Why a layer stayed float, by its name."""
        return {
            f"{part}.{name}".removeprefix("."): why for part, plan in self.plans for name, why in plan.skipped.items()
        }

    @property
    def headline_metric(self) -> str | None:
        """The metric that a reader looks for first: an accuracy or the like before a loss or anything of ours."""

        def unlikely(name: str) -> tuple[bool, bool, bool]:
            telling = any(word in name.lower() for word in ("acc", "top", "f1", "auroc", "map", "bleu", "fid", "ppl"))
            return name.startswith("fidelity/"), "loss" in name.lower(), not telling

        return min(self.after, key=unlikely, default=None)


def plans_of(model: nn.Module) -> list[tuple[str, Plan]]:
    """What was done to a model, each with the name of the part that the record is kept with."""
    records = [(name, record_of(module)) for name, module in model.named_modules()]
    return [(name, plan) for name, record in records if record is not None for plan in record.plans.values()]


def circumstances(trainer: Trainer, pl_module: LightningModule, function: str, samples: int) -> dict[str, str]:
    """When, on what and with which versions a model was measured, in words.

    Args:
        trainer: the Trainer.
        pl_module: the model.
        function: of the Trainer, such as ``validate``.
        samples: how many were measured.
    """
    ranks = f" of rank 0 of {trainer.world_size}" if trainer.world_size > 1 else ""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "measured": f"in trainer.{function}, on {samples} samples{ranks}",
        "precision": f"{trainer.precision} on {pl_module.device}",
        **{package: _version(package) for package in ("lightning-quant", "lightning", "torch")},
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it runs from its source
        return "not installed"


def described(model: nn.Module) -> str:
    """The class of a model, with that of the network inside it.

    >>> net = nn.Sequential(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10)), nn.Linear(10, 1))
    >>> described(net)
    'Sequential(Sequential)'
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for child in model.children():
        own = sum(parameter.numel() for parameter in child.parameters())
        if own > 0.9 * total and next(child.children(), None) is not None:
            return f"{_class_name(model)}({_class_name(child)})"
    return _class_name(model)


def _class_name(module: nn.Module) -> str:
    return getattr(module, "float_class", type(module)).__name__


def main_cause(layer: LayerError) -> tuple[TensorError, float] | None:
    """The tensor with most of a layer's noise, and its share of it, taking the tensors' noises as independent."""
    noises = {
        tensor: 10 ** (-tensor.sqnr / 10)
        for tensor in layer.tensors
        if tensor.sqnr is not None and math.isfinite(tensor.sqnr)
    }
    total = sum(noises.values())
    if len(noises) < 2 or not total:
        return None
    worst = max(noises, key=lambda tensor: noises[tensor])
    return worst, noises[worst] / total


def spare(layers: list[LayerError]) -> str:
    """The argument that would spare some layers: 8 bits for those with fewer, floats for those that have them."""
    names = [layer.name.rpartition(".")[0] if layer.kind == "attention" else layer.name for layer in layers]
    # Several calls of attention share one name; patterns do without the name that compiling adds.
    names = list(dict.fromkeys(name.replace("_orig_mod.", "") for name in names))
    if all(Scheme.parse(tensor.scheme).bits >= 8 for layer in layers for tensor in layer.tensors):
        return f"skip={names!r}"
    return "overrides={" + ", ".join(f'"{name}": "int8"' for name in names) + "}"
