"""The metrics of a model, or of its float twin: one more pass of Lightning's own loop, seen by nobody else."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.states import RunningStage
from torchmetrics import Metric

from lightning_quant.calibration import undisturbed
from lightning_quant.layers import as_float


def float_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """What ``trainer.validate`` or ``trainer.test`` would report of the float twin of a quantized model.

    Args:
        trainer: in ``validate`` or ``test``; see :func:`own_metrics`.
        pl_module: the quantized model.
    """
    with as_float(pl_module):
        return own_metrics(trainer, pl_module)


def own_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """What ``trainer.validate`` or ``trainer.test`` would report of the model as it is now.

    To be called where one of them has not begun or has just ended its own loop, in ``on_validation_start`` or
    ``on_validation_end``, ``on_test_start`` or ``on_test_end``, on every rank. The loop runs once more over the same
    loaders with the same limits; callbacks and loggers are absent, and the metrics of the run are left as they were.

    Args:
        trainer: in ``validate`` or ``test``.
        pl_module: the model.
    """
    testing = trainer.state.stage == RunningStage.TESTING
    name = "test_loop" if testing else "validate_loop"
    outer: _EvaluationLoop = getattr(trainer, name)
    inner = _EvaluationLoop(
        trainer, outer._trainer_fn, outer._stage, verbose=False, inference_mode=outer.inference_mode
    )
    inner._data_source = outer._data_source
    connector = trainer._logger_connector
    kept = {key: dict(vars(connector)[key]) for key in _METRICS}
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    try:
        trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
        setattr(trainer, name, inner)
        with undisturbed(pl_module):
            for metric in pl_module.modules():
                if isinstance(metric, Metric):
                    metric.reset()  # Lightning does so only where the loop that used it begins anew
            found = inner.run()
        inner.teardown()
    finally:
        setattr(trainer, name, outer)
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        vars(connector).update(kept)
    return {key: float(value) for metrics in found for key, value in metrics.items()}


# Lightning's private names, which a test watches: what a run has logged so far.
_METRICS = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")
