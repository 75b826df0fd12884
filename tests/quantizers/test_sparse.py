"""Patterns of pruned weights, and the mask that stands in front of a layer's weight."""

import pytest
import torch

from lightning_quant.quantizers import Mask, Pattern


@pytest.mark.parametrize(
    ("text", "sparsity", "kept", "group"),
    [(0.5, 0.5, None, None), ("0.3", 0.3, None, None), ("2:4", 0.5, 2, 4), ("1:4", 0.75, 1, 4), ("4:8", 0.5, 4, 8)],
)
def test_patterns_are_read_and_written(text, sparsity, kept, group):
    pattern = Pattern.parse(text)
    assert (pattern.sparsity, pattern.kept, pattern.group) == (sparsity, kept, group)
    assert Pattern.parse(str(pattern)) == pattern == Pattern.parse(pattern)


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2:4:8", "half", 0, 1, 1.5, "-0.5", 124])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(text)


def test_yaml_that_reads_a_pattern_as_minutes_is_told_of_quotes():
    with pytest.raises(ValueError, match="quotes"):
        Pattern.parse(2 * 60 + 4)  # what YAML 1.1 makes of 2:4


def test_a_pattern_says_which_rows_have_room_for_it():
    assert Pattern.parse("2:4").why_not(12) is None
    assert "12 weights" in Pattern.parse("4:8").why_not(12)
    assert Pattern.parse(0.5).why_not(13) is None


def test_an_undecided_mask_hands_on_what_it_is_given():
    mask, weight = Mask(0.5), torch.randn(3, 4)
    assert not mask.calibrated and mask(weight) is weight


def test_weights_train_behind_a_mask_and_pruned_ones_do_not():
    mask, weight = Mask(0.5), torch.randn(3, 4, requires_grad=True)
    keep = torch.rand(3, 4) > 0.5
    mask.decide(keep, torch.randn(3, 4))
    mask(weight).square().sum().backward()
    assert torch.equal(weight.grad != 0, keep)


def test_what_is_not_finite_is_pruned_all_the_same():
    mask = Mask(0.5)
    mask.decide(torch.tensor([[True, False]]))
    assert mask(torch.tensor([[1.0, torch.inf]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("names", [[], ["offset"], ["offset", "correction", "before"]])
def test_state_goes_through_a_state_dict(names):
    mask, fresh = Mask("2:4"), Mask("2:4")
    mask.decide(torch.rand(3, 4) > 0.5)
    for name in names:
        setattr(mask, name, torch.randn(3, 4))
    fresh.decide(torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4))
    fresh.load_state_dict(mask.state_dict())
    assert fresh.state_dict().keys() == mask.state_dict().keys()
    assert all(torch.equal(value, mask.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_a_float_state_dict_leaves_a_mask_undecided():
    mask = Mask("2:4")
    mask.decide(torch.ones(1, 4, dtype=torch.bool))
    mask.load_state_dict({})
    assert not mask.calibrated and mask.offset is None
