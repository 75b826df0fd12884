"""Quantization-aware training: train through the rounding, and train the scales too (LSQ, ICLR 2020; LSQ+, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_quant.calibration import CalibrationBatches, check_feedable, feed, undisturbed
from lightning_quant.callbacks.fitting import check_fit, check_resumed, copies, freeze_batchnorm, like_parameters
from lightning_quant.callbacks.param_groups import group_scales
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.checkpoint import attach_record, record_of
from lightning_quant.graph import trace
from lightning_quant.layers import Plan, learn_scales, learned_parameters, learned_quantizers, settle_scales
from lightning_quant.quantizers import LearnedQuantizer, RangeRule, Scheme


class QuantizationAwareTraining(PostTrainingQuantization):
    r"""Trains a model as it computes when quantized: rounded forward, and backward as if nothing were rounded.

    .. math::
        \hat x = s \, (\text{clamp}(\lfloor x / s \rceil + z, \, q_{min}, \, q_{max}) - z), \qquad
        \frac{\partial \hat x}{\partial x} = \mathbf 1[q_{min} \le x / s + z \le q_{max}]

    and the scale :math:`s` is a Parameter, trained with the gradient
    :math:`\lfloor x / s \rceil - x / s` inside the range and :math:`q_{min} - z` or :math:`q_{max} - z` outside, times
    :math:`g = 1 / \sqrt{N q_{max}}`, where :math:`N` elements (of one sample) share the scale.

    ``trainer.fit`` starts from what :class:`PostTrainingQuantization` would find, so the model should be a trained
    one, loaded before; ``trainer.validate`` before the fit reports just that start. Fit's own validation reports the
    quantized model. The float weights stay in the model and in its checkpoints; afterwards it is a quantized model
    like any other, and :func:`~lightning_quant.save_quantized` packs its codes.

    A scale trains in the optimizer that trains its layer, without weight decay. With Adam, whose steps do not depend on
    the size of a gradient, ``scale_lr`` should be well below the scales themselves. List this callback before
    ``WeightAveraging`` or ``StochasticWeightAveraging``.

    References: Esser et al., *Learned Step Size Quantization*, ICLR 2020; Bhalgat et al., *LSQ+*, CVPR Workshops 2020.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs and of the attention operands, ``None`` for float.
        ranges: how the ranges are found that training starts from; see :class:`PostTrainingQuantization`.
        attention: whether q, k, v and the attention probabilities are quantized.
        first_last: format of the first and the last layer, ``None`` for no exemption. Eight bits there cost little and
            matter most at low bits.
        embeddings: format of embedding tables, ``None`` leaves them float.
        learn_scales: whether scales are trained (of static ``intN`` formats); else they stay what the search found.
        learn_offsets: whether the zero points of asymmetric activations are trained as well (LSQ+).
        scale_lr: learning rate of scales and zero points; ``None``: that of their layer.
        delay_epochs: how many epochs train in float first.
        freeze_batchnorm_epochs: in how many last epochs BatchNorm statistics stand still.
        target: name of the submodule to quantize; default: every layer that runs.
        skip: name patterns of layers that stay float.
        overrides: format of single layers by name pattern, ``{"blocks.0.*": "int8"}``, for weights and inputs.
        calibration_samples: how many samples (not batches) are searched for the ranges to start from.
        calibration_loader: where they come from; see :class:`~lightning_quant.callbacks.base.QuantizationCallback`.

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
        target: str | None = None,
        skip: Sequence[str] = (),
        overrides: Mapping[str, str] | None = None,
        calibration_samples: int = 32,
        calibration_loader: Literal["auto", "train", "val"] | Iterable[Any] | Callable[[], Iterable[Any]] = "auto",
    ) -> None:
        common = {"target": target, "skip": skip, "calibration_samples": calibration_samples}
        super().__init__(
            weights,
            activations,
            ranges,
            attention,
            first_last,
            embeddings,
            overrides,
            **common,
            calibration_loader=calibration_loader,
        )
        if learn_offsets and not learn_scales:
            raise ValueError("learn_offsets=True needs learn_scales=True")
        if delay_epochs < 0 or freeze_batchnorm_epochs < 0:
            raise ValueError(
                f"delay_epochs and freeze_batchnorm_epochs are numbers of epochs, "
                f"found {delay_epochs} and {freeze_batchnorm_epochs}"
            )
        for text in [activations, first_last, *self.formats.overrides.values()] if delay_epochs else []:
            if text is not None and Scheme.parse(text).dynamic:
                raise ValueError(f"{text!r} is dynamic and would not wait for delay_epochs; use a static format")
        self.learn_scales = learn_scales
        self.learn_offsets = learn_offsets
        self.scale_lr = scale_lr
        self.delay_epochs = delay_epochs
        self.freeze_batchnorm_epochs = freeze_batchnorm_epochs
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
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        known = self.is_calibrated(pl_module)
        if not known:
            self._forget(pl_module)
            self._build(trainer, pl_module)
        plan = self._plan(pl_module)
        if self.learn_scales:
            learn_scales(pl_module, plan, self.learn_offsets)
        for quantizer in [] if known else plan.quantizers(pl_module).values():
            quantizer.reset()  # two samples told the shape of the scales; their values come with all samples

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the scales are trained, and find where they start, unless a checkpoint brought them."""
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
        check_feedable(pl_module)
        trainer.strategy.model_to_device()  # a moment early: in setup, pl_module.device says so already
        run = partial(feed, None, pl_module)
        with undisturbed(pl_module), torch.compiler.set_stance("force_eager"):
            samples = min(2, self.calibration_samples)
            batches = list(CalibrationBatches(trainer, pl_module, self.calibration_loader, samples))
            batch = like_parameters(trainer.strategy.broadcast(batches[0] if batches else None), pl_module)
            try:
                graph = trace(pl_module, partial(run, batch))
            except Exception as error:
                error.add_note(
                    "The model runs before LightningModule.setup: build layers in __init__ or configure_model"
                )
                raise
            plan = self.plan_for(pl_module, graph)
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
        found = plan.quantizers(pl_module)
        for copy in copies(trainer, pl_module):
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
