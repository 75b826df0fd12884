"""LRP-QViT: bits by relevance, and ranges without outlier channels."""

import math

import pytest
import torch

from lightning_quant import LRPQViT, RepQViT
from lightning_quant.callbacks.lrp_qvit import ClippedRepQViT
from lightning_quant.solvers.channel_clips import best_clip, clip_outlier_channels
from tests.models import TinyTransformer, validate


def scales(callback):
    model = TinyTransformer()
    validate(model, callback)
    return {key: value for key, value in model.state_dict().items() if "lightning_quant" not in key}


def test_without_clips_it_is_repq_vit():
    plain, same = scales(RepQViT()), scales(ClippedRepQViT([math.inf]))
    assert plain.keys() == same.keys() and all(torch.equal(plain[key], same[key]) for key in plain)


def test_clips_move_only_outlier_channels():
    hi, lo = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0, 30.0]), torch.zeros(6)
    _, clipped = clip_outlier_channels(lo, hi, 2.0)
    assert torch.equal(clipped[:5], hi[:5]) and clipped[5] < 30
    assert all(torch.equal(a, b) for a, b in zip(clip_outlier_channels(lo, hi, math.inf), (lo, hi), strict=True))


def test_the_best_clip_is_of_least_error_and_ties_clip_nothing():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert best_clip(x, [torch.eye(6)], x.amin(0), x.amax(0), 8, [5.0, math.inf]) == math.inf
    x[0, 2] = 60.0  # one outlier of a channel that otherwise is like the others
    assert best_clip(x, [torch.eye(6)], x.amin(0), x.amax(0), 3, [1.0, 2.0, math.inf]) < math.inf


def test_the_budget_is_met_and_relevance_decides():
    callback = LRPQViT(budget="4bit")
    validate(TinyTransformer(), callback)
    choice = callback.choice
    assert choice.point.costs["weight bits"] <= 4 + 1e-6 and len(set(choice.bits.values())) > 1


@pytest.mark.parametrize("clips", [[], [0.0], [-1.0, 3.0]])
def test_clips_out_of_range_are_refused(clips):
    with pytest.raises(ValueError, match="clip_channels="):
        LRPQViT(clip_channels=clips)
