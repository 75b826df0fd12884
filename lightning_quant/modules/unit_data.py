"""The inputs and targets of one unit of a model, in both streams: through floats and through what is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.calibration import (
    Call,
    SampleCache,
    Signature,
    first_samples,
    record,
    reordered,
    same_constants,
    sample_count,
    signature,
)
from lightning_quant.layers import as_float, steps_inside


@dataclass
class UnitBatch:
    """Samples of a unit: what goes in, in one stream or both, and what should come out.

    Args:
        quantized: argument columns behind the quantized units, if wanted.
        float_: argument columns of the float model, if wanted.
        targets: what the float unit makes of its float input.
        inner: the same for the layers inside.
        importance: what each element of the targets counts, if that is known.
        steps: where each sample is in its trajectory, for every group of tables with scales for each step.
    """

    quantized: list[Tensor] | None
    float_: list[Tensor] | None
    targets: list[Tensor]
    inner: dict[str, Tensor]
    importance: list[Tensor] | None
    steps: list[Tensor]


class UnitData:
    """Runs a model on calibration batches and keeps what one unit of it sees.

    Args:
        model: the quantized model; the units before this one are finished.
        name: of the unit.
        batches: the calibration batches.
        run: feeds one batch through the model.
        streams: which of ``"quantized"`` and ``"float"`` inputs are wanted.
        layers: names of layers inside whose outputs are targets too.
        fisher: whether to weight the elements of the output.
        cache: ``"ram"``, ``"disk"`` or ``"recompute"``.
        folder: where files go.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        batches: Sequence[Any],
        run: Callable[[Any], Any],
        streams: set[str],
        layers: Sequence[str] = (),
        fisher: bool = False,
        cache: str = "ram",
        folder: Path | None = None,
    ) -> None:
        self.model, self.name, self.run, self.streams, self.fisher = model, name, run, streams, fisher
        self.unit = model.get_submodule(name)
        self.steps = steps_inside(model)
        self.layers = {layer: model.get_submodule(layer) for layer in layers}
        self.batches = batches if cache == "recompute" else []
        two = first_samples(batches[0], 2)
        if sample_count(two) < 2:
            raise ValueError("reconstruction needs batches of at least 2 samples: raise the batch size of the loader")
        self.signature: Signature = signature(
            name, self._calls(two, None, True), self._calls(first_samples(two, 1), None, True)
        )
        sizes = [sample_count(batch) for batch in batches]
        self.samples = sum(sizes) * self.signature.calls
        self.starts = [sum(sizes[:i]) * self.signature.calls for i in range(len(sizes) + 1)]
        self.cache = SampleCache(self.samples, folder if cache == "disk" else None)
        try:
            for start, batch in zip(self.starts, batches, strict=False) if cache != "recompute" else ():
                self.cache.put(start, self._columns(batch))
        except BaseException:
            self.cache.close()
            raise

    def take(self, rows: Tensor) -> UnitBatch:
        """The samples of these rows."""
        return self._unpacked(self.cache.take(rows) if not self.batches else self._recomputed(rows))

    def enter_steps(self, batch: UnitBatch) -> None:
        """Let the tables in the unit know where the samples are, for it runs without the rest of the model."""
        for steps, rows in zip(self.steps, batch.steps, strict=True):
            steps.stand_at(rows.flatten().tolist())

    def close(self) -> None:
        """Let go of what is kept."""
        self.cache.close()

    # ---------------------------------------------------------------- private

    def _calls(self, batch: Any, calls: int | None, as_floats: bool) -> list[Call]:
        with torch.no_grad(), as_float(self.model) if as_floats else nullcontext():
            return record(self.unit, lambda: self.run(batch), calls, self.layers if as_floats else None)

    def _columns(self, batch: Any) -> list[Tensor]:
        """All columns of one batch; those of several calls of the unit one below the other."""
        with self._steps_seen(batch) as steps:
            calls = self._calls(batch, self.signature.calls, as_floats=True)
        for call in calls:
            same_constants(self.name, self.signature.constants, [
                leaf if axis is None else None for leaf, axis in zip(call.inputs, self.signature.inputs, strict=True)
            ])  # fmt: skip
        columns: list[list[Tensor]] = [[*rows] for rows in steps]
        if "quantized" in self.streams:
            for mine, call in zip(columns, self._calls(batch, self.signature.calls, as_floats=False), strict=True):
                mine += self.signature.columns(call)
        for mine, call in zip(columns, calls, strict=True):
            if "float" in self.streams:
                mine += self.signature.columns(call)
            mine += self.signature.results_of(call)
            mine += [axis.first(call.inner[key]) for key, axis in self.signature.inner.items()]
        if self.fisher:
            for mine, importance in zip(columns, self._importance(batch, len(calls)), strict=True):
                mine += importance
        return [torch.cat(parts) for parts in zip(*columns, strict=True)]

    @contextmanager
    def _steps_seen(self, batch: Any) -> Iterator[list[list[Tensor]]]:
        """For each call of the unit where the samples are, (samples, entries of each)."""
        found: list[list[Tensor]] = []
        samples = sample_count(batch)

        def see(*_: Any) -> None:
            rows = [steps.rows * samples if len(steps.rows) == 1 else steps.rows for steps in self.steps]
            found.append([torch.tensor(row).view(samples, -1) for row in rows])

        handle = self.unit.register_forward_pre_hook(see)
        try:
            yield found
        finally:
            handle.remove()

    def _unpacked(self, columns: list[Tensor]) -> UnitBatch:
        remaining = iter(columns)

        def take(count: int) -> list[Tensor]:
            return [next(remaining) for _ in range(count)]

        steps = take(len(self.steps))
        inputs = sum(axis is not None for axis in self.signature.inputs)
        outputs = sum(axis is not None for axis in self.signature.outputs)
        quantized = take(inputs) if "quantized" in self.streams else None
        float_ = take(inputs) if "float" in self.streams else None
        targets = take(outputs)
        inner = dict(zip(self.signature.inner, take(len(self.signature.inner)), strict=True))
        return UnitBatch(quantized, float_, targets, inner, take(outputs) if self.fisher else None, steps)

    def _recomputed(self, rows: Tensor) -> list[Tensor]:
        parts = []
        for start, batch in zip(self.starts, self.batches, strict=False):
            size = sample_count(batch)
            inside = rows[(rows >= start) & (rows < start + size * self.signature.calls)] - start
            if len(inside):
                chosen = sorted({int(row) % size for row in inside})
                columns = self._columns(reordered(batch, chosen))
                place = [int(row) // size * len(chosen) + chosen.index(int(row) % size) for row in inside]
                parts.append([column[torch.tensor(place)] for column in columns])
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def _importance(self, batch: Any, calls: int) -> list[list[Tensor]]:
        """What BRECQ's code calls Fisher: 1 + |gradient of KL(float, quantized so far) by the unit's output|."""
        with torch.no_grad(), as_float(self.model):
            exact = _logits(self.run(batch))
        outputs: list[list[Tensor]] = []

        def watch(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = torch.utils._pytree.tree_flatten(output)
            watched = [
                leaf.detach().requires_grad_() if axis is not None else leaf
                for leaf, axis in zip(leaves, self.signature.outputs, strict=True)
            ]
            outputs.append([x for x, axis in zip(watched, self.signature.outputs, strict=True) if axis is not None])
            return torch.utils._pytree.tree_unflatten(watched, spec)

        handle = self.unit.register_forward_hook(watch)
        try:
            with torch.enable_grad():
                found = _logits(self.run(batch))
                loss = F.kl_div(found.log_softmax(-1), exact.softmax(-1), reduction="sum")
                leaves = [leaf for call in outputs for leaf in call]
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        finally:
            handle.remove()
        weights = iter([
            torch.ones_like(leaf) if g is None else 1 + g.abs() for leaf, g in zip(leaves, gradients, strict=True)
        ])  # fmt: skip
        axes = [axis for axis in self.signature.outputs if axis is not None]
        return [[axis.first(next(weights)) for axis in axes] for _ in range(calls)]


def _logits(output: Any) -> Tensor:
    found: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return found
