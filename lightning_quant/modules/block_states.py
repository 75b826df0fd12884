"""Which blocks a solver has finished, each in a file of its own, so that a killed run goes on at its block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_quant.layers.low_rank import LowRank
from lightning_quant.quantizers import Mask, Quantizer

__all__ = ["BlockStates"]


class BlockStates:
    """Writes what was changed in a block, and puts it into a block that is as it was before.

    Args:
        folder: where the files go; its name tells the model, the settings and the data.
        trainer: whose first rank writes and reads.
    """

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder, self.trainer = trainer.strategy.broadcast(folder), trainer
        self._before: dict[str, tuple[int, int]] = {}

    def begin(self, block: nn.Module) -> None:
        """Remember a block as it is."""
        self._before = {name: _identity(parameter) for name, parameter in block.named_parameters()}

    def resume(self, number: int, block: nn.Module) -> dict[str, Any] | None:
        """Put in what was found for a block, and give back what was noted with it; ``None`` if it was not finished."""
        file = self.folder / f"{number}.pt"
        found = torch.load(file, weights_only=True) if self.trainer.is_global_zero and file.is_file() else None
        found = self.trainer.strategy.broadcast(found)
        if found is None:
            return None
        _put(block, found["state"])
        notes: dict[str, Any] = found["notes"]
        return notes

    def save(self, number: int, block: nn.Module, notes: dict[str, Any]) -> None:
        """Write what has changed since :meth:`begin`, all or nothing."""
        if not self.trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        parameters = dict(block.named_parameters())
        state = {
            name: value.cpu()
            for name, value in block.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
            and (name not in parameters or _identity(parameters[name]) != self._before.get(name))
        }
        partial = self.folder / f"{number}.partial"
        torch.save({"state": {name: value.detach() for name, value in state.items()}, "notes": notes}, partial)
        partial.replace(self.folder / f"{number}.pt")

    def forget(self) -> None:
        """The run is over: nothing is left to resume."""
        if self.trainer.is_global_zero and self.folder.is_dir():
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()


def _identity(parameter: Tensor) -> tuple[int, int]:
    """Changes when a Parameter is written to, or given other data."""
    return parameter.data_ptr(), parameter._version


@torch.no_grad()
def _put(block: nn.Module, state: dict[str, Tensor]) -> None:
    parameters = dict(block.named_parameters())
    quantizers = {
        name: module for name, module in block.named_modules() if isinstance(module, (LowRank, Mask, Quantizer))
    }
    for name, quantizer in quantizers.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if own:
            quantizer.load_state_dict(own)
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        if key in parameters:
            parameters[key].copy_(value)
        elif owner not in quantizers:
            module = block.get_submodule(owner)
            old = getattr(module, name)
            setattr(module, name, value.to(old.device))
