"""AdaQuant: layers are calibrated one by one, their weights moving freely together with both ranges (2020)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.solvers import Reconstruction


class AdaQuant(PostTrainingQuantization):
    r"""Plain post-training quantization, then every layer is fitted to its float twin by all that it has.

    .. math:: \min_{V, s_w, z_w, s_x} \; \| W X - Q_w(W + V) \, Q_x(\hat X) \|^2

    where :math:`V` is continuous, so that a weight may move by more than one step; it is rounded to the nearest in
    every step and in the end. Weights are asymmetric per output channel, activations asymmetric per tensor. The zero
    points of activations, biases and BatchNorm statistics stay what they are.

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
        arguments: see :class:`PostTrainingQuantization`.

    >>> callback = AdaQuant(weights="int4", activations="int4")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str | None = "int4",
        reconstruct: str | Reconstruction = "adaquant",
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, reconstruct=reconstruct, **arguments)
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})
