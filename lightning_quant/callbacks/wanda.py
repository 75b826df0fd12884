"""Wanda: weights are judged together with the activations that they meet (ICLR 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.pruning import SolvedPruning, row_squares
from lightning_quant.callbacks.solving import Notes
from lightning_quant.layers import QuantizedLayer
from lightning_quant.solvers import Compared, keep_best, wanda_scores


class Wanda(SolvedPruning):
    r"""Sets the weights to 0 that matter least to the output, by their size and by that of the input they meet.

    .. math:: \hat W = M \odot W, \quad M_{ij} = 0 \text{ for the smallest } |W_{ij}| \, \|X_j\|_2 \text{ of each row}

    The blocks are pruned one after another, on what the pruned ones before them make of the calibration data. Weights
    that are kept stay as they are.

    Reference: Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, ICLR 2024.

    Args:
        pattern: share of the weights that are pruned, as 0.5, or ``"2:4"``.
        compared: whether the weights of one ``"row"`` compete to be kept, or all of a ``"layer"``.
        common: see :class:`~lightning_quant.callbacks.pruning.SolvedPruning`.

    Attributes:
        solved: of each layer the tokens it was judged on, and the squared output error relative to the output, if
            inputs were independent.

    Raises:
        ValueError: for an unknown pattern, one that the rows of a layer have no room for, NaN in weights or calibration
            data, or a model without blocks.

    >>> callback = Wanda("2:4", calibration_samples=128)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(self, pattern: float | str = 0.5, compared: Compared = "row", **common: Any) -> None:
        super().__init__(pattern, **common)
        if compared not in ("layer", "row"):
            raise ValueError(f"compared={compared!r} is neither 'layer' nor 'row'")
        self.compared: Compared = compared

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "compared": self.compared}

    def scores(self, weight: Tensor, squares: Tensor) -> Tensor:
        """What decides which weights are kept: their size, and that of their input."""
        return wanda_scores(weight, squares)

    def prune(
        self, name: str, layer: QuantizedLayer, rows: Tensor, statistics: Hessian, importance: Tensor | float
    ) -> Notes:
        """Keep the best weights of each row, or of the layer."""
        scores = self.scores(rows, row_squares(statistics, len(rows)))
        keep = keep_best(scores * importance, self.patterns[name], self.compared)
        layer.prune(keep.view_as(layer.float_rows()))
        power = scores.double().square()
        return {"error": float(power[~keep].sum() / power.sum().clamp(min=1e-30))}
