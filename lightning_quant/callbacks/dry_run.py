"""What a callback would do to a model, without doing it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, twin_of
from lightning_quant.quantizers import Pattern, Scheme


@dataclass
class PlannedLayer:
    """One row of a dry run.

    Args:
        name: of the layer.
        kind: its class.
        macs: multiply-accumulates in one forward of the batch.
        weights: format its weights would get, ``None`` for float; or the pattern in which they would be pruned.
        inputs: format its inputs would get, ``None`` for float.
        float_bytes: size of its weights now.
        bytes: size of its weights then, scales included.
        why_float: why nothing would be done to it, ``None`` if something would.
    """

    name: str
    kind: str
    macs: int
    weights: str | None
    inputs: str | None
    float_bytes: int
    bytes: int
    why_float: str | None


@dataclass
class DryRun:
    """What a callback would do to a model; print it for a table.

    Args:
        plan: the plan that calibration would carry out.
        layers: every layer that could be quantized, in call order.
        model_bytes: size of all parameters now.
    """

    plan: Plan
    layers: list[PlannedLayer]
    model_bytes: int

    @property
    def quantized_bytes(self) -> int:
        """Size of all parameters then, scales included."""
        return self.model_bytes - sum(layer.float_bytes - layer.bytes for layer in self.layers)

    @property
    def quantized_macs(self) -> float:
        """Share of the layers' multiply-accumulates that would be quantized, 0 to 1."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.why_float is None) / max(total, 1)

    def table(self) -> Table:
        """A rich table: one line a layer, what would be quantized first."""
        names = Column("layer", no_wrap=True)  # in full: they are what skip= and overrides= ask for
        pruned = any(layer.pruned is not None for layer in self.plan.layers.values())
        verb, share = ("prune", "in pruned layers") if pruned else ("quantize", "quantized")
        table = Table(names, "kind", "weights", "inputs", "size", "MACs", title=f"{self.plan.method} would {verb}")
        for layer in sorted(self.layers, key=lambda layer: layer.why_float is not None):
            formats = (layer.weights or "float", layer.inputs or "float") if layer.why_float is None else ("float", "")
            size = (
                f"{_bytes(layer.float_bytes)} -> {_bytes(layer.bytes)}" if layer.why_float is None else layer.why_float
            )
            table.add_row(layer.name, layer.kind, *formats, size, f"{layer.macs / 1e6:.1f} M")
        for name, site in self.plan.attention.items():
            if site.query or site.probabilities:
                table.add_row(name, "attention", "", f"{site.query}, probabilities {site.probabilities}", "", "")
        table.caption = (
            f"{_bytes(self.model_bytes)} -> {_bytes(self.quantized_bytes)}; "
            f"{100 * self.quantized_macs:.1f} % of the layers' multiplications {share}"
        )
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def dry_run(model: nn.Module, graph: ModelGraph, plan: Plan) -> DryRun:
    """Put sizes and costs to a plan.

    Args:
        model: the float model.
        graph: what one forward told about it.
        plan: what would be done.
    """
    rows = []
    modules = dict(model.named_modules())
    ran = {name: position for position, name in enumerate(graph.order)}
    names = sorted({*plan.layers, *plan.skipped}, key=lambda name: ran.get(name, len(ran)))
    for name in names:
        layer, planned, cost = modules[name], plan.layers.get(name), graph.costs.get(name)
        why = plan.skipped.get(name) if planned is None else None
        if planned is not None and name not in ran and name not in graph.costs:
            planned, why = None, "it did not run for this batch; given back unless calibration reaches it"
        twin = twin_of(layer)
        weights = [
            w for w in (getattr(layer, n, None) for n in (twin.weight_names if twin else ("weight",))) if w is not None
        ]
        now = sum(weight.numel() * weight.element_size() for weight in weights)
        formats: tuple[str | None, str | None] = (None, None)
        then = now
        if planned is not None and planned.pruned is not None:
            formats, then = (f"pruned {planned.pruned}", None), sum(_kept(w, planned.pruned) for w in weights)
        elif planned is not None:
            formats = (planned.weights, planned.inputs)
            then = now if planned.weights is None else sum(_packed(w, planned.weights) for w in weights)
        rows.append(PlannedLayer(name, type(layer).__name__, cost.macs if cost else 0, *formats, now, then, why))
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return DryRun(plan, rows, model_bytes)


def _packed(weight: nn.Parameter, text: str) -> int:
    """Bytes of packed codes, and of a float32 scale (and zero point, for each sign) per channel, group or tensor."""
    scheme = Scheme.parse(text)
    scales = {"tensor": 1, "channel": len(weight), "group": weight.numel() // (scheme.group_size or 1)}
    state = {"int": 2, "twinlog": 4}.get(scheme.kind, 1)
    return -(-weight.numel() * scheme.bits // 8) + 4 * state * scales[scheme.granularity or "tensor"]


def _kept(weight: nn.Parameter, text: str) -> int:
    """Bytes of the weights that are kept, and of one bit for each that tells which."""
    kept = round(weight.numel() * (1 - Pattern.parse(text).sparsity))
    return kept * weight.element_size() - (-weight.numel() // 8)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
