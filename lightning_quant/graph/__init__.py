"""Read-only knowledge of a model."""

from lightning_quant.graph.attention import AttentionCalls, AttentionWatcher
from lightning_quant.graph.bottleneck import find_bottleneck
from lightning_quant.graph.cache_points import CachePoint, find_cache_point, readers
from lightning_quant.graph.costs import Cost
from lightning_quant.graph.norms import Modulation, NormPair, Rows
from lightning_quant.graph.operators import Operator, Traced, trace_operators
from lightning_quant.graph.patterns import attention_name, matches, matching
from lightning_quant.graph.residual import HeadPair, Residual, residual_stream
from lightning_quant.graph.roofline import Bits, Machine, Work, kv_bytes, machine_table, work
from lightning_quant.graph.select import Selection, select
from lightning_quant.graph.temporal import Temporal, TemporalWatcher
from lightning_quant.graph.trace import ModelGraph, trace, watch, watching
from lightning_quant.graph.units import units_of

__all__ = [
    "AttentionCalls",
    "AttentionWatcher",
    "Bits",
    "CachePoint",
    "Cost",
    "HeadPair",
    "Machine",
    "ModelGraph",
    "Modulation",
    "NormPair",
    "Operator",
    "Residual",
    "Rows",
    "Selection",
    "Temporal",
    "TemporalWatcher",
    "Traced",
    "Work",
    "attention_name",
    "find_bottleneck",
    "find_cache_point",
    "kv_bytes",
    "machine_table",
    "matches",
    "matching",
    "readers",
    "residual_stream",
    "select",
    "trace",
    "trace_operators",
    "units_of",
    "watch",
    "watching",
    "work",
]
