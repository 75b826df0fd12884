"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.pruning import PruningCallback, finite_rows
from lightning_quant.callbacks.solving import Notes
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import Pattern
from lightning_quant.solvers import Compared, keep_best


class MagnitudePruning(PruningCallback):
    r"""Sets the smallest weights of every layer to 0: the baseline of all pruning.

    .. math:: \hat W = M \odot W, \quad M_{ij} = 0 \text{ for the smallest } |W_{ij}|

    among all weights of a layer, among those of a row, or among those of a group such as four consecutive inputs.

    No data is looked at, but that one batch runs through the model and tells which layers there are. A fit afterwards
    trains what is kept.

    Args:
        pattern: share of the weights that are pruned, as 0.5, or ``"2:4"``.
        compared: whether all weights of a ``"layer"`` compete to be kept, or those of one ``"row"``.
        overrides: pattern of single layers by name pattern, ``{"blocks.0.*": "4:8"}``.
        common: ``target``, ``skip``, ``calibration_samples``, ``calibration_loader``, ``during_fit``: see
            :class:`~lightning_quant.callbacks.base.QuantizationCallback`.

    Raises:
        ValueError: for an unknown pattern, one that the rows of a layer have no room for, or a weight that is not
            finite.

    >>> callback = MagnitudePruning("2:4")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        pattern: float | str = 0.5,
        compared: Compared = "layer",
        overrides: Mapping[str, float | str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(pattern, overrides, **common)
        if compared not in ("layer", "row"):
            raise ValueError(f"compared={compared!r} is neither 'layer' nor 'row'")
        self.compared: Compared = compared

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "compared": self.compared}

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Look at the weights, layer after layer."""
        self.give_back_unreached(model, plan, set(graph.order))
        self.patterns = {name: Pattern.parse(planned.pruned or "") for name, planned in plan.layers.items()}
        for name, layer in plan.quantized_layers(model).items():
            self.solve(name, layer)

    def scores(self, weight: Tensor, squares: Tensor) -> Tensor:
        """What decides which weights are kept: their size."""
        return weight.abs()

    def solve(
        self, name: str, layer: nn.Module, statistics: Hessian | None = None, importance: Tensor | float = 1.0
    ) -> Notes:
        """Prune one layer.

        Args:
            name: of the layer.
            layer: what is pruned.
            statistics: not looked at.
            importance: what the scores are multiplied with, (out, inputs) or less.
        """
        assert isinstance(layer, QuantizedLayer)
        for weight in layer.masks():
            scores = finite_rows(layer, weight, name).abs() * importance
            keep = keep_best(scores, self.patterns[name], self.compared)
            layer.prune(keep.view_as(layer.float_rows(weight)), name=weight)
        return {}
