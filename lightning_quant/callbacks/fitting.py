"""What a callback has to see to that quantizes a model in ``trainer.fit``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.checkpoint import record_of
from lightning_quant.modules import CalibrationMixin
from lightning_quant.quantizers import UniformQuantizer


def check_fit(
    trainer: Trainer, pl_module: LightningModule, callback: Callback, delay_epochs: int, freeze_batchnorm_epochs: int
) -> None:
    """Refuse a run in which learned scales would get lost, before anything is changed.

    Args:
        trainer: the Trainer of the run.
        pl_module: the model.
        callback: the callback that makes the scales.
        delay_epochs: how many epochs stay float.
        freeze_batchnorm_epochs: how many epochs before the end BatchNorm statistics stand still.

    Raises:
        ValueError: for a sharded strategy; for processes started by spawning or forking, whose main process cannot
            take the trained model over without a :class:`~lightning_quant.CalibrationMixin`; for an average of
            weights that is copied before there are scales; for epochs that there are not.
    """
    name, model, strategy = type(callback).__name__, type(pl_module).__name__, trainer.strategy
    if strategy.restore_checkpoint_after_setup:
        raise ValueError(
            f"{name} does not work with {type(strategy).__name__}, which shards parameters: use strategy='ddp'"
        )
    started = getattr(strategy.launcher, "_start_method", None)  # a test watches that Lightning keeps this name
    if started is not None and not isinstance(pl_module, CalibrationMixin):
        raise ValueError(
            f"processes started by {started} hand the trained model back by its state dict, and {model} cannot load a "
            f"quantized one: put CalibrationMixin before LightningModule in its bases, or use strategy='ddp'"
        )
    for earlier in trainer.callbacks[: trainer.callbacks.index(callback)]:
        if isinstance(earlier, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{type(earlier).__name__} copies the model before {name} has made the scales: "
                f"put {name} before it in the Trainer's callbacks"
            )
    endless = trainer.max_epochs in (None, -1)
    if not endless and delay_epochs >= (trainer.max_epochs or 0):
        raise ValueError(f"delay_epochs={delay_epochs} leaves none of max_epochs={trainer.max_epochs} to be quantized")
    if endless and freeze_batchnorm_epochs:
        raise ValueError(f"freeze_batchnorm_epochs={freeze_batchnorm_epochs} counts from the end: set max_epochs")


def check_resumed(pl_module: LightningModule, key: str, learned: bool) -> None:
    """Refuse to go on from a checkpoint that took the structure away which setup had made.

    Args:
        pl_module: the model, with the checkpoint's weights.
        key: state key of the callback.
        learned: whether static uniform quantizers should be learned ones.

    Raises:
        ValueError: if the checkpoint was float, or its plan has other layers.
    """
    record = record_of(pl_module)
    plan = None if record is None else record.plans.get(key)
    if plan is None:
        raise ValueError(
            "ckpt_path= resumes a run, and this checkpoint is of a float run: load its weights into the model "
            "(load_from_checkpoint), and fit without ckpt_path"
        )
    for name, quantizer in plan.quantizers(pl_module).items() if learned else ():
        if type(quantizer) is UniformQuantizer and not quantizer.scheme.dynamic:
            raise ValueError(
                f"`{name}` is quantized in this checkpoint, but not in this model as its first calibration samples "
                f"run through it: resume with the model and the data that the run began with"
            )


def copies(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """The copies of a quantized model that other callbacks keep, such as averages of its weights."""
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            for module in value.modules() if isinstance(value, nn.Module) else ():
                if module is not pl_module and record_of(module) is not None:
                    yield module


def like_parameters(batch: Any, module: nn.Module) -> Any:
    """A batch on the device and in the float type of a model that Lightning has not converted yet.

    >>> like_parameters([torch.ones(2, dtype=torch.bfloat16), torch.tensor(3)], nn.Linear(2, 2))
    [tensor([1., 1.]), tensor(3)]
    """
    one = next(module.parameters())
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return apply_to_collection(batch, Tensor, lambda x: x.to(one.device, one.dtype if x.dtype in floats else x.dtype))


def freeze_batchnorm(module: nn.Module) -> list[nn.Module]:
    """Let BatchNorm layers use their running statistics and leave them as they are; returns those that did not yet.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    >>> len(freeze_batchnorm(net)), net[1].training, len(freeze_batchnorm(net))
    (1, False, 0)
    """
    moving = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.training]
    for child in moving:
        child.eval()
    return moving
