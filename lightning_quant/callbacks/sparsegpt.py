"""SparseGPT: what is pruned is made good by the weights that are kept (ICML 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.pruning import SolvedPruning
from lightning_quant.callbacks.solving import Notes
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Pattern
from lightning_quant.solvers import ColumnSolver, Compared, Masking, OnGrid, relative_error, wanda_scores


class SparseGPT(SolvedPruning):
    r"""Prunes the columns of a weight one after another; the columns that are left make good what each loss did.

    .. math::
        \min_{M, \hat W} \| W X - (M \odot \hat W) X \|^2, \qquad H = 2 X X^\top, \quad (H + \lambda I)^{-1} = U^\top U

    Of :math:`W^2_{ij} / U^2_{jj}`, what it costs to lose a weight, the smallest are chosen: among all rows of
    ``mask_block`` columns, or among the m weights of each group, always as the columns before have left them. The
    blocks are pruned one after another, on what the pruned ones before them make of the calibration data.

    Where another callback has quantized the weights before, what is kept is rounded to that grid in the same loop.

    Reference: Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
    ICML 2023.

    Args:
        pattern: share of the weights that are pruned, as 0.5, or ``"2:4"``.
        damp: :math:`\lambda` in parts of the mean of diag(H).
        mask_block: of how many columns the weights compete to be kept.
        common: see :class:`~lightning_quant.callbacks.pruning.SolvedPruning`.

    Attributes:
        solved: of each layer the tokens it was solved on, and the squared output error relative to the output.

    Raises:
        ValueError: for an unknown pattern, one that the rows of a layer have no room for, NaN in weights or calibration
            data, or a model without blocks.

    >>> callback = SparseGPT("2:4", calibration_samples=128)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    compared: Compared = "layer"  # all rows of some columns compete

    def __init__(self, pattern: float | str = 0.5, damp: float = 0.01, mask_block: int = 128, **common: Any) -> None:
        super().__init__(pattern, **common)
        if mask_block < 1:
            raise ValueError(f"mask_block={mask_block} must be at least 1")
        self.solver, self.mask_block = ColumnSolver(damp), mask_block

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "damp": self.solver.damp, "mask_block": self.mask_block}

    def statistics(self, name: str, layer: nn.Module) -> Hessian:
        """The Hessian."""
        return Hessian.of(layer)

    def scores(self, weight: Tensor, squares: Tensor) -> Tensor:
        """What decides which weights are kept, as far as the inputs are independent."""
        return wanda_scores(weight, squares)

    def prune(
        self, name: str, layer: QuantizedLayer, rows: Tensor, statistics: Hessian, importance: Tensor | float
    ) -> Notes:
        """Column by column; the rounded weights, if there are such, are rounded anew."""
        weight, hessians = layer.float_rows().detach().flatten(1).double(), statistics.matrix()
        if hessians.dim() == 2:
            hessians = hessians.unsqueeze(0)  # a convolution has one for each group of channels
        factors = torch.as_tensor(importance, device=weight.device).expand_as(weight)
        kept: list[Tensor] = []
        values: list[Tensor] = []
        for part, (hessian, these) in enumerate(zip(hessians, weight.chunk(len(hessians)), strict=True)):
            place = slice(part * len(these), (part + 1) * len(these))
            fix = self._fix(layer, self.patterns[name], place, factors[place])
            solved = self.solver.solve(these, hessian, fix).values
            kept.append(fix.kept)
            values.append(solved)
        shape, found = layer.float_rows().shape, torch.cat(values)
        layer.prune(torch.cat(kept).reshape(shape), found.reshape(shape))
        return {"error": relative_error(weight, found, hessians)}

    def _fix(self, layer: QuantizedLayer, pattern: Pattern, rows: slice, factors: Tensor) -> Masking:
        quantizer = layer.weight_quantizer
        grid = None if quantizer is None or not quantizer.calibrated else OnGrid(quantizer, rows)
        if pattern.group is not None and pattern.kept is not None:
            return _Weighted(factors, pattern=(pattern.group - pattern.kept, pattern.group), then=grid)
        return _Weighted(factors, density=1 - pattern.sparsity, mask_block=self.mask_block, then=grid)


class _Weighted(Masking):
    """Chooses by the cost of a loss times a factor for each weight."""

    def __init__(self, factors: Tensor, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.factors = factors

    def look_ahead(self, ahead: Tensor, position: int, spread: Tensor) -> None:
        """The factors of the columns ahead, as if these were so much larger."""
        if position % self.width == 0:
            ahead = ahead * self.factors[:, position : position + ahead.shape[1]]
        super().look_ahead(ahead, position, spread)
