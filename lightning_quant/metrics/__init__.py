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
from lightning_quant.metrics.noise import SQNR, sqnr

__all__ = [
    "SQNR",
    "CosineFidelity",
    "FlipCounts",
    "NegativeFlipRate",
    "PositiveFlipRate",
    "TopOneAgreement",
    "cosine_fidelity",
    "count_flips",
    "negative_flip_rate",
    "positive_flip_rate",
    "sqnr",
    "top_one_agreement",
]
