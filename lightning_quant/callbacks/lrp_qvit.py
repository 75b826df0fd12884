"""LRP-QViT: bits by relevance, and clipped outlier channels (2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_quant.calibration import record
from lightning_quant.callbacks.mixed_precision import MixedPrecision
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.graph import NormPair
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer
from lightning_quant.solvers.channel_clips import best_clip, clip_outlier_channels


class ClippedRepQViT(RepQViT):
    """RepQ-ViT whose ranges per channel are limited to what is usual among the channels.

    Args:
        clip_channels: candidates k; the one of least error behind the linear layers is taken for each norm.
        arguments: see :class:`RepQViT`.
    """

    def __init__(self, clip_channels: Sequence[float] = (2.0, 3.0, 4.0, math.inf), **arguments: Any) -> None:
        super().__init__(**arguments)
        if not clip_channels or min(clip_channels) <= 0:
            raise ValueError(f"clip_channels={list(clip_channels)}: at least one number above 0, inf clips nothing")
        self.clip_channels = [float(k) for k in clip_channels]

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        clips = [None if math.isinf(k) else k for k in self.clip_channels]  # JSON has no infinity
        return {**super().arguments, "clip_channels": clips}

    def refine_ranges(
        self, model: nn.Module, pairs: Sequence[NormPair], batches: Sequence[Any], run: Callable[[Any], Any]
    ) -> None:
        """Clip the ranges behind each norm as far as its linear layers are the better for it."""
        for pair in pairs:
            linears = [cast(QuantizedLayer, model.get_submodule(name)) for name in pair.linears]
            quantizer = cast(UniformQuantizer, linears[0].input_quantizer)
            qmin, qmax = quantizer.scheme.qmin, quantizer.scheme.qmax
            lo, hi = ((end - quantizer.zero_point) * quantizer.scale for end in (qmin, qmax))
            x = torch.cat([_input_of(linears[0], partial(run, batch)) for batch in batches])
            weights = [linear.weight_rows() for linear in linears]
            k = best_clip(x, weights, lo, hi, quantizer.scheme.bits, self.clip_channels)
            if not math.isinf(k):
                lo, hi = clip_outlier_channels(lo, hi, k)
                for linear in linears:
                    cast(UniformQuantizer, linear.input_quantizer).freeze(lo, hi)


class LRPQViT(MixedPrecision):
    r"""Bits by relevance: what an answer is made of keeps more of them; RepQ-ViT with clipped outlier channels.

    *Relevance* begins at the largest output and is propagated back to every tensor that is rounded: linear layers share
    by their positive products, a product of two activations gives half to each, a residual sum shares by the size of
    path and branch, norms, softmax and activation functions hand it on. With :math:`C_l` the relevance that arrives,

    .. math:: \min_b \sum_l C_l \, 4^{-b_l}

    within the budget, by the integer program; weights have the relevance of the inputs that they meet.

    *Clipped ranges*: behind a LayerNorm, where :math:`\mu, \sigma` are mean and deviation over the channels,

    .. math:: hi_j \le \mu(hi) + k \, \sigma(hi), \quad lo_j \ge \mu(lo) - k \, \sigma(lo)

    with the k of least error behind the linear layers; then the ranges are folded as in :class:`RepQViT`.

    No code is published: propagation rules, candidates and k are reconstructed from the abstract and the usual rules
    for transformers. Relevance says how much of an answer comes through a tensor, not how much rounding disturbs it: on
    DeiT-Tiny at four bits ``MixedPrecision(sensitivity="hessian")`` chooses better.

    Reference: Ranjan and Savakis, *LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance
    Propagation*, 2024.

    Args:
        budget: what it may cost; see :class:`MixedPrecision`.
        clip_channels: candidates k; ``inf`` clips nothing.
        weight_bits: the numbers of bits that weights may have.
        activation_bits: the same for activations; ``None``: as the weights.
        search: see :class:`MixedPrecision`.
        monitor: see :class:`MixedPrecision`.
        mode: see :class:`MixedPrecision`.
        trials: see :class:`MixedPrecision`.
        common: see :class:`MixedPrecision`.

    >>> callback = LRPQViT(budget="4.0bit")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: str | Sequence[str] = "4.0bit",
        clip_channels: Sequence[float] = (2.0, 3.0, 4.0, math.inf),
        weight_bits: Sequence[int] = (3, 4, 5),
        activation_bits: Sequence[int] | None = None,
        search: str = "integer_program",
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        trials: int = 5,
        **common: Any,
    ) -> None:
        method = ClippedRepQViT(clip_channels, stem_activations=None, **common)
        super().__init__(budget, method, "lrp", search, weight_bits, activation_bits, monitor, mode, trials)


def _input_of(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a layer is given in one run of the model: (tokens, channels)."""
    calls = record(layer, run, calls=1)
    x = next(leaf for leaf in calls[0].inputs if isinstance(leaf, Tensor))
    return x.flatten(0, -2)
