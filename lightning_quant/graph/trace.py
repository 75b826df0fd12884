"""Learn the structure of a model by running it once.

One real batch goes through the model while module hooks keep track of where we are and a torch function mode sees every
call. Nothing is traced symbolically, so control flow in Python is no obstacle. What is learned from the calls is the
business of the watchers, one file each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_quant.graph.attention import AttentionCalls, AttentionWatcher
from lightning_quant.graph.batch_norms import BatchNormWatcher
from lightning_quant.graph.blocks import repeated_blocks
from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.costs import Cost, CostWatcher
from lightning_quant.graph.joins import JoinWatcher
from lightning_quant.graph.norms import NormPair, NormWatcher
from lightning_quant.graph.owners import Owners
from lightning_quant.graph.temporal import Temporal, TemporalWatcher


@dataclass
class ModelGraph:
    """What one forward told about a model. Names are relative to the traced module.

    Args:
        order: names of the modules that ran, in the order of their first call.
        pairs: norms that can be folded into the linears behind them.
        unfoldable: why a norm cannot be folded, by its name.
        attention: how a module attends in one forward, by its name.
        functional: linear layers whose weight a function reads, by the name of the module in which it does.
        costs: shapes and multiplications of every layer with a weight, by its name.
        tied: groups of names of one shared parameter.
        blocks: names of the repeated blocks, in the order of their first call.
        batch_norms: the layer whose output a BatchNorm alone reads, by the norm's name.
        joins: the widths of the parts, by the name of a layer that reads a concatenation with a skip connection.
        temporal: what depends on the timestep of a denoiser alone, if there is one.
        sample_readers: layers that read a denoiser's noisy sample itself.
    """

    order: list[str] = field(default_factory=list)
    pairs: list[NormPair] = field(default_factory=list)
    unfoldable: dict[str, str] = field(default_factory=dict)
    attention: dict[str, AttentionCalls] = field(default_factory=dict)
    functional: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    batch_norms: dict[str, str] = field(default_factory=dict)
    joins: dict[str, tuple[int, ...]] = field(default_factory=dict)
    temporal: Temporal | None = None
    sample_readers: list[str] = field(default_factory=list)


def trace(module: nn.Module, run: Callable[[], Any]) -> ModelGraph:
    """Run a model once and tell its structure.

    Args:
        module: the module whose names are used.
        run: runs one forward of the module, or of something that contains it.

    >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> graph = trace(net, lambda: net(torch.ones(2, 4)))
    >>> graph.order
    ['', '0', '1', '2', '3']
    >>> graph.pairs
    [NormPair(norm='0', linears=('1',), modulation=None)]
    >>> graph.costs["3"]
    Cost(macs=64, calls=1, input=(2, 8), output=(2, 4))
    """
    owners = Owners(module)
    norms, attention, costs = NormWatcher(owners), AttentionWatcher(), CostWatcher(owners)
    batch_norms, joins, temporal = BatchNormWatcher(owners), JoinWatcher(owners), TemporalWatcher(owners)
    order = watch(module, (norms, attention, costs, batch_norms, joins, temporal), run)
    pairs, unfoldable = norms.result()
    blocks = repeated_blocks(module, order)
    return ModelGraph(
        order,
        pairs,
        unfoldable,
        attention.sites,
        costs.functional,
        costs.costs,
        owners.tied_groups(),
        blocks,
        batch_norms.result(),
        joins.result(),
        temporal.result(),
        list(temporal.readers),
    )


def watch(module: nn.Module, watchers: Sequence[Watcher], run: Callable[[], Any]) -> list[str]:
    """Run a model once while watchers look on; names of the modules that ran, in the order of their first call.

    Args:
        module: the module whose names are used.
        watchers: who is told what happens.
        run: runs the module, or something that contains it.
    """
    # A compiled model would run without its hooks.
    with torch.compiler.set_stance("force_eager"), watching(module, watchers) as order, torch.no_grad():
        output = run()
    for watcher in watchers:
        watcher.finish(output)
    return list(order)


@contextlib.contextmanager
def watching(module: nn.Module, watchers: Sequence[Watcher]) -> Iterator[dict[str, None]]:
    """Let watchers look on while a model runs by itself; gives the names of the modules that ran, in order."""
    recorder = _Recorder(module, watchers)
    with recorder.watching(), recorder:
        yield recorder.order


class _Recorder(TorchFunctionMode):
    """Tells the watchers what happens."""

    def __init__(self, module: nn.Module, watchers: Sequence[Watcher]) -> None:
        super().__init__()
        self.names = {child: name for name, child in module.named_modules()}
        self.watchers = watchers
        self.stack: list[str] = []
        self.order: dict[str, None] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, for as long as this lasts."""
        handles = []
        for child, name in self.names.items():
            handles.append(child.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(child.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            self.order.setdefault(name)
            for watcher in self.watchers:
                watcher.given(name, module, args, kwargs)
                watcher.enter(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            for watcher in self.watchers:
                watcher.leave(name)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out, tuple(self.stack))
        if call.gives():  # shapes, dtypes and the like are asked, not read
            for watcher in self.watchers:
                watcher.saw(call)
        return out
