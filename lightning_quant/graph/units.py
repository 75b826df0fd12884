"""The parts of a model that are worked on one after another: layers, blocks, stages, or whatever patterns name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_quant.graph.patterns import matching
from lightning_quant.graph.trace import ModelGraph


def units_of(model: nn.Module, graph: ModelGraph, layers: Sequence[str], granularity: str | Sequence[str]) -> list[str]:
    """Names of the units that hold the given layers, in the order of their first call.

    A layer in no block or stage is a unit of its own. ``"inner"`` are the innermost members of lists that hold two
    layers or more: the residual and attention blocks of a U-Net, whose outer blocks hold several of them. With patterns
    the outermost modules that they name are the units, and layers elsewhere are in none.

    Args:
        model: the model.
        graph: what one forward told about it.
        layers: names of the layers that matter; a unit without any is left out.
        granularity: ``"layer"``, ``"block"``, ``"inner"``, ``"stage"``, or name patterns.

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
        inner = _inner(model, graph, layers)
        found = {"layer": [], "block": graph.blocks, "inner": inner, "stage": _stages(model, graph)}
        wider = found[granularity]
        inside = [layer for unit in wider for layer in layers if _holds(unit, layer)]
        wanted = [*wider, *(layer for layer in layers if layer not in inside)]
    else:
        wanted = [name for pattern in granularity for name in matching(graph.order, pattern, "granularity")]
    ran = {name: position for position, name in enumerate(graph.order)}
    units = {name for name in wanted if name in ran and any(_holds(name, layer) for layer in layers)}
    outermost = [name for name in units if not any(other != name and _holds(other, name) for other in units)]
    return sorted(outermost, key=ran.__getitem__)


def _inner(model: nn.Module, graph: ModelGraph, layers: Sequence[str]) -> list[str]:
    """The innermost members of lists that ran and hold two layers or more."""
    lists = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    members = [name for name in graph.order if name and name.rpartition(".")[0] in lists]
    several = [member for member in members if sum(_holds(member, layer) for layer in layers) > 1]
    return [one for one in several if not any(other != one and _holds(one, other) for other in several)]


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
