from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix

from lightning_quant.metrics import (
    NegativeFlipRate,
    PositiveFlipRate,
    count_flips,
    negative_flip_rate,
    positive_flip_rate,
)


def three(draw_lists):
    return (torch.tensor(each) for each in zip(*draw_lists, strict=True))


triples = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40)


def test_the_example_of_the_paper_by_hand():
    new, old, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    assert negative_flip_rate(new, old, target) == positive_flip_rate(new, old, target) == 0.25
    assert negative_flip_rate(new, old, target, relative=True).item() == pytest.approx(0.25 / (0.75 * 0.25))


@given(triples)
def test_equal_scikit_learn(triple):
    new, old, target = three(triple)
    # rows: right by the float model, columns: right by the quantized one
    table = confusion_matrix(old == target, new == target, labels=[True, False], normalize="all")
    assert negative_flip_rate(new, old, target).item() == pytest.approx(table[0, 1], abs=1e-12)
    assert positive_flip_rate(new, old, target).item() == pytest.approx(table[1, 0], abs=1e-12)
    independent = table[0].sum() * table[:, 1].sum()
    relative = negative_flip_rate(new, old, target, relative=True).item()
    assert relative == pytest.approx(table[0, 1] / independent if independent > 0 else 0.0, abs=1e-12)


@given(triples)
def test_accuracy_changes_by_the_flips_exactly(triple):
    new, old, target = three(triple)
    counts, n = count_flips(new, old, target), len(target)
    shares = [Fraction(int((predicted == target).sum()), n) for predicted in (new, old)]
    assert shares[0] == shares[1] - Fraction(int(counts.negative), n) + Fraction(int(counts.positive), n)

    nfr, pfr = NegativeFlipRate(), PositiveFlipRate()
    for part in torch.arange(n).chunk(3):  # batches of different sizes
        for metric in (nfr, pfr):
            metric.update(new[part], old[part], target[part])
    accuracies = [accuracy_score(target, predicted) for predicted in (new, old)]
    assert accuracies[0] == pytest.approx(accuracies[1] - nfr.compute().item() + pfr.compute().item(), abs=1e-15)


def test_independent_errors_have_a_relative_rate_of_one():
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(200_000, dtype=torch.long)
    old = (torch.rand(len(target), generator=generator) < 0.2).long()
    new = (torch.rand(len(target), generator=generator) < 0.4).long()
    assert negative_flip_rate(new, old, target).item() == pytest.approx(0.8 * 0.4, abs=0.005)
    assert negative_flip_rate(new, old, target, relative=True).item() == pytest.approx(1.0, abs=0.02)


def test_a_relative_rate_of_nothing_is_zero():
    target = torch.arange(4)
    assert negative_flip_rate(target, target + 1, target, relative=True) == 0  # the float model has nothing right
    assert negative_flip_rate(target, target, target, relative=True) == 0  # the quantized model has all right


def test_scores_indices_and_soft_labels_mean_the_same():
    new, old, target = torch.randn(3, 9, 5, 4)
    want = count_flips(new.argmax(-1), old.argmax(-1), target.argmax(-1))
    assert count_flips(new, old, target.argmax(-1)) == want == count_flips(new, old, target.softmax(-1))
    assert np.isclose(negative_flip_rate(new, old, target), want.negative / (9 * 5))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1), (1,)])
def test_a_target_of_another_shape_is_refused(shape):
    new, old = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) .*last axis makes \(4,\) predictions, but the target has shape"):
        NegativeFlipRate().update(new, old, torch.zeros(shape, dtype=torch.long))
