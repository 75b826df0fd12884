"""What a callback has to see to that quantizes a model in ``trainer.fit``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.calibration import CalibrationBatches, check_feedable
from lightning_quant.callbacks.averages import AVERAGING
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import has_scale_to_learn
from lightning_quant.modules import CalibrationMixin


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
            weights that is copied before there are scales, or that averages buffers; for epochs that there are not.
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
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for position, other in enumerate(callbacks):
        if isinstance(other, AVERAGING) and position < callbacks.index(callback):
            raise ValueError(
                f"{type(other).__name__} copies the model before {name} has made the scales: "
                f"put {name} before it in the Trainer's callbacks"
            )
        if isinstance(other, AVERAGING) and getattr(other, "_use_buffers", False):
            raise ValueError(
                f"{type(other).__name__} would average integer zero points: pass use_buffers=False to it (the scales "
                f"are Parameters and are averaged all the same)"
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
        if has_scale_to_learn(quantizer):
            raise ValueError(
                f"`{name}` is quantized in this checkpoint, but not in this model as its first calibration samples "
                f"run through it: resume with the model and the data that the run began with"
            )


def first_look(trainer: Trainer, pl_module: LightningModule, loader: Any, samples: int) -> Any:
    """In ``setup``, let the model exist on its device, and draw one batch to run through it, the same on every rank.

    In ``setup`` Lightning has neither built late layers nor moved or converted the model, but ``pl_module.device``
    tells the device already, and batches come in the precision of the run.

    Args:
        trainer: the Trainer of the run.
        pl_module: the model.
        loader: where the batch comes from; see :class:`~lightning_quant.calibration.CalibrationBatches`.
        samples: how many samples it has.
    """
    if is_overridden("configure_model", pl_module):
        pl_module.configure_model()
    check_feedable(pl_module)
    trainer.strategy.model_to_device()
    batches = list(CalibrationBatches(trainer, pl_module, loader, samples))
    batch = trainer.strategy.broadcast(batches[0] if batches else None)
    one = next(pl_module.parameters())
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return apply_to_collection(batch, Tensor, lambda x: x.to(one.device, one.dtype if x.dtype in floats else x.dtype))


def freeze_batchnorm(module: nn.Module) -> list[nn.Module]:
    """Let BatchNorm layers use their running statistics and leave them as they are; returns those that did not yet.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    >>> len(freeze_batchnorm(net)), net[1].training, len(freeze_batchnorm(net))
    (1, False, 0)
    """
    moving: list[nn.Module] = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.training]
    for child in moving:
        child.eval()
    return moving
