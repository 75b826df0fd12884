"""From a calibrated model to the bits of its tensors: measure, search, and try what only a run can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.calibration import first_samples, merge_across_ranks, sample_count, undisturbed
from lightning_quant.callbacks.kernel_latency import KernelLatency
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan
from lightning_quant.quantizers import RangeRule
from lightning_quant.reports import float_metrics, model_sizes, own_metrics
from lightning_quant.solvers import Allocation, Budget, Point, sensitivities
from lightning_quant.solvers.products import (
    Option,
    Product,
    Shapes,
    Slot,
    bits_of,
    cost_table,
    options_of,
    products,
    quantizers_of,
)
from lightning_quant.solvers.sensitivity import as_others, narrowed

SMALLEST_LOSS = 1e-6  # a measured gain is noise, and must not be sought


@dataclass
class Choice:
    """What was chosen, and among what.

    Args:
        bits: of every tensor.
        point: where that lies.
        allocation: what there was to choose from.
        trials: mean bits that were tried, and the metric that was measured.
        monitor: name of the metric.
        exact: its value for the float model.
    """

    bits: dict[Slot, int]
    point: Point
    allocation: Allocation
    trials: list[tuple[float, float]] = field(default_factory=list)
    monitor: str | None = None
    exact: float | None = None

    def __str__(self) -> str:
        """What it comes to."""
        costs = {**self.point.costs}
        costs["MB"], costs["GBitOps"] = costs.pop("bytes") / 1e6, costs.pop("BitOps") / 1e9
        return ", ".join(f"{value:.3g} {name}" for name, value in costs.items() if value)


class Monitor:
    """A metric of the user's own, as ``trainer.validate`` reports it.

    Args:
        trainer: in ``validate``.
        pl_module: the model, which is float as yet.
        name: of the metric; ``None``: the only one there is.
        mode: ``"max"`` if larger values are better, ``"min"`` if smaller ones are.

    Raises:
        ValueError: if no such metric is logged.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, name: str | None, mode: str) -> None:
        self.trainer, self.pl_module, self.mode = trainer, pl_module, mode
        found = float_metrics(trainer, pl_module)
        if name is None and len(found) == 1:
            (name,) = found
        if name not in found:
            logged = ", ".join(map(repr, found)) or "nothing"
            told = "is not logged" if name else "has to be named"
            raise ValueError(
                f"monitor={name!r}: the metric {told}; validation_step of {type(pl_module).__name__} logs {logged}"
            )
        self.name = name
        self.exact = self._same_on_all_ranks(found)

    def value(self) -> float:
        """Of the model as it is now."""
        return self._same_on_all_ranks(own_metrics(self.trainer, self.pl_module))

    def loss(self, value: float) -> float:
        """Lower is better."""
        return -value if self.mode == "max" else value

    def _same_on_all_ranks(self, found: Mapping[str, float]) -> float:
        values = merge_across_ranks(found[self.name])
        return sum(values) / len(values)


def measure(
    model: nn.Module,
    plan: Plan,
    graph: ModelGraph,
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    allowed: Callable[[Slot], Sequence[int]],
    sensitivity: str,
    rule: RangeRule,
    monitor: Monitor | None = None,
    timed: bool = False,
) -> Allocation:
    """What there is to choose in a model that is calibrated with as many bits as there may be.

    Args:
        model: the calibrated model; it is left as it is.
        plan: what was done to it.
        graph: what one forward told about it.
        batches: calibration batches.
        run: feeds one batch forward.
        allowed: the numbers of bits that a slot may have.
        sensitivity: the producer of the losses; ``"metric"`` asks the monitor.
        rule: how ranges are found.
        monitor: the metric of the user's own.
        timed: whether milliseconds are measured too.
    """
    quantizers = quantizers_of(plan, model)
    bits = {slot: allowed(slot) for slot in quantizers}
    sample = first_samples(batches[0], 2)  # as many as the graph was traced with
    others, shapes = narrowed(quantizers, bits, rule, lambda: run(sample))
    seen = Shapes(shapes, sample_count(sample))
    found = products(plan, graph, seen)
    options = [options_of(product, bits) for product in found]
    if sensitivity == "metric":
        assert monitor is not None
        options = [[option for option in some if _is_even(option, some)] for some in options]
        measured = _by_metric(found, options, quantizers, others, monitor)

        def losses(product: Product, option: Option) -> float:
            return measured[product.name, option]

    else:
        with undisturbed(model, grad=True):
            table = sensitivities(sensitivity, quantizers, others, batches, run)
        tables = merge_across_ranks(table)

        def losses(product: Product, option: Option) -> float:
            by_slot = bits_of(product, option).items()
            return sum(one[slot][number] for one in tables for slot, number in by_slot) / len(tables)

    costs = cost_table(found, options, seen, KernelLatency(model, plan, seen) if timed else None)
    widest = sum(table["bytes"][-1] for table in costs)  # options ascend
    return Allocation.of(found, options, costs, losses, model_sizes(model).after - widest)


def within_drop(
    allocation: Allocation,
    search: str,
    drops: Sequence[Budget],
    others: Sequence[Budget],
    trials: int,
    monitor: Monitor,
    build: Callable[[Point], None],
    as_deployed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Point, list[tuple[float, float]]]:
    """The fewest bits, by bisection, with which the metric is good enough; the model is built so in the end.

    Args:
        allocation: what there is to choose.
        search: how.
        drops: what drop is allowed; of several, the smallest counts.
        others: budgets that hold beside it.
        trials: how often to try.
        monitor: the metric.
        build: quantizes the model anew.
        as_deployed: in which the metric is measured.

    Raises:
        ValueError: if the metric is not good enough with as many bits as there may be.
    """
    budget = min(drops, key=lambda drop: monitor.loss(drop.allowed(monitor.exact, monitor.mode)))
    allowed = budget.allowed(monitor.exact, monitor.mode)
    rank_zero_info(f"{monitor.name} is {monitor.exact:.4g} in float; {budget.text} allows {allowed:.4g}")
    tried: list[tuple[float, float]] = []
    best = built = allocation.solve(search, others)
    low, high = allocation.range_of_bits()
    good = False

    def is_good(point: Point, level: float) -> bool:
        build(point)
        with as_deployed():
            tried.append((level, monitor.value()))
        rank_zero_info(f"  {level:.2f} bits: {monitor.name} {tried[-1][1]:.4g}")
        return monitor.loss(tried[-1][1]) <= monitor.loss(allowed)

    for _ in range(trials):
        level = (low + high) / 2
        try:
            point = allocation.solve(search, [*others, Budget("bits", level, f"{level:.2f}bit")])
        except ValueError:
            low = level
            continue
        built = point
        if is_good(point, level):
            best, high, good = point, level, True
        else:
            low = level
    if not good and not is_good(best, high):
        raise ValueError(
            f"budget={budget.text!r}: {monitor.name} is {monitor.exact:.4g} in float, and {tried[-1][1]:.4g} with as "
            f"many bits as there may be; allow a larger drop, or more bits by weight_bits= and activation_bits="
        )
    if good and built is not best:
        build(best)
    return best, tried


def _is_even(option: Option, options: Sequence[Option]) -> bool:
    """Whether both factors have the same bits, or one of them has no choice."""
    free = [len({option[side] for option in options}) > 1 for side in (0, 1)]
    return not all(free) or option.left == option.right


def _by_metric(
    found: Sequence[Product],
    options: Sequence[Sequence[Option]],
    quantizers: Mapping[Slot, Sequence[Any]],
    others: Mapping[Slot, Mapping[int, Sequence[Any]]],
    monitor: Monitor,
) -> dict[tuple[str, Option], float]:
    """One product narrower, all others as wide as they may be: how much worse the metric gets."""
    base = monitor.loss(monitor.value())
    measured = {}
    for product, choices in zip(found, options, strict=True):
        for option in choices:
            if option == choices[-1]:
                measured[product.name, option] = 0.0
                continue
            slots = bits_of(product, option)
            mine = [q for slot in slots for q in quantizers[slot]]
            tried = [q for slot, number in slots.items() for q in others[slot][number]]
            with as_others(mine, tried):
                measured[product.name, option] = max(monitor.loss(monitor.value()) - base, SMALLEST_LOSS)
    return measured
