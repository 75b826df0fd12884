"""Two processes learn together, and end with the same codes and scales."""

import torch

from lightning_quant import PostTrainingQuantization, Reconstruction
from tests.callbacks.test_ranks import SavesState, assert_equal, run


def test_two_ranks_learn_the_same(tmp_path):
    settings = Reconstruction(iterations=12, samples=16, batch_size=4, learning_rate=0.03, patience=4)
    callback = PostTrainingQuantization("int3", "int8", calibration_samples=16, reconstruct=settings)
    run(callback, SavesState(tmp_path), ranks=2)
    (scales, weights), (others, other_weights) = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert sum("codes" in state for state in scales.values()) == 10
    assert_equal(scales, others)
    assert_equal(weights, other_weights)
