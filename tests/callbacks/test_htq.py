"""HTQ: a choice without a budget, and within one."""

import pytest

from lightning_quant import HTQ
from lightning_quant.solvers.bits import grown
from tests.models import TinyTransformer, validate


def test_without_a_budget_it_takes_a_knee_that_nothing_beats():
    callback = HTQ()
    validate(TinyTransformer(), callback)
    choice = callback.choice
    others = grown(choice.allocation.decisions, {})
    point = choice.point
    assert not any(
        other.loss < point.loss and all(other.costs[name] < point.costs[name] for name in ("bytes", "BitOps"))
        for other in others
    )
    ends = [choice.allocation.range_of_bits(), (point.costs["weight bits"], point.costs["activation bits"])]
    assert ends[0][0] < max(ends[1]) and min(ends[1]) < ends[0][1]  # neither all narrow nor all wide
    assert all(bits in (2, 4, 8) if slot.is_weight else bits in (4, 8) for slot, bits in choice.bits.items())


@pytest.mark.parametrize("budget", ["7.5kB", "0.4MBitOps"])
def test_a_budget_bounds_it(budget):
    callback = HTQ(budget=budget)
    validate(TinyTransformer(), callback)
    costs = callback.choice.point.costs
    assert costs["bytes"] <= 7500 if budget.endswith("kB") else costs["BitOps"] <= 4e5
