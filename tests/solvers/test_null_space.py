"""What is added to a weight lies where inputs hardly vary, and makes its outliers small."""

import pytest
import torch

from lightning_quant.quantizers import build_quantizer
from lightning_quant.solvers import ColumnSolver, Rounding, absorb_outliers, null_space, output_error, row_reach

OUT, IN = 24, 64


def layer(rank=IN, decay=6.0, tokens=400, seed=0):
    """A weight with planted outliers, inputs whose spectrum decays over decades, and held-out ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64))[0][:rank]
    scales = 10 ** (-decay / 2 * torch.linspace(0, 1, rank, dtype=torch.float64))
    x, other = (torch.randn(tokens, rank, generator=generator, dtype=torch.float64) * scales @ basis for _ in range(2))
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    weight[torch.rand(OUT, IN, generator=generator) < 0.01] *= 8
    return weight, x, other


def regularizers(basis, hessian):
    """As a matrix: small additions, sums of rows that stay, and little that the output feels."""
    values, total = torch.linalg.eigvalsh(hessian), basis.sum(1)
    damp = 0.01 * values.mean()
    felt = ((basis @ hessian @ basis.T).diagonal() + damp) / (values + damp).log().mean().exp()
    return torch.diag(1 + 100 * felt) / IN + 1e-3 * total[:, None] * total


def share(edit, weight, x):
    return float((x @ edit.T).square().sum() / (x @ weight.T).square().sum())


def test_the_directions_hold_no_more_than_their_share_and_one_more_would():
    _, x, _ = layer()
    hessian = x.T @ x
    for gamma in (1e-6, 1e-3, 0.1):
        basis = null_space(hessian, gamma)
        values = torch.linalg.eigvalsh(hessian)
        count = len(basis)
        held = (basis @ hessian @ basis.T).diagonal().sum() / values.sum()
        assert 0 < count < IN and held <= gamma * (1 + 1e-9)
        assert values[: count + 1].sum() / values.sum() > gamma
        torch.testing.assert_close(basis @ basis.T, torch.eye(count, dtype=torch.float64))


def test_the_addition_lies_in_the_span_and_solves_the_normal_equations():
    weight, x, _ = layer()
    found = absorb_outliers(weight, x.T @ x, tolerance=1e-10, steps=2000)
    basis = found.directions
    outside = found.edit - found.edit @ basis.T @ basis
    assert outside.norm() < 1e-5 * found.edit.norm()
    for row, b in zip(weight, found.coefficients, strict=True):
        s = (row.abs() / (0.2 * row.abs().max())).softmax(0)
        matrix = (basis * s) @ basis.T + regularizers(basis, x.T @ x)
        torch.testing.assert_close(b, torch.linalg.solve(matrix, -basis @ (s * row)), rtol=1e-5, atol=1e-7)


def test_each_group_has_outliers_of_its_own():
    weight, x, _ = layer()
    found = absorb_outliers(weight, x.T @ x, group=16, tolerance=1e-10, steps=2000)
    row, basis = weight[3], found.directions
    parts = row.unflatten(0, (-1, 16)).abs()
    s = (parts / (0.2 * parts.amax(1, keepdim=True))).softmax(1).flatten() / 4
    matrix = (basis * s) @ basis.T + regularizers(basis, x.T @ x)
    expected = torch.linalg.solve(matrix, -basis @ (s * row))
    torch.testing.assert_close(found.coefficients[3], expected, rtol=1e-5, atol=1e-7)


def test_inputs_of_exact_rank_do_not_feel_it():
    weight, x, _ = layer(rank=40, decay=0)
    found = absorb_outliers(weight, x.T @ x, gamma=1e-9)
    assert len(found.directions) == IN - 40 and found.edit.abs().max() > 0.1
    torch.testing.assert_close(x @ (weight + found.edit).T, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_inputs_that_vary_in_all_directions_leave_the_weight_alone():
    weight, x, _ = layer(decay=0)
    found = absorb_outliers(weight, x.T @ x, gamma=1e-4)
    assert len(found.directions) == 0 and not found.edit.any()


def test_outliers_fall_and_the_output_hardly_moves_on_held_out_inputs_too():
    weight, x, other = layer()
    found = absorb_outliers(weight, x.T @ x)
    assert row_reach(weight + found.edit).mean() < 0.8 * row_reach(weight).mean()
    assert share(found.edit, weight, x) < 2e-3 and share(found.edit, weight, other) < 4e-3


@pytest.mark.parametrize("text", ["int2_asym_channel", "int3_asym_channel", "int3_sym_channel"])
def test_what_is_rounded_afterwards_errs_less(text):
    weight, x, _ = layer()
    hessian, solver = x.T @ x, ColumnSolver()
    edited = weight + absorb_outliers(weight, hessian).edit

    def errors(solve):
        rounding = Rounding(build_quantizer(text, axis=0))
        return [float(output_error(weight, solve(start, rounding), hessian).sum()) for start in (edited, weight)]

    for ours, plain in (
        errors(lambda start, rounding: solver.solve(start, hessian, rounding).values),
        errors(lambda start, rounding: rounding.nearest(start)),
    ):
        assert ours < 0.9 * plain


def test_a_row_of_zeros_and_a_dead_input_do_no_harm():
    weight, x, _ = layer()
    weight[2], x[:, 5] = 0, 0
    found = absorb_outliers(weight, x.T @ x)
    assert found.edit.isfinite().all() and not found.edit[2].any()
