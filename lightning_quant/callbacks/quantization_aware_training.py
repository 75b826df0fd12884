"""Quantization-aware training: train through the rounding, and train the scales too (LSQ, ICLR 2020; LSQ+, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.calibration import CalibrationBatches, feed, undisturbed
from lightning_quant.callbacks.averages import averaged_copies
from lightning_quant.callbacks.base import require_scales
from lightning_quant.callbacks.fitting import check_fit, check_resumed, first_look, freeze_batchnorm
from lightning_quant.callbacks.param_groups import group_scales
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.checkpoint import attach_record, record_of
from lightning_quant.graph import trace
from lightning_quant.layers import Plan, learn_scales, learned_parameters, learned_quantizers, settle_scales
from lightning_quant.quantizers import LearnedQuantizer, RangeRule, Scheme


class QuantizationAwareTraining(PostTrainingQuantization):
    r"""Trains a model as it computes when quantized: rounded forward, and backward as if nothing had been rounded.

    .. math::
        \hat x = s \, (\text{clamp}(\lfloor x / s \rceil + z, \, q_{min}, \, q_{max}) - z), \qquad
        \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
            \lfloor x / s \rceil - x / s & \text{inside the range} \\
            q_{min} - z, \; q_{max} - z & \text{below, above}
        \end{cases}

    where the scale :math:`s` is a Parameter and :math:`g = 1 / \sqrt{N q_{max}}` for :math:`N` elements (of one sample)
    that share it; the gradient of :math:`x` is that of the output inside the range and 0 outside.

    ``trainer.fit`` starts from the ranges that :class:`PostTrainingQuantization` finds, so the weights should be
    trained ones, loaded before; ``trainer.validate`` before the fit reports that start. Fit's own validation reports
    the quantized model. Afterwards it is a quantized model like any other, with its float weights behind the codes
    that :func:`~lightning_quant.save_quantized` packs.

    A scale trains in the optimizer that trains its layer, without weight decay. With Adam, whose steps do not depend on
    the size of a gradient, ``scale_lr`` should be well below the scales themselves. Averages of weights
    (``WeightAveraging(use_buffers=False)``, ``StochasticWeightAveraging``) come after this callback in the list.

    References: Esser et al., *Learned Step Size Quantization*, ICLR 2020; Bhalgat et al., *LSQ+: Improving Low-Bit
    Quantization through Learnable Offsets and Better Initialization*, CVPR Workshops 2020.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs and of the attention operands, ``None`` for weight-only quantization.
        ranges: how the ranges are found that training starts from; see :class:`PostTrainingQuantization`.
        attention: whether q, k, v and the attention probabilities are quantized.
        first_last: format of the first and the last layer, which suffer most at low bits and cost little; ``None`` for
            no exemption.
        embeddings: format of embedding tables, ``None`` leaves them float.
        learn_scales: whether the scales of static ``intN`` formats are trained; others stay as the search found them.
        learn_offsets: whether the zero points of asymmetric activations are trained as well (LSQ+).
        scale_lr: learning rate of scales and zero points; ``None``: that of their layer.
        delay_epochs: how many epochs train in float first.
        freeze_batchnorm_epochs: in how many last epochs BatchNorm statistics stand still.
        overrides: format of single layers by name pattern, ``{"blocks.0.*": "int8"}``, for weights and inputs.
        target, skip, calibration_samples, calibration_loader: see
            :class:`~lightning_quant.callbacks.base.QuantizationCallback`.

    Raises:
        ValueError: for an unknown format, rule or pattern, a strategy that shards parameters, a checkpoint of a float
            run to resume from, or a model that another method has quantized.

    >>> callback = QuantizationAwareTraining(weights="int4", activations="int4", freeze_batchnorm_epochs=1)
    >>> trainer = L.Trainer(max_epochs=5, callbacks=[callback])  # doctest: +SKIP
    >>> trainer.fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | None = "int4",
        activations: str | None = "int4",
        ranges: str = "mse",
        attention: bool = True,
        first_last: str | None = "int8",
        embeddings: str | None = None,
        learn_scales: bool = True,
        learn_offsets: bool = False,
        scale_lr: float | None = None,
        delay_epochs: int = 0,
        freeze_batchnorm_epochs: int = 0,
        overrides: Mapping[str, str] | None = None,
        target: str | None = None,
        skip: Sequence[str] = (),
        calibration_samples: int = 32,
        calibration_loader: Literal["auto", "train", "val"] | Iterable[Any] | Callable[[], Iterable[Any]] = "auto",
    ) -> None:
        places: dict[str, Any] = {"target": target, "skip": skip}
        batches: dict[str, Any] = {"calibration_samples": calibration_samples, "calibration_loader": calibration_loader}
        super().__init__(
            weights, activations, ranges, attention, first_last, embeddings, overrides, **places, **batches
        )
        if learn_offsets and not learn_scales:
            raise ValueError("learn_offsets=True needs learn_scales=True")
        if delay_epochs < 0 or freeze_batchnorm_epochs < 0:
            raise ValueError("delay_epochs and freeze_batchnorm_epochs are numbers of epochs, 0 or more")
        for text in [activations, first_last, *self.formats.overrides.values()] if delay_epochs else []:
            if text is not None and Scheme.parse(text).dynamic:
                raise ValueError(f"{text!r} is dynamic and would not wait for delay_epochs; use a static format")
        self.learn_scales, self.learn_offsets, self.scale_lr = learn_scales, learn_offsets, scale_lr
        self.delay_epochs, self.freeze_batchnorm_epochs = delay_epochs, freeze_batchnorm_epochs
        self.epochs = -1
        self.learned: list[LearnedQuantizer] = []
        self.frozen: list[nn.Module] = []  # BatchNorm layers whose statistics stand still

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides which Parameters there are; a run resumes with the same ones."""
        return {**super().arguments, "learn_scales": self.learn_scales, "learn_offsets": self.learn_offsets}

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """For fit, make the scales now: before optimizers, DDP, averages and a checkpoint's weights come."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_fit(trainer, pl_module, self, self.delay_epochs, self.freeze_batchnorm_epochs)
        self.epochs = trainer.max_epochs or -1  # the Trainer's own grows when StochasticWeightAveraging starts
        known = self.is_calibrated(pl_module)
        if not known:
            self._forget(pl_module)
            try:
                self._build(trainer, pl_module)
            except AttributeError as error:
                error.add_note("This runs before LightningModule.setup: build layers in __init__ or configure_model")
                raise
        plan = self._plan(pl_module)
        if self.learn_scales:
            learn_scales(pl_module, plan, self.learn_offsets)
        for quantizer in [] if known else plan.quantizers(pl_module).values():
            quantizer.reset()  # two samples told the shape of the scales; their values come with all samples

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the scales are trained, and find where they start, unless a checkpoint brought them."""
        super().on_fit_start(trainer, pl_module)
        check_resumed(pl_module, self.state_key, self.learn_scales)
        plan = self._plan(pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        group_scales(trainer.optimizers, schedulers, learned_parameters(pl_module, plan), self.scale_lr)
        self.learned = list(learned_quantizers(pl_module, plan).values())
        if not self.delay_epochs:
            self._start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that resumes within an epoch does not start that epoch again."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to quantize after the delay, and hold the BatchNorm statistics in the last epochs."""
        if trainer.current_epoch >= self.delay_epochs:
            self._start(trainer, pl_module)
        if self.epochs - self.freeze_batchnorm_epochs <= trainer.current_epoch < self.epochs:
            self.frozen += freeze_batchnorm(pl_module)
        else:
            self._thaw()

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """The optimizer may have pushed a scale below 0."""
        for quantizer in self.learned:
            quantizer.keep_positive()

    # ---------------------------------------------------------------- private

    def _plan(self, pl_module: LightningModule) -> Plan:
        return attach_record(pl_module).plans[self.state_key]

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The quantized structure, calibrated on two samples, the same ones on every rank."""
        run = partial(feed, None, pl_module)
        with undisturbed(pl_module), torch.compiler.set_stance("force_eager"):
            batch = first_look(trainer, pl_module, self.calibration_loader, min(2, self.calibration_samples))
            plan = self.plan_for(pl_module, trace(pl_module, partial(run, batch)))
            with self.applied(pl_module, plan):
                self.find_ranges(pl_module, plan, [batch], run, RangeRule.parse("minmax"))

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the scales that training starts from, unless they are known."""
        if self.is_calibrated(pl_module):
            return
        plan, run = self._plan(pl_module), partial(feed, trainer, pl_module)
        with undisturbed(pl_module), torch.compiler.set_stance("force_eager"):
            batches = CalibrationBatches(trainer, pl_module, self.calibration_loader, self.calibration_samples)
            self.find_ranges(pl_module, plan, batches, run, self.rule)
            plan.calibration = f"{batches.available} samples from {batches.source}"
            require_scales(pl_module, plan)
        found = plan.quantizers(pl_module)
        for copy in averaged_copies(trainer):
            attach_record(copy).plans[self.state_key].calibration = plan.calibration
            for name, quantizer in plan.quantizers(copy).items():
                quantizer.load_state_dict(found[name].state_dict())

    def _thaw(self) -> None:
        for module in self.frozen:
            module.train()
        self.frozen = []

    def _forget(self, pl_module: LightningModule) -> None:
        plan = attach_record(pl_module).plans.pop(self.state_key, None)
        if plan is not None:
            plan.undo(pl_module)

    def _let_go(self, pl_module: LightningModule) -> None:
        """Scales are Parameters only while they are trained; what was never calibrated is float again."""
        self._thaw()
        self.learned = []
        record = record_of(pl_module)
        plan = None if record is None else record.plans.get(self.state_key)
        if plan is not None and self.is_calibrated(pl_module):
            settle_scales(pl_module, plan)
        elif plan is not None:
            self._forget(pl_module)
        super()._let_go(pl_module)
