"""The searches: the integer program is brute force, the others stay within the limits and near it."""

import itertools

import numpy as np
import pytest

from lightning_quant.solvers import Budget, Decision, Point, greedy, integer_program, pareto, trade_off
from lightning_quant.solvers.bits import SEARCHES, grown, hull, non_dominated


def table(seed, decisions=5, bits=(2, 3, 4, 8)):
    """Losses that fall with the bits, and two costs that rise with them."""
    random = np.random.default_rng(seed)
    found = []
    for size, loss, macs in random.uniform(0.1, 1.0, (decisions, 3)):
        noise = random.uniform(0.8, 1.25, len(bits))
        found.append(
            Decision.of(
                [loss * 4.0**-b * n for b, n in zip(bits, noise, strict=True)],
                {"bytes": [size * b for b in bits], "BitOps": [macs * b * b for b in bits]},
            )
        )
    return found


def brute_force(decisions, limits):
    """Every combination there is."""
    points = (Point.of(decisions, chosen) for chosen in itertools.product(*(range(len(d.losses)) for d in decisions)))
    return min((point for point in points if point.within(limits)), key=lambda point: point.loss)


def limits(decisions, part):
    ends = {name: [sum(end(d.costs[name]) for d in decisions) for end in (min, max)] for name in decisions[0].costs}
    return {name: low + part * (high - low) for name, (low, high) in ends.items()}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("part", [0.1, 0.35, 0.8])
def test_the_integer_program_is_brute_force(seed, part):
    decisions = table(seed)
    within = limits(decisions, part)
    found, exact = integer_program(decisions, within), brute_force(decisions, within)
    assert found.within(within) and found.loss == pytest.approx(exact.loss, rel=1e-6)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(5))
def test_every_search_stays_within_the_limits_and_none_beats_the_program(search, seed):
    decisions = table(seed)
    within = limits(decisions, 0.4)
    found = SEARCHES[search](decisions, within)
    assert found.within(within) and found.loss >= integer_program(decisions, within).loss * (1 - 1e-9)
    assert found == Point.of(decisions, found.chosen)


@pytest.mark.parametrize("search", SEARCHES)
def test_limits_that_cannot_be_met_are_refused_with_the_least_there_is(search):
    decisions = table(0)
    least = sum(d.costs["bytes"].min() for d in decisions)
    with pytest.raises(ValueError, match=f"bytes cannot be at most .*: the cheapest choice has {least:g}"):
        SEARCHES[search](decisions, {"bytes": 0.9 * least})


@pytest.mark.parametrize("search", [integer_program, pareto, greedy])
def test_without_need_nothing_is_lost(search):
    decisions = table(1)
    roomy = limits(decisions, 1.0)
    assert search(decisions, roomy).loss == pytest.approx(sum(d.losses.min() for d in decisions))


def test_equal_layers_get_equal_bits():
    layer = Decision.of([4.0**-b for b in (2, 4, 8)], {"bytes": [2, 4, 8]})
    assert integer_program([layer] * 6, {"bytes": 24}).chosen == (1,) * 6


@pytest.mark.parametrize("seed", range(5))
def test_the_hull_is_the_hull_and_its_points_do_not_beat_each_other(seed):
    decisions = table(seed, decisions=4)
    every = itertools.product(*(range(len(d.losses)) for d in decisions))
    points = [Point.of(decisions, chosen) for chosen in every]
    front = hull(decisions, {"bytes": 1.0})
    assert non_dominated(front, "bytes") == front
    for price in np.geomspace(1e-6, 1e2, 60):  # a point of the hull is best for some price
        best = min(point.loss + price * point.costs["bytes"] for point in points)
        assert min(point.loss + price * point.costs["bytes"] for point in front) == pytest.approx(best)


def test_points_that_are_grown_layer_by_layer_hold_the_true_fronts():
    random = np.random.default_rng(3)
    pairs = [(w, a) for w in (2, 4, 8) for a in (4, 8)]
    decisions = [
        Decision.of(
            [loss * 4.0**-w + other * 4.0**-a for w, a in pairs],
            {"bytes": [size * w for w, a in pairs], "BitOps": [macs * w * a for w, a in pairs]},
        )
        for size, macs, loss, other in random.uniform(0.1, 1.0, (4, 4))
    ]
    points = [Point.of(decisions, chosen) for chosen in itertools.product(range(6), repeat=4)]
    for cost in ("bytes", "BitOps"):
        assert non_dominated(grown(decisions, {}), cost) == non_dominated(points, cost)


def test_the_knee_is_nearest_to_the_best_of_everything():
    decisions = [Decision.of([100.0, 1.0, 0.0], {"bytes": [1, 2, 10], "BitOps": [1, 2, 10]})]
    assert trade_off(decisions, {}).chosen == (1,)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("4.0bit", "bits", 4.0),
        ("3 bits", "bits", 3.0),
        ("6MB", "bytes", 6e6),
        ("512 kB", "bytes", 512e3),
        ("20GBitOps", "BitOps", 20e9),
        ("8ms", "milliseconds", 8.0),
        ("drop<=0.5", "drop", 0.5),
        ("drop <= 2%", "relative drop", 2.0),
    ],
)
def test_budgets_are_read(text, kind, amount):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, pytest.approx(amount))


@pytest.mark.parametrize("text", ["", "4", "4 apples", "drop<0.5", "1.2.3bit", "-4bit", "MB"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match=r'valid examples: "4\.0bit"'):
        Budget.parse(text)


def test_a_point_is_a_hundredth_of_a_share_and_a_unit_of_anything_else():
    assert Budget.parse("drop<=1.0").allowed(0.804, "max") == pytest.approx(0.794)
    assert Budget.parse("drop<=1.0").allowed(80.4, "max") == pytest.approx(79.4)
    assert Budget.parse("drop<=0.5").allowed(3.548, "min") == pytest.approx(4.048)
    assert Budget.parse("drop<=10%").allowed(3.0, "min") == pytest.approx(3.3)
