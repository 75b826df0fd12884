"""Modules that answer with what they answered some steps ago, and the memory that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_quant.layers.denoiser import given_timesteps

__all__ = ["CachedModule", "KeptFeatures", "channel_axis", "deep_feature", "on_trajectory", "stop_caching"]


class KeptFeatures:
    r"""What the deep part of a denoiser answered at the last refresh, and where the trajectory is.

    At the steps in ``refresh`` everything runs, and the deep feature :math:`h_c` is kept. At any other step t the deep
    modules do not run, and the shallow ones are given

    .. math:: h_t = a_t h_c + b_t

    channel by channel. Outside of a trajectory everything runs.

    Args:
        timesteps: of the schedule, in the order of sampling; one that comes again is the same step.
        refresh: numbers of the steps that refresh; the first one is 0.
        scale: the factors a (steps, channels), ``None`` for 1.
        shift: the addends b in the same shape.

    Attributes:
        paused: while set, everything runs.
        runs: how often the deep part has run, and been skipped.
    """

    def __init__(
        self,
        timesteps: Sequence[float],
        refresh: Sequence[int],
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.timesteps = list(timesteps)
        self.step_of = {timestep: k for k, timestep in enumerate(dict.fromkeys(self.timesteps))}
        self.refresh, self.scale, self.shift = {*refresh}, scale, shift
        self.paused = self.sampling = False
        self.step = 0
        self.runs = {"deep": 0, "skipped": 0}
        self.outputs: dict[nn.Module, Any] = {}
        self.added: Tensor | None = None
        self._before: Tensor | None = None

    def begin(self, timesteps: Sequence[float]) -> None:
        """A trajectory begins.

        Raises:
            ValueError: if it goes along another schedule.
        """
        if [float(timestep) for timestep in timesteps] != self.timesteps:
            raise ValueError(
                f"features are cached for {len(self.timesteps)} steps from {self.timesteps[0]:g} to "
                f"{self.timesteps[-1]:g}, and this trajectory has {len(timesteps)} from {timesteps[0]:g} to "
                f"{timesteps[-1]:g}: use the scheduler and the num_inference_steps that FeatureCache was calibrated "
                f"with, or calibrate a new FeatureCache by trainer.validate(model, ...)"
            )
        self.forget()
        self.sampling = True

    def forget(self) -> None:
        """The trajectory is over."""
        self.sampling, self.added, self._before = False, None, None
        self.outputs.clear()

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the denoiser: which step it is called for."""
        if self.answers:
            self.step = self.step_of[(given_timesteps(denoiser, args, kwargs) or self.timesteps[:1])[0]]
            self.runs["deep" if self.step in self.refresh else "skipped"] += 1

    @property
    def answers(self) -> bool:
        """Whether a deep module has to ask here before it runs."""
        return self.sampling and not self.paused

    def kept(self, module: CachedModule, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The answer of a deep module that skip connections join."""
        if self.step in self.refresh:
            self.outputs[module] = run(*args, **kwargs)
            return self.outputs[module]
        kept = self.outputs[module]
        if not module.is_point:
            return kept
        return (self.corrected(kept[0]), *kept[1:]) if isinstance(kept, tuple) else self.corrected(kept)

    def added_to(self, module: CachedModule, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The answer of a deep module in a run of blocks, the first of which begins with what it is given."""
        stream: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self.step in self.refresh:
            self._before = stream if self._before is None else self._before
            out = run(*args, **kwargs)
            if module.is_point:
                self.added, self._before = (out[0] if isinstance(out, tuple) else out) - self._before, None
            return out
        if not module.is_point:
            return stream
        assert self.added is not None
        return stream + self.corrected(self.added)

    def corrected(self, feature: Tensor) -> Tensor:
        """A kept feature as this step is best served by it."""
        if self.scale is None or self.shift is None:
            return feature
        shape = [1] * feature.dim()
        shape[channel_axis(feature)] = -1
        scale, shift = (table[self.step].to(feature).view(shape) for table in (self.scale, self.shift))
        return torch.addcmul(shift, feature, scale)


class CachedModule(nn.Module):
    """A deep module that asks before it runs; mixed in before the module's own class."""

    own_class: ClassVar[type[nn.Module]]
    features: KeptFeatures
    is_point: bool
    residual: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run, or answer with what is kept."""
        run = super().forward
        if not self.features.answers:
            return run(*args, **kwargs)
        ask = self.features.added_to if self.residual else self.features.kept
        return ask(self, run, args, kwargs)


def cache_modules(denoiser: nn.Module, deep: Sequence[str], point: str, residual: bool, features: KeptFeatures) -> None:
    """Let the deep modules of a denoiser ask before they run; see :class:`~lightning_quant.graph.CachePoint`."""
    for name in deep:
        module = denoiser.get_submodule(name)
        module.__class__ = _cached_class(cast(Hashable, type(module)))
        vars(module).update(features=features, is_point=name == point, residual=residual)
    denoiser.register_forward_pre_hook(features, with_kwargs=True)


def stop_caching(denoiser: nn.Module) -> None:
    """Give the modules of a denoiser their own classes back."""
    for module in denoiser.modules():
        if isinstance(module, CachedModule):
            module.__class__ = module.own_class  # type: ignore[assignment]
            for name in ("features", "is_point", "residual"):
                del vars(module)[name]
    for key in [key for key, hook in denoiser._forward_pre_hooks.items() if isinstance(hook, KeptFeatures)]:
        del denoiser._forward_pre_hooks[key], denoiser._forward_pre_hooks_with_kwargs[key]


def caches(model: nn.Module) -> list[KeptFeatures]:
    """What is kept in a model."""
    return list({id(m.features): m.features for m in model.modules() if isinstance(m, CachedModule)}.values())


@contextmanager
def on_trajectory(denoiser: nn.Module, timesteps: Sequence[float]) -> Iterator[None]:
    """The denoiser is called step by step along a schedule meanwhile, for the same samples."""
    opened = [features for features in caches(denoiser) if not features.paused]
    for features in opened:
        features.begin(timesteps)
    try:
        yield
    finally:
        for features in opened:
            features.forget()


@contextmanager
def deep_feature(denoiser: nn.Module, deep: Sequence[str], point: str, residual: bool) -> Iterator[list[Tensor]]:
    """The deep feature of each call of a denoiser meanwhile, in a list that holds the last one."""
    found: list[Tensor] = []
    before: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before[:] = [args[0] if args else next(iter(kwargs.values()))]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        found[:] = [out - before[0] if residual else out]

    handles = [
        denoiser.get_submodule(deep[0]).register_forward_pre_hook(enter, with_kwargs=True),
        denoiser.get_submodule(point).register_forward_hook(leave),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def channel_axis(feature: Tensor) -> int:
    """Where a feature has its channels: an image (B, C, H, W) behind the samples, tokens (B, N, C) at the end."""
    return 1 if feature.dim() == 4 else feature.dim() - 1


@functools.cache
def _cached_class(own: type[nn.Module]) -> type[CachedModule]:
    return type(f"Cached{own.__name__}", (CachedModule, own), {"own_class": own})
