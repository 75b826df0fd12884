"""Run a reconstruction inside another Trainer's validation: a stage of its own, driven by a Trainer of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import nn

from lightning_quant.modules import ReconstructionStage
from lightning_quant.quantizers import StepQuantizer
from lightning_quant.solvers import Reconstruction


def reconstruct(
    trainer: Trainer,
    model: nn.Module,
    settings: Reconstruction,
    batches: Iterable[Any],
    layers: Sequence[str],
    state_dir: str | None = None,
) -> ReconstructionStage:
    """Fit the units of a quantized model to their float twins, on the devices and in the precision of a Trainer.

    Args:
        trainer: the running Trainer; its loggers get the loss curves.
        model: the quantized model, or a part of it.
        settings: what is learned, and how.
        batches: the calibration batches.
        layers: names of the quantized layers that take part.
        state_dir: where finished units are written.
    """
    stage = ReconstructionStage(model, settings, batches, layers, state_dir, trainer.loggers, trainer)
    bar = trainer.progress_bar_callback
    shown = bar is not None and not getattr(bar, "is_disabled", False)
    device = next(model.parameters()).device
    inner = Trainer(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index],  # the ranks learn together all the same
        precision=trainer.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=shown,
        callbacks=[UnitProgress(stage)] if shown else [],
        default_root_dir=trainer.default_root_dir,
        use_distributed_sampler=False,
    )
    with tables_float(model):
        inner.fit(stage)
    model.to(device)  # Lightning takes its module to the CPU when a fit ends
    return stage


@contextmanager
def tables_float(model: nn.Module) -> Iterator[None]:
    """Let quantizers with a scale for each step hand on floats: the samples of a unit do not tell their steps."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, StepQuantizer):
                stack.enter_context(module.observed_by(lambda x: x))
        yield


class UnitProgress(TQDMProgressBar):
    """Lightning's progress bar, with the unit's number and name beside the loss."""

    def __init__(self, stage: ReconstructionStage) -> None:
        super().__init__(leave=False)
        self.stage = stage

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The unit, and its loss."""
        metrics = super().get_metrics(trainer, pl_module)
        number = int(float(str(metrics.pop("unit", 1))))
        shown = {"unit": f"{number}/{len(self.stage.tasks)} {self.stage.tasks[number - 1].unit}"}
        return {**shown, **{name: value for name, value in metrics.items() if name != "v_num"}}
