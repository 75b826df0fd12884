"""The step of the trajectory that a denoiser is in, read from its timestep argument, and tables that depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lightning_quant.layers.attention import QuantAttention
from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.denoiser import given_timesteps
from lightning_quant.layers.routing import AttentionSite
from lightning_quant.layers.step_correction import add_correction, drop_correction
from lightning_quant.quantizers import Quantizer, SplitQuantizer, StepQuantizer, Steps


@dataclass
class StepPlan:
    """Which activation quantizers have a scale for every step, or for every few of them.

    Args:
        denoiser: name of the network whose timestep argument says where we are.
        timesteps: of the sampling schedule, in the order of sampling.
        groups: how many groups of steps that follow each other share a scale.
        owners: names of the layers and attention sites.
        corrected: layers whose output is corrected for each step, and for how many of their first input channels.
    """

    denoiser: str
    timesteps: list[float]
    groups: int
    owners: list[str] = field(default_factory=list)
    corrected: dict[str, int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Put tables in the place of the uncalibrated quantizers, and watch the denoiser."""
        steps = Steps(self.timesteps, self.groups)
        denoiser = model.get_submodule(self.denoiser)
        denoiser.register_forward_pre_hook(StepHook(steps), with_kwargs=True)
        for owner in self.owners:
            for holder, name, quantizer in _activation_quantizers(model.get_submodule(owner)):
                if takes_steps(quantizer):
                    table = StepQuantizer(quantizer.scheme, quantizer.axis, steps)
                    setattr(holder, name, table.to(quantizer.scale.device).train(quantizer.training))
        for name, channels in self.corrected.items():
            add_correction(model.get_submodule(name), channels, steps)

    def undo(self, model: nn.Module) -> None:
        """Look at the denoiser no longer, and take the corrections away."""
        modules = dict(model.named_modules())
        for name in self.corrected:
            if name in modules:
                drop_correction(modules[name])
        denoiser = modules.get(self.denoiser)
        if denoiser is None:
            return
        for key, hook in step_hooks(denoiser).items():
            if hook.steps.timesteps == self.timesteps and hook.steps.groups == self.groups:
                del denoiser._forward_pre_hooks[key]
                denoiser._forward_pre_hooks_with_kwargs.pop(key, None)


class StepHook:
    """The pre-hook on a denoiser that tells its quantizers where the trajectory is."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called."""
        timesteps = given_timesteps(denoiser, args, kwargs)
        if timesteps is not None:
            self.steps.enter(timesteps)


def step_hooks(denoiser: nn.Module) -> dict[int, StepHook]:
    """The hooks of this kind on a module."""
    return {key: hook for key, hook in denoiser._forward_pre_hooks.items() if isinstance(hook, StepHook)}


def steps_inside(model: nn.Module) -> list[Steps]:
    """Where the trajectory is, for every group of tables in a model; none where no scale depends on that."""
    return [hook.steps for module in model.modules() for hook in step_hooks(module).values()]


def require_schedule(denoiser: nn.Module, timesteps: Sequence[float]) -> None:
    """Refuse to sample along another schedule than the one that a denoiser's tables are for.

    A table alone would not notice a schedule of fewer steps that are all among its own.

    Raises:
        ValueError: saying which schedule was found, and how to calibrate for it.
    """
    for hook in step_hooks(denoiser).values():
        hook.steps.require(timesteps)


def takes_steps(quantizer: Quantizer) -> bool:
    """Whether there is a scale that could depend on the step: a static uniform format."""
    scheme = quantizer.scheme
    if isinstance(quantizer, SplitQuantizer):  # its scales depend on the part already
        return False
    return scheme.kind == "int" and not scheme.dynamic and scheme.granularity in ("tensor", "channel")


def _activation_quantizers(owner: nn.Module) -> Iterable[tuple[nn.Module, str, Quantizer]]:
    if isinstance(owner, QuantizedLayer):
        return [(owner, name, quantizer) for name, quantizer in owner.activation_quantizers().items()]
    assert isinstance(owner, AttentionSite)
    return [
        (attention, name, quantizer)
        for attention in owner.attention_quantizers
        for name, quantizer in cast(QuantAttention, attention).activation_quantizers().items()
    ]
