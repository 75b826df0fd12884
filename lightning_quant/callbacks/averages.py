"""Averages of weights, which other callbacks keep while a quantized model is trained."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

# Where they keep the copy, and what they do with buffers, are private names of theirs; tests fail when these go.
AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def averaged_copies(trainer: Trainer) -> list[nn.Module]:
    """The copies of the model that hold an average of its weights.

    Args:
        trainer: the Trainer whose callbacks keep them.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    copies = [callback._average_model for callback in callbacks if isinstance(callback, AVERAGING)]
    return [copied.module if isinstance(copied, AveragedModel) else copied for copied in copies if copied is not None]


def check_averages(trainer: Trainer, pl_module: LightningModule, name: str, calibrated: bool, during_fit: bool) -> None:
    """Refuse a fit in which an average of the weights would spoil scales, or mix up tensors.

    Lightning's averages pair their copy with the model tensor by tensor, in order, and average scales and integer zero
    points like any other buffer.

    Args:
        trainer: the Trainer of the run.
        pl_module: the model, with the weights of a checkpoint if one was given.
        name: of the quantization callback.
        calibrated: whether it has quantized the model.
        during_fit: whether it is going to, if it has not.

    Raises:
        ValueError: naming the callback that averages, and what to change.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, AVERAGING):
            continue
        average = type(callback).__name__
        if not calibrated and during_fit:
            raise ValueError(
                f"{average} copied the float model, which {name}(during_fit=True) is about to quantize: "
                f"calibrate by trainer.validate before the fit, or after it"
            )
        if calibrated and getattr(callback, "_use_buffers", False):
            raise ValueError(
                f"{average} would average the scales and integer zero points of a quantized model: "
                f"pass use_buffers=False to it"
            )
        copied, with_buffers = callback._average_model, isinstance(callback, WeightAveraging)
        if calibrated and copied is not None and _names(copied, with_buffers) != _names(pl_module, with_buffers):
            raise ValueError(
                f"{average} copied the float model before the checkpoint brought a quantized one: "
                f"load the checkpoint before the fit"
            )


def _names(model: nn.Module, with_buffers: bool) -> list[str]:
    """The tensors that are paired, in their order; WeightAveraging keeps its copy in a child named ``module``."""
    model = model.module if isinstance(model, AveragedModel) else model
    buffers = [name for name, _ in model.named_buffers()] if with_buffers else []
    return [name for name, _ in model.named_parameters()] + buffers
