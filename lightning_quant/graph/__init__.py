"""Read-only knowledge of a model."""

from lightning_quant.graph.attention import AttentionCalls
from lightning_quant.graph.costs import Cost
from lightning_quant.graph.norms import Modulation, NormPair, Rows
from lightning_quant.graph.patterns import attention_name, matches, matching
from lightning_quant.graph.residual import HeadPair, Residual, residual_stream
from lightning_quant.graph.select import Selection, select
from lightning_quant.graph.trace import ModelGraph, trace
from lightning_quant.graph.units import units_of

__all__ = [
    "AttentionCalls",
    "Cost",
    "HeadPair",
    "ModelGraph",
    "Modulation",
    "NormPair",
    "Residual",
    "Rows",
    "Selection",
    "attention_name",
    "matches",
    "matching",
    "residual_stream",
    "select",
    "trace",
    "units_of",
]
