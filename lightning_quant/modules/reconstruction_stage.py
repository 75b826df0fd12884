"""Reconstruction as a stage of its own: one unit after another is fitted to its float twin, driven by a Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.calibration import (
    draw_training_batches_from,
    feed,
    first_samples,
    hooked_outputs,
    undisturbed,
)
from lightning_quant.graph import trace, units_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.modules.unit_data import UnitData
from lightning_quant.modules.unit_learning import UnitLearning, activations_float
from lightning_quant.modules.unit_states import UnitStates
from lightning_quant.modules.unit_tail import FloatTail
from lightning_quant.solvers import Balance, Reconstruction, output_distance

# How many batches tell what an error is at the beginning: those of one batch may be next to nothing.
BEGINNINGS = 8


class Task(NamedTuple):
    """One unit in one phase."""

    phase: str
    unit: str


class ReconstructionStage(LightningModule):
    r"""Fits each unit of a quantized model to what its float twin computes; ``trainer.fit(stage, loader)`` runs it.

    .. math:: \min_{V, s} \; \|f(x) - \hat f(\hat x; V, s)\|^p + \lambda \sum 1 - |2 h(V) - 1|^\beta

    where :math:`f` is the float unit and :math:`\hat f` the quantized one, with the rounding :math:`V` of its weights
    and the scales :math:`s` of its activations; see :class:`~lightning_quant.Reconstruction`. The model is changed in
    place: afterwards its weight quantizers hold the codes that were found, and its float weights are what they were.

    A step costs one forward and backward of one unit: the float twin runs once for each unit, and what goes in and
    comes out is kept. Kept at a time are the calibration samples, and of one unit ``samples`` times its input (twice
    for mixed inputs) and its output.

    After each unit the state is written to ``state_dir``. The same stage on the same model and data, started again
    after it was killed, goes on with the unit that it was in, and ends with the same weights.

    Args:
        model: a model that one of our callbacks has calibrated.
        reconstruction: ``"adaround"``, ``"brecq"``, ``"qdrop"``, ``"mgrq"``, or settings.
        batches: the calibration batches; by default they are drawn from the loader given to ``trainer.fit``.
        layers: names of the quantized layers that are reconstructed; default: all.
        state_dir: where the state is written; default: ``reconstruction`` below the Trainer's ``default_root_dir``.
        curves: loggers that get the loss of every unit, beside those of the Trainer.
        ranks: the Trainer whose processes learn together, where each has a Trainer of its own for this stage.

    Raises:
        ValueError: if the model is not quantized and calibrated, or a unit cannot be fed sample by sample.

    >>> stage = ReconstructionStage(model, "brecq")  # doctest: +SKIP
    >>> trainer = L.Trainer(max_epochs=1, enable_checkpointing=False)  # doctest: +SKIP
    >>> trainer.fit(stage, calibration_loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        reconstruction: str | Reconstruction = "qdrop",
        batches: Iterable[Any] | None = None,
        layers: Sequence[str] | None = None,
        state_dir: str | Path | None = None,
        curves: Sequence[Logger] = (),
        ranks: Trainer | None = None,
    ) -> None:
        super().__init__()
        self.settings = Reconstruction.parse(reconstruction)
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.curves = list(curves)
        self.tasks: list[Task] = []
        self.seconds: dict[str, dict[str, float]] = {}
        self.losses: dict[str, tuple[float, float]] = {}
        self._model = (model,)  # not a child: its Parameters are not ours to train, wrap or save
        self._given = batches
        self._ranks = ranks
        self._scope = ExitStack()
        self._current: _Current | None = None
        # DDP wants a Parameter that has a part in the loss from the beginning; what is learned comes and goes.
        self.anchor = nn.Parameter(torch.zeros(()))
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
        self.layers = list(quantized if layers is None else layers)
        weights = [q for name in self.layers for q in quantized[name].weight_quantizers().values()]
        if not self.layers or not all(quantizer.calibrated for quantizer in weights):
            raise ValueError(
                f"{type(model).__name__} is not quantized and calibrated: run trainer.validate(model, ...) with "
                f"PostTrainingQuantization or another of our callbacks first"
            )

    @property
    def ranks(self) -> Trainer:
        """The Trainer that knows the other processes."""
        return self.trainer if self._ranks is None else self._ranks

    @property
    def model(self) -> nn.Module:
        """The model that is reconstructed."""
        return self._model[0]

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def configure_callbacks(self) -> list[Callback]:
        """Clean up after an exception, which a LightningModule is not told of."""
        return [_CleanUp()]

    def setup(self, stage: str) -> None:
        """The loader given to ``fit`` calibrates; what is trained on are the samples of the units."""
        if self._given is None:
            self._given = draw_training_batches_from(self.trainer, self, self.settings.samples)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose Parameters are exchanged from unit to unit."""
        return torch.optim.Adam([{"params": [self.anchor], "lr": 0.0}])

    def on_fit_start(self) -> None:
        """Find the units, and those that an earlier run has finished."""
        self.model.to(self.device)
        self._scope.enter_context(undisturbed(self.model, grad=True))
        batches = list(self._given or [])
        if not batches:
            raise ValueError("reconstruction got no calibration batch: raise samples= or lower the batch size")
        self._run = partial(feed, self.trainer, self.model)
        samples = first_samples(batches[0], 2)
        graph = trace(self.model, lambda: self._run(samples))
        units = units_of(self.model, graph, self.layers, self.settings.granularity)
        if not units:
            raise ValueError(f"granularity={self.settings.granularity!r} finds no unit with a quantized layer")
        tasks = [Task(phase, unit) for phase in self.settings.phases for unit in units]
        self.tasks = [task for task in tasks if self._learning(task).has_something_to_learn]
        folder = self.state_dir or Path(self.ranks.default_root_dir) / "reconstruction"
        self._states = UnitStates(folder, self.model, self.settings, self.tasks, batches)
        self._done = self._states.resume(self.ranks)
        self._batches = batches

    def train_dataloader(self) -> Iterable[Any]:
        """Rows of the current unit's samples; the units are taken one after another."""
        return _Steps(self)

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        """The error of the unit on some samples, and what undecided weights cost."""
        now = self._require_current()
        error, beside = self._errors(rows, now)
        self.log("unit", float(now.number), prog_bar=True, logger=False, batch_size=1)
        self.log("loss", error.detach(), prog_bar=True, logger=False, batch_size=1)
        now.losses.append(self.ranks.strategy.reduce(error.detach().clone(), reduce_op="mean"))
        return error + beside + now.learning.penalty(now.step) + 0 * self.anchor

    def on_after_backward(self) -> None:
        """Several ranks learn the same: their gradients are averaged here, since DDP does not know the Parameters."""
        if self.ranks.world_size > 1:
            for parameter in self._require_current().learning.parameters():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.ranks.strategy.reduce(grad, reduce_op="mean")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the curve; after the last step decide the rounding."""
        now = self._require_current()
        now.learning.after_step()
        now.step += 1
        if now.step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in [*self.trainer.loggers, *self.curves]:
                logger.log_metrics({f"reconstruction/{now.task.unit}": float(now.losses[-1])}, step=now.step)
        if now.finished(self.settings):
            self._finish()

    def on_train_epoch_end(self) -> None:
        """One pass over the units is all."""
        self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Leave the model as a quantized one like any other."""
        if self.ranks.is_global_zero:
            self._states.forget()
        self.clean_up()

    # ---------------------------------------------------------------- the units

    def begin(self, number: int) -> _Current:
        """Gather what a unit sees, and give the optimizer what it learns."""
        task, start = self.tasks[number], time.perf_counter()
        learning = self._learning(task)
        with ExitStack() as scope:
            if task.phase == "weights":
                scope.enter_context(activations_float(self.model))
            data = UnitData(
                self.model,
                task.unit,
                self._batches,
                self._run,
                _streams(task.phase, self.settings.inputs),
                learning.supervised,
                self.settings.loss == "fisher",
                self.settings.cache,
                self._states.folder / "cache",
            )
            scope.callback(data.close)
            tail = None
            if self.settings.global_weight:
                tail = FloatTail(self.model, task.unit, self._batches, self._run, data.signature)
            seed = (self.settings.seed * 1_000_003 + number) * 4099 + self.ranks.global_rank
            random = torch.Generator().manual_seed(seed)
            now = _Current(task, number + 1, data, learning, random, tail, Balance() if self.settings.balance else None)
            if now.balance is not None:
                self._note_beginning(now)
            scope.enter_context(learning.learn(seed))
            self._train(learning)
            now.begin(scope.pop_all(), time.perf_counter() - start)
            self._current = now
        return self._current

    def _note_beginning(self, now: _Current) -> None:
        """Measure the rounded unit: what is learned begins at the float weights, where there is next to no error."""
        with torch.no_grad():
            for rows in torch.arange(now.data.samples).split(self.settings.batch_size)[:BEGINNINGS]:
                self._errors(rows, now)
        now.has_begun = True

    def _learning(self, task: Task) -> UnitLearning:
        return UnitLearning(self.model, task.unit, task.phase, self.settings, self.layers)

    def _train(self, learning: UnitLearning) -> None:
        """Give the optimizer the Parameters of a unit, and nothing else."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.state.clear()
        optimizer.param_groups.clear()
        for group in [{"params": [self.anchor], "lr": 0.0, "decay": False}, *learning.groups()]:
            optimizer.add_param_group({**group, "initial": group["lr"]})

    def clean_up(self) -> None:
        """Let go of a unit that is not finished, and of everything else."""
        if self._current is not None:
            self._current.scope.close()
            self._current = None
        self._scope.close()

    def _finish(self) -> None:
        now = self._require_current()
        now.learning.harden()
        now.scope.close()
        self._current = None
        self._states.save(now.number, self.ranks)
        first, last = (float(torch.stack(part).mean()) for part in (now.losses[:10], now.losses[-10:]))
        self.losses[now.task.unit] = (first, last)
        self.seconds[now.task.unit] = {"gathering": now.gathering, "learning": time.perf_counter() - now.started}
        rank_zero_info(
            f"Reconstructed {now.number}/{len(self.tasks)} `{now.task.unit}`: loss {first:.4g} -> {last:.4g} "
            f"({now.gathering:.0f} s gathering samples, {time.perf_counter() - now.started:.0f} s learning)"
        )

    def _errors(self, rows: Tensor, now: _Current) -> tuple[Tensor, Tensor]:
        """The error of the unit's output on some samples, and what those below and above it count."""
        batch, signature, settings = now.data.take(rows), now.data.signature, self.settings
        now.data.enter_steps(batch)
        args, kwargs = signature.arguments(now.learning.mixed_inputs(batch))
        inner = {name: now.data.layers[name] for name in signature.inner}
        with hooked_outputs(inner) as found:
            outputs = signature.results(now.data.unit(*args, **kwargs))
        error = outputs[0].new_zeros(())
        importance: Sequence[Tensor | None] = batch.importance or [None] * len(outputs)
        for out, target, weight in zip(outputs, batch.targets, importance, strict=True):
            error = error + now.learning.distance(out, target, weight)
        beside = error.new_zeros(())
        if inner:
            layers = [
                now.learning.layer_distance(name, axis.first(found[name]), batch.inner[name])
                for name, axis in signature.inner.items()
            ]
            beside = beside + settings.layer_weight * now.measured("layers", sum(layers, beside), error)
        if now.tail is not None and now.step % settings.global_every == 0:
            far = output_distance(*now.tail(rows, outputs), settings.global_loss)
            times = settings.global_weight * settings.global_every
            beside = beside + times * now.measured("output", far, error)
        return error, beside

    def _require_current(self) -> _Current:
        assert self._current is not None
        return self._current


def _streams(phase: str, inputs: str) -> set[str]:
    """Which inputs a unit is fed; the activations alone are learned on the float ones, as BRECQ has it."""
    if inputs == "mixed":
        return {"quantized", "float"}
    return {"float"} if phase == "activations" else {inputs}


class _Current:
    """The unit that is being learned."""

    def __init__(
        self,
        task: Task,
        number: int,
        data: UnitData,
        learning: UnitLearning,
        random: torch.Generator,
        tail: FloatTail | None,
        balance: Balance | None,
    ) -> None:
        self.task, self.number, self.data, self.learning, self.random = task, number, data, learning, random
        self.tail, self.balance = tail, balance
        self.step, self.has_begun = 0, False
        self.losses: list[Tensor] = []
        self.begin(ExitStack(), 0.0)

    def begin(self, scope: ExitStack, gathering: float) -> None:
        """What ends with the unit, and how long it took to gather what it sees."""
        self.scope, self.gathering, self.started = scope, gathering, time.perf_counter()

    def measured(self, name: str, error: Tensor, unit: Tensor) -> Tensor:
        """An error in units of the unit's own, if the settings say so."""
        if self.balance is None:
            return error
        if not self.has_begun:
            self.balance.note(name, error, unit)
            return error
        return self.balance(name, error)

    def finished(self, settings: Reconstruction) -> bool:
        """Whether this was the last step."""
        window = settings.patience
        if window and self.step > settings.warmup * settings.iterations and self.step >= 2 * window:
            recent, before = (
                torch.stack(self.losses[-window:]).mean(),
                torch.stack(self.losses[-2 * window : -window]).mean(),
            )
            if bool(recent >= before):
                return True
        return self.step >= settings.iterations


class _Steps:
    """Rows of samples for every step of every unit that is left, in a fixed random order."""

    def __init__(self, stage: ReconstructionStage) -> None:
        self.stage = stage

    def __len__(self) -> int:
        return (len(self.stage.tasks) - self.stage._done) * self.stage.settings.iterations

    def __iter__(self) -> Iterator[Tensor]:
        settings = self.stage.settings
        for number in range(self.stage._done, len(self.stage.tasks)):
            now = self.stage.begin(number)
            size = min(settings.batch_size, now.data.samples)
            optimizer = self.stage.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, torch.optim.Optimizer)
            while self.stage._current is now:
                for group in optimizer.param_groups:
                    if group["decay"]:
                        group["lr"] = group["initial"] * (1 + math.cos(math.pi * now.step / settings.iterations)) / 2
                # sorted: the order does not matter, and files are read from front to back
                yield torch.randperm(now.data.samples, generator=now.random)[:size].sort().values


class _CleanUp(Callback):
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, ReconstructionStage):
            pl_module.clean_up()
