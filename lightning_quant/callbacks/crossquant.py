"""CrossQuant: the step of an activation is that of its token and of its channel (2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.calibration import channel_extremes
from lightning_quant.callbacks.formats import activation_scheme
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import CrossQuantizer, kernel_share


class CrossQuant(PostTrainingQuantization):
    r"""Rounds fewer activations to zero: an outlier channel no longer decides the step of all others in its token.

    .. math:: \Delta_{ij} = \frac{t_i^\alpha \, c_j^{1 - \alpha}}{q_{max}}, \qquad \hat x_{ij} = \Delta_{ij} \lfloor
        x_{ij} / \Delta_{ij} \rceil

    where :math:`t_i` is the largest magnitude in token i, found on the spot, and :math:`c_j` that in channel j over all
    calibration tokens. The paper also takes :math:`c_j` on the spot, which gives every number of a single token its own
    largest code, and no product of integers; here it is always calibrated. Numbers beyond what calibration saw are
    clipped.

    Only layers with channels on the last axis have such inputs; others have one static range for the whole tensor.
    On stories260K, which has no loud channels, it loses: perplexity at W8A8 is 3.58 where a scale per token has 3.56,
    and 17.0 against 4.8 at W8A4 (float 3.55). It is for models in which a few channels dwarf the others.

    The arithmetic is simulated: no kernel has the channels' factor folded into its weights yet.

    Reference: Liu et al., *CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel for Precise
    Large Language Model Compression*, 2024. There is no published code; the formula is that of the paper.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs; symmetric integers with a scale per token.
        ranges: how ranges of weights are found.
        alpha: how much of the step is the token's; 1 is the plain scale per token.
        attention: whether q, k, v and the attention probabilities are quantized, per token.
        arguments: see :class:`PostTrainingQuantization`.

    Attributes:
        kernels: by layer, the share of calibration inputs that become 0 now, and with a plain scale per token.

    Raises:
        ValueError: for a number out of range, or a format that has no such step.

    >>> callback = CrossQuant(weights="int8", activations="int8", skip=["lm_head"])
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | None = "int8",
        activations: str = "int8",
        ranges: str = "mse",
        alpha: float = 0.15,
        attention: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, attention, **arguments)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1")
        self.formats.activation_defaults = {"symmetric": True, "granularity": "token"}
        try:
            CrossQuantizer(activation_scheme(activations, self.formats.activation_defaults))
        except ValueError as error:
            raise ValueError(f"activations={activations!r}: {error}") from None
        self.alpha = alpha
        self.kernels: dict[str, tuple[float, float]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "alpha": self.alpha}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The plain formats, and which layers have a step of this kind."""
        plan = super().plan_for(model, graph)
        for name, layer in plan.layers.items():
            if isinstance(model.get_submodule(name), (nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)):
                layer.inputs = None if layer.inputs is None else layer.inputs.replace("sym_token", "asym_tensor")
            elif layer.inputs is not None:
                layer.crossed = self.alpha
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Find the reach of every channel on the float stream; the rest is plain."""
        batches = list(batches)
        crossed = {name: x for name, x in plan.quantized_layers(model).items() if plan.layers[name].crossed is not None}
        extremes = channel_extremes(crossed, batches, run)
        self.give_back_unreached(model, plan, set(graph.order) & ({*extremes} | ({*plan.modules(model)} - {*crossed})))
        for name, (lo, hi) in extremes.items():
            cast(CrossQuantizer, crossed[name].input_quantizer).set_reach(torch.maximum(lo.abs(), hi.abs()))
        super().calibrate_plan(model, plan, graph, batches, run)
        self.kernels = self._kernels({name: crossed[name] for name in extremes}, batches, run)
        if self.kernels:
            now, before = (sum(pair[i] for pair in self.kernels.values()) / len(self.kernels) for i in (0, 1))
            rank_zero_info(
                f"CrossQuant rounds {now:.1%} of the inputs to 0; a scale per token would round {before:.1%}."
            )

    def _kernels(
        self, layers: dict[str, QuantizedLayer], batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> dict[str, tuple[float, float]]:
        """What becomes 0 in the first batch."""
        found: dict[str, tuple[float, float]] = {}

        def look(name: str, quantizer: CrossQuantizer) -> Any:
            def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach().float()
                token = x.abs().amax(-1, keepdim=True) / quantizer.scheme.qmax
                found[name] = kernel_share(x, quantizer.state_for(x)[0]), kernel_share(x, token)

            return hook

        handles = [
            layer.register_forward_pre_hook(look(name, cast(CrossQuantizer, layer.input_quantizer)))
            for name, layer in layers.items()
        ]
        try:
            for batch in islice(batches, 1):
                run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found
