"""Which scales of a plan depend on the step of the trajectory."""

from __future__ import annotations

from torch import nn

from lightning_quant.layers import Plan, StepPlan
from lightning_quant.modules import DiffusionMixin


def check_groups(per_step: bool | int) -> None:
    """Refuse what is no number of groups.

    Raises:
        ValueError: saying what there is.
    """
    if not isinstance(per_step, int) or (not isinstance(per_step, bool) and per_step < 2):
        raise ValueError(
            f"per_step={per_step!r} is neither True, nor False, nor a number of groups of steps, 2 or more"
        )


def step_plan(model: nn.Module, plan: Plan, per_step: bool | int) -> StepPlan | None:
    """Tables for every layer and attention site of a plan that is inside the model's denoiser.

    Args:
        model: which samples, so that it knows its schedule.
        plan: what is quantized.
        per_step: whether each step has its own row, or how many groups of them have one.

    Raises:
        TypeError: if the model does not sample.
        ValueError: if there are more groups than steps.
    """
    if per_step is False:
        return None
    if not isinstance(model, DiffusionMixin):
        raise TypeError(
            f"per_step={per_step!r} needs a model that knows its sampling schedule, which {type(model).__name__} does "
            f"not: derive it from DiffusionMixin, use DiffusionModule, or set per_step=False"
        )
    timesteps = model.timesteps
    groups = len({*timesteps}) if per_step is True else per_step
    if groups > len({*timesteps}):
        raise ValueError(f"per_step={per_step} groups, but a trajectory has only {len({*timesteps})} steps")
    owners = [name for name in [*plan.layers, *plan.attention] if name.startswith("denoiser.")]
    return StepPlan("denoiser", timesteps, groups, list(dict.fromkeys(owners)))
