"""Mixed precision as a search problem: products with their options, losses and costs, and budgets as limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_quant.solvers.bits import SEARCHES, Decision, Infeasible, Point, hull, non_dominated
from lightning_quant.solvers.budgets import Budget
from lightning_quant.solvers.products import Option, Product, Slot, bits_of

__all__ = ["Allocation"]

Losses = Callable[[Product, Option], float]


@dataclass
class Allocation:
    """What there is to choose, and the points that a search finds.

    Args:
        products: what is multiplied.
        options: the pairs of bits of each product.
        decisions: their losses and costs, in the same order, and a last one with a single option for all that is
            stored beside the codes.
    """

    products: Sequence[Product]
    options: Sequence[Sequence[Option]]
    decisions: Sequence[Decision]

    @classmethod
    def of(
        cls,
        products: Sequence[Product],
        options: Sequence[Sequence[Option]],
        costs: Sequence[Mapping[str, Sequence[float]]],
        losses: Losses,
        rest: float = 0.0,
    ) -> Allocation:
        """Put losses to options with known costs.

        Args:
            products: what is multiplied.
            options: of each product.
            costs: of each product, as :func:`~lightning_quant.solvers.cost_table` gives them.
            losses: what a product loses with an option.
            rest: bytes that are stored whatever is chosen.
        """
        decisions = [
            Decision.of([losses(product, option) for option in choices], table)
            for product, choices, table in zip(products, options, costs, strict=True)
        ]
        beside = {name: [rest if name == "bytes" else 0.0] for name in costs[0]} if costs else {}
        return cls(products, options, [*decisions, Decision.of([0.0], beside)])

    def solve(self, search: str, budgets: Sequence[Budget]) -> Point:
        """The best point within the budgets.

        Raises:
            ValueError: if there is none.
        """
        limits: dict[str, float] = {}
        for budget in budgets:
            for name, limit in self.limits(budget).items():
                limits[name] = min(limit, limits.get(name, limit))
        try:
            return SEARCHES[search](self.decisions, limits)
        except Infeasible as error:
            written = " and ".join(repr(budget.text) for budget in budgets)
            raise ValueError(
                f"budget={written} cannot be met: even the fewest bits that are allowed come to {error.least:.4g} "
                f"{error.cost}, above {error.limit:.4g}; raise the budget, or allow fewer bits by weight_bits= and "
                f"activation_bits="
            ) from None

    def limits(self, budget: Budget) -> dict[str, float]:
        """What a budget allows of each cost.

        "4bit" is what uniform 4 bits cost: as many bits in the mean of all weights, in the mean of all activations,
        and as many bit operations.
        """
        if budget.kind != "bits":
            if budget.kind not in self.decisions[0].costs:
                raise ValueError(f"budget={budget.text!r}: nobody measures {budget.kind} here")
            return {budget.kind: budget.amount}
        kinds = {slot.is_weight for product in self.products for slot in (*product.left, *product.right)}
        names = {True: "weight bits", False: "activation bits"}
        limits = {names[kind]: budget.amount for kind in sorted(kinds)}
        if len(kinds) == 2:
            limits["BitOps"] = sum(product.macs for product in self.products) * budget.amount**2
        return limits

    def bits(self, point: Point) -> dict[Slot, int]:
        """The bits of every slot at a point."""
        found: dict[Slot, int] = {}
        for product, options, index in zip(self.products, self.options, point.chosen, strict=False):
            found |= bits_of(product, options[index])
        return found

    def range_of_bits(self) -> tuple[float, float]:
        """The fewest and the most mean bits there can be, in weights or activations, whichever has more."""
        names = [name for name in ("weight bits", "activation bits") if name in self.decisions[0].costs]
        sums = [[sum(float(end(d.costs[name])) for d in self.decisions) for name in names] for end in (min, max)]
        return max(sums[0]), max(sums[1])

    def uniform(self, bits: int) -> Point:
        """All products as near to a number of bits as they can be."""

        def distance(option: Option) -> int:
            return sum(abs(number - bits) for number in option if number is not None)

        chosen = [min(range(len(some)), key=lambda i, some=some: distance(some[i])) for some in self.options]  # type: ignore[misc]
        return Point.of(self.decisions, [*chosen, 0])

    def front(self, cost: str) -> list[Point]:
        """The points that are best for their cost, along the convex hull."""
        largest = sum(float(decision.costs[cost].max()) for decision in self.decisions)
        return non_dominated(hull(self.decisions, {cost: largest or 1.0}), cost)
