"""AdaQuant: layers are calibrated one by one, their weights moving freely together with both ranges (2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.calibration import CalibrationBatches, feed, first_samples
from lightning_quant.calibration.progress import progress_bar
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph, trace
from lightning_quant.layers import Plan, QuantizedLayer, as_float
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import Reconstruction, absorb_statistics, learn_biases, measure_statistics

# What five passes of momentum 0.1 take over.
NORM_SHARE = 1 - 0.9**5
NOTHING = Reconstruction(rounding="nearest", scale_learning_rate=None)


class AdaQuant(PostTrainingQuantization):
    r"""Plain post-training quantization, then every layer is fitted to its float twin by all that it has.

    .. math:: \min_{V, b, s_w, z_w, s_x} \; \| W X + b_0 - Q_w(W + V) \, Q_x(\hat X) - b \|^2

    where :math:`V` is continuous, so that a weight may move by more than one step; it is rounded to the nearest in
    every step and in the end. Weights are asymmetric per output channel, activations asymmetric per tensor; a bias has
    as many bits as both together. The zero points of activations stay what they are.

    Two repairs of the whole may follow, or stand alone. Where a BatchNorm alone reads a layer, its statistics are
    measured again on the quantized network, and the layer makes up for the difference: its scales and its bias change,
    the norm does not. Then the biases of all layers but the last learn to bring the softmax of the output near to the
    float network's,

    .. math:: \min_b \; KL(p \, \| \, \hat p).

    The integer program of the paper, which finds the bits of each layer, is
    ``MixedPrecision(budget="4.0bit", method=AdaQuant(...))``, with ``sensitivity="metric"`` for the paper's own losses.

    Reference: Hubara et al., *Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming*, 2020.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs and of the attention operands.
        reconstruct: how the layers are fitted; ``"adaquant"``, or settings of your own, see
            :class:`~lightning_quant.Reconstruction`. With ``inputs="float"`` each layer is fed what the float network
            gives it (the *parallel* form), by default what the quantized layers before it do (the *sequential* one).
            ``None`` rounds to the nearest, and only repairs, in seconds: the paper's *light* pipeline.
        tune_norms: whether layers make up for what quantization does to BatchNorm statistics; by default only where
            they are not fitted.
        bias_steps: steps for the biases on the network's output; by default 40 where the layers are not fitted, and
            none where they are.
        bias_lr: their learning rate, by plain gradient descent.
        bias_loss: ``"kl"``, or ``"mse"`` where the output is no score of classes.
        arguments: see :class:`PostTrainingQuantization`.

    >>> callback = AdaQuant(weights="int4", activations="int4")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str | None = "int4",
        reconstruct: str | Reconstruction | None = "adaquant",
        tune_norms: bool | None = None,
        bias_steps: int | None = None,
        bias_lr: float = 0.1,
        bias_loss: Literal["kl", "mse"] = "kl",
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, reconstruct=NOTHING if reconstruct is None else reconstruct, **arguments)
        light = reconstruct is None
        if bias_steps is not None and bias_steps < 0:
            raise ValueError(f"bias_steps={bias_steps} must be 0 or more")
        if bias_loss not in ("kl", "mse"):
            raise ValueError(f"bias_loss={bias_loss!r} is neither 'kl' nor 'mse'")
        self.tune_norms = light if tune_norms is None else tune_norms
        self.bias_steps = (40 if light else 0) if bias_steps is None else bias_steps
        self.bias_lr, self.bias_loss = bias_lr, bias_loss
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        names = ("tune_norms", "bias_steps", "bias_lr", "bias_loss")
        return {**super().arguments, **{name: getattr(self, name) for name in names}}

    def reconstruct_plan(
        self, trainer: Trainer, pl_module: LightningModule, plan: Plan, settings: Reconstruction
    ) -> None:
        """Fit the layers one by one, then repair the whole."""
        give_biases(pl_module, plan)
        if settings != NOTHING:
            super().reconstruct_plan(trainer, pl_module, plan, settings)
        run = partial(feed, trainer, pl_module)
        batches = list(CalibrationBatches(trainer, pl_module, self.calibration_loader, settings.samples))
        with as_float(pl_module):
            graph = trace(pl_module, lambda: run(first_samples(batches[0], 2)))
        layers = {
            name: layer for name, layer in plan.quantized_layers(pl_module).items() if layer.bias_quantizer is not None
        }
        if self.tune_norms:
            repair_norms(pl_module, graph, layers, lambda: [run(batch) for batch in batches])
        last = next((name for name in reversed(graph.order) if name in layers), None)
        layers.pop(last, None)  # type: ignore[arg-type]
        if self.bias_steps and layers:
            with progress_bar(trainer, "Learning biases", self.bias_steps, "steps") as advance:
                before, after = learn_biases(
                    pl_module, layers, batches, run, self.bias_steps, self.bias_lr, self.bias_loss, advance
                )
            rank_zero_info(f"AdaQuant learned the biases of {len(layers)} layers: {before:.4g} -> {after:.4g}")


def give_biases(model: nn.Module, plan: Plan) -> None:
    """Make room for another bias in the layers of a plan, of as many bits as weights and inputs have together."""
    for name, layer in plan.quantized_layers(model).items():
        formats = plan.layers[name]
        if layer.takes_bias and formats.weights is not None:
            bits = [Scheme.parse(text).bits for text in (formats.weights, formats.inputs or "int16")]
            formats.biases = f"int{min(sum(bits), 16)}_sym_tensor"
            layer.set_quantizer("bias_quantizer", Scheme.parse(formats.biases), axis=0)
            layer.settle_bias(layer.float_bias())


def repair_norms(
    model: nn.Module, graph: ModelGraph, layers: Mapping[str, QuantizedLayer], run: Callable[[], Any]
) -> None:
    """Let the layers before BatchNorms make up for what quantization does to their statistics."""
    norms = {
        norm: model.get_submodule(norm)
        for norm, name in graph.batch_norms.items()
        if name in layers and layers[name].weight_quantizers()["weight"].scale.dim() > 0
    }
    with torch.no_grad():
        for norm, found in measure_statistics(norms, run).items():
            absorb_statistics(layers[graph.batch_norms[norm]], norms[norm], found, NORM_SHARE)
