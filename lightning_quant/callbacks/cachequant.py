"""CacheQuant: feature caching and quantization of a diffusion model, each calibrated in the presence of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_quant.calibration import WholeTrajectories, merge_across_ranks
from lightning_quant.callbacks.at_first_batch import AtFirstBatch
from lightning_quant.callbacks.feature_cache import FeatureCache
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph, readers
from lightning_quant.layers import Plan, QuantizedLayer, StepCorrection, as_float, corrected_part
from lightning_quant.modules import DiffusionMixin
from lightning_quant.solvers import by_channel, line_of, line_sums


class CacheQuant(PostTrainingQuantization, AtFirstBatch):
    r"""A quantized sampler that skips its deep part at most steps, with the two errors corrected one after the other.

    1. :class:`FeatureCache` watches the float model's trajectories and corrects the kept feature,
       :math:`h_t = a_t h_c + b_t`; it can choose the refresh steps there too.
    2. Ranges are found on trajectories that are cached and corrected so, for each step apart.
    3. What quantization makes of the kept feature is corrected where a layer reads it,

    .. math:: y = \alpha_t \, \hat W_0 \hat h_t + \beta_t + \hat W_1 \hat x_1 + b

    with :math:`\alpha_t, \beta_t` for each step and output channel, by least squares to :math:`W_0 h_t` on the float
    stream. In a U-Net that is the shortcut of the layer that joins :math:`h` with a skip connection :math:`x_1`; in a
    transformer the projections to queries, keys and values of the block behind the skipped ones, which read the norm
    of the stream. The released code fits the bias too and then adds it a second time; here it is left out of the fit.

    On a small trained U-Net (W8A8, 50 steps, interval 5, SQNR of 16 final samples) it has 19.3 dB, and 19.9 with
    ``schedule="weighted"``, where a uniform cache beside plain quantization has 16.6; on a small transformer 23.5 and
    24.1, where the plain ones have 21.4. A correction of the kept feature everywhere, as in the paper, costs more than
    it gains on that transformer, hence ``correct="auto"``.

    ``trainer.validate`` calibrates. The schedule and the correction of the kept feature are kept in Lightning's
    checkpoints, with the callback; ``save_quantized`` holds the quantized model alone.

    Reference: Liu et al., *CacheQuant: Comprehensively Accelerated Diffusion Models*, CVPR 2025.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs and of the attention operands.
        interval: refresh at so many-th of the steps in the mean.
        schedule: ``"uniform"``, ``"dps"``, ``"weighted"``, or the numbers of the refresh steps; see
            :class:`FeatureCache`.
        cache_point: see :class:`FeatureCache`.
        correct: whether the kept feature is corrected, or ``"auto"``; see :class:`FeatureCache`.
        correct_quantization: whether what the quantized layers make of it is.
        ranges: how ranges are found, for each step.
        per_step: whether each step has its own ranges and corrections, or how many groups of them do.
        calibration_samples: how many trajectories calibrate.
        calibration_loader: where their seeds and conditions come from, as :class:`~lightning_quant.Trajectory` says.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: for ``reconstruct=``, which does not know of cached steps, and where
            :class:`PostTrainingQuantization` does.

    >>> callback = CacheQuant(weights="int8", activations="int8", interval=5)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    >>> trainer.predict(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | None = "int8",
        activations: str = "int8",
        interval: int = 5,
        schedule: Literal["uniform", "dps", "weighted"] | Sequence[int] = "uniform",
        cache_point: str = "auto",
        correct: bool | Literal["auto"] = "auto",
        correct_quantization: bool = True,
        ranges: str = "minmax",
        per_step: bool | int = True,
        calibration_samples: int = 32,
        calibration_loader: Any = "auto",
        **arguments: Any,
    ) -> None:
        if arguments.get("reconstruct") is not None:
            raise ValueError("CacheQuant takes no reconstruct=: a unit is reconstructed without regard to cached steps")
        if correct_quantization and per_step is False:
            raise ValueError("correct_quantization=True is a correction for each step: it needs per_step=True")
        self.cache = FeatureCache(interval, schedule, cache_point, correct, calibration_samples, calibration_loader)
        whole = WholeTrajectories(calibration_loader, calibration_samples)
        arguments |= {"calibration_samples": calibration_samples, "calibration_loader": whole}
        super().__init__(weights, activations, ranges, per_step=per_step, **arguments)
        self.correct_quantization = correct_quantization

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {**self.cache.arguments, "correct_quantization": self.correct_quantization}
        return {**super().arguments, **own}

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the schedule, then the ranges; a checkpoint may have brought either."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.cache.on_validation_start(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test without calibration."""
        super().on_test_start(trainer, pl_module)
        self.cache.require_calibrated(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to predict without calibration."""
        super().on_predict_start(trainer, pl_module)
        self.cache.require_calibrated(trainer, pl_module, "predict")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self.end()
        super().on_exception(trainer, pl_module, exception)

    def begin(self, pl_module: LightningModule) -> None:
        """Let the deep modules ask before they run."""
        self.cache.begin(pl_module)

    def end(self) -> None:
        """Give them their own classes back."""
        self.cache.end()

    def state_dict(self) -> dict[str, Any]:
        """The arguments, and what the cache found."""
        return {**super().state_dict(), "cache": self.cache.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the cache found."""
        self.cache.load_state_dict(state_dict["cache"])

    # ---------------------------------------------------------------- how it is calibrated

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the model now, as it is when it is cached."""
        if self.cache.needs_calibration:
            self.cache.calibrate(trainer, pl_module)
        super().calibrate(trainer, pl_module)

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats, what depends on the step, and which layers read the kept feature."""
        plan = super().plan_for(model, graph)
        if self.correct_quantization and plan.steps is not None and isinstance(model, DiffusionMixin):
            for name, channels in readers(model.denoiser, self.cache.point(model)).items():
                if f"denoiser.{name}" in plan.steps.owners:
                    plan.steps.corrected[f"denoiser.{name}"] = channels
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Find the ranges under the cache, then the corrections."""
        assert isinstance(model, DiffusionMixin)
        batches = list(batches)  # seeds and conditions
        self.cache.begin(model)
        try:
            super().calibrate_plan(model, plan, graph, batches, run)
            if plan.steps is not None and plan.steps.corrected:
                self._find_corrections(model, plan.steps.corrected, batches, run)
        finally:
            self.cache.end()

    def _find_corrections(
        self, model: DiffusionMixin, corrected: dict[str, int], batches: Sequence[Any], run: Callable[[Any], Any]
    ) -> None:
        """Fit what each layer makes of the kept feature in floats by what it makes of it when quantized."""
        sums: dict[tuple[str, int], Tensor] = {}

        def watch(name: str, channels: int) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any) -> None:
                assert isinstance(layer, QuantizedLayer) and isinstance(layer.step_correction, StepCorrection)
                row = layer.step_correction.steps.rows[0]
                exact, rounded = (
                    by_channel(corrected_part(layer, args[0], channels, exact)) for exact in (True, False)
                )
                seen = line_sums(rounded, exact)
                sums[name, row] = sums[name, row] + seen if (name, row) in sums else seen

            return hook

        layers = {name: model.get_submodule(name) for name in corrected}
        handles = [layers[name].register_forward_pre_hook(watch(name, corrected[name])) for name in layers]
        try:
            with as_float(model, cached=True):
                for batch in batches:
                    run(batch)
        finally:
            for handle in handles:
                handle.remove()
        ranks = merge_across_ranks(sums)
        for name, row in {key for rank in ranks for key in rank}:
            correction = layers[name].step_correction
            assert isinstance(correction, StepCorrection)
            scale, shift = line_of(torch.stack([rank[name, row] for rank in ranks if (name, row) in rank]).sum(0))
            correction.scale[row], correction.shift[row] = scale.float(), shift.float()
