"""Mixed precision: which tensor gets how many bits, chosen within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.calibration import CalibrationBatches, check_feedable, feed, first_samples, undisturbed
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.bit_allocation import Choice, Monitor, measure, within_drop
from lightning_quant.callbacks.dry_run import DryRun, dry_run
from lightning_quant.callbacks.formats import Formats
from lightning_quant.callbacks.inner_method import calibrating, with_bits
from lightning_quant.callbacks.mixed_precision_section import mixed_precision_section
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.checkpoint import record_of
from lightning_quant.graph import ModelGraph, trace
from lightning_quant.layers import Plan, WeightsAsTheyWere, structure_kept
from lightning_quant.quantizers import RangeRule, Scheme
from lightning_quant.reports import Section
from lightning_quant.solvers import PRODUCERS, SEARCHES, Allocation, Budget, Point, Reconstruction
from lightning_quant.solvers.products import Slot, formats_of, set_bits


class MixedPrecision(QuantizationCallback):
    r"""Chooses the bits of every weight and activation within a budget, and then calibrates like another method.

    Each product of two tensors (weights and inputs of a layer, query and key, attention map and value) takes one pair
    of bits :math:`b`, by default those that solve

    .. math:: \min_b \sum_i L_i(b_i) \quad \text{with} \quad \sum_i C_i(b_i) \le B, \qquad
              L_i(b) = E_n \, \langle g_{n}, \, Q_b(x_{n}) - x_{n} \rangle^2

    where :math:`g` is the gradient of the output times random signs, so that :math:`L` is the squared error that
    rounding this tensor causes at the output, to second order. C counts bytes, bits or bit operations. The losses are
    measured where the method has calibrated with as many bits as are allowed; then it begins anew with what was chosen.
    The layers that read one norm agree on its bits.

    *Producers* of losses: ``"hessian"`` (the above); ``"patch"``, its diagonal; ``"snip"``,
    :math:`\text{mean}|x g| \cdot \|\delta\|`; ``"snr"``, :math:`\|\delta\|^2 / \|x\|^2` without gradients; ``"lrp"``,
    the relevance of a tensor times :math:`4^{-b}`; ``"metric"``, how much ``monitor`` gets worse in a validation with
    one product narrower, both factors alike (AdaQuant): as many validations as there are products times bits.

    *Searches*: ``"integer_program"``, exact, by HiGHS; ``"pareto"``, along the convex hull; ``"greedy"``;
    ``"trade_off"``, which takes the knee of loss, bytes and bit operations if there is no budget.

    *Budgets*: ``"4.0bit"`` is what uniform 4 bits cost, in the mean of all weights, in the mean of all activations, and
    in bit operations; ``"6MB"`` the size of the saved model; ``"20GBitOps"`` for one sample; ``"8ms"`` what the layers
    take for one sample on the kernels that :class:`KernelSwap` would run here; ``"drop<=0.5"`` finds the
    fewest mean bits with which ``monitor`` is at most so many points worse than in float (a point is 0.01 of a metric
    between 0 and 1, and 1 of others), or ``"drop<=1%"`` relative to it. Several may hold at once.

    Reference for the integer program: Hubara et al., *Improving Post Training Neural Quantization: Layer-wise
    Calibration and Integer Programming*, 2020.

    Args:
        budget: what it may cost; a list if there are several; ``None`` only for ``search="trade_off"``.
        method: ``"repq"`` for :class:`RepQViT` with a free choice for its stem too, ``"ptq"`` for
            :class:`PostTrainingQuantization`, or a callback that calibrates; its own ``weights`` and ``activations``
            say all but the number of bits. What it exempts by ``overrides`` or ``first_last`` keeps its bits.
        sensitivity: who says what is lost.
        search: who chooses.
        weight_bits: the numbers of bits that weights may have.
        activation_bits: the same for activations; ``None``: as the weights.
        monitor: name of the metric that ``drop`` and ``"metric"`` look at; ``None``: the only one there is.
        mode: ``"max"`` if a larger value of it is better, ``"min"`` if a smaller one is.
        trials: how many validations a ``drop`` may take.
        common: arguments of the method, where that is given by name: ``attention``, ``first_last``, ``overrides``,
            ``target``, ``skip``, ``calibration_samples``, ``calibration_loader``, ``during_fit``, ``reconstruct``.

    Raises:
        ValueError: for an unknown word, a budget that cannot be met, or a metric that is not logged.

    >>> callback = MixedPrecision(budget="4.0bit", method="repq", skip=["head"])
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    >>> callback.choice.bits  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: str | Sequence[str] | None = "4.0bit",
        method: str | QuantizationCallback = "repq",
        sensitivity: str = "hessian",
        search: str = "integer_program",
        weight_bits: Sequence[int] = (3, 4, 5, 6, 8),
        activation_bits: Sequence[int] | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        trials: int = 5,
        **common: Any,
    ) -> None:
        known = {"sensitivity": [*PRODUCERS, "metric"], "search": [*SEARCHES], "mode": ["max", "min"]}
        for name, word in {"sensitivity": sensitivity, "search": search, "mode": mode}.items():
            if word not in known[name]:
                raise ValueError(f"{name}={word!r} is none of {', '.join(map(repr, known[name]))}")
        texts = [] if budget is None else [budget] if isinstance(budget, str) else list(budget)
        self.budgets = [Budget.parse(text) for text in texts]
        if not texts and search != "trade_off":
            raise ValueError(f"search={search!r} needs a budget=; only 'trade_off' finds a point without one")
        self.weight_bits = _ascending(weight_bits, "weight_bits")
        self.activation_bits = _ascending(activation_bits or weight_bits, "activation_bits")
        self.method = calibrating(method, **common)
        if isinstance(self.method, MixedPrecision):
            raise ValueError(f"method is a {type(method).__name__}, which chooses bits itself; use it alone")
        self.sensitivity, self.search, self.trials = sensitivity, search, trials
        self.monitor, self.mode = monitor, mode
        self.choice: Choice | None = None
        if self._asks_metric and self.method.during_fit:
            raise ValueError("a metric is asked in trainer.validate alone: leave during_fit=False")
        for small in (b for b in self.budgets if b.kind == "bits"):
            if small.amount < min(self.weight_bits):
                raise ValueError(f"budget={small.text!r} is below the fewest bits, weight_bits={self.weight_bits}")
        inner = self.method
        super().__init__(
            self._formats(max), inner.attention, inner.target, inner.skip, inner.calibration_samples,
            inner.calibration_loader, inner.during_fit, inner.reconstruct,
        )  # fmt: skip
        self._fixed: dict[Slot, int] = {}
        self._monitor: Monitor | None = None
        self._batches: CalibrationBatches | None = None

    # ---------------------------------------------------------------- what a method says

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {
            "method": type(self.method).__name__,
            "budget": [budget.text for budget in self.budgets],
            "sensitivity": self.sensitivity,
            "search": self.search,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "monitor": self.monitor,
            "mode": self.mode,
        }
        return {**self.method.arguments, **super().arguments, **own}

    def as_deployed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Where the model computes otherwise at inference than its layers say, a context in which it does."""
        return nullcontext()

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats of the method, with as many bits as there may be."""
        if isinstance(self.method, RepQViT) and not graph.pairs:
            raise ValueError(
                f"method='repq' folds LayerNorms into the linear layers behind them, and {type(model).__name__} has "
                f"none that can be folded; set method='ptq'"
            )
        plans = [self._method_with(end).plan_for(model, graph) for end in (min, max)]
        narrow, wide = map(formats_of, plans)
        # what does not follow the method's own number of bits is exempt
        self._fixed = {slot: Scheme.parse(text).bits for slot, text in wide.items() if narrow[slot] == text}
        plan = plans[1]
        plan.method, plan.arguments = type(self).__name__, self.arguments
        return plan

    def draw(self, batches: CalibrationBatches) -> Iterable[Any]:
        """As the method wants them."""
        return self.method.draw(batches)

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Calibrate with all bits, measure, choose, and calibrate anew with the bits that were chosen."""
        batches, start = list(batches), WeightsAsTheyWere(model)
        try:
            self.method.calibrate_plan(model, plan, graph, batches, run)
            rule = getattr(self.method, "rule", RangeRule.parse("mse"))
            seen = self._same_on_all_ranks(batches)
            timed = any(budget.kind == "milliseconds" for budget in self.budgets)
            allocation = measure(
                model, plan, graph, seen, run, self._allowed, self.sensitivity, rule, self._monitor, timed
            )

            def build(point: Point) -> None:
                start.take_back(model, plan)
                set_bits(plan, allocation.bits(point))
                plan.apply(model)
                self.method.calibrate_plan(model, plan, graph, batches, run)

            self.choice = self._choose(model, allocation, build)
        except BaseException:
            start.put_back(model)
            raise
        rank_zero_info(f"{type(self).__name__} chose {self.choice}")

    def reconstruct_plan(
        self, trainer: Trainer, pl_module: LightningModule, plan: Plan, settings: Reconstruction
    ) -> None:
        """As the method does it."""
        self.method.reconstruct_plan(trainer, pl_module, plan, settings)

    # ---------------------------------------------------------------- what a user may call

    def plan(self, model: nn.Module, batch: Any) -> DryRun:
        """What would be quantized, with the bits that this batch would lead to; changes nothing. Print the result.

        A choice that asks for a metric cannot be made without a Trainer: then it is the widest one.
        """
        if self._asks_metric:
            return super().plan(model, batch)
        check_feedable(model)
        run, start, choice = partial(feed, None, model), WeightsAsTheyWere(model), self.choice
        with undisturbed(model), structure_kept(model):
            graph = trace(model, lambda: run(first_samples(batch, 2)))
            plan = self.plan_for(model, graph)
            plan.apply(model)
            try:
                self.calibrate_plan(model, plan, graph, [batch], run)
            finally:
                start.take_back(model, plan)
                self.choice = choice
        return dry_run(model, graph, plan)

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the model now; it is left as it was if anything goes wrong."""
        if self._asks_metric:
            self._monitor = Monitor(trainer, pl_module, self.monitor, self.mode)
        self._batches = CalibrationBatches(trainer, pl_module, self.calibration_loader, self.calibration_samples)
        try:
            super().calibrate(trainer, pl_module)
        finally:
            self._monitor = self._batches = None

    def choice_of(self, model: nn.Module) -> Choice | None:
        """What was chosen for this model; ``None`` if a checkpoint brought its bits."""
        record = record_of(model)
        plan = None if record is None else record.plans.get(self.state_key)
        bits = {} if plan is None else {slot: Scheme.parse(text).bits for slot, text in formats_of(plan).items()}
        return self.choice if self.choice is not None and self.choice.bits == bits else None

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> list[Section]:
        """What was chosen, for the report of :class:`~lightning_quant.QuantReport`; none for a loaded model."""
        choice = self.choice_of(pl_module)
        return [] if choice is None else [mixed_precision_section(choice, self.budgets)]

    # ---------------------------------------------------------------- private

    @property
    def _asks_metric(self) -> bool:
        return self.sensitivity == "metric" or any(budget.is_measured for budget in self.budgets)

    def _formats(self, end: Callable[[Sequence[int]], int]) -> Formats:
        """The formats of the method with the most, or the fewest, bits."""
        formats = self.method.formats
        weights, activations = end(self.weight_bits), end(self.activation_bits)
        return replace(
            formats,
            weights=with_bits(formats.weights, weights),
            activations=with_bits(formats.activations, activations),
            probabilities=with_bits(formats.probabilities, activations),
        )

    def _method_with(self, end: Callable[[Sequence[int]], int]) -> QuantizationCallback:
        method = copy(self.method)
        method.formats = self._formats(end)
        return method

    def _allowed(self, slot: Slot) -> Sequence[int]:
        if slot in self._fixed:
            return [self._fixed[slot]]
        return self.weight_bits if slot.is_weight else self.activation_bits

    def _same_on_all_ranks(self, batches: Sequence[Any]) -> Sequence[Any]:
        """All samples as one batch, so that any number of ranks measures the same; as they are if they do not merge."""
        try:
            return batches if self._batches is None else [self._batches.merged()]
        except ValueError:
            return batches

    def _choose(self, model: nn.Module, allocation: Allocation, build: Callable[[Point], None]) -> Choice:
        drops = [budget for budget in self.budgets if budget.is_measured]
        others = [budget for budget in self.budgets if not budget.is_measured]
        if not drops:
            point = allocation.solve(self.search, others)
            build(point)
            return Choice(allocation.bits(point), point, allocation)
        assert self._monitor is not None
        point, trials = within_drop(
            allocation, self.search, drops, others, self.trials, self._monitor, build, partial(self.as_deployed, model)
        )
        return Choice(allocation.bits(point), point, allocation, trials, self._monitor.name, self._monitor.exact)


def _ascending(bits: Sequence[int], argument: str) -> list[int]:
    found = sorted(set(bits))
    if not found or found[0] < 2 or found[-1] > 8:
        raise ValueError(f"{argument}={list(bits)}: numbers of bits are 2 to 8")
    return found
