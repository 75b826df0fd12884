"""Q-Diffusion: calibrate on all of a trajectory, and keep the two halves of a skip concatenation apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.calibration import Trajectory, at_intervals
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan
from lightning_quant.modules import DiffusionMixin
from lightning_quant.solvers import Reconstruction


class QDiffusion(PostTrainingQuantization):
    r"""Post-training quantization of a denoiser whose activations drift from step to step.

    1. *Timestep-aware calibration.* Samples are taken from the float model's own trajectories, the same number at each
       of ``steps`` steps that lie at equal intervals, so that ranges and rounding serve all of a trajectory.
    2. *Split shortcuts.* A layer that reads a stream :math:`h` joined with a skip connection :math:`x`, as the shortcut
       of a U-Net's block on the way up does, has a scale for each of the two, and its weight for each of the two halves
       of its input channels,

       .. math:: y = \hat W_h \hat h + \hat W_x \hat x + b .

       A denoiser without skip connections, as a diffusion transformer, has none.
    3. *Reconstruction*, with ``reconstruct="brecq"``: the rounding of weights is learned block by block, then the
       scales of activations.

    Weights are asymmetric per output channel, activations asymmetric per tensor, both between their extremes, unless
    the formats and ``ranges`` say otherwise. The paper's code searches ranges of least error to the power 2.4
    (``"lp"``) for most nets. That clips, clipped weights predict too little noise, and what is missing adds up over the
    steps: a net of convolutions with 4-bit weights predicts 0 % too little with the extremes, 3 % with ``"lp"``, and
    11 % with ``"mse"``. The papers' code calibrates on 20 steps of 256 trajectories (25 of 128 for Stable Diffusion)
    and reconstructs with 20,000 iterations; the defaults here are sized for minutes.

    On a small trained U-Net (W4A8, 50 steps, SQNR of 64 final samples): 15.3 dB with 60 iterations for each block, and
    11.9 with plain quantization. Scales for each half gain nothing there, with ``split=False`` it is 19.1 dB: they
    lower the error of five of the six shortcuts, by up to 40 %, and raise that of the last one by 30 %, most of which
    is a shift of its mean, where rounding happens to fall; and that one stands next to the output.

    Reference: Li et al., *Q-Diffusion: Quantizing Diffusion Models*, ICCV 2023.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs and of the attention operands.
        steps: how many steps of a trajectory give calibration samples; all, where it has no more.
        split: whether the halves of skip concatenations are kept apart.
        ranges: how ranges are found.
        calibration_samples: over all steps; every ``steps`` of them take one trajectory to be sampled.
        calibration_loader: where the seeds and conditions of trajectories come from, as
            :class:`~lightning_quant.Trajectory` says. A ``Trajectory`` is taken as it is.
        reconstruct: ``None``, ``"brecq"``, or another preset or settings.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: if ``steps`` is not positive, and where :class:`PostTrainingQuantization` does.
        TypeError: if the model does not sample.

    >>> callback = QDiffusion(weights="int4", activations="int8", reconstruct="brecq")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    >>> trainer.predict(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | None = "int4",
        activations: str | None = "int8",
        steps: int = 20,
        split: bool = True,
        ranges: str = "minmax",
        calibration_samples: int = 640,
        calibration_loader: Any = "auto",
        reconstruct: str | Reconstruction | None = None,
        **arguments: Any,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, found {steps}")
        arguments |= {"calibration_samples": calibration_samples, "calibration_loader": calibration_loader}
        super().__init__(weights, activations, ranges, reconstruct=reconstruct, **arguments)
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})
        self.steps, self.split = steps, split

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "steps": self.steps, "split": self.split}

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the model now, on moments of its own trajectories."""
        given = self.calibration_loader
        if not isinstance(given, Trajectory):
            self.calibration_loader = self.moments(pl_module, given)
        try:
            super().calibrate(trainer, pl_module)
        finally:
            self.calibration_loader = given

    def moments(self, model: nn.Module, loader: Any) -> Trajectory:
        """The same number of samples at each of the chosen steps.

        Raises:
            TypeError: if the model does not sample.
        """
        if not isinstance(model, DiffusionMixin):
            raise TypeError(
                f"{type(self).__name__} calibrates on the trajectories of a model that samples, which "
                f"{type(model).__name__} does not: derive it from DiffusionMixin, or use DiffusionModule"
            )
        steps = min(self.steps, model.num_inference_steps)
        return Trajectory(-(-self.calibration_samples // steps), steps, at_intervals(steps), loader=loader)

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats, and which layers read a skip connection."""
        plan = super().plan_for(model, graph)
        for name, parts in graph.joins.items() if self.split else ():
            if name in plan.layers:
                plan.layers[name].split = list(parts)
        return plan
