"""What a reconstruction has finished, in a file, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.quantizers import Quantizer
from lightning_quant.solvers import Reconstruction


class UnitStates:
    """The quantizers of the finished units.

    The file's name tells the model, its weights, the settings and the data, so that another run finds nothing.

    Args:
        folder: where the file goes.
        model: the quantized model.
        settings: how it is reconstructed.
        tasks: the units by phase.
        batches: the calibration batches.
    """

    def __init__(
        self, folder: Path, model: nn.Module, settings: Reconstruction, tasks: Sequence[Any], batches: Sequence[Any]
    ) -> None:
        self.model = model
        self.folder = folder
        self.name = f"{fingerprint([settings.to_dict(), [list(task) for task in tasks]], model, batches)}.pt"

    def resume(self, trainer: Trainer) -> int:
        """Load what is finished; how many units that is."""
        file = self.folder / self.name
        found = torch.load(file, weights_only=True) if trainer.is_global_zero and file.is_file() else None
        self.name, found = trainer.strategy.broadcast((self.name, found))
        if found is None:
            return 0
        for name, state in found["quantizers"].items():
            self.model.get_submodule(name).load_state_dict(state)
        rank_zero_info(f"Reconstruction goes on after {found['done']} finished units ({file})")
        return int(found["done"])

    def save(self, done: int, trainer: Trainer) -> None:
        """Write what is finished, all or nothing."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            quantizers = {
                name: {key: value.cpu() for key, value in module.state_dict().items()}
                for name, module in self.model.named_modules()
                if isinstance(module, Quantizer)
            }
            partial = self.folder / f"{self.name}.partial"
            torch.save({"done": done, "quantizers": quantizers}, partial)
            partial.replace(self.folder / self.name)

    def forget(self) -> None:
        """The run is over: nothing is left to resume."""
        (self.folder / self.name).unlink(missing_ok=True)
        for folder in (self.folder / "cache", self.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def fingerprint(settings: Any, model: nn.Module, batches: Sequence[Any]) -> str:
    """A short name for one piece of work: other settings (as JSON can say them), weights or data have another one."""
    digest = sha256(json.dumps(settings).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(_bytes(value))
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            digest.update(_bytes(leaf))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> memoryview:
    """What a tensor holds, not copied if it is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
