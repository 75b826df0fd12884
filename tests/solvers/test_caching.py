"""Refresh steps and corrections of cached features, against brute force and against torch's least squares."""

from itertools import combinations, pairwise

import pytest
import torch

from lightning_quant.solvers import FeaturePairs, cheapest_groups


def features(steps=9, channels=3, seed=0):
    """A walk that moves fast in the middle: (steps, 2, channels, 4, 5)."""
    generator = torch.Generator().manual_seed(seed)
    speed = torch.exp(-((torch.arange(steps) - steps / 2) ** 2) / 4).view(-1, 1, 1, 1, 1)
    return (torch.randn(steps, 2, channels, 4, 5, generator=generator) * speed).cumsum(0) + 1


def watched(x, window=4):
    pairs = FeaturePairs(len(x), window)
    for step, feature in enumerate(x):
        pairs.add(step, feature)
    return pairs


def costs(x, schedule):
    """The slow, obvious sum of what each step is away from the feature it is given."""
    ends = [*schedule, len(x)]
    return sum(float((x[t] - x[i]).abs().sum()) for i, j in pairwise(ends) for t in range(i, j))


@pytest.mark.parametrize("steps", [7, 9, 11])
@pytest.mark.parametrize("interval", [2, 3, 4])
def test_the_schedule_is_the_best_of_all(steps, interval):
    x = features(steps, seed=steps)
    pairs = watched(x, 2 * interval)
    found = pairs.schedule(interval)
    groups = -(-steps // interval)
    shortest = min((interval + 1) // 2, steps // groups)
    every = [
        [0, *rest]
        for rest in combinations(range(1, steps), groups - 1)
        if all(shortest <= b - a <= 2 * interval for a, b in pairwise([0, *rest, steps]))
    ]
    assert found in every and len(found) == groups
    assert costs(x, found) == pytest.approx(min(costs(x, schedule) for schedule in every), rel=1e-5)
    assert (
        costs(x, found) <= costs(x, list(range(0, steps, interval))) + 1e-3
        or list(range(0, steps, interval)) not in every
    )


@pytest.mark.parametrize(("steps", "interval"), [(12, 4), (11, 3), (7, 2), (9, 4)])
def test_differences_count_by_what_the_samples_lose(steps, interval):
    x = features(steps, seed=steps)
    pairs, lost = watched(x, 2 * interval), torch.rand(steps, generator=torch.Generator().manual_seed(1)) ** 2
    weights, starts = torch.zeros(steps), range(0, steps, interval)
    for first in starts:
        cost = costs(x[first : first + interval], [0])
        weights[first : first + interval] = float(lost[first]) ** 0.5 / cost if cost else weights[first - 1]

    def weighed(schedule):
        return sum(
            float(weights[t] * (x[t] - x[i]).abs().sum()) for i, j in pairwise([*schedule, steps]) for t in range(i, j)
        )

    groups = -(-steps // interval)
    shortest, longest = min(-(-3 * interval // 4), steps // groups), -(-3 * interval // 2)
    every = [
        [0, *rest]
        for rest in combinations(range(1, steps), groups - 1)
        if all(shortest <= b - a <= longest for a, b in pairwise([0, *rest, steps]))
    ]
    found = pairs.schedule(interval, lost)
    assert found in every and weighed(found) == pytest.approx(min(map(weighed, every)), rel=1e-5)


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="7 steps cannot be cut into 2 groups of 1 to 3"):
        cheapest_groups(lambda i, j: 0.0, 7, 2, 1, 3)


@pytest.mark.parametrize("tokens", [False, True], ids=["image", "tokens"])
def test_the_correction_is_the_least_squares_line_of_each_channel(tokens):
    x = features()
    seen = x.flatten(3).transpose(2, 3) if tokens else x
    scale, shift = watched(seen).correction(2, 4)
    for channel in range(3):
        given, wanted = (x[step][:, channel].flatten().double() for step in (2, 4))
        line = torch.linalg.lstsq(torch.stack([given, torch.ones_like(given)], 1), wanted[:, None]).solution
        torch.testing.assert_close(torch.stack([scale[channel], shift[channel]]), line[:, 0])
        residual = scale[channel] * given + shift[channel] - wanted
        assert abs(float(residual.mean())) < 1e-6
        assert residual.square().sum() <= (given - wanted).square().sum()


def test_a_step_needs_no_correction_by_itself():
    scale, shift = watched(features()).correction(3, 3)
    torch.testing.assert_close(scale, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(shift, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_channel_that_never_changes_is_only_shifted():
    x = features()
    x[:, :, 1] = 2.5
    x[4, :, 1] = 3.0
    scale, shift = watched(x).correction(2, 4)
    assert scale.isfinite().all() and scale[1] == 1 and shift[1] == pytest.approx(0.5)


def test_batches_and_ranks_add_up():
    x = features()
    whole = watched(x)
    parts = FeaturePairs(len(x), 4)
    for half in x.split(1, dim=1):
        for step, feature in enumerate(half):
            parts.add(step, feature)
    ranks = [watched(half) for half in x.split(1, dim=1)]
    ranks[0].merge(ranks[1].state())
    for other in (parts, ranks[0]):
        torch.testing.assert_close(other.distances, whole.distances)
        assert all(torch.allclose(other.sums[pair], whole.sums[pair]) for pair in whole.sums)


def test_memory_is_that_of_the_window():
    pairs = watched(features(30), window=4)
    assert len(pairs._recent) == 4 and max(b - a for a, b in pairs.sums) == 3
