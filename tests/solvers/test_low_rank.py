"""The branch is the best product of its rank, by either measure."""

import pytest
import torch

from lightning_quant.solvers import low_rank, output_error


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    error, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 11), (90, 11)))
    x = x * torch.logspace(0, -2, 11, dtype=torch.float64)
    return error, x.T @ x


def test_full_rank_leaves_nothing(operands):
    error, hessian = operands
    for h in (None, hessian):
        up, down = low_rank(error, 20, h)
        assert up.shape == (7, 7) and down.shape == (7, 11)
        torch.testing.assert_close(up @ down, error)


def test_what_is_left_are_the_smaller_singular_values(operands):
    error, _ = operands
    values = torch.linalg.svdvals(error).square()
    left = []
    for rank in range(1, 8):
        up, down = low_rank(error, rank)
        left.append(float((error - up @ down).square().sum()))
        assert left[-1] == pytest.approx(float(values[rank:].sum()), abs=1e-9)
    assert left == sorted(left, reverse=True)


def test_the_hessian_makes_the_outputs_error_least(operands):
    error, hessian = operands
    for rank in (1, 3, 5):
        ours, plain = (
            float(output_error(error, up @ down, hessian).sum())
            for up, down in (low_rank(error, rank, hessian, damp=0), low_rank(error, rank))
        )
        factor = torch.linalg.cholesky(hessian)
        least = torch.linalg.svdvals(error @ factor)[rank:].square().sum()
        assert ours == pytest.approx(float(least), rel=1e-6) and ours < 0.9 * plain
