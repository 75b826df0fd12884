"""The parts of a model that are worked on one after another: layers, blocks, stages, or whatever patterns name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_quant.graph.patterns import matching
from lightning_quant.graph.trace import ModelGraph


def units_of(model: nn.Module, graph: ModelGraph, layers: Sequence[str], granularity: str | Sequence[str]) -> list[str]:
    """Names of the units that hold the given layers, in the order of their first call.

    A layer in no block or stage is a unit of its own. With patterns the outermost modules that they name are
    the units, and layers elsewhere are in none.

    Args:
        model: the model.
        graph: what one forward told about it.
        layers: names of the layers that matter; a unit without any is left out.
        granularity: ``"layer"``, ``"block"``, ``"stage"``, or name patterns.

    Raises:
        ValueError: if a pattern names nothing.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> from lightning_quant.graph import trace
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(block(), block()))
    >>> graph = trace(net, lambda: net(torch.ones(1, 2)))
    >>> layers = ["0", "1.0.0", "1.1.0"]
    >>> units_of(net, graph, layers, "block"), units_of(net, graph, layers, "stage")
    (['0', '1.0', '1.1'], ['0', '1'])
    """
    if isinstance(granularity, str):
        wider = {"layer": [], "block": graph.blocks, "stage": _stages(model, graph)}[granularity]
        inside = [layer for unit in wider for layer in layers if _holds(unit, layer)]
        wanted = [*wider, *(layer for layer in layers if layer not in inside)]
    else:
        wanted = [name for pattern in granularity for name in matching(graph.order, pattern, "granularity")]
    ran = {name: position for position, name in enumerate(graph.order)}
    units = {name for name in wanted if name in ran and any(_holds(name, layer) for layer in layers)}
    outermost = [name for name in units if not any(other != name and _holds(other, name) for other in units)]
    return sorted(outermost, key=ran.__getitem__)


def _stages(model: nn.Module, graph: ModelGraph) -> list[str]:
    """The smallest modules that ran and hold a whole list of blocks, but not the model itself."""
    stages: dict[str, None] = {}
    for block in graph.blocks:
        above = block.rpartition(".")[0]
        while above and above not in graph.order:  # a list of modules is never called
            above = above.rpartition(".")[0]
        if above:
            stages.setdefault(above)
        else:
            stages.setdefault(block)
    return [stage for stage in stages if not any(other != stage and _holds(other, stage) for other in stages)]


def _holds(unit: str, layer: str) -> bool:
    return layer == unit or layer.startswith(f"{unit}.")
