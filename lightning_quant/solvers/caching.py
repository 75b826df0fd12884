"""When to refresh a cached feature, and how to correct it in between: dynamic programming and least squares."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_quant.layers.cached import channel_axis


def cheapest_groups(
    cost: Callable[[int, int], float], steps: int, groups: int, shortest: int, longest: int
) -> list[int]:
    r"""Cut steps into groups that follow each other, so that the costs of the groups add up to the least.

    .. math:: L(n, k) = \min_{j} \, L(j, k - 1) + D(j, n), \qquad m \le n - j \le M

    Args:
        cost: D(i, j), the cost of the group of the steps i to j - 1.
        steps: how many there are.
        groups: how many groups.
        shortest: m, the length of a group at least.
        longest: M, the length of a group at most.

    Returns:
        the first step of each group.

    Raises:
        ValueError: if there are no such groups.

    >>> cheapest_groups(lambda i, j: (j - i) ** 2, steps=6, groups=3, shortest=1, longest=6)
    [0, 2, 4]
    """
    if not groups * shortest <= steps <= groups * longest:
        raise ValueError(f"{steps} steps cannot be cut into {groups} groups of {shortest} to {longest}")
    best = [[math.inf] * (steps + 1) for _ in range(groups + 1)]
    start = [[0] * (steps + 1) for _ in range(groups + 1)]
    best[0][0] = 0.0
    for k in range(1, groups + 1):
        for n in range(k * shortest, min(k * longest, steps) + 1):
            for j in range(max(0, n - longest), n - shortest + 1):
                if best[k - 1][j] < math.inf and best[k - 1][j] + (together := cost(j, n)) < best[k][n]:
                    best[k][n], start[k][n] = best[k - 1][j] + together, j
    firsts, n = [], steps
    for k in range(groups, 0, -1):
        n = start[k][n]
        firsts.append(n)
    return firsts[::-1]


class FeaturePairs:
    r"""How the features of nearby steps are related, over many trajectories: distances and moments of each channel.

    Memory is ``window`` features of one batch in float64, and a few numbers for each channel and each pair of steps at
    most ``window`` apart.

    Args:
        steps: of a trajectory.
        window: how many steps a feature may be used for.
    """

    def __init__(self, steps: int, window: int) -> None:
        self.steps, self.window = steps, window
        self.distances = torch.zeros(steps, steps, dtype=torch.float64)
        self.sums: dict[tuple[int, int], Tensor] = {}  # (5, channels): count, x, y, xx, xy
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=window)

    def add(self, step: int, feature: Tensor) -> None:
        """Take in the feature of one step of a batch of trajectories; the first step begins new ones."""
        if step == 0:
            self._recent.clear()
        now = by_channel(feature)
        self._recent.append((step, now))
        for before, kept in self._recent:
            self.distances[before, step] += float((now - kept).abs_().sum())
            sums, pair = line_sums(kept, now), (before, step)
            self.sums[pair] = self.sums[pair] + sums if pair in self.sums else sums

    def state(self) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """What was seen, for other ranks."""
        return self.distances, self.sums

    def merge(self, state: tuple[Tensor, dict[tuple[int, int], Tensor]]) -> None:
        """Take in what another rank has seen."""
        self.distances = self.distances + state[0].to(self.distances)
        for pair, sums in state[1].items():
            self.sums[pair] = self.sums[pair] + sums if pair in self.sums else sums

    def cost(self, first: int, end: int) -> float:
        """What it costs to use the feature of the first step until before the end: the sum of absolute differences."""
        return float(self.distances[first, first:end].sum())

    def schedule(self, interval: int, lost: Tensor | None = None) -> list[int]:
        r"""The steps to refresh at, as many as every ``interval``-th, that cost the least.

        Groups have at least half and at most twice as many steps as the interval; where differences are weighted, three
        quarters and one and a half times as many, as such a weight says little of groups of quite another length.

        Args:
            interval: refresh at so many-th of the steps in the mean.
            lost: what the final samples lose, in squares, if one group of ``interval`` steps is served the feature of
                its first one, by that step. A difference is then weighted by :math:`w_t = \sqrt{L_t} / D_t`, where D
                is the cost of the group that t is in.
        """
        groups = -(-self.steps // interval)
        shares = (0.5, 2.0) if lost is None else (0.75, 1.5)
        shortest, longest = (math.ceil(share * interval) for share in shares)
        shortest = min(shortest, self.steps // groups)
        differences = self.distances if lost is None else self.distances * self._weights(interval, lost)
        return cheapest_groups(lambda i, j: float(differences[i, i:j].sum()), self.steps, groups, shortest, longest)

    def _weights(self, interval: int, lost: Tensor) -> Tensor:
        weights = torch.ones(self.steps, dtype=torch.float64)
        for first in range(0, self.steps, interval):
            end = min(first + interval, self.steps)
            if (cost := self.cost(first, end)) > 0:
                weights[first:end] = float(lost[first]) ** 0.5 / cost
            elif first:  # a group of one step
                weights[first:end] = weights[first - 1]
        return weights

    def correction(self, before: int, step: int) -> tuple[Tensor, Tensor]:
        """The factor and the addend of each channel that bring a kept feature nearest to that of a step."""
        return line_of(self.sums[before, step])

    def corrections(self, refresh: Sequence[int], pays: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Tables of these for all steps (steps, channels); a step that refreshes needs none.

        Args:
            refresh: the steps that do.
            pays: for each of them, by its number, whether the steps that use its feature are corrected; default: all.
        """
        last, lines = 0, []
        for step in range(self.steps):
            last = step if step in refresh else last
            scale, shift = self.correction(last, step)
            corrected = step != last and (pays is None or pays[last])
            lines.append((scale, shift) if corrected else (torch.ones_like(scale), torch.zeros_like(shift)))
        scales, shifts = (torch.stack(table).float().cpu() for table in zip(*lines, strict=True))
        return scales, shifts


def line_sums(x: Tensor, y: Tensor) -> Tensor:
    """What :func:`line_of` needs of two tensors (channels, elements): (5, channels); batches and ranks add up."""
    count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64, device=x.device)
    return torch.stack([count, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)])


def line_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    r"""The factor and the addend that bring x nearest to y, by least squares in each channel.

    .. math:: a = \mathrm{Cov}(x, y) / \mathrm{Var}(x), \qquad b = \bar y - a \bar x

    A channel in which x never changes is only shifted.

    >>> x = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    >>> [round(float(part), 6) for part in line_of(line_sums(x, 3 * x + 1))]
    [3.0, 1.0]
    """
    count, x, y, xx, xy = sums
    variance, covariance = xx / count - (x / count) ** 2, xy / count - x * y / count**2
    flat = variance <= 1e-12 * (xx / count)
    scale = torch.where(flat, 1.0, covariance / torch.where(flat, 1.0, variance))
    return scale, y / count - scale * x / count


def by_channel(feature: Tensor) -> Tensor:
    """A feature as (channels, everything else), in float64."""
    return feature.movedim(channel_axis(feature), 0).flatten(1).double()
