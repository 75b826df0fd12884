"""What every quantization callback shares: when it calibrates, what it refuses, what it leaves behind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_quant.calibration import (
    CalibrationBatches,
    check_feedable,
    feed,
    first_samples,
    merge_across_ranks,
    undisturbed,
)
from lightning_quant.callbacks.averages import averaged_copies, check_averages
from lightning_quant.callbacks.dry_run import DryRun, dry_run
from lightning_quant.callbacks.formats import Formats
from lightning_quant.callbacks.order import check_callbacks, check_last, check_order, earlier
from lightning_quant.callbacks.reconstructing import reconstruct
from lightning_quant.checkpoint import attach_record, detach_record, record_of
from lightning_quant.graph import ModelGraph, select, trace
from lightning_quant.kernels.layer_door import require_float_weights
from lightning_quant.layers import Plan, QuantizedLayer, as_float, created_biases, structure_kept
from lightning_quant.quantizers import RangeRule
from lightning_quant.solvers import Reconstruction


class QuantizationCallback(Callback):
    """Calibrates once on ``on_validation_start``, so that ``trainer.validate`` reports the quantized model's metrics.

    A subclass says *what* happens to the model: :meth:`plan_for` chooses the formats, :meth:`calibrate_plan` finds
    the scales.

    Args:
        formats: the formats of weights, activations and attention.
        attention: whether q, k, v and the attention probabilities are quantized.
        target: name of the submodule to quantize; default: every layer that runs in the calibration forward.
        skip: name patterns of layers that stay float.
        calibration_samples: how many samples (not batches) calibrate.
        calibration_loader: ``"auto"``, ``"train"``, ``"val"``, a DataLoader, or a callable that gives one. Auto takes
            ``calibration_dataloader()`` of the module or datamodule, then the train set unshuffled, then the
            validation loader.
        during_fit: whether to calibrate in the validation loops of ``trainer.fit`` as well.
        reconstruct: how units of the quantized model are fitted to their float twins after the ranges are found:
            ``"adaround"``, ``"brecq"``, ``"qdrop"``, or a :class:`~lightning_quant.Reconstruction`; ``None`` rounds to
            the nearest.
    """

    step: ClassVar[str] = "decide"  # what it does to float weights; see callbacks/order.py

    def __init__(
        self,
        formats: Formats,
        attention: bool = True,
        target: str | None = None,
        skip: Sequence[str] = (),
        calibration_samples: int = 32,
        calibration_loader: Literal["auto", "train", "val"] | Iterable[Any] | Callable[[], Iterable[Any]] = "auto",
        during_fit: bool = False,
        reconstruct: str | Reconstruction | None = None,
    ) -> None:
        if calibration_samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, found {calibration_samples}")
        self.formats = formats
        self.attention = attention
        self.target = target
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.calibration_samples = calibration_samples
        self.calibration_loader = calibration_loader
        self.during_fit = during_fit
        self.reconstruct = None if reconstruct is None else Reconstruction.parse(reconstruct)

    # ---------------------------------------------------------------- what a method says

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result, as strings and numbers; a checkpoint made with others is another plan."""
        return {
            "weights": self.formats.weights,
            "activations": self.formats.activations,
            "attention": self.attention,
            "first_last": self.formats.first_last,
            "embeddings": self.formats.embeddings,
            "overrides": self.formats.overrides,
            "target": self.target,
            "skip": self.skip,
            "reconstruct": None if self.reconstruct is None else self.reconstruct.to_dict(),
        }

    @property
    def slots(self) -> list[str]:
        """What of its layers it works on; other callbacks may have the rest."""
        wanted = {QuantizedLayer.WEIGHTS: self.formats.weights, QuantizedLayer.INPUTS: self.formats.activations}
        return [slot for slot, text in wanted.items() if text is not None]

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Choose the formats; changes nothing."""
        attention = self.attention and self.formats.activations is not None
        selection = select(model, graph, self.target, self.skip, attention, self.slots)
        return self.formats.plan(model, graph, selection, type(self).__name__, self.arguments)

    @abstractmethod
    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Find the scales of a model whose quantized structure stands; ``run`` feeds one batch forward."""

    def draw(self, batches: CalibrationBatches) -> Iterable[Any]:
        """The batches as the method wants them."""
        return batches

    def give_back_unreached(self, model: nn.Module, plan: Plan, reached: set[str]) -> None:
        """Make layers float again that no calibration batch reached, on any rank."""
        reached = set().union(*merge_across_ranks(reached))
        for name in [name for name in plan.modules(model) if name not in reached]:
            plan.give_back(model, name, "calibration never reached it")
        if not plan.layers:
            raise ValueError(
                f"nothing to quantize in {type(model).__name__}: calibration never reached a layer"
                + (f" in target={self.target!r}" if self.target else "")
                + "; set target=, or define calibration_step(self, batch) that runs the layers to be quantized"
            )

    def fit_weights(self, layers: Mapping[str, QuantizedLayer], rule: RangeRule) -> None:
        """Search the ranges of the layers' weights as they are now."""
        for name, layer in layers.items():
            for weight, quantizer in layer.weight_quantizers().items():
                try:
                    quantizer.fit(layer.weight_rows(weight), rule)
                except ValueError as error:
                    raise ValueError(f"`{name}.{weight}`: {error}") from error

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    @property
    def state_key(self) -> str:
        """Two callbacks of one class may quantize two parts of a model."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Be ready for a checkpoint: its plan must be ours, and the structure is rebuilt before its weights load."""
        record = attach_record(pl_module)
        plan = record.plans.get(self.state_key)
        if plan is not None and plan.arguments != self.arguments:
            detach_record(pl_module)
            raise ValueError(
                f"this model is quantized already, by {plan.method} with {plan.arguments}; "
                f"this callback has {self.arguments}. Call {plan.method}.remove(model) first"
            )
        check_callbacks(trainer.callbacks, self)  # type: ignore[attr-defined]
        for model in [pl_module, *(averaged_copies(trainer) if stage == "fit" else [])]:  # a checkpoint is for both
            attach_record(model).expected[self.state_key] = (type(self).__name__, self.arguments)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit that would spoil the scales."""
        check_averages(trainer, pl_module, type(self).__name__, self.is_calibrated(pl_module), self.during_fit)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, unless that is done, or this is only fit's own validation."""
        fitting = trainer.sanity_checking or trainer.state.fn == TrainerFn.FITTING
        if not self.is_calibrated(pl_module) and ((self.during_fit and not trainer.sanity_checking) or not fitting):
            self.calibrate(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test a float model as if it were quantized."""
        self._require_calibrated(pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to predict with a float model as if it were quantized."""
        self._require_calibrated(pl_module, "predict")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop minding checkpoints; Lightning put the training flags back, but of the modules that it knew only."""
        record = record_of(pl_module)
        plan = None if record is None else record.plans.get(self.state_key)
        if plan is not None:
            plan.follow_training(pl_module)
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown after an exception."""
        self._let_go(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Only the arguments: everything that was calibrated is in the model's own state dict."""
        return self.arguments

    # ---------------------------------------------------------------- what a user may call

    def plan(self, model: nn.Module, batch: Any) -> DryRun:
        """What would be quantized, to which size, and what would not and why; changes nothing. Print the result.

        Args:
            model: the float LightningModule.
            batch: one batch as its dataloader gives it, on the model's device; a few samples suffice.
        """
        check_feedable(model)
        with undisturbed(model), as_float(model):
            graph = trace(model, lambda: feed(None, model, first_samples(batch, 2)))
        return dry_run(model, graph, self.plan_for(model, graph))

    def is_calibrated(self, model: nn.Module) -> bool:
        """Whether this callback has quantized the model, and every scale is known."""
        record = record_of(model)
        plan = None if record is None else record.plans.get(self.state_key)
        return plan is not None and not plan.lacking(model)

    def remove(self, model: nn.Module) -> None:
        """Give the float model back.

        The Parameters are the very same; where the method folded scales into weights they stay folded, which computes
        the same function up to rounding, and a warning says so.

        Raises:
            ValueError: if this callback has not quantized the model, or ``KernelSwap(keep=True)`` dropped its weights.
        """
        require_float_weights(model)
        record = record_of(model)
        if record is not None:
            check_last(type(self).__name__, self.state_key, record.plans)
        plan = None if record is None else record.plans.pop(self.state_key, None)
        if plan is None:
            raise ValueError(
                f"{type(self).__name__} has not quantized this {type(model).__name__}: there is nothing to remove"
            )
        modules = dict(model.named_modules())
        folded = [name for name in plan.layers if bool(getattr(modules.get(name), "folded", False))]
        plan.undo(model)
        detach_record(model)
        if folded:
            rank_zero_warn(
                f"{plan.method}.remove: the model is float again, but norms stay folded into {len(folded)} layers "
                f"(`{folded[0]}`, ...); it computes the same function up to rounding. "
                f"Load the float checkpoint to have the original weights."
            )

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the model now; it is left as it was if anything goes wrong."""
        check_feedable(pl_module)
        record = attach_record(pl_module)
        run = partial(feed, trainer, pl_module)
        with undisturbed(pl_module), torch.compiler.set_stance("force_eager"), structure_kept(pl_module):
            if self.state_key in record.plans:  # its quantizers lost scales: a float state dict went into a submodule
                record.plans[self.state_key].undo(pl_module)
            batches = CalibrationBatches(trainer, pl_module, self.calibration_loader, self.calibration_samples)
            samples, stream = _peek(self.draw(batches))
            with as_float(pl_module):  # another callback may have been here
                graph = trace(pl_module, lambda: run(samples))
            plan = self.plan_for(pl_module, graph)
            with self.applied(pl_module, plan):
                self.calibrate_plan(pl_module, plan, graph, stream, run)
                plan.calibration = f"{batches.available} samples from {batches.source}"
                if self.reconstruct is not None:
                    self.reconstruct_plan(trainer, pl_module, plan, self.reconstruct)

    def reconstruct_plan(
        self, trainer: Trainer, pl_module: LightningModule, plan: Plan, settings: Reconstruction
    ) -> None:
        """Fit the units to their float twins, on samples of their own."""
        batches = CalibrationBatches(trainer, pl_module, self.calibration_loader, settings.samples)
        reconstruct(trainer, pl_module, settings, batches, self.reconstructed(pl_module, plan))

    def reconstructed(self, pl_module: LightningModule, plan: Plan) -> list[str]:
        """Names of the layers that reconstruction may round otherwise."""
        return list(plan.layers)

    @contextmanager
    def applied(self, pl_module: LightningModule, plan: Plan) -> Iterator[None]:
        """Build the quantized structure, for the block to find its scales; undone if anything goes wrong."""
        plan.check(pl_module)
        plan.step = earlier(plan.step, self.step)
        check_order(plan, self.state_key, attach_record(pl_module).plans, self.reconstruct is not None)
        with structure_kept(pl_module):
            plan.apply(pl_module)
            yield
            require_scales(pl_module, plan)
        plans = attach_record(pl_module).plans
        others = {name for key, other in plans.items() if key != self.state_key for name in other.created}
        # an earlier fold may have left its biases behind
        plan.created = [name for name in created_biases(pl_module) if name not in others]
        plans[self.state_key] = plan
        rank_zero_info(_summary(plan))

    # ---------------------------------------------------------------- private

    def _require_calibrated(self, pl_module: LightningModule, verb: str) -> None:
        if not self.is_calibrated(pl_module):
            raise RuntimeError(
                f"{type(self).__name__} has not calibrated this {type(pl_module).__name__}: "
                f"run trainer.validate(model, ...) before trainer.{verb}(model, ...), "
                f"or pass ckpt_path= of a quantized checkpoint"
            )

    def _let_go(self, pl_module: LightningModule) -> None:
        record = record_of(pl_module)
        if record is not None:
            record.expected.pop(self.state_key, None)
            detach_record(pl_module)


def require_scales(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan with a quantizer that calibration did not reach.

    Raises:
        ValueError: naming the first one.
    """
    for name in plan.lacking(model):
        raise ValueError(f"`{name}` saw no calibration data although its layer ran; leave the layer float with skip=")


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Two samples, the same ones on every rank, and all batches; refuses on every rank where one would have none."""
    stream = iter(batches)
    first = list(islice(stream, 1))
    samples = merge_across_ranks([first_samples(batch, 2) for batch in first])
    if not all(samples):
        raise ValueError("fewer calibration batches than ranks: raise calibration_samples or lower batch_size")
    return samples[0][0], chain(first, stream)


def _summary(plan: Plan) -> str:
    formats = sorted({f"weights {layer.weights}, inputs {layer.inputs}" for layer in plan.layers.values()})
    patterns = sorted({layer.pruned for layer in plan.layers.values() if layer.pruned is not None})
    done = f"{_counted(len(plan.layers), 'layer')} ({', '.join(patterns) or '; '.join(formats)})"
    if patterns:
        lines = [f"{plan.method} pruned {done}."]
    else:
        lines = [f"{plan.method} quantized {done} and {_counted(len(plan.attention), 'attention site')}."]
    lines += [f"  left float: {name}: {why}" for name, why in plan.skipped.items()]
    return "\n".join(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
