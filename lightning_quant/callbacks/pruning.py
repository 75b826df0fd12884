"""What every pruning callback shares: which layers are pruned, in which pattern, one after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.formats import Formats
from lightning_quant.callbacks.solving import Notes, blocks_of, solve_blocks
from lightning_quant.graph import ModelGraph, matching, select
from lightning_quant.layers import AttentionPlan, LayerPlan, Plan, QuantizedLayer, twin_of
from lightning_quant.modules.block_sequence import Block
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
        self.patterns: dict[str, Pattern] = {}  # of the layers that are being pruned
        self.overrides = {key: str(Pattern.parse(text)) for key, text in (overrides or {}).items()}

    # ---------------------------------------------------------------- what a method says

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {"pattern": self.pattern, "overrides": self.overrides, "target": self.target, "skip": self.skip}

    @property
    def slots(self) -> list[str]:
        """It prunes."""
        return [QuantizedLayer.PRUNED]

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Choose the patterns; changes nothing."""
        selection = select(model, graph, self.target, self.skip, attention=False, slots=self.slots)
        plan = Plan(type(self).__name__, self.arguments, skipped=dict(selection.skipped))
        able = [name for name in selection.layers if not isinstance(model.get_submodule(name), nn.Embedding)]
        patterns = dict.fromkeys(self.inside(model, graph, able), self.pattern)
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

    def inside(self, model: nn.Module, graph: ModelGraph, layers: Sequence[str]) -> list[str]:
        """Those of the layers that are pruned unless something else is asked for."""
        blocks = tuple(f"{block}." for block in graph.blocks)
        return [name for name in layers if name.startswith(blocks)] or list(layers)


class SolvedPruning(PruningCallback):
    """Prunes the blocks of a model one after another, each by what the pruned ones before it make of the data.

    Within a block the layers are pruned in the order in which they run. What lies outside the blocks stays dense;
    :class:`~lightning_quant.MagnitudePruning` with ``target`` prunes that.

    Args:
        pattern: share of the weights that are pruned, as 0.5, or ``"2:4"``.
        overrides: pattern of single layers by name pattern, ``{"blocks.0.*": "4:8"}``.
        blocks: name patterns of the modules that are pruned one after another; default: the repeated blocks.
        min_tokens: calibration tokens for each input of a layer below which it warns.
        state_dir: where finished blocks are written, for a killed run to go on; default: a folder of the Trainer's.
        device: where one block at a time is pruned, ``"cuda"`` for a model that stays on the CPU.
        calibration_samples: how many samples calibrate.
        common: see :class:`PruningCallback`.
    """

    def __init__(
        self,
        pattern: float | str = 0.5,
        overrides: Mapping[str, float | str] | None = None,
        blocks: Sequence[str] | None = None,
        min_tokens: float = 4.0,
        state_dir: str | None = None,
        device: str | None = None,
        calibration_samples: int = 128,
        **common: Any,
    ) -> None:
        super().__init__(pattern, overrides, calibration_samples=calibration_samples, **common)
        self.blocks = [blocks] if isinstance(blocks, str) else None if blocks is None else list(blocks)
        self.min_tokens, self.state_dir, self.device = min_tokens, state_dir, device
        self.solved: dict[str, Notes] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "blocks": self.blocks}

    def inside(self, model: nn.Module, graph: ModelGraph, layers: Sequence[str]) -> list[str]:
        """The layers of the blocks."""
        blocks = tuple(f"{name}." for name in blocks_of(model, graph, layers, self.blocks))
        return [name for name in layers if name.startswith(blocks)]

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Choose the patterns, of layers with one weight inside the blocks; changes nothing."""
        plan = super().plan_for(model, graph)
        able = self.inside(model, graph, list(plan.layers))
        for name in list(plan.layers):
            twin = twin_of(model.get_submodule(name))
            if name not in able:
                raise ValueError(
                    f"overrides: `{name}` lies outside the blocks, which are pruned one after another; name the "
                    f"modules that are with blocks=[...], or prune it with MagnitudePruning(target={name!r})"
                )
            if twin is not None and twin.weight_names != ("weight",):
                del plan.layers[name]
                plan.skipped[name] = f"a {twin.float_class.__name__} has several weights; MagnitudePruning prunes them"
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Block after block; a layer whose turn has not come computes with its dense weight."""
        layers, pl_module = plan.quantized_layers(model), cast(LightningModule, model)
        self.patterns = {name: Pattern.parse(planned.pruned or "") for name, planned in plan.layers.items()}
        blocks = blocks_of(model, graph, list(plan.layers), self.blocks)
        how = (self.arguments, self.state_dir, self.device, self.min_tokens)
        self.solved = solve_blocks(pl_module.trainer, pl_module, self, blocks, layers, list(batches), run, *how)
        self.give_back_unreached(model, plan, set(self.solved))

    # ---------------------------------------------------------------- one layer, as solve_blocks asks for it

    def statistics(self, name: str, layer: nn.Module) -> Hessian:
        """How large each input is."""
        return Hessian.of(layer, diagonal=True)

    def token_weights(self, block: Block) -> Sequence[Tensor] | None:
        """All tokens count alike."""
        return None

    def solve(self, name: str, layer: nn.Module, statistics: Hessian, importance: Tensor | float = 1.0) -> Notes:
        """Prune one layer.

        Args:
            name: of the layer.
            layer: what is pruned.
            statistics: of its inputs.
            importance: what the scores are multiplied with, (out, inputs) or less.
        """
        assert isinstance(layer, QuantizedLayer)
        rows = finite_rows(layer, "weight", name)
        return self.prune(name, layer, rows, statistics, importance)

    @abstractmethod
    def prune(
        self, name: str, layer: QuantizedLayer, rows: Tensor, statistics: Hessian, importance: Tensor | float
    ) -> Notes:
        """Prune one layer, whose weight as it computes with it is these rows."""


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


def row_squares(statistics: Hessian, rows: int) -> Tensor:
    """How large the inputs of each row are: (inputs,), or (rows, inputs) where groups of rows read different ones."""
    squares = statistics.diagonal()
    return squares if squares.dim() == 1 else squares.repeat_interleave(rows // len(squares), 0)


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
