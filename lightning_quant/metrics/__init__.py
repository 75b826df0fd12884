"""How far a quantized model is from its float twin: torchmetrics, and the same maths as functions of two tensors."""

from __future__ import annotations

from lightning_quant.metrics.agreement import TopOneAgreement, top_one_agreement
from lightning_quant.metrics.cosine import CosineFidelity, cosine_fidelity
from lightning_quant.metrics.flips import (
    FlipCounts,
    NegativeFlipRate,
    PositiveFlipRate,
    count_flips,
    negative_flip_rate,
    positive_flip_rate,
)
from lightning_quant.metrics.language import (
    IGNORED,
    Perplexity,
    PredictionDivergence,
    next_tokens,
    perplexity,
    prediction_divergence,
)
from lightning_quant.metrics.noise import SQNR, sqnr

__all__ = [
    "IGNORED",
    "SQNR",
    "CosineFidelity",
    "FlipCounts",
    "NegativeFlipRate",
    "Perplexity",
    "PositiveFlipRate",
    "PredictionDivergence",
    "TopOneAgreement",
    "cosine_fidelity",
    "count_flips",
    "negative_flip_rate",
    "next_tokens",
    "perplexity",
    "positive_flip_rate",
    "prediction_divergence",
    "sqnr",
    "top_one_agreement",
]
