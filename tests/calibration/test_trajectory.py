"""Moments of trajectories as calibration data: which are kept, that they replay, and what they weigh."""

import pytest
import torch
from torch import nn

from lightning_quant import PostTrainingQuantization, Trajectory
from lightning_quant.calibration import evenly
from tests.diffusion import Own, labelled, pictures, sampler, seeds
from tests.models import NoDropout, trainer


def recorded(module, trajectory):
    """A trajectory that has been recorded in a run."""
    callback = PostTrainingQuantization("int8", "int8", calibration_loader=trajectory, calibration_samples=4)
    trainer(callback).validate(module, pictures(), verbose=False)
    callback.remove(module)
    return trajectory


@pytest.mark.parametrize("moments", [1, 3, "all"])
def test_a_row_replays(moments):
    module = labelled(steps=5, guidance_scale=2.0)
    rows = recorded(module, Trajectory(7, moments, loader=seeds(7), features=["denoiser.transformer_blocks.1"]))
    assert len(rows) == 7 * (5 if moments == "all" else moments)
    met = set()
    for batch in rows:
        with torch.no_grad():
            again = module.guided(batch["x"], batch["timestep"], **batch["conditions"])
        torch.testing.assert_close(again, batch["prediction"], atol=1e-5, rtol=1e-5)
        assert batch["features"]["denoiser.transformer_blocks.1"].shape == (len(again), 16, 16)
        assert [module.timesteps[k] for k in batch["k"]] == batch["timestep"].tolist()
        met |= {(float(x), k) for x, k in zip(batch["x"].flatten(1)[:, 0], batch["k"].tolist(), strict=True)}
    assert len(met) == len(rows)  # a trajectory gives each moment once


def test_rows_are_those_of_the_float_model_though_a_quantized_one_samples():
    module = labelled()
    exact = recorded(module, Trajectory(4, loader=seeds(4)))
    trainer(PostTrainingQuantization("int3", "int3")).validate(module, pictures(), verbose=False)
    again = Trajectory(4, loader=seeds(4))
    again.recorded(trainer(), module)
    assert torch.equal(exact.take(range(4))["prediction"], again.take(range(4))["prediction"])


def test_any_first_few_rows_are_spread_over_the_steps():
    rows = recorded(sampler(steps=50), Trajectory(64, loader=None))
    for few in (8, 16, 32):
        gaps = torch.tensor([-1, *sorted(rows.steps[:few]), 50]).diff()
        assert int(gaps.max()) <= 3 * 50 // few


def test_an_allocation_of_ones_own():
    late = lambda steps, rows: [0] * (steps - 2) + [rows // 2, rows - rows // 2]  # noqa: E731
    rows = recorded(sampler(steps=6), Trajectory(5, allocation=late, loader=None))
    assert sorted(rows.steps) == [4, 4, 5, 5, 5]
    with pytest.raises(ValueError, match=r"0 to 5 rows, 5 in all; it gave 6 numbers with the sum 6"):
        recorded(sampler(steps=6), Trajectory(5, allocation=lambda steps, rows: [1] * steps, loader=None))


def test_rows_are_as_even_as_can_be():
    for steps, rows in ((7, 3), (7, 7), (7, 26)):
        counts = evenly(steps, rows)
        assert sum(counts) == rows and len(counts) == steps and max(counts) - min(counts) <= 1


def test_memory_is_that_of_the_rows_however_many_steps_there_are(tmp_path):
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.1))
            self.most = 0

        def forward(self, x, t):
            return x * self.scale

    rows = Trajectory(64, loader=None, batch_size=64)
    rows.recorded(trainer(), sampler(Tiny(), steps=1000, sample_shape=(1, 32, 32)))
    assert len(rows) == 64 and rows.nbytes == 64 * 2 * 32 * 32 * 4  # 0.5 MB
    kept = Trajectory(64, "all", loader=None, batch_size=64, folder=tmp_path / "rows")
    kept.recorded(trainer(), sampler(Tiny(), steps=1000, sample_shape=(1, 4, 4)))
    assert len(kept) == 64_000 and kept.nbytes == 64_000 * 2 * 16 * 4
    assert sum(file.stat().st_size for file in (tmp_path / "rows").iterdir()) == kept.nbytes


def test_a_model_that_does_not_sample_has_no_trajectories():
    with pytest.raises(TypeError, match="derive it from DiffusionMixin"):
        Trajectory().recorded(trainer(), NoDropout())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="moments=9, but a trajectory has 4 steps"):
        Trajectory(2, 9, loader=None).recorded(trainer(), sampler(Own(), sample_shape=(1, 4, 4)))
    with pytest.raises(ValueError, match="nothing is recorded yet"):
        Trajectory().take([0])
    with pytest.raises(ValueError, match="moments=0"):
        Trajectory(moments=0)
