"""Which steps calibrate how often: by density and diversity."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant import DiffusionModule, PostTrainingQuantization
from lightning_quant.calibration import AlignedTrajectory, density, diversity, shared_out, step_shares
from tests.diffusion import Own, labelled, pictures, sampler, seeds
from tests.models import trainer


def slow_density(features, radius):
    steps = len(features)
    return [
        sum(k != j and float((features[k] - features[j]).square().mean()) <= radius for j in range(steps))
        for k in range(steps)
    ]


def slow_diversity(features):
    steps = len(features)
    return [
        sum(float((1 - F.cosine_similarity(features[k], features[j], 1, 1e-6)).sum()) for j in range(steps) if j != k)
        for k in range(steps)
    ]


@pytest.mark.parametrize("shape", [(7, 2, 3, 5, 4), (5, 1, 4, 1, 1)])
def test_density_and_diversity_are_what_the_formulas_say(shape):
    torch.manual_seed(0)
    features = torch.randn(shape)
    assert density(features, 2.0).tolist() == slow_density(features, 2.0)
    torch.testing.assert_close(diversity(features), torch.tensor(slow_diversity(features)), rtol=1e-4, atol=1e-4)
    tokens = features.flatten(3).movedim(2, -1)  # (steps, samples, tokens, channels)
    torch.testing.assert_close(diversity(tokens, axis=-1), diversity(features), rtol=1e-5, atol=1e-4)


def test_equal_features_share_evenly_and_lambda_of_0_follows_density():
    assert step_shares(torch.ones(6, 2, 3, 4)).tolist() == pytest.approx([1 / 6] * 6)
    features = torch.cat([torch.zeros(4, 1, 2), torch.full((2, 1, 2), 9.0)])
    assert step_shares(features, weight=0, radius=0.1).tolist() == pytest.approx([0.25] * 4 + [0.0] * 2)


@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
def test_rounded_shares_add_up(rows):
    generator = torch.Generator().manual_seed(rows)
    for steps in (1, 3, 50):
        for _ in range(20):
            shares = torch.rand(steps, generator=generator).pow(4)
            counts = shared_out(shares / shares.sum(), rows)
            assert sum(counts) == rows and min(counts) >= 0
    assert shared_out([1 / 3] * 3, 4) == [2, 1, 1]
    assert shared_out([0.5, 0.5], 3) == [2, 1]  # rounded to 2 and 2: the last step gives one back


def test_a_rare_cluster_is_covered_better_than_by_chance():
    """A stretch of crowded steps, and a few of their own kind: ranges want samples of both."""
    torch.manual_seed(0)
    crowded, rare = torch.randn(1, 1, 8).expand(45, 1, 8), 4 * torch.eye(8)[:5].unsqueeze(1)
    features = torch.cat([crowded + 0.01 * torch.randn(45, 1, 8), rare])
    counts = torch.tensor(shared_out(step_shares(features), 100))
    assert int(counts[45:].sum()) > 1.5 * 100 * 5 / 50  # evenly, or by chance, they have a tenth
    seen = []  # random choices of 100 steps, at how many of which the rare ones are
    for seed in range(50):
        drawn = torch.randint(50, (100,), generator=torch.Generator().manual_seed(seed))
        seen.append(int((drawn >= 45).sum()))
    assert int(counts[45:].sum()) > max(sorted(seen)[:45])


def recorded(module, **arguments):
    rows = AlignedTrajectory(12, watched=4, loader=seeds(12), **arguments)
    callback = PostTrainingQuantization(calibration_loader=rows, calibration_samples=12)
    trainer(callback).validate(module, pictures(), verbose=False)
    return rows


@pytest.mark.parametrize("make", [sampler, labelled], ids=["unet", "dit"])
def test_each_trajectory_gives_one_moment_of_a_step_that_was_wanted(make):
    rows = recorded(make(steps=6))
    assert sorted(rows._origins) == list(range(12))
    assert rows.shares is not None and rows.shares.shape == (6,) and float(rows.shares.sum()) == pytest.approx(1)
    assert [rows.steps.count(k) for k in range(6)] == shared_out(rows.shares, 12)
    again = make(steps=6)
    row = rows.take([0])
    with torch.no_grad():
        replayed = again(row["x"], row["timestep"], **row["conditions"])
    torch.testing.assert_close(replayed, row["prediction"], atol=1e-5, rtol=1e-5)


def test_a_denoiser_without_a_middle_wants_to_be_told():
    def own():
        return DiffusionModule(Own(), sampler().scheduler, 4, sample_shape=(1, 8, 8))

    with pytest.raises(ValueError, match="feature='auto' finds neither a mid_block nor a list"):
        recorded(own())
    assert recorded(own(), feature="denoiser.first").shares is not None


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="diversity and radius must be 0 or more"):
        AlignedTrajectory(diversity=-1)
    with pytest.raises(ValueError, match="watched must be at least 1"):
        AlignedTrajectory(watched=0)
