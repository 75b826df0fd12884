"""A LightningModule around a denoiser: it learns to denoise, samples from seeds, and compares itself with its twin."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.calibration import Moment, Trajectory, first_samples
from lightning_quant.layers import call_denoiser, is_altered, on_trajectory, require_schedule
from lightning_quant.modules.denoising import noised, prediction_target, training_timesteps
from lightning_quant.modules.mixin import CalibrationMixin
from lightning_quant.modules.trajectory_judge import TrajectoryJudge

if TYPE_CHECKING:
    _Base = pl.LightningModule
else:
    _Base = object


class DiffusionMixin(_Base):
    r"""Training, sampling and judging a denoiser; for a LightningModule that has ``denoiser`` and ``scheduler``.

    *A batch* is a dict, in which ``"image"`` or ``"seed"`` holds the samples and everything else is a condition that
    the denoiser takes by that name; or a tuple, whose first element is the images or, if they are integers (B,), the
    seeds, and whose next ones have the names in :attr:`conditions`; or the images or seeds alone.

    *Sampling* starts each sample from the noise of its own seed, and draws whatever a stochastic scheduler adds from
    the same stream, on the CPU: the images are those of the seeds, up to rounding, whatever the size of the batch. With
    guidance the conditional and the unconditional half are one batch,
    :math:`\epsilon = \epsilon_u + w \, (\epsilon_c - \epsilon_u)`.

    *Validation* logs ``noise_mse`` on the images, made noisy at the timesteps of the sampling schedule and by the same
    noise every time; for a quantized or cached
    model ``trajectory_sqnr``, the ratio in decibels between the final samples and what they differ from those of the
    float twin by, from equal seeds; and with :attr:`features` the Frechet distances ``frechet`` to the images and
    ``frechet_to_float`` to the samples of the float twin. A batch of seeds has no noise to be predicted.

    *Calibration* feeds single moments of the float model's own trajectories (:class:`~lightning_quant.Trajectory`),
    with the conditions of the train or validation loader. A ``calibration_loader`` of one's own may give images, which
    are made noisy at timesteps of the sampling schedule, or seeds, which run through their whole trajectories.

    Attributes:
        denoiser: one of diffusers', or any module called ``(x, t, **conditions)`` with ``t`` of shape (B,).
        scheduler: one of diffusers'. It is never changed; every trajectory has its own copy.
        num_inference_steps: how many steps a sample takes.
        guidance_scale: weight w of classifier-free guidance, ``None`` for none.
        conditions: names of the elements behind the first of a batch that is a tuple.
        unconditional: the conditions of the unconditional half, by name: a number, or a tensor without the axis of the
            samples. Conditions without one are the same in both halves. Known for the labels of a ``DiT``.
        sample_shape: (C, H, W) of a sample; default: what the denoiser's ``config`` says.
        step_arguments: more arguments of the scheduler's ``step``, such as ``{"eta": 1.0}``.
        validation_samples: how many samples a validation draws, over all batches of a rank; 0 for none.
        calibration_trajectories: how many trajectories calibration samples; it draws eight moments of each at most.
        features: a network that gives (N, d) features of images, for the Frechet distance. N should be 10 d at least.
    """

    denoiser: nn.Module
    scheduler: Any
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    conditions: Sequence[str] = ()
    unconditional: Mapping[str, Any] = {}
    sample_shape: tuple[int, ...] | None = None
    step_arguments: Mapping[str, Any] = {}
    validation_samples: int = 8
    calibration_trajectories: int = 32
    features: nn.Module | None = None

    # ---------------------------------------------------------------- the denoiser

    def forward(self, x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        """What the denoiser predicts for noisy samples (B, ...) at their timesteps (B,)."""
        predicted = call_denoiser(self.denoiser, x, timesteps, conditions)
        learned = str(getattr(self.scheduler.config, "variance_type", "")).startswith("learned")
        return predicted if learned or predicted.shape[1] != 2 * x.shape[1] else predicted.chunk(2, dim=1)[0]

    def guided(self, x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        """The same with classifier-free guidance, if there is any."""
        if self.guidance_scale is None:
            return self.forward(x, timesteps, **conditions)
        without = self.without_conditions(conditions)
        both = _joined(conditions, without)
        predicted = self.forward(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **both)
        conditional, unconditional = predicted.chunk(2)
        channels = x.shape[1]  # a learned variance behind them is not guided
        noise = torch.lerp(unconditional[:, :channels], conditional[:, :channels], self.guidance_scale)
        return torch.cat([noise, conditional[:, channels:]], dim=1)

    def without_conditions(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions of the unconditional half.

        Raises:
            ValueError: if nothing tells what they are.
        """
        known = dict(self.unconditional)
        classes = getattr(getattr(self.denoiser, "config", None), "num_embeds_ada_norm", None)
        if not known and classes is not None and "class_labels" in conditions:
            known = {"class_labels": classes}
        if not known or not {*known} <= {*conditions}:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs to know what no condition looks like: the batch has the "
                f"conditions {sorted(conditions) or 'none'}, unconditional= has {sorted(known) or 'none'}; "
                f"set unconditional={{name: value}}, and conditions=[name, ...] where batches are tuples"
            )
        return {
            name: torch.as_tensor(known[name]).to(value).expand_as(value) if name in known else value
            for name, value in conditions.items()
        }

    def unconditional_batch(self, batch: Any) -> Any:
        """A batch without its conditions: those of the unconditional half are in their place."""
        if isinstance(batch, Mapping) and "conditions" in batch:  # recorded moments
            return {**batch, "conditions": self.without_conditions(batch["conditions"])}
        conditions = self.without_conditions(self.parts(batch)[2])
        if isinstance(batch, Mapping):
            return {**batch, **conditions}
        first, *rest = batch
        named = dict(zip(self.conditions, rest, strict=False))
        return [first, *({**named, **conditions}[name] for name in named), *rest[len(named) :]]

    # ---------------------------------------------------------------- sampling

    def inference_scheduler(self) -> Any:
        """A scheduler for one trajectory; override it where ``set_timesteps`` wants to know more."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler

    @property
    def timesteps(self) -> list[float]:
        """The timesteps at which a trajectory calls the denoiser, in that order."""
        return [float(timestep) for timestep in self.inference_scheduler().timesteps]

    @torch.no_grad()
    def trajectory(self, seeds: Tensor, **conditions: Any) -> Iterator[Moment]:
        """Sample, step by step.

        Args:
            seeds: integers (B,), one for each sample.
            conditions: of the denoiser, (B, ...) each.

        Yields:
            each step: its number and timestep, what the denoiser is given and predicts, and what comes of it.
        """
        scheduler = self.inference_scheduler()
        timesteps = [float(timestep) for timestep in scheduler.timesteps]
        require_schedule(self.denoiser, timesteps)
        random = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        taken = inspect.signature(scheduler.step).parameters
        arguments = {**self.step_arguments, **({"generator": random} if "generator" in taken else {})}
        noise = torch.stack([torch.randn(self.shape_of_samples(), generator=generator) for generator in random])
        like = next(self.denoiser.parameters())
        x = noise.to(like) * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        with on_trajectory(self.denoiser, timesteps):
            for k, timestep in enumerate(scheduler.timesteps):
                given = scaled(x, timestep)
                predicted = self.guided(given, timestep.to(x.device).expand(len(x)), **conditions)
                after = scheduler.step(predicted, timestep, x, **arguments, return_dict=False)[0].to(x.dtype)
                yield Moment(k, timesteps[k], given, predicted, after)
                x = after

    def sample(self, seeds: Tensor, **conditions: Any) -> Tensor:
        """The samples of these seeds (B,): (B, C, H, W)."""
        for moment in self.trajectory(seeds, **conditions):
            last = moment.after
        return last

    def shape_of_samples(self) -> tuple[int, ...]:
        """(C, H, W) of a sample.

        Raises:
            ValueError: if nothing tells.
        """
        if self.sample_shape is not None:
            return tuple(self.sample_shape)
        config = getattr(self.denoiser, "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or size is None:
            raise ValueError(
                f"{type(self.denoiser).__name__} does not say in a config which shape its samples have: "
                f"set sample_shape=(channels, height, width)"
            )
        return (channels, *(size if isinstance(size, (tuple, list)) else (size, size)))

    # ---------------------------------------------------------------- batches

    def parts(self, batch: Any) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
        """The images or the seeds of a batch, whichever it has, and its conditions.

        Raises:
            ValueError: if it has neither.
        """
        if isinstance(batch, Mapping):
            conditions = {name: value for name, value in batch.items() if name not in ("image", "seed")}
            images, seeds = batch.get("image"), batch.get("seed")
        else:
            first, *rest = batch if isinstance(batch, (tuple, list)) else [batch]
            conditions = dict(zip(self.conditions, rest, strict=False))
            integers = isinstance(first, Tensor) and not first.is_floating_point() and first.dim() == 1
            images, seeds = (None, first) if integers else (first, None)
        if not isinstance(images if seeds is None else seeds, Tensor):
            raise ValueError(
                f"{type(self).__name__} finds neither images nor seeds in a {type(batch).__name__}: give it a tensor, "
                f'a tuple that begins with one, or a dict with "image" or "seed"'
            )
        return images, seeds, conditions

    def seeds_of(self, batch: Any, first: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """The seeds of a batch and its conditions; a batch of images has the seeds ``first``, ``first + 1``, ..."""
        images, seeds, conditions = self.parts(batch)
        if seeds is None:
            assert images is not None
            seeds = torch.arange(first, first + len(images))
        return seeds, conditions

    # ---------------------------------------------------------------- what Lightning and calibration call

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The denoising loss, at timesteps drawn from all that the scheduler knows."""
        loss = self.denoising_loss(batch)
        self.log("train_loss", loss)
        return loss

    def denoising_loss(
        self, batch: Any, schedule: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of what the denoiser predicts for the images of a batch made noisy.

        Args:
            batch: with images.
            schedule: the timesteps to draw from; default: all that the scheduler was made for.
            generator: where the noise and the timesteps come from.

        Raises:
            ValueError: if the batch has none.
        """
        images, _, conditions = self.parts(batch)
        if images is None:
            raise ValueError(f"the denoising loss of {type(self).__name__} needs images, and this batch has seeds")
        noise = torch.randn(images.shape, generator=generator).to(images)
        schedule = training_timesteps(self.scheduler) if schedule is None else schedule
        drawn = torch.randint(len(schedule), (len(images),), generator=generator)
        timesteps = schedule.cpu()[drawn].to(images.device)
        predicted = self.forward(noised(self.scheduler, images, noise, timesteps), timesteps, **conditions)
        target = prediction_target(self.scheduler, images, noise, timesteps)
        return F.mse_loss(predicted[:, : images.shape[1]], target)

    def calibration_dataloader(self) -> Any:
        """What calibration draws from, unless a callback or the datamodule says otherwise."""
        return Trajectory(self.calibration_trajectories, moments=min(8, self.num_inference_steps))

    def calibration_step(self, batch: Any) -> Any:
        """Feed a batch of images, of seeds, or of recorded moments."""
        if isinstance(batch, Mapping) and "x" in batch and "timestep" in batch:
            return self.guided(batch["x"], batch["timestep"], **batch.get("conditions", {}))
        images, seeds, conditions = self.parts(batch)
        if seeds is not None:
            return self.sample(seeds, **conditions)
        assert images is not None
        schedule = self.inference_scheduler().timesteps.cpu()
        timesteps = schedule[torch.randint(len(schedule), (len(images),))].to(images.device)
        noise = torch.randn(images.shape).to(images)
        return self.guided(noised(self.scheduler, images, noise, timesteps), timesteps, **conditions)

    def on_validation_epoch_start(self) -> None:
        """Nothing has been sampled yet."""
        self._drawn = 0
        self.judge = TrajectoryJudge(self.features, self.device) if self.validation_samples else None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log how well noise is predicted, and compare the first samples with those of the float twin."""
        images, seeds, conditions = self.parts(batch)
        if images is not None:
            schedule = self.inference_scheduler().timesteps
            loss = self.denoising_loss(batch, schedule, torch.Generator().manual_seed(batch_idx))
            self.log("noise_mse", loss, batch_size=len(images), sync_dist=True)
        if self.judge is None or not (is_altered(self) or self.features is not None):
            return
        first = self.global_rank * self.validation_samples + self._drawn
        seeds, conditions = first_samples(self.seeds_of(batch, first), self.validation_samples - self._drawn)
        if len(seeds):
            self._drawn += len(seeds)
            self.judge.see(self, lambda: self.trajectory(seeds, **conditions), images)

    def on_validation_epoch_end(self) -> None:
        """Log what the comparison came to."""
        for name, value in self.judge.compute().items() if self.judge is not None else ():
            self.log(name, value, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The samples of a batch of seeds."""
        seeds, conditions = self.seeds_of(batch)
        return self.sample(seeds, **conditions)


class DiffusionModule(DiffusionMixin, CalibrationMixin, pl.LightningModule):
    """A denoiser and a scheduler of diffusers as a LightningModule: it trains, validates, and samples from seeds.

    ``trainer.predict`` takes seeds, alone or with the conditions of each, and every callback of this package quantizes
    it as it does any other model. :class:`~lightning_quant.modules.DiffusionMixin` says what batches look like, how
    samples are drawn and what is logged; it is there for modules of one's own.

    Args:
        denoiser: ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel``, ``PixArtTransformer2DModel`` or
            any module called ``(x, t, **conditions)`` with ``t`` of shape (B,).
        scheduler: DDPM, DDIM, DPM-Solver++, PLMS, flow matching, ...; it is never changed.
        num_inference_steps: how many steps a sample takes.
        guidance_scale: weight of classifier-free guidance, ``None`` for none.
        conditions: names of the elements behind the first of a batch that is a tuple, ``["class_labels"]``.
        unconditional: the conditions of the unconditional half, by name; known for the labels of a ``DiT``.
        sample_shape: (C, H, W) of a sample; default: what the denoiser's ``config`` says.
        step_arguments: more arguments of the scheduler's ``step``, such as ``{"eta": 1.0}``.
        validation_samples: how many samples a validation draws on each rank; 0 for none.
        features: a network that gives (N, d) features of images, for the Frechet distance.
        learning_rate: of AdamW, in a fit.

    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> denoiser = UNet2DModel(
    ...     8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ... )  # fmt: skip
    >>> model = DiffusionModule(denoiser, DDIMScheduler(), num_inference_steps=3)
    >>> model.sample(torch.tensor([7, 8])).shape
    torch.Size([2, 1, 8, 8])
    >>> model.timesteps
    [666.0, 333.0, 0.0]
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        conditions: Sequence[str] = (),
        unconditional: Mapping[str, Any] | None = None,
        sample_shape: Sequence[int] | None = None,
        step_arguments: Mapping[str, Any] | None = None,
        validation_samples: int = 8,
        features: nn.Module | None = None,
        learning_rate: float = 1e-4,
    ) -> None:
        super().__init__()
        if num_inference_steps < 1 or validation_samples < 0:
            raise ValueError(
                f"num_inference_steps must be at least 1 and validation_samples 0, "
                f"found {num_inference_steps} and {validation_samples}"
            )
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.conditions = [conditions] if isinstance(conditions, str) else list(conditions)
        self.unconditional = dict(unconditional or {})
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.step_arguments = dict(step_arguments or {})
        self.validation_samples = validation_samples
        self.learning_rate = learning_rate
        self.__dict__["features"] = features  # no child: it judges the model, and is neither trained nor saved with it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the denoiser."""
        return torch.optim.AdamW(self.denoiser.parameters(), lr=self.learning_rate)


def _joined(conditional: Any, unconditional: Any) -> Any:
    """Both halves of a batch, tensor by tensor."""
    if isinstance(conditional, Mapping):
        return {name: _joined(value, unconditional[name]) for name, value in conditional.items()}
    return torch.cat([conditional, unconditional]) if isinstance(conditional, Tensor) else conditional
