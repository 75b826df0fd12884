"""Where a model attends in bfloat16 while it predicts, and what answers there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_quant.graph import AttentionWatcher, watching
from lightning_quant.kernels.attention_door import give_back_attention, route_attention, why_not_routable
from lightning_quant.kernels.bfloat16_attention import Bfloat16Attention
from lightning_quant.kernels.table import KernelRow


class FloatAttention:
    """Finds the modules that call float attention, and routes it to :class:`Bfloat16Attention`.

    Attributes:
        sites: the modules, by name; known after a forward was looked at.
    """

    def __init__(self) -> None:
        self.sites: dict[str, nn.Module] = {}
        self._routed: list[nn.Module] = []
        self._looking = ExitStack()

    @contextmanager
    def looking(self, model: nn.Module) -> Iterator[None]:
        """Look at what runs while this lasts."""
        watcher = AttentionWatcher()
        with watching(model, [watcher]):
            yield
        found = {name: model.get_submodule(name) for name, calls in watcher.sites.items() if calls.fused}
        self.sites = {name: site for name, site in found.items() if why_not_routable(site) is None}

    def look(self, model: nn.Module) -> None:
        """Look at what runs until :meth:`looked`."""
        self._looking.enter_context(self.looking(model))

    def looked(self) -> None:
        """Look no more, if anybody did."""
        self._looking.close()

    def route(self) -> list[KernelRow]:
        """Answer at all sites, unless that is done; a row for each that is new."""
        if self._routed:
            return []
        attend = Bfloat16Attention()
        for site in self.sites.values():
            route_attention(site, attend)
            self._routed.append(site)
        return [KernelRow(name, attend.name, "q, k, p, v float") for name in self.sites]

    def give_back(self) -> None:
        """Let every module attend as it did."""
        while self._routed:
            give_back_attention(self._routed.pop())


def computes_in_bfloat16(trainer: Trainer, model: nn.Module) -> bool:
    """Whether predict runs in bfloat16 on a CPU, under autocast or altogether."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    asked_for = trainer.precision in ("bf16-mixed", "bf16-true")
    return on_cpu and (asked_for or any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()))
