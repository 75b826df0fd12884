"""LoRC: a low-rank branch makes good what rounding did to a weight (ZeroQuant-V2, 2023)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.gptq import GPTQ, Rounded
from lightning_quant.callbacks.solving import Notes
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.solvers import Rounding, low_rank, output_error

DTYPES = {16: torch.float16, 32: torch.float32}


class LoRC(GPTQ):
    r"""Rounds weights, and keeps the largest part of the error beside them as a product of two thin matrices.

    .. math:: E = W - \hat W \approx A B, \qquad y = x \hat W^\top + (x B^\top) A^\top

    with A (out, m) and B (m, in) from the singular value decomposition of :math:`E`, or, weighed by what the layer
    reads, from that of :math:`E H^{1/2}`. That takes :math:`16 m (out + in) / (out \cdot in)` more bits for each
    weight. The branch reads the rounded activations where there are such. ``KernelSwap`` leaves these layers simulated.

    Reference: Yao et al., *ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low
    Rank Compensation*, 2023.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs, ``None`` for weight-only quantization.
        rank: m.
        metric: ``"frobenius"``, as in the paper, or ``"hessian"``.
        solver: ``"nearest"``, or ``"gptq"``.
        branch_bits: 16 or 32, of A and B.
        arguments: see :class:`GPTQ`.

    Attributes:
        solved: what was noted of each layer in this process, among it the part of the squared output error that the
            branch leaves (``left``).

    Raises:
        ValueError: for an unknown metric or solver, a rank below 1, and where :class:`GPTQ` does.

    >>> callback = LoRC(weights="int3_g128", rank=8)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4_g128",
        activations: str | None = None,
        rank: int = 8,
        metric: Literal["frobenius", "hessian"] = "frobenius",
        solver: Literal["nearest", "gptq"] = "nearest",
        branch_bits: Literal[16, 32] = 16,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, **arguments)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        if metric not in ("frobenius", "hessian"):
            raise ValueError(f"metric={metric!r} is neither 'frobenius' nor 'hessian'")
        if solver not in ("nearest", "gptq"):
            raise ValueError(f"solver={solver!r} is neither 'nearest' nor 'gptq'")
        if branch_bits not in DTYPES:
            raise ValueError(f"branch_bits={branch_bits} is neither 16 nor 32")
        self.rank, self.metric, self.rounded_by, self.branch_bits = rank, metric, solver, branch_bits

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {"rank": self.rank, "metric": self.metric, "solver": self.rounded_by, "branch_bits": self.branch_bits}
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """A branch for every layer inside a block."""
        plan = super().plan_for(model, graph)
        inside = tuple(f"{block}." for block in self.blocks_in(model, graph, plan))
        for name, layer in plan.layers.items():
            solvable = not isinstance(model.get_submodule(name), (nn.MultiheadAttention, nn.Embedding))
            if name.startswith(inside) and solvable and getattr(model.get_submodule(name), "groups", 1) == 1:
                layer.low_rank = self.rank
        return plan

    def solve(self, name: str, layer: nn.Module, statistics: Hessian) -> Notes:
        """Round one weight; then split its error."""
        notes = super().solve(name, layer, statistics)
        assert isinstance(layer, QuantizedLayer)
        branch = layer.low_rank_branch()
        if branch is None:
            return notes
        weight, rounded = (rows.detach().flatten(1).double() for rows in (layer.weight_rows(), layer.rounded_rows()))
        hessian = statistics.matrix()
        up, down = low_rank(weight - rounded, self.rank, hessian if self.metric == "hessian" else None)
        branch.set(up.to(DTYPES[self.branch_bits]), down.to(DTYPES[self.branch_bits]))
        after = layer.rounded_rows().detach().flatten(1).double()
        error, left = (float(output_error(weight, found, hessian).sum()) for found in (rounded, after))
        share = left / error if error else 1.0
        return {**notes, "error": notes["error"] * share, "left": share}

    def round(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor, statistics: Hessian) -> Rounded:
        """To the nearest, or as GPTQ does."""
        if self.rounded_by == "gptq":
            return super().round(weight, hessian, rounding, keep, statistics)
        return Rounded(rounding.nearest(weight), rounding.state, {})
