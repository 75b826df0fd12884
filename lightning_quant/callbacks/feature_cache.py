"""Feature caching for diffusion: the deep part of the denoiser runs at some steps, and its answer serves the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_quant.calibration import trajectory_seeds, undisturbed
from lightning_quant.callbacks.at_first_batch import AtFirstBatch
from lightning_quant.graph import CachePoint, find_cache_point
from lightning_quant.layers import KeptFeatures, as_float, cache_modules, stop_caching
from lightning_quant.modules import DiffusionMixin
from lightning_quant.solvers import WatchedFeature

SCHEDULES = ("uniform", "dps", "weighted")


class FeatureCache(AtFirstBatch):
    r"""Skips the deep part of a denoiser at most steps of a trajectory, and uses what it answered before.

    Neighbouring steps see nearly the same image, so what the deep layers make of it hardly changes. At the refresh
    steps :math:`S` everything runs and the deep feature :math:`h_c` is kept; at the others only the shallow layers do:

    .. math:: h_t = a_t h_c + b_t

    In a U-Net :math:`h` is what joins the last skip connection; in a transformer it is what the blocks between the
    first and the last add to the stream. ``schedule="dps"`` chooses as many refresh steps as every ``interval``-th, so
    that :math:`\sum_t w_t \|h_t - h_{c(t)}\|_1` over the float model's own trajectories is least, with :math:`w_t = 1`,
    by dynamic programming (groups of half to twice the interval). ``"weighted"`` is our own: w says what the final
    sample loses, for which one group of ``interval`` steps after another is served the feature of its first step while
    all others run in full (steps / interval more trajectories, of eight samples). ``correct`` finds a and b for each
    step and channel by least squares; ``"auto"``, our own too, tries each group of steps with and without in the same
    way, and corrects where the final sample gains.

    It works in validate, test and predict on a module that samples (:class:`~lightning_quant.DiffusionModule`), float
    or quantized; nothing is left behind when the run ends, also after an exception. Where the schedule or ``correct``
    need it, ``trainer.validate`` calibrates; ``trainer.predict`` does so with a ``calibration_loader`` and refuses
    without.

    What it is worth depends on the net (50 DDIM steps, interval 5, 32 final samples, SQNR in dB):

    =========== ======= ======== ============= ================ =========== =========================
    net         uniform ``dps``  ``weighted``  ``correct=True`` ``"auto"``  ``weighted``, ``"auto"``
    =========== ======= ======== ============= ================ =========== =========================
    small U-Net 19.7    19.0     20.3          20.4             20.7        20.7
    small DiT   23.0    22.9     23.8          19.6             24.3        25.2
    =========== ======= ======== ============= ================ =========== =========================

    ``dps`` lets the first steps, where features change least, run longest without a refresh, and an early error has
    many steps to grow. A correction halves the error of the DiT's prediction along the float trajectory, but its fit
    does not know what the steps make of what is left. At interval 3, where groups have little choice, ``weighted``
    loses 0.7 dB on the DiT; at 8 it gains 1.0.

    References: Ma et al., *DeepCache*, CVPR 2024; Liu et al., *CacheQuant*, CVPR 2025 (the schedule and the
    correction; for transformers they are carried over from its U-Nets).

    Args:
        interval: refresh at so many-th of the steps in the mean; 1 skips nothing.
        schedule: ``"uniform"``, ``"dps"``, ``"weighted"``, or the numbers of the refresh steps, which begin with 0.
        cache_point: ``"auto"``; of a U-Net the layer whose answer is kept, ``"up_blocks.2.resnets.0"``; else a run of
            blocks, ``"transformer_blocks.2:6"``. Names are relative to the denoiser.
        correct: whether the kept feature is corrected; ``"auto"``: where the final sample gains.
        calibration_samples: how many trajectories calibrate.
        calibration_loader: where their seeds and conditions come from, as :class:`~lightning_quant.Trajectory` says.

    Attributes:
        refresh: the numbers of the refresh steps, once they are known.
        runs: how often the deep part has run and been skipped in the last run.

    Raises:
        ValueError: for a schedule that is none, or a denoiser that cannot be cut there.
        RuntimeError: at predict, if it needs calibration and has none.

    >>> callback = FeatureCache(interval=5, schedule="dps")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    >>> trainer.predict(model, datamodule=dm)  # doctest: +SKIP
    >>> callback.runs  # doctest: +SKIP
    {'deep': 10, 'skipped': 40}
    """

    def __init__(
        self,
        interval: int = 5,
        schedule: Literal["uniform", "dps", "weighted"] | Sequence[int] = "uniform",
        cache_point: str = "auto",
        correct: bool | Literal["auto"] = True,
        calibration_samples: int = 32,
        calibration_loader: Any = "auto",
    ) -> None:
        if interval < 1 or calibration_samples < 1:
            raise ValueError(
                f"interval and calibration_samples must be at least 1, found {interval} and {calibration_samples}"
            )
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is none of {', '.join(map(repr, SCHEDULES))}, nor a list of steps")
        if not isinstance(schedule, str) and (list(schedule) != sorted({*schedule}) or list(schedule)[:1] != [0]):
            raise ValueError(f"schedule={list(schedule)} has to be a list of different steps that begins 0, in order")
        if correct not in (True, False, "auto"):
            raise ValueError(f"correct={correct!r} is none of True, False, 'auto'")
        self.interval, self.cache_point, self.correct = interval, cache_point, correct
        self.schedule = schedule if isinstance(schedule, str) else list(schedule)
        self.calibration_samples, self.calibration_loader = calibration_samples, calibration_loader
        self.refresh: list[int] = []
        self.timesteps: list[float] = []
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self._features: KeptFeatures | None = None
        self._open: DiffusionMixin | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        names = ("interval", "schedule", "cache_point", "correct", "calibration_samples")
        return {name: getattr(self, name) for name in names}

    @property
    def needs_calibration(self) -> bool:
        """Whether the schedule or the correction have to be found yet."""
        return (self.searches or self.correct) and not self.refresh

    @property
    def searches(self) -> bool:
        """Whether the schedule is found on trajectories."""
        return self.schedule in ("dps", "weighted")

    @property
    def runs(self) -> dict[str, int]:
        """How often the deep part has run and been skipped in the last run."""
        return {"deep": 0, "skipped": 0} if self._features is None else dict(self._features.runs)

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, unless that is done, or this is only fit's own validation."""
        if trainer.state.fn == TrainerFn.VALIDATING and self.needs_calibration:
            self.calibrate(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test without calibration."""
        self.require_calibrated(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate where a loader was given for that, or refuse."""
        self.require_calibrated(trainer, pl_module, "predict")

    def state_dict(self) -> dict[str, Any]:
        """The arguments, and what calibration found."""
        found = {"refresh": self.refresh, "timesteps": self.timesteps, "scale": self.scale, "shift": self.shift}
        return {"arguments": self.arguments, **found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was found by a callback of the same arguments.

        Raises:
            ValueError: if they are others.
        """
        stored = state_dict["arguments"]
        differing = {name: value for name, value in self.arguments.items() if stored.get(name) != value}
        if differing:
            raise ValueError(
                f"the features of this checkpoint are cached with "
                f"{', '.join(f'{name}={stored.get(name)!r}' for name in differing)}, and this FeatureCache has "
                f"{', '.join(f'{name}={value!r}' for name, value in differing.items())}: give it the same arguments"
            )
        self.refresh, self.timesteps = state_dict["refresh"], state_dict["timesteps"]
        self.scale, self.shift = state_dict["scale"], state_dict["shift"]

    # ---------------------------------------------------------------- how it is done

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample with the float model, choose the refresh steps, and find the corrections."""
        module, point = _sampler(pl_module), self.point(pl_module)
        self.timesteps = module.timesteps
        steps = len({*self.timesteps})
        with undisturbed(pl_module), as_float(pl_module):
            seeds = trajectory_seeds(trainer, module, self.calibration_loader, self.calibration_samples)
            feature = WatchedFeature(trainer, module, point, seeds)
            pairs = feature.pairs(self._window(steps))
            if self.schedule == "weighted":
                self.refresh = pairs.schedule(self.interval, feature.lost(range(0, steps, self.interval)))
            else:
                self.refresh = pairs.schedule(self.interval) if self.schedule == "dps" else self._fixed(steps)
            if self.correct:
                self.scale, self.shift = pairs.corrections(self.refresh)
            if self.correct == "auto":
                pays = feature.lost(self.refresh, self.scale, self.shift) < feature.lost(self.refresh)
                self.scale, self.shift = pairs.corrections(self.refresh, pays.tolist())
        rank_zero_info(f"FeatureCache refreshes at {len(self.refresh)} of {steps} steps: {self.refresh}")

    def begin(self, pl_module: LightningModule) -> None:
        """Let the deep modules of a model ask before they run."""
        if self._open is not None:
            return
        module, point = _sampler(pl_module), self.point(pl_module)
        if not (self.searches or self.correct):
            self.timesteps = module.timesteps
            self.refresh = self._fixed(len({*self.timesteps}))
        self._features = KeptFeatures(self.timesteps, self.refresh, self.scale, self.shift)
        cache_modules(module.denoiser, point.deep, point.point, point.residual, self._features)
        self._open = module

    def end(self) -> None:
        """Give the modules of the model their own classes back."""
        if self._open is not None:
            stop_caching(self._open.denoiser)
            self._open = None

    # ---------------------------------------------------------------- private

    def _fixed(self, steps: int) -> list[int]:
        """The refresh steps that need no calibration."""
        if isinstance(self.schedule, str):
            return list(range(0, steps, self.interval))
        if self.schedule[-1] >= steps:
            raise ValueError(f"schedule={self.schedule} goes beyond the steps of a trajectory, 0 to {steps - 1}")
        return self.schedule

    def _window(self, steps: int) -> int:
        """The most steps that a feature may be used for."""
        if self.searches:
            return 2 * self.interval
        fixed = [*self._fixed(steps), steps]
        return max(after - before for before, after in pairwise(fixed))

    def point(self, pl_module: LightningModule) -> CachePoint:
        """Where the denoiser is cut."""
        return find_cache_point(_sampler(pl_module).denoiser, self.cache_point)

    def require_calibrated(self, trainer: Trainer, pl_module: LightningModule, verb: str) -> None:
        """Calibrate where a loader was given for that, or refuse."""
        if self.needs_calibration and self.calibration_loader == "auto":
            raise RuntimeError(
                f"FeatureCache(schedule={self.schedule!r}, correct={self.correct}) has to watch trajectories first: "
                f"run trainer.validate(model, ...) before trainer.{verb}(model, ...), give it a calibration_loader= of "
                f"seeds and conditions, or set schedule='uniform', correct=False"
            )
        if self.needs_calibration:
            self.calibrate(trainer, pl_module)


def _sampler(pl_module: LightningModule) -> DiffusionMixin:
    if not isinstance(pl_module, DiffusionMixin):
        raise TypeError(
            f"FeatureCache needs a model that samples step by step, and {type(pl_module).__name__} does not say how: "
            f"derive it from DiffusionMixin, or use DiffusionModule"
        )
    return pl_module
