"""Which weights are pruned: against references that look at one weight after another."""

import pytest
import torch

from lightning_quant.quantizers import Pattern
from lightning_quant.solvers import keep_best, wanda_scores


def naive(scores, pattern, compared):
    """Prune one weight at a time: the smallest that is left, the first of equals."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    places = [(i, j) for i in range(len(scores)) for j in range(scores.shape[1])]
    if pattern.group is not None:
        size, pruned = pattern.group, pattern.group - pattern.kept
        groups = [
            [(i, j + k) for k in range(size)] for i in range(len(scores)) for j in range(0, scores.shape[1], size)
        ]
    elif compared == "row":
        groups, pruned = [[p for p in places if p[0] == i] for i in range(len(scores))], None
    else:
        groups, pruned = [places], None
    for group in groups:
        count = int(len(group) * round(100 * pattern.sparsity)) // 100 if pruned is None else pruned
        for place in sorted(group, key=lambda place: float(scores[place]))[:count]:
            keep[place] = False
    return keep


@pytest.mark.parametrize("compared", ["layer", "row"])
@pytest.mark.parametrize("text", ["0.5", "0.29", "0.9", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_reference_ties_included(text, compared, ties):
    scores = torch.rand(7, 24)
    scores = (scores * 4).round() if ties else scores
    pattern = Pattern.parse(text)
    assert torch.equal(keep_best(scores, pattern, compared), naive(scores, pattern, compared))


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_every_group_keeps_exactly_its_number(text):
    pattern = Pattern.parse(text)
    keep = keep_best(torch.randn(5, 48), pattern)
    assert (keep.unflatten(1, (-1, pattern.group)).sum(-1) == pattern.kept).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.7])
def test_density_is_what_is_asked_for(sparsity):
    for compared in ("layer", "row"):
        keep = keep_best(torch.ones(100, 1000), Pattern.parse(sparsity), compared)
        assert (~keep).float().mean().item() == pytest.approx(sparsity, abs=1e-6)


def test_wanda_with_equal_inputs_is_magnitude_in_each_row():
    weight, half = torch.randn(9, 40), Pattern.parse(0.5)
    wanda = keep_best(wanda_scores(weight, torch.full((40,), 3.0)), half, "row")
    assert torch.equal(wanda, keep_best(weight.abs(), half, "row"))
    assert not torch.equal(wanda, keep_best(weight.abs(), half, "layer"))


def test_wandas_score_is_what_the_output_loses_if_inputs_are_independent():
    x = torch.randn(200, 6).double() * torch.arange(1.0, 7.0)
    weight = torch.randn(3, 6).double()
    scores = wanda_scores(weight, x.square().mean(0))
    for i, j in ((0, 0), (1, 3), (2, 5)):
        lost = weight.clone()
        lost[i, j] = 0
        error = (x @ weight.T - x @ lost.T).square().mean(0).sum()
        assert float(scores[i, j].square()) == pytest.approx(float(error))
