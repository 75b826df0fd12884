"""A report of what quantization did to a model, to be looked at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_quant.calibration import check_feedable, feed, first_samples, sample_count, undisturbed
from lightning_quant.reports import (
    Findings,
    ModelErrors,
    circumstances,
    contributed,
    float_metrics,
    log_sections,
    sample_sections,
    standard_sections,
    title_of,
    write,
)


class QuantReport(Callback):
    r"""Writes ``report.html`` and ``report.json``: what quantization saved, what it cost, and in which layers.

    To be added beside any method of this library, or to a run of a model that :func:`~lightning_quant.load_quantized`
    loaded. The report is written at the end of ``trainer.validate`` and ``trainer.test``, and at the end of
    ``trainer.fit``, from the batches of its last validation. The page is one file that asks for nothing from elsewhere;
    the JSON holds the same facts.

    For each layer there are two errors, as signal to quantization noise at its output, over the first samples:

    .. math:: \text{SQNR} = 10 \log_{10} \frac{\sum_i y_i^2}{\sum_i (y_i - \hat y_i)^2}

    its *own*, where :math:`\hat y` comes of quantizing this layer alone, and the *accumulated* one, where everything is
    quantized; :math:`y` is the float twin's. Cost: three forwards of ``samples`` samples. Memory does not grow with the
    number of batches, and no second copy of the model is made. On several ranks, rank 0 tells of its own samples.

    Loggers of the Trainer get the main figures as scalars, and the plots where they take figures (TensorBoard, Weights
    & Biases). Any callback, and the LightningModule, may add sections: a method ``report_sections(trainer, pl_module)``
    that returns :class:`~lightning_quant.reports.Section` objects.

    Args:
        dirpath: the folder of the two files; made if it does not exist, files of an earlier run are replaced.
        samples: how many samples to measure on.
        worst: how many layers to show with their histograms.
        float_metrics: metrics of the float model, to compare with: as a dict, or ``True`` to validate (or test) the
            float twin as well, over the same batches, behind the run's own loop.

    Raises:
        ValueError: if ``dirpath`` is a file, or a number makes no sense.
        TypeError: if the module defines nothing that a batch could be fed to.

    >>> from lightning_quant import QuantReport, RepQViT
    >>> callbacks = [RepQViT(weights="int4", activations="int4"), QuantReport("report", float_metrics=True)]
    >>> trainer = L.Trainer(callbacks=callbacks)  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        dirpath: str | Path = "quant_report",
        samples: int = 8,
        worst: int = 5,
        float_metrics: bool | Mapping[str, float] = False,
    ) -> None:
        if samples < 1 or worst < 1:
            raise ValueError(f"QuantReport needs samples and worst of at least 1, found {samples} and {worst}")
        self.dirpath = Path(dirpath)
        self.samples, self.worst, self.float_metrics = samples, worst, float_metrics
        self.path: Path | None = None  # of the report, once it is written
        self._forget()

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be written in the end."""
        if self.dirpath.exists() and not self.dirpath.is_dir():
            raise ValueError(f"dirpath={str(self.dirpath)!r} is a file; QuantReport needs a folder of its own")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; by now every callback has calibrated."""
        self._forget()
        if trainer.state.fn != TrainerFn.FITTING:
            self._start(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        """Measure on this batch; within a fit keep its samples for the end."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._measure(trainer, pl_module, batch)
        elif not trainer.sanity_checking and (samples := self._first_samples(batch)) is not None:
            self._kept.append(apply_to_collection(samples, Tensor, torch.clone))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._report(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._forget()
        self._start(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        """Measure on this batch."""
        self._measure(trainer, pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._report(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the fit has left, on the batches of its last validation, and write."""
        kept, self._left = self._kept, self.samples
        self._start(pl_module)
        for batch in kept:
            self._measure(trainer, pl_module, batch)
        self._report(trainer, pl_module, "fit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing is written of a run that failed."""
        self._forget()

    # ---------------------------------------------------------------- private

    def _forget(self) -> None:
        self._errors: ModelErrors | None = None
        self._kept: list[Any] = []
        self._left = self.samples
        self._seconds = 0.0

    def _start(self, pl_module: LightningModule) -> None:
        errors = ModelErrors(pl_module)
        if len(errors):
            check_feedable(pl_module)
            self._errors = errors

    def _first_samples(self, batch: Any) -> Any:
        """As many of a batch's samples as are still to be measured, or None."""
        if not self._left:
            return None
        batch = first_samples(batch, self._left)
        try:
            self._left -= sample_count(batch)
        except ValueError:  # a batch without tensors counts as one
            self._left -= 1
        return batch

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self._errors is None or (samples := self._first_samples(batch)) is None:
            return
        began = time.perf_counter()
        self._errors.add(partial(_run_apart, trainer, pl_module, samples))
        self._seconds += time.perf_counter() - began

    def _report(self, trainer: Trainer, pl_module: LightningModule, function: str) -> None:
        after = {name: float(value) for name, value in trainer.callback_metrics.items()}
        before = self.float_metrics
        if isinstance(before, bool):
            before = float_metrics(trainer, pl_module) if before and self._errors and function != "fit" else {}
        if self._errors is None:
            rank_zero_warn(
                f"QuantReport has nothing to compare: no layer of this {type(pl_module).__name__} is quantized. Add a "
                f"quantization callback (in trainer.fit with during_fit=True), or load a quantized checkpoint"
            )
        if trainer.is_global_zero:
            began = time.perf_counter()
            made = circumstances(trainer, pl_module, function, samples=self.samples - self._left)
            found = Findings.of(pl_module, self._errors, before, after, made, self.worst)
            sections = standard_sections(found, [*contributed(trainer, pl_module), *sample_sections(pl_module)])
            self.path = write(self.dirpath, title_of(found), sections)
            log_sections(trainer.loggers, sections, trainer.global_step)
            rank_zero_info(f"QuantReport: {self.path} ({self._seconds + time.perf_counter() - began:.1f} s)")
        self._forget()


def _run_apart(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Feed a batch outside the run, but in inference mode where the loop is: its batch was born there."""
    inference = torch.is_inference_mode_enabled()
    with undisturbed(pl_module), torch.inference_mode(inference):
        return feed(trainer, pl_module, batch)
