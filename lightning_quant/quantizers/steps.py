"""A uniform grid with a scale for every step of a denoising trajectory, or for every few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.tables import TableObserver
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["StepObserver", "StepQuantizer", "Steps"]


class Steps:
    """The timesteps of a sampling schedule, in groups that share what they are quantized with, and where we are now.

    One such object serves all quantizers of a network. Someone who sees the network's timestep argument says where we
    are, with :meth:`enter`.

    Args:
        timesteps: those of the schedule, in the order of sampling; one that comes again is the same step.
        groups: how many groups of steps that follow each other; ``None`` gives each step its own.

    Attributes:
        rows: for each sample of the batch the number of its group, or a single number for all of them.

    Raises:
        ValueError: if there are fewer steps than groups.

    Example:
        >>> steps = Steps([999, 666, 333, 0], groups=2)
        >>> steps.enter([333.0])
        >>> steps.rows
        [1]
        >>> steps.enter([999.0, 0.0])
        >>> steps.rows
        [0, 1]
    """

    def __init__(self, timesteps: Sequence[float], groups: int | None = None) -> None:
        self.timesteps = [float(timestep) for timestep in timesteps]
        distinct = list(dict.fromkeys(self.timesteps))
        self.groups = len(distinct) if groups is None else groups
        if not 1 <= self.groups <= len(distinct):
            raise ValueError(f"a schedule of {len(distinct)} steps has no {self.groups} groups of steps")
        self.rows = [0]
        self._row_of = {step: k * self.groups // len(distinct) for k, step in enumerate(distinct)}

    def enter(self, timesteps: Sequence[float]) -> None:
        """The network is called with these timesteps: one for each sample, or a single one for all.

        Raises:
            ValueError: for one that is not in the schedule.
        """
        try:
            rows = [self._row_of[timestep] for timestep in timesteps]
        except KeyError as error:
            raise ValueError(self.refusal(f"the timestep {error.args[0]:g}")) from None
        self.stand_at(rows)

    def stand_at(self, rows: Sequence[int]) -> None:
        """The samples that come now are at these rows: for a part of the network that runs alone."""
        self.rows = list(rows) if len({*rows}) > 1 else list(rows[:1])

    def require(self, timesteps: Sequence[float]) -> None:
        """Refuse another schedule.

        Raises:
            ValueError: if the timesteps are not the very same ones.
        """
        if [float(timestep) for timestep in timesteps] != self.timesteps:
            raise ValueError(self.refusal(_described(timesteps)))

    def refusal(self, found: str) -> str:
        """What to say of another schedule."""
        return (
            f"this model has scales for {_described(self.timesteps)}, and is asked for {found}: sample with the "
            f"scheduler and the num_inference_steps that it was calibrated with, or call remove(model) of the callback "
            f"and trainer.validate(model, ...) again to calibrate it for these"
        )


class StepQuantizer(UniformQuantizer):
    r"""Integers times a scale that depends on the step of the trajectory; samples of one batch may differ in theirs.

    .. math:: \hat x = Q(x; \; s_{g(t)}, z_{g(t)})

    where :math:`Q` is the :class:`UniformQuantizer`, :math:`t` the timestep and :math:`g` the group it is in. The
    table has one row for each group; the timesteps that it is for are kept beside it.

    Args:
        scheme: A static ``intN`` or ``uintN`` format per tensor or per channel; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`. The samples are along axis 0.
        steps: The schedule.

    Raises:
        ValueError: If the format is dynamic or has groups.

    Example:
        >>> steps = Steps([999, 0])
        >>> quantizer = StepQuantizer("uint4_asym", -1, steps)
        >>> quantizer.freeze_rows(torch.tensor([0.0, 0.0]), torch.tensor([15.0, 1.5]))
        >>> steps.enter([999, 0])
        >>> quantizer(torch.tensor([[0.36], [0.36]]))
        tensor([[0.0000],
                [0.4000]])
    """

    state_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    timesteps: Tensor

    def __init__(self, scheme: Scheme | str, axis: int | None, steps: Steps) -> None:
        super().__init__(scheme, axis)
        if self.scheme.dynamic or self.scheme.granularity not in ("tensor", "channel"):
            raise ValueError(
                f'"{self.scheme}" has no scale that could depend on the step: it needs a static format, per tensor or '
                f"per channel."
            )
        self.steps = steps
        self.register_buffer("timesteps", torch.tensor(steps.timesteps, dtype=torch.float64))

    @torch.no_grad()
    def freeze_rows(self, lo: Tensor, hi: Tensor) -> None:
        """Sets the table from known ranges.

        Args:
            lo: Lower ends, (groups,) or (groups, channels).
            hi: Upper ends, in the same shape.
        """
        for name, value in zip(self.state_names, self.state_from_range(lo, hi), strict=True):
            self._store(name, value.to(self.scale.device))

    def freeze(self, lo: Tensor, hi: Tensor) -> None:
        """Sets every row from one range."""
        super().freeze(lo, hi)
        for name in self.state_names:
            row: Tensor = getattr(self, name)
            self._store(name, row.expand(self.steps.groups, *row.shape).clone())

    def at(self, row: int) -> UniformQuantizer:
        """The quantizer of one row of the table."""
        found = UniformQuantizer(self.scheme, self.axis).to(self.scale.device)
        for name in self.state_names:
            found._store(name, getattr(self, name)[row].clone())
        return found

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The rows of the samples' steps, in the shape that broadcasts against ``view``."""
        per_channel = self.scheme.granularity == "channel"
        shape = [1] * view.dim()
        if per_channel:
            assert self.axis is not None
            shape[self.axis] = -1
        rows = self.steps.rows
        if len(rows) == 1:
            found = [getattr(self, name)[rows[0]] for name in self.state_names]
            return tuple(row.view(shape) for row in found) if per_channel else tuple(found)
        repeats = self.repeats(view)
        chosen = torch.tensor(rows, device=view.device).repeat_interleave(repeats)  # windows and heads of a sample
        shape[0] = len(chosen)
        return tuple(getattr(self, name)[chosen].reshape(shape) for name in self.state_names)

    def repeats(self, x: Tensor) -> int:
        """How many entries along the first axis each sample has.

        Raises:
            ValueError: If the samples are not along the first axis.
        """
        samples = len(self.steps.rows)
        if x.dim() == 0 or x.shape[0] % samples:
            raise ValueError(
                f"a batch of {samples} samples at different steps has a tensor of shape {tuple(x.shape)}, which does "
                f"not say what belongs to which sample; feed samples at one step at a time, or leave the layer float "
                f"with skip="
            )
        return int(x.shape[0] // samples)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}timesteps")
        if stored is None:  # a float checkpoint
            state_dict[f"{prefix}timesteps"] = self.timesteps
        elif stored.shape == self.timesteps.shape and not torch.equal(stored.cpu(), self.timesteps.cpu()):
            raise ValueError(self.steps.refusal(_described(stored.tolist())))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class StepObserver(TableObserver[StepQuantizer]):
    """Watches an activation and freezes the table of a :class:`StepQuantizer`; see :class:`TableObserver`."""

    @property
    def length(self) -> int:
        """How many rows the table has."""
        return self.quantizer.steps.groups

    def __call__(self, x: Tensor) -> Tensor:
        """Takes one batch into account and returns it unchanged."""
        rows = self.quantizer.steps.rows
        if len(rows) == 1:
            return self.row(rows[0])(x)
        repeats = self.quantizer.repeats(x)
        for sample, row in enumerate(rows):
            self.row(row)(x[sample * repeats : (sample + 1) * repeats])
        return x


def _described(timesteps: Sequence[float]) -> str:
    shown = [f"{timestep:g}" for timestep in timesteps]
    if len(shown) > 4:
        shown = [*shown[:2], "...", shown[-1]]
    return f"{len(timesteps)} steps ({', '.join(shown)})"
