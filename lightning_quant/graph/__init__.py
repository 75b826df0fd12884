"""Read-only knowledge of a model."""

from lightning_quant.graph.patterns import matches, matching
from lightning_quant.graph.select import Selection, select
from lightning_quant.graph.trace import ModelGraph, NormPair, trace

__all__ = ["ModelGraph", "NormPair", "Selection", "matches", "matching", "select", "trace"]
