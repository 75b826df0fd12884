"""What a denoiser makes of its timestep alone, as a module of its own: recorded once, and computed again at will."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.calibration import reordered, sample_count
from lightning_quant.graph import Temporal, TemporalWatcher, watch
from lightning_quant.graph.calls import Call, Watcher
from lightning_quant.graph.owners import Owners
from lightning_quant.layers import as_float
from lightning_quant.modules.diffusion import DiffusionMixin


def every_step(model: DiffusionMixin, batch: Any, most: int = 512) -> dict[str, Any]:
    """A calibration batch that has every timestep of the schedule, with each of some conditions; the samples are 0.

    Args:
        model: whose schedule it is.
        batch: a calibration batch, which has conditions if there are any.
        most: how many samples there may be; so many different conditions are taken, labels and the like. Conditions
            that are floats are not looked at.
    """
    moments = isinstance(batch, dict) and "timestep" in batch and "x" in batch
    given = batch.get("conditions", {}) if moments else model.parts(batch)[2]
    chosen: dict[Any, int] = {}
    for row in range(sample_count(given) if given else 1):
        known = [
            x[row].flatten().tolist() for x in given.values() if isinstance(x, Tensor) and not x.is_floating_point()
        ]
        chosen.setdefault(str(known), row)
    schedule = torch.tensor(list(dict.fromkeys(model.timesteps)))
    rows = list(chosen.values())[: max(1, most // len(schedule))]
    schedule = schedule.long() if bool((schedule == schedule.round()).all()) else schedule
    device = next(model.denoiser.parameters()).device
    return {
        "x": torch.zeros(len(schedule) * len(rows), *model.shape_of_samples(), device=device),
        "timestep": schedule.repeat_interleave(len(rows)).to(device),
        "conditions": reordered(given, rows * len(schedule)) if given else {},
    }


@dataclass(frozen=True)
class _Made:
    """A tensor that an earlier step has made."""

    slot: int


@dataclass
class _Step:
    """One call: of a layer, or of a function between layers."""

    func: Callable[..., Any]
    layer: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[int, ...]

    def reads(self) -> set[int]:
        """The slots of what it is given."""
        found: set[int] = set()
        tree_map(lambda leaf: found.add(leaf.slot) if isinstance(leaf, _Made) else None, (self.args, self.kwargs))
        return found

    @property
    def in_place(self) -> bool:
        """Whether it changes what it is given."""
        name = getattr(self.func, "__name__", "")
        return self.layer is None and (name.startswith("__i") or (name.endswith("_") and not name.endswith("__")))


class TemporalBlock(nn.Module):
    r"""All that a denoiser makes of the timesteps of a schedule alone, :math:`g_1(t), g_2(t), \ldots`; no sample.

    The denoiser runs once, in floats, on a batch that has every timestep; what was called on the way from the timestep
    to the layers whose answer goes to the sample is written down. Afterwards the layers, which are the denoiser's own,
    compute this anew whenever the block is called, quantized or not, with gradients.

    Args:
        model: what holds the denoiser.
        temporal: which layers these are; see :class:`~lightning_quant.graph.Temporal`.
        run: runs the model on that batch, calling the denoiser once.

    Attributes:
        names: of the layers, in the order in which they are in ``layers``.
        rows: how many rows the batch has.

    Raises:
        ValueError: if an answer has no entry for each row of the batch.
    """

    def __init__(self, model: nn.Module, temporal: Temporal, run: Callable[[], Any]) -> None:
        super().__init__()
        self.names = list(temporal.layers)
        self.layers = nn.ModuleList(model.get_submodule(name) for name in self.names)
        tape = _Tape(model, temporal)
        with as_float(model):
            watch(model, (tape,), run)
        outputs = {step.layer: step.out[0] for step in tape.steps if step.layer in temporal.outputs}
        self._outputs = [outputs[name] for name in temporal.outputs]
        self._steps = _needed(tape.steps, {*self._outputs})
        with torch.no_grad():
            sizes = {len(out) for out in self._replay()}
        if len(sizes) != 1:
            raise ValueError(f"what depends on the timestep alone has {sorted(sizes)} rows, not one for each timestep")
        (self.rows,) = sizes

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The answers of all last layers, for some rows of the batch that was recorded."""
        return tuple(out[rows] for out in self._replay())

    def _replay(self) -> list[Tensor]:
        made: dict[int, Tensor] = {}

        def value(leaf: Any, copied: bool) -> Any:
            found = made[leaf.slot] if isinstance(leaf, _Made) else leaf
            return found.clone() if copied and isinstance(found, Tensor) else found

        layers = dict(zip(self.names, self.layers, strict=True))
        for step in self._steps:
            args, kwargs = tree_map(lambda leaf, c=step.in_place: value(leaf, c), (step.args, step.kwargs))
            found = step.func(*args, **kwargs) if step.layer is None else layers[step.layer](*args, **kwargs)
            outs = [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]
            made |= dict(zip(step.out, outs, strict=True))
        return [made[slot] for slot in self._outputs]


class _Tape(Watcher):
    """Writes down what happens behind the first of the temporal layers."""

    def __init__(self, model: nn.Module, temporal: Temporal) -> None:
        self.follower, self.temporal = TemporalWatcher(Owners(model)), temporal
        self.steps: list[_Step] = []
        self._slots = WeakTensorKeyDictionary()
        self._inputs: dict[str, tuple[Any, ...]] = {}
        self._over = False

    def given(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer's own input is what it is given; what it does to that is its own business."""
        if not self._over:
            self.follower.given(name, module, args, kwargs)
            if name in self.temporal.layers:
                self._inputs[name] = self._written(args)

    def leave(self, name: str) -> None:
        """One call of the denoiser is all."""
        self._over = self._over or name == self.follower.denoiser

    def saw(self, call: Call) -> None:
        """Write it down, if a temporal layer has to do with it."""
        if self._over:
            return
        args, kwargs = self._written((call.args, call.kwargs))
        self.follower.saw(call)
        outs = call.gives()
        if not self.follower.made.get(outs[0]):  # made of the sample, of no temporal layer, or of no timestep
            return
        layer = self.follower.layer(call)
        if layer is None and any(name in self.temporal.layers for name in call.stack):
            return
        slots = tuple(range(self._count, self._count + len(outs)))
        self._count += len(outs)
        for out, slot in zip(outs, slots, strict=True):
            self._slots[out] = slot
        if layer is not None:
            args, kwargs = self._inputs.get(layer, (args[0],)), {}
        self.steps.append(_Step(call.func, layer, args, kwargs, slots))

    _count = 0

    def _written(self, tree: Any) -> Any:
        """Arguments with a mark in the place of what earlier steps have made."""

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            slot = self._slots.get(x)
            if slot is not None:
                return _Made(slot)
            return x if isinstance(x, nn.Parameter) else x.detach()

        return tree_map(leaf, tree)


def _needed(steps: list[_Step], slots: set[int]) -> list[_Step]:
    """The steps that lead to some slots."""
    kept = []
    for step in reversed(steps):
        if slots & {*step.out}:
            slots |= step.reads()
            kept.append(step)
    return kept[::-1]
