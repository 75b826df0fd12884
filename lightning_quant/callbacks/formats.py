"""From the words that users write, ``weights="int4"``, to a plan with one exact format for every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_quant.graph import AttentionCalls, ModelGraph, Selection, attention_name, matching
from lightning_quant.layers import AttentionPlan, LayerPlan, Plan
from lightning_quant.quantizers import Scheme, build_quantizer

Defaults = dict[str, Any]


def parse_format(text: str, argument: str) -> Scheme:
    """The format in a string; an error names the argument that the string was given for."""
    with _named(argument):
        return Scheme.parse(text)


def weight_scheme(text: str, defaults: Defaults, argument: str = "weights") -> Scheme:
    """A weight format, with what it leaves open filled in.

    Raises:
        ValueError: if the text is no format, or none that weights can have.

    >>> str(weight_scheme("int4", {"symmetric": True, "granularity": "channel"}))
    'int4_sym_channel'
    """
    scheme = parse_format(text, argument).resolve(**defaults)
    if scheme.companded or scheme.dynamic or scheme.granularity == "token":
        raise ValueError(
            f"{argument}={text!r}: weights have a static uniform or float format, like 'int4' or 'fp8_e4m3'"
        )
    with _named(argument):
        build_quantizer(scheme, axis=0)  # refuses what it cannot hold
    return scheme


def activation_scheme(text: str, defaults: Defaults, argument: str = "activations") -> Scheme:
    """An activation format, with what it leaves open filled in.

    Raises:
        ValueError: if the text is no format, or none that a layer's input can have.

    >>> str(activation_scheme("int8", {"symmetric": False, "granularity": "tensor"}))
    'int8_asym_tensor'
    """
    scheme = parse_format(text, argument).resolve(**defaults)
    if scheme.companded:
        raise ValueError(
            f"{argument}={text!r}: a {scheme.family} format holds no negative numbers; take another, like 'int8'"
        )
    if scheme.kind == "twinlog":
        raise ValueError(f"{argument}={text!r}: a {scheme.family} format is for weights; take another, like 'int8'")
    with _named(argument):
        build_quantizer(scheme, axis=-1)
    return scheme


@contextmanager
def _named(argument: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


@dataclass
class Formats:
    """The formats that a method gives to the tensors of a model.

    Args:
        weights: format of weights, ``None`` for float.
        activations: format of layer inputs and attention operands, ``None`` for float.
        probabilities: format of attention probabilities; ``None``: as the activations.
        first_last: format of the first and last layer that run; of a denoiser the first ones are those that read the
            sample.
        embeddings: format of embedding tables, ``None`` for float.
        overrides: format by name pattern.
        weight_defaults: what a weight format that leaves it open means.
        activation_defaults: the same for activations.
        required: whether there must be a format at all.
    """

    weights: str | None
    activations: str | None
    probabilities: str | None = None
    first_last: str | None = None
    embeddings: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    weight_defaults: Defaults = field(default_factory=lambda: {"symmetric": True, "granularity": "channel"})
    activation_defaults: Defaults = field(default_factory=lambda: {"symmetric": False, "granularity": "tensor"})
    required: bool = True

    def __post_init__(self) -> None:
        if self.required and self.weights is None and self.activations is None:
            raise ValueError("weights and activations are both None: nothing would be quantized")
        self.layer_plan(self.weights, self.activations)
        if self.embeddings is not None:
            if self.weights is None:
                raise ValueError(
                    f"embeddings={self.embeddings!r}, but weights are None: a table has nothing but weights"
                )
            weight_scheme(self.embeddings, self.weight_defaults, "embeddings")
        others = {
            "first_last": self.first_last,
            **{f"overrides[{key!r}]": text for key, text in self.overrides.items()},
        }
        for argument, text in others.items():
            if text is not None:
                self.same_for_both(text, argument)

    def layer_plan(self, weights: str | None, activations: str | None) -> LayerPlan:
        """The exact formats of one layer."""
        return LayerPlan(
            None if weights is None else str(weight_scheme(weights, self.weight_defaults)),
            None if activations is None else str(activation_scheme(activations, self.activation_defaults)),
        )

    def same_for_both(self, text: str, argument: str) -> LayerPlan:
        """One format for weights and inputs, where those are quantized at all."""
        return LayerPlan(
            None if self.weights is None else str(weight_scheme(text, self.weight_defaults, argument)),
            None if self.activations is None else str(activation_scheme(text, self.activation_defaults, argument)),
        )

    def plan(
        self, model: nn.Module, graph: ModelGraph, selection: Selection, method: str, arguments: dict[str, Any]
    ) -> Plan:
        """Give every selected layer and attention site its formats."""
        modules = dict(model.named_modules())
        plan = Plan(method, arguments, skipped=dict(selection.skipped))
        for name in selection.layers:
            plan.layers[name] = self.layer_plan(self.weights, self.activations)
            if isinstance(modules[name], nn.Embedding):
                self._plan_embedding(plan, name)
        running = [name for name in graph.order if name in plan.layers and not isinstance(modules[name], nn.Embedding)]
        if self.first_last is not None and running:
            first = [name for name in graph.sample_readers if name in running] or running[:1]
            for name in {*first, running[-1]}:
                plan.layers[name] = self.same_for_both(self.first_last, "first_last")
        if self.activations is not None:
            operand = str(activation_scheme(self.activations, self.activation_defaults))
            for name in selection.attention:
                calls = graph.attention.get(name, AttentionCalls(fused=1))  # nn.MultiheadAttention shows no call
                spelled = [list(positions) for positions in calls.spelled]
                plan.attention[name] = AttentionPlan(
                    operand, operand, operand, self.probabilities or operand, calls.fused, spelled
                )
        for name in selection.doors:
            site = plan.attention.setdefault(name, AttentionPlan(None, None, None, None, fused=0))
            read = [layer for layer in graph.functional.get(name, ()) if layer in plan.layers]
            prefix = f"{name}." if name else ""
            site.functional = [layer.removeprefix(prefix) for layer in read if layer.startswith(prefix)]
        for pattern, text in self.overrides.items():
            self._override(plan, pattern, text)
        for name in graph.sample_readers:
            if name in plan.layers:
                plan.layers[name].fed_back = True
        return plan

    def _plan_embedding(self, plan: Plan, name: str) -> None:
        if self.embeddings is None:
            del plan.layers[name]
            plan.skipped[name] = "embeddings stay float; set embeddings="
        else:
            plan.layers[name] = LayerPlan(str(weight_scheme(self.embeddings, self.weight_defaults, "embeddings")), None)

    def _override(self, plan: Plan, pattern: str, text: str) -> None:
        sites = {attention_name(name): name for name, site in plan.attention.items() if site.query is not None}
        for name in matching([*plan.layers, *sites], pattern, "overrides"):
            if name in plan.layers:
                plan.layers[name] = self.same_for_both(text, "overrides")
            else:
                site = plan.attention[sites[name]]
                operand = str(activation_scheme(text, self.activation_defaults))
                probabilities = site.probabilities if self.probabilities else operand
                plan.attention[sites[name]] = replace(
                    site, query=operand, key=operand, value=operand, probabilities=probabilities
                )
