"""Which step of a denoising trajectory a diffusion model is in, by the timestep that it is really called with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.layers import given_timesteps, timestep_argument


class DenoisingSteps:
    """Counts the timesteps of a trajectory; calls with the same timestep, as guidance makes them, are one step.

    A trajectory begins anew where its first timestep comes back.

    >>> steps = DenoisingSteps()
    >>> [steps.see(timestep) for timestep in (999, 999, 500, 0, 999)]
    [0, 0, 1, 2, 0]
    """

    def __init__(self) -> None:
        self.step = -1
        self._first: float | None = None
        self._last: float | None = None
        self._handles: list[RemovableHandle] = []

    def see(self, timestep: float) -> int:
        """A denoiser is called with this timestep: which step that is."""
        if timestep == self._last:
            return self.step
        if self._first is None or timestep == self._first:
            self._first, self.step = timestep, -1
        self._last = timestep
        self.step += 1
        return self.step

    def restart(self) -> None:
        """The next timestep begins a trajectory."""
        self.step, self._first, self._last = -1, None, None

    def watch(self, model: nn.Module, sites: Iterable[str]) -> list[str]:
        """Follow the outermost networks that hold these attention sites and take a timestep; their names."""
        denoisers: dict[str, nn.Module] = {}
        for site in sites:
            parts = site.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                module = model.get_submodule(name)
                if timestep_argument(module) is not None:
                    denoisers[name] = module
                    break
        for denoiser in denoisers.values():
            self._handles.append(denoiser.register_forward_pre_hook(self._hook, with_kwargs=True))
        return list(denoisers)

    def forget(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timesteps = given_timesteps(module, args, kwargs)
        if timesteps:
            self.see(timesteps[0])
