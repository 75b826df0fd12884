"""What every pruning callback shares: which layers are pruned, in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.formats import Formats
from lightning_quant.graph import ModelGraph, matching, select
from lightning_quant.layers import AttentionPlan, LayerPlan, Plan, QuantizedLayer, twin_of
from lightning_quant.quantizers import Pattern


class PruningCallback(QuantizationCallback):
    """Sets weights to 0, on ``on_validation_start``, so that ``trainer.validate`` reports the pruned model's metrics.

    Pruned are the layers inside the model's repeated blocks; what lies outside, the stem, the head, stays dense unless
    ``overrides`` names it, and a model without repeated blocks is pruned throughout. Embeddings and biases are never.
    The weights are masked, not changed: ``remove`` gives the dense model back bit for bit, and ``trainer.fit`` trains
    what is kept.

    Args:
        pattern: share of the weights that are pruned, as 0.5, or ``"2:4"``: of every four consecutive inputs of a row
            two are kept.
        overrides: pattern of single layers by name pattern, ``{"blocks.0.*": "4:8"}``.
        common: ``target``, ``skip``, ``calibration_samples``, ``calibration_loader``, ``during_fit``: see
            :class:`~lightning_quant.callbacks.base.QuantizationCallback`.
    """

    def __init__(
        self, pattern: float | str = 0.5, overrides: Mapping[str, float | str] | None = None, **common: Any
    ) -> None:
        super().__init__(_NothingRounded(None, None), attention=False, **common)
        if self.reconstruct is not None:
            raise ValueError(f"{type(self).__name__} does not round weights: reconstruct= has nothing to learn")
        self.pattern = str(Pattern.parse(pattern))
        self.overrides = {key: str(Pattern.parse(text)) for key, text in (overrides or {}).items()}

    # ---------------------------------------------------------------- what a method says

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {"pattern": self.pattern, "overrides": self.overrides, "target": self.target, "skip": self.skip}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Choose the patterns; changes nothing."""
        slots = [QuantizedLayer.PRUNED]
        selection = select(model, graph, self.target, self.skip, attention=False, slots=slots)
        plan = Plan(type(self).__name__, self.arguments, skipped=dict(selection.skipped), step=self.step)
        able = [name for name in selection.layers if not isinstance(model.get_submodule(name), nn.Embedding)]
        inside = [name for name in able if name.startswith(tuple(f"{block}." for block in graph.blocks))] or able
        patterns = dict.fromkeys(inside, self.pattern)
        for key, text in self.overrides.items():
            patterns |= dict.fromkeys(matching(able, key, "overrides"), text)
        for name in selection.layers:
            if name in patterns:
                plan.layers[name] = LayerPlan(None, None, pruned=patterns[name])
            else:
                plan.skipped[name] = (
                    "it is outside the repeated blocks; set overrides=" if name in able else "embeddings stay dense"
                )
        _require_whole_groups(model, plan)
        for name in selection.doors:
            prefix = f"{name}." if name else ""
            read = [layer.removeprefix(prefix) for layer in graph.functional.get(name, ()) if layer in plan.layers]
            plan.attention[name] = AttentionPlan(None, None, None, None, fused=0, functional=read)
        return plan


class _NothingRounded(Formats):
    """No format for anything."""

    def __post_init__(self) -> None:
        """There is nothing to refuse."""


def finite_rows(layer: QuantizedLayer, weight: str, name: str) -> Tensor:
    """A weight as its layer computes with it before it is pruned, as rows: (out, inputs).

    Raises:
        ValueError: if it holds NaN or infinity.
    """
    rows = layer.rounded_rows(weight).detach().flatten(1)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"`{name}.{weight}` holds NaN or infinity; leave the layer dense with skip=[{name!r}]")
    return rows


def _require_whole_groups(model: nn.Module, plan: Plan) -> None:
    for name, planned in plan.layers.items():
        layer, pattern = model.get_submodule(name), Pattern.parse(planned.pruned or "")
        twin = twin_of(layer)
        for weight in (getattr(layer, weight, None) for weight in (twin.weight_names if twin else ())):
            if weight is None:
                continue
            refusal = pattern.why_not((weight.t() if twin and twin.transposed else weight)[0].numel())
            if refusal:
                raise ValueError(
                    f"`{name}` cannot be pruned {pattern}: {refusal}; set skip=[{name!r}], or overrides= with a share"
                )
