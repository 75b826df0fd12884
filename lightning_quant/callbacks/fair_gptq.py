"""Fair-GPTQ: paired sentences are given the same outputs while weights are rounded (2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.gptq import GPTQ, Rounded
from lightning_quant.graph import ModelGraph, matches
from lightning_quant.layers import Plan
from lightning_quant.solvers import Rounding, against_differences, output_error

OUTPUTS = ("o_proj", "out_proj", "c_proj", "proj", "down_proj", "fc2", "dense_4h_to_h")


class FairGPTQ(GPTQ):
    r"""Shifts weights so that the two sentences of a pair come out alike, then rounds them as GPTQ does.

    .. math::
        \min_{\hat W} \| W X - \hat W X \|^2 + \alpha \| \hat W (X_0 - X_1) \|^2, \qquad
        W \leftarrow W - W H_{01} (H + H_{01} + \lambda I)^{-1}, \quad
        H_{01} = \frac{2 \alpha}{n} \sum (x_0 - x_1)(x_0 - x_1)^\top

    where :math:`X_0` and :math:`X_1` are what a layer reads of the two sentences, token by token. The calibration data
    are such pairs, a stereotype and its opposite one after the other, in batches of an even number of sentences; padded
    to one length, with the same padding in both.

    Reference: *Fair-GPTQ: Bias-Aware Quantization for Large Language Models*, 2025.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs, ``None`` for weight-only quantization.
        alpha: how much differences count; 0 is GPTQ.
        debias: name patterns of the layers that are shifted; default: output projections by their usual names.
        depth: which blocks' layers are: ``"all"``, or a tenth of them: the ``"lowest"``, the ``"highest"``, or half of
            that at either end (``"ends"``), at least one.
        pairs_in_loop: let :math:`H_{01}` have a part in the rounding too, where the published code has not.
        arguments: see :class:`GPTQ`.

    Raises:
        ValueError: for an odd batch, several ranks, ``debias`` that names nothing, and where :class:`GPTQ` does.

    >>> callback = FairGPTQ(weights="int4_g128", calibration_loader=pairs)  # doctest: +SKIP
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4_g128",
        activations: str | None = None,
        alpha: float = 0.1,
        debias: Sequence[str] = OUTPUTS,
        depth: Literal["all", "lowest", "highest", "ends"] = "all",
        pairs_in_loop: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, **arguments)
        if alpha < 0:
            raise ValueError(f"alpha={alpha} must be 0 or more")
        if depth not in ("all", "lowest", "highest", "ends"):
            raise ValueError(f"depth={depth!r} is none of 'all', 'lowest', 'highest' and 'ends'")
        self.alpha, self.depth, self.pairs_in_loop = alpha, depth, pairs_in_loop
        self.debias = [debias] if isinstance(debias, str) else list(debias)
        self.debiased: set[str] = set()

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {name: getattr(self, name) for name in ("alpha", "debias", "depth", "pairs_in_loop")}
        return {**super().arguments, **own}

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve on one rank: several would part the pairs."""
        if trainer.world_size > 1:
            raise ValueError(f"{type(self).__name__} needs pairs, which {trainer.world_size} ranks would part: use one")
        super().calibrate(trainer, pl_module)

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The same layers, some of which are shifted."""
        plan = super().plan_for(model, graph)
        blocks = self.blocks_in(model, graph, plan)
        count = {"all": len(blocks), "ends": max(1, round(len(blocks) / 20))}.get(self.depth, round(len(blocks) / 10))
        low, high = blocks[: max(1, count)], blocks[-max(1, count) :]
        chosen = {"all": low, "lowest": low, "highest": high, "ends": low + high}[self.depth]
        self.debiased = {
            name
            for name in plan.layers
            if name.startswith(tuple(f"{block}." for block in chosen))
            and any(matches(name, pattern) for pattern in self.debias)
        }
        if not self.debiased:
            raise ValueError(f"debias={self.debias} names no layer of these blocks; its layers are {list(plan.layers)}")
        return plan

    def statistics(self, name: str, layer: nn.Module) -> Hessian:
        """The Hessian, and that of the differences where a layer is shifted."""
        return PairHessian.of(layer) if name in self.debiased else super().statistics(name, layer)

    def round(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor, statistics: Hessian) -> Rounded:
        """Shift, then round."""
        if not isinstance(statistics, PairHessian) or not self.alpha:
            return super().round(weight, hessian, rounding, keep, statistics)
        pairs = self.alpha * statistics.pairs.matrix()
        shifted = against_differences(weight, hessian, pairs, self.solver.damp)
        found = self.solve_columns(shifted, hessian + pairs if self.pairs_in_loop else hessian, rounding, keep)
        bias, before = (float(output_error(torch.zeros_like(w), w, pairs).sum()) for w in (found.values, weight))
        return found._replace(notes={"difference": bias / before if before else 1.0})


class PairHessian(Hessian):
    """A Hessian beside that of the differences between each sample of even number and the next one.

    Attributes:
        pairs: the second one.

    Example:
        >>> hessian = PairHessian(2)
        >>> hessian.add(torch.tensor([[[1.0, 2.0]], [[1.0, 5.0]]]))
        >>> hessian.pairs.matrix()
        tensor([[ 0.,  0.],
                [ 0., 18.]], dtype=torch.float64)
    """

    def __init__(self, features: int, groups: int | None = None, diagonal: bool = False, device: Any = None) -> None:
        super().__init__(features, groups, diagonal, device)
        self.pairs = Hessian(features, groups, diagonal, device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens of pairs.

        Raises:
            ValueError: if the samples are not in pairs.
        """
        if x.dim() < 3 or len(x) % 2:
            raise ValueError(
                f"reads {tuple(x.shape)}, which are no pairs of samples: let calibration_loader give batches of an "
                f"even number of sentences, the two of a pair one after the other"
            )
        super().add(x, weights)
        self.pairs.add(x[0::2] - x[1::2])
