"""Validation that also says how far the quantized model is from its float twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_quant.calibration import check_feedable, feed, feeder_name, undisturbed
from lightning_quant.layers import as_float, is_altered
from lightning_quant.metrics import (
    SQNR,
    CosineFidelity,
    NegativeFlipRate,
    PositiveFlipRate,
    PredictionDivergence,
    TopOneAgreement,
)

METRICS: dict[str, Callable[[], Metric]] = {
    "sqnr": SQNR,
    "cosine": CosineFidelity,
    "agreement": TopOneAgreement,
    "kl": PredictionDivergence,
    "negative_flips": NegativeFlipRate,
    "relative_negative_flips": partial(NegativeFlipRate, relative=True),
    "positive_flips": PositiveFlipRate,
}
FLIPS = {"negative_flips", "relative_negative_flips", "positive_flips"}  # these need labels


class Fidelity(Callback):
    r"""Compares the quantized model with its float twin on the batches of validate, test and fit's validation.

    After each batch the model is fed that batch twice more, through its ``fidelity_step(batch)`` if it has one, else as
    calibration feeds it (``calibration_step``, else ``predict_step``, else ``forward``): once as it is, and once with
    its quantizers handing on floats (:func:`~lightning_quant.layers.as_float`), so there is no second copy of the
    model. Both see the same random numbers. At the end of the epoch these are logged as ``fidelity/<name>``, over all
    ranks, and with ``/dataloader_idx_<i>`` behind the name where there are several dataloaders:

    - ``sqnr``: :class:`~lightning_quant.metrics.SQNR` in dB
    - ``cosine``: :class:`~lightning_quant.metrics.CosineFidelity`
    - ``agreement``: :class:`~lightning_quant.metrics.TopOneAgreement`
    - ``kl``: :class:`~lightning_quant.metrics.PredictionDivergence` in nats, of what are class scores
    - ``negative_flips``, ``relative_negative_flips``: :class:`~lightning_quant.metrics.NegativeFlipRate`
    - ``positive_flips``: :class:`~lightning_quant.metrics.PositiveFlipRate`

    The twin is the float model exactly where quantization left the weights alone, and up to rounding where it folded
    norms into them. It is made of the weights as they are now: after training or rounding them, the comparison is
    with the float model of the *new* weights.

    Cost: two forwards per batch beside the one of the validation step, one quantized and one float, and next to no
    memory; ``limit_batches`` bounds it. The module's own metrics, random numbers and modes are left as they were. A
    model that is not quantized is not compared, and one warning says so.

    Args:
        metrics: which of the names above to log.
        target: where the labels are in a batch, an index or a key; ``None``: there are none, and no flips are counted.
        output: where the tensor to compare is in what the model returns, an index or a key; ``None``: the first float
            tensor that is not a scalar. The last axis holds the classes for the agreement and the flips.
        limit_batches: compare only the first batches of each dataloader, per rank; ``None``: all.

    Raises:
        ValueError: for an unknown metric, flips alone without a target, or a batch without such a target.
        TypeError: if the model returns nothing that can be compared.

    >>> from lightning_quant import Fidelity, PostTrainingQuantization
    >>> callbacks = [PostTrainingQuantization(weights="int8", activations="int8"), Fidelity(target=1)]
    >>> trainer = L.Trainer(callbacks=callbacks)  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    [{'top1': 0.808, 'fidelity/sqnr': 15.9, ..., 'fidelity/negative_flips': 0.004, 'fidelity/positive_flips': 0.008}]
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("sqnr", "cosine", "agreement", "negative_flips", "positive_flips"),
        target: int | str | None = 1,
        output: int | str | None = None,
        limit_batches: int | None = None,
    ) -> None:
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        if unknown := [name for name in names if name not in METRICS]:
            raise ValueError(f"Fidelity knows the metrics {', '.join(METRICS)}; found {', '.join(unknown)}")
        self.metrics = [name for name in names if target is not None or name not in FLIPS]
        if not self.metrics:
            raise ValueError(f"metrics={names} with target=None leaves nothing to log: flips need the labels")
        self.target = target if FLIPS & {*self.metrics} else None
        self.output = output
        self.limit_batches = limit_batches
        self.collections: list[MetricCollection] = []  # one per dataloader; none while nothing is compared
        self._warned = False

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; by now every callback has calibrated."""
        self._start(pl_module, 0 if trainer.sanity_checking else len(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare on this batch."""
        self._compare(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._start(pl_module, len(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare on this batch."""
        self._compare(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module)

    # ---------------------------------------------------------------- private

    def _start(self, pl_module: LightningModule, dataloaders: int) -> None:
        self.collections = []
        if dataloaders and not is_altered(pl_module):
            if not self._warned:
                rank_zero_warn(
                    f"Fidelity compares nothing: no layer of this {type(pl_module).__name__} is quantized. Add a "
                    f"quantization callback (in trainer.fit with during_fit=True), or load a quantized checkpoint"
                )
            self._warned = True
            return
        if dataloaders:
            check_feedable(pl_module)
        for _ in range(dataloaders):
            collection = MetricCollection({name: METRICS[name]() for name in self.metrics}, prefix="fidelity/")
            self.collections.append(collection.to(pl_module.device))

    def _compare(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if not self.collections or (self.limit_batches is not None and batch_idx >= self.limit_batches):
            return
        found = {} if self.target is None else {"target": _labels(batch, self.target)}
        # Each context starts from the random numbers of the run, so both forwards draw the same ones.
        with _apart(pl_module):
            quantized = self._tensor(_fed(trainer, pl_module, batch), pl_module)
        with _apart(pl_module), as_float(pl_module):
            reference = self._tensor(_fed(trainer, pl_module, batch), pl_module)
        # A collection hands each metric only the keywords that its update takes.
        self.collections[dataloader_idx].update(quantized=quantized, reference=reference, **found)

    def _log(self, pl_module: LightningModule) -> None:
        for index, collection in enumerate(self.collections):
            suffix = f"/dataloader_idx_{index}" if len(self.collections) > 1 else ""
            for name, value in collection.compute().items():
                # torchmetrics has added up the ranks' sums, so the values are equal on all ranks: the maximum keeps
                # them as they are, and Lightning does not warn that nothing was synchronized.
                pl_module.log(
                    name + suffix, value, sync_dist=True, reduce_fx="max", add_dataloader_idx=False, batch_size=1
                )

    def _tensor(self, outputs: Any, pl_module: LightningModule) -> Tensor:
        """What to compare out of what the model returned."""
        if self.output is not None:
            candidates = [outputs[self.output]]
        elif isinstance(outputs, Mapping):
            candidates = list(outputs.values())
        else:
            candidates = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        for candidate in candidates:
            if isinstance(candidate, Tensor) and candidate.is_floating_point() and candidate.dim() > 0:
                return candidate
        raise TypeError(
            f"Fidelity compares float tensors such as logits, but {type(pl_module).__name__}."
            f"{feeder_name(pl_module)} returned {_described(outputs)}: say where they are with output=, or define "
            f"calibration_step(self, batch) that returns them"
        )


def _fed(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    if not callable(step := getattr(pl_module, "fidelity_step", None)):
        return feed(trainer, pl_module, batch)
    with trainer.precision_plugin.val_step_context():
        return step(batch)


@contextmanager
def _apart(pl_module: LightningModule) -> Iterator[None]:
    """Outside the run, but in inference mode where the loop is: its batch and the model's caches were born there."""
    inference = torch.is_inference_mode_enabled()
    with undisturbed(pl_module), torch.inference_mode() if inference else nullcontext():
        yield


def _labels(batch: Any, target: int | str) -> Tensor:
    try:
        labels = None if isinstance(batch, Tensor) else batch[target]
    except (KeyError, IndexError, TypeError):
        labels = None
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"Fidelity looks for labels in batch[{target!r}], but the batch is {_described(batch)}: say where they are "
            f"with target=, or count no flips with target=None"
        )
    return labels


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}"
    return f"a {type(value).__name__}"
