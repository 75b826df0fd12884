"""Which numbers of bits: the search among choices with known losses and costs. Knows neither models nor layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SEARCHES", "Decision", "Point", "greedy", "integer_program", "non_dominated", "pareto", "trade_off"]

Array = npt.NDArray[np.float64]
Limits = Mapping[str, float]
SLACK = 1e-9  # sums of the same numbers in another order may differ by rounding


@dataclass(frozen=True)
class Decision:
    """One thing to be decided: exactly one of its options is taken.

    Args:
        losses: what each option loses, (options,).
        costs: what each option costs, by the name of the cost, (options,) each.
    """

    losses: Array
    costs: Mapping[str, Array]

    @classmethod
    def of(cls, losses: Sequence[float], costs: Mapping[str, Sequence[float]]) -> Decision:
        """A decision out of plain numbers."""
        return cls(np.asarray(losses, float), {name: np.asarray(cost, float) for name, cost in costs.items()})


@dataclass(frozen=True)
class Point:
    """One option for every decision, and what they come to.

    Args:
        chosen: index of the option, by decision.
        loss: sum of their losses.
        costs: sums of their costs, by name.
    """

    chosen: tuple[int, ...]
    loss: float
    costs: Mapping[str, float]

    @classmethod
    def of(cls, decisions: Sequence[Decision], chosen: Sequence[int]) -> Point:
        """Add up what was chosen."""
        picked = list(zip(decisions, map(int, chosen), strict=True))
        names = decisions[0].costs if decisions else {}
        costs = {name: float(sum(decision.costs[name][i] for decision, i in picked)) for name in names}
        return cls(tuple(i for _, i in picked), float(sum(decision.losses[i] for decision, i in picked)), costs)

    def within(self, limits: Limits) -> bool:
        """Whether no cost is above its limit."""
        return all(self.costs[name] <= limit * (1 + SLACK) for name, limit in limits.items())


def integer_program(decisions: Sequence[Decision], limits: Limits) -> Point:
    r"""The options of least loss within all limits, exactly, by the branch and cut of HiGHS.

    A minute is the most it takes: then it is the best point found so far.

    .. math:: \min_{z \in \{0, 1\}} \sum_{d, o} L_{do} z_{do} \quad \text{with} \quad \sum_o z_{do} = 1, \quad
              \sum_{d, o} C^k_{do} z_{do} \le B^k

    where :math:`L_{do}` is the loss of option o of decision d, :math:`C^k` a cost and :math:`B^k` its limit.

    Args:
        decisions: what is to be decided.
        limits: the most that each cost may come to.

    Raises:
        ValueError: if nothing lies within the limits.

    >>> layer = {"bytes": [1, 2, 4]}
    >>> decisions = [Decision.of([9, 3, 0], layer), Decision.of([2, 1, 0], layer)]
    >>> integer_program(decisions, {"bytes": 5}).chosen
    (2, 0)
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    require_feasible(decisions, limits)
    sizes = [len(decision.losses) for decision in decisions]
    ends = np.cumsum(sizes)
    losses = np.concatenate([decision.losses for decision in decisions])
    one_each = np.zeros((len(decisions), ends[-1]))
    for row, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        one_each[row, end - size : end] = 1
    # Limits of 1: bytes and bit operations differ by ten orders of magnitude.
    rows = [np.concatenate([d.costs[name] for d in decisions]) / limit for name, limit in limits.items()]
    constraints = [LinearConstraint(one_each, 1, 1)]
    if rows:
        constraints.append(LinearConstraint(np.stack(rows), -np.inf, 1 + SLACK))
    largest = float(np.abs(losses).max()) or 1.0
    found = milp(
        losses / largest, integrality=np.ones(len(losses)), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 1e-7, "time_limit": 60},
    )  # fmt: skip
    if found.x is None:
        raise ValueError(f"the integer program found no choice of bits within {_listed(limits)}: {found.message}")
    return Point.of(decisions, [int(part.argmax()) for part in np.split(found.x, ends[:-1])])


def pareto(decisions: Sequence[Decision], limits: Limits) -> Point:
    r"""The point of least loss within the limits on the convex hull of all points.

    :math:`\mu` is swept in :math:`o_d = \arg\min_o L_{do} + \mu \, C_{do}`, where the cost C is the mean of all costs,
    each as part of its limit. It equals the integer program up to the gaps of the hull.

    Raises:
        ValueError: if nothing on the hull lies within the limits.
    """
    require_feasible(decisions, limits)
    points = [point for point in hull(decisions, limits) if point.within(limits)]
    return min(points, key=lambda point: point.loss) if points else greedy(decisions, limits)


def greedy(decisions: Sequence[Decision], limits: Limits) -> Point:
    """Begin where least is lost, and give way where it hurts least for what it saves, until all is within limits.

    A step raises no cost, so that there is an end.

    Raises:
        ValueError: if nothing lies within the limits.
    """
    require_feasible(decisions, limits)
    chosen = [int(np.lexsort((_total(d, limits), d.losses))[0]) for d in decisions]
    while not (point := Point.of(decisions, chosen)).within(limits):
        over = [name for name, limit in limits.items() if point.costs[name] > limit * (1 + SLACK)]
        steps = []
        for index, decision in enumerate(decisions):
            saved = sum((decision.costs[name][chosen[index]] - decision.costs[name]) / limits[name] for name in over)
            lost = decision.losses - decision.losses[chosen[index]]
            raised = np.any([cost > cost[chosen[index]] for cost in decision.costs.values()], axis=0)
            steps += [(lost[o] / saved[o], index, o) for o in np.flatnonzero((saved > 0) & ~raised)]
        if not steps:
            raise ValueError(f"the greedy search found no choice of bits within {_listed(limits)}")
        _, index, option = min(steps)
        chosen[index] = int(option)
    return point


def trade_off(
    decisions: Sequence[Decision], limits: Limits, costs: Sequence[str] = ("bytes", "BitOps"), keep: int = 300
) -> Point:
    r"""The knee of loss and costs among the points that :func:`grown` finds (HTQ).

    Loss and costs are normalised to :math:`[0, 1]` over these points, and the one nearest to the origin is taken.

    Args:
        decisions: what is to be decided.
        limits: the most that each cost may come to; without any the knee alone decides.
        costs: the costs that are traded against the loss.
        keep: how many points go on at most by each cost.

    Raises:
        ValueError: if nothing lies within the limits.
    """
    points = grown(decisions, limits, costs, keep)
    axes = np.array([[point.loss, *(point.costs[name] for name in costs)] for point in points])  # (points, axes)
    spans = np.ptp(axes, axis=0)
    distances = (((axes - axes.min(0)) / np.where(spans == 0, 1, spans)) ** 2).sum(1)
    return points[int(distances.argmin())]


def grown(
    decisions: Sequence[Decision], limits: Limits, costs: Sequence[str] = ("bytes", "BitOps"), keep: int = 300
) -> list[Point]:
    """Grow the choices decision by decision, and keep those that are good for any one cost.

    After each decision, the points are sorted by one cost, and a point is kept if no point that stands a twentieth of
    the list before it loses less; the same by every other cost, and the union goes on.

    Raises:
        ValueError: if nothing lies within the limits.
    """
    require_feasible(decisions, limits)
    loss, sums = np.zeros(1), {name: np.zeros(1) for name in decisions[0].costs}
    chosen = np.zeros((1, 0), dtype=np.int64)
    # What is over a limit even if everything to come were as cheap as can be leads nowhere.
    least = {name: sum(float(decision.costs[name].min()) for decision in decisions) for name in limits}
    for decision in decisions:
        parents = np.repeat(np.arange(len(loss)), len(decision.losses))
        options = np.tile(np.arange(len(decision.losses)), len(loss))
        loss = loss[parents] + decision.losses[options]
        sums = {name: total[parents] + decision.costs[name][options] for name, total in sums.items()}
        chosen = np.column_stack([chosen[parents], options])
        alive = np.ones(len(loss), dtype=bool)
        for name, limit in limits.items():
            least[name] -= float(decision.costs[name].min())
            alive &= sums[name] + least[name] <= limit * (1 + SLACK)
        kept = np.unique(np.concatenate([_nearly_best(np.flatnonzero(alive), sums[n], loss, keep) for n in costs]))
        if len(kept) == 0:
            raise ValueError(f"growing the choices of bits left none within {_listed(limits)}")
        loss, sums, chosen = loss[kept], {name: total[kept] for name, total in sums.items()}, chosen[kept]
    return [Point.of(decisions, row.tolist()) for row in chosen]


SEARCHES: dict[str, Callable[[Sequence[Decision], Limits], Point]] = {
    "integer_program": integer_program,
    "pareto": pareto,
    "greedy": greedy,
    "trade_off": trade_off,
}


def hull(decisions: Sequence[Decision], limits: Limits) -> list[Point]:
    """The points on the convex hull of loss and mean cost, the cheapest first.

    >>> decisions = [Decision.of([4, 1, 0], {"bytes": [1, 2, 3]})] * 2
    >>> [(point.costs["bytes"], point.loss) for point in hull(decisions, {"bytes": 4})]
    [(2.0, 8.0), (4.0, 2.0), (6.0, 0.0)]
    """
    totals = [_total(decision, limits) for decision in decisions]
    slopes = sorted({s for d, total in zip(decisions, totals, strict=True) for s in _slopes(d.losses, total)})
    points: dict[tuple[int, ...], Point] = {}
    for mu in [*(s * (1 + 1e-12) for s in reversed(slopes)), 0.0]:  # just beyond a slope it is no longer a tie
        chosen = [
            int(np.lexsort((total, d.losses + mu * total))[0]) for d, total in zip(decisions, totals, strict=True)
        ]
        points.setdefault(tuple(chosen), Point.of(decisions, chosen))
    return list(points.values())


def non_dominated(points: Sequence[Point], cost: str) -> list[Point]:
    """The points that no other one beats in both loss and cost, the cheapest first."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda point: (point.costs[cost], point.loss)):
        if point.loss < best:
            best = point.loss
            kept.append(point)
    return kept


def require_feasible(decisions: Sequence[Decision], limits: Limits) -> None:
    """Refuse limits below what the cheapest options come to.

    Raises:
        ValueError: naming the cost, its limit and the least there is.
    """
    if not decisions:
        raise ValueError("there is nothing to decide: no layer has a choice of bits")
    for name, limit in limits.items():
        least = float(sum(decision.costs[name].min() for decision in decisions))
        if least > limit * (1 + SLACK):
            raise Infeasible(name, limit, least)


class Infeasible(ValueError):
    """A limit that even the cheapest options do not meet."""

    def __init__(self, cost: str, limit: float, least: float) -> None:
        super().__init__(f"{cost} cannot be at most {limit:g}: the cheapest choice has {least:g}")
        self.cost, self.limit, self.least = cost, limit, least


def _total(decision: Decision, limits: Limits) -> Array:
    """All costs as one: each as part of its limit; without limits, as part of its mean."""
    scales = limits or {name: max(float(cost.mean()), 1e-30) for name, cost in decision.costs.items()}
    return np.asarray(sum(decision.costs[name] / scale for name, scale in scales.items()) / len(scales))


def _slopes(losses: Array, costs: Array) -> list[float]:
    """What a unit of cost saves in loss along the lower convex hull of one decision."""
    order = np.lexsort((losses, costs))
    slopes: list[float] = []
    current = order[0]
    while True:
        ahead = [o for o in order if costs[o] > costs[current] and losses[o] < losses[current]]
        if not ahead:
            return slopes
        steepest = max(ahead, key=lambda o: ((losses[current] - losses[o]) / (costs[o] - costs[current]), costs[o]))
        slopes.append(float((losses[current] - losses[steepest]) / (costs[steepest] - costs[current])))
        current = steepest


def _nearly_best(alive: npt.NDArray[np.int64], cost: Array, loss: Array, keep: int) -> npt.NDArray[np.int64]:
    """The points that are no worse than the best of those that are clearly cheaper; every n-th of too many."""
    order = alive[np.lexsort((loss[alive], cost[alive]))]
    kept: list[int] = []
    best: list[float] = []  # of the first k kept ones
    for index in order:
        before = len(kept) - len(kept) // 20
        if before == 0 or loss[index] <= best[before - 1]:
            kept.append(int(index))
            best.append(min(loss[index], best[-1]) if best else float(loss[index]))
    picked = np.linspace(0, max(0, len(kept) - 1), min(keep, len(kept))).round().astype(np.int64)
    return np.asarray(kept, dtype=np.int64)[np.unique(picked)]


def _listed(limits: Limits) -> str:
    return ", ".join(f"{name} <= {limit:g}" for name, limit in limits.items())
