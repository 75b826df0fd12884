from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_quant.calibration.samples import first_samples, merge_batches, reordered, sample_count

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    name: str


def boxes(*counts):
    return [{"boxes": torch.rand(count, 4)} for count in counts]


BATCHES = {
    "tensor": lambda n: torch.arange(n),
    "list of columns": lambda n: [torch.arange(n), torch.arange(n)],
    "named tuple": lambda n: Pair(torch.arange(n), torch.zeros(n, 2)),
    "nested dict": lambda n: {
        "inputs": {"ids": torch.arange(n)},
        "scale": 0.5,
        "flag": torch.tensor(1.0),
        "none": None,
    },
    "captions": lambda n: (torch.arange(n), [str(i) for i in range(n)], tuple(str(i) for i in range(n))),
    "user dict": lambda n: UserDict(ids=torch.arange(n)),
    "dataclass": lambda n: Record(torch.arange(n), "name"),
}


@pytest.mark.parametrize("name", BATCHES)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_cutting_merging_and_reordering_agree(name, sizes, data):
    whole = BATCHES[name](sum(sizes))
    order = data.draw(st.permutations(range(sum(sizes))))
    back = sorted(range(len(order)), key=order.__getitem__)
    assert sample_count(whole) == sum(sizes) == extract_batch_size(whole)
    assert str(first_samples(whole, sizes[0])) == str(BATCHES[name](sizes[0]))
    assert str(reordered(reordered(whole, order), back)) == str(whole)
    pieces, rest = [], whole
    for size in sizes:  # cut from the front
        pieces.append(first_samples(rest, size))
        left = sample_count(rest) - size
        rest = first_samples(reordered(rest, [*range(size, sample_count(rest)), *range(size)]), left) if left else rest
    merged = merge_batches(pieces)
    assert str(merged) == str(whole)
    assert type(merged) is type(whole)


def test_a_batch_of_two_columns_and_two_samples_is_not_cut_between_the_columns():
    x, y = first_samples((torch.arange(2), torch.arange(2)), 1)
    assert x.tolist() == y.tolist() == [0]
    inputs, targets = first_samples(({"a": torch.arange(2)}, {"b": torch.arange(2)}), 1)
    assert inputs["a"].tolist() == targets["b"].tolist() == [0]


def test_the_targets_of_a_detector_stay_with_their_images():
    targets = boxes(3, 1, 2)
    images, kept = first_samples((torch.zeros(3, 1, 8, 8), targets), 2)
    assert (len(images), kept) == (2, targets[:2])
    assert merge_batches([(images, kept), (torch.zeros(1, 1, 8, 8), targets[2:])])[1] == targets


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"the batch has the shapes \(2, 3\), \(2, 4\)"),
        ([(torch.zeros(2), {"ids": torch.zeros(2, n)}) for n in (5, 6)], r"the batch\[1\]\['ids'\] has the shapes"),
        ([(torch.zeros(2), n) for n in (5, 6)], r"the batch\[1\] has no dimension for the samples and differs"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": 0}], r"holds \['a'\] in one batch and \['a', 'b'\]"),
        ([(torch.zeros(2), 1), (torch.zeros(2), 1, 1)], "holds 2 in one batch and 3 in another"),
    ],
)
def test_batches_that_do_not_fit_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        merge_batches(batches)


def test_a_batch_without_tensors_cannot_be_counted():
    with pytest.raises(ValueError, match="batch of type list holds: it has no tensor"):
        sample_count(["a", "b"])
    assert first_samples(["a", "b"], 1) == ["a", "b"]


def test_the_given_batch_is_left_alone():
    batch = {"ids": torch.arange(4)}
    first_samples(batch, 2)
    assert batch["ids"].tolist() == [0, 1, 2, 3]
