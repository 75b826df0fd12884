"""Sparsity Induction: what rescaling does to a pruned layer, and what it does not."""

import pytest
import torch

from lightning_quant.quantizers import Pattern
from lightning_quant.solvers import ColumnSolver, InducedMask, Masking, keep_best, skewness_init, wanda_scores

HALF = Pattern.parse(0.5)


def layer(out=12, inputs=32):
    x = (torch.randn(400, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + torch.randn(inputs)).double()
    return torch.randn(out, inputs).double(), x, torch.rand(inputs).double() * 4 + 0.2


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_rescaling_both_sides_changes_neither_wandas_mask_nor_its_output(text):
    """The trap: a method that scaled exactly could gain nothing with this host."""
    weight, x, s = layer()
    pattern = Pattern.parse(text)
    before = keep_best(wanda_scores(weight, x.square().mean(0)), pattern, "row")
    after = keep_best(wanda_scores(weight * s, (x / s).square().mean(0)), pattern, "row")
    assert torch.equal(before, after)
    torch.testing.assert_close((weight * s * after) @ (x / s).T, (weight * before) @ x.T)


def test_nor_what_sparsegpt_makes_of_a_layer_without_damping():
    weight, x, s = layer()
    solver = ColumnSolver(damp=0.0)
    first, second = Masking(density=0.5), Masking(density=0.5)
    plain = solver.solve(weight, x.T @ x, first).values
    scaled = solver.solve(weight * s, (x / s).T @ (x / s), second).values / s
    assert torch.equal(first.kept, second.kept)
    torch.testing.assert_close(scaled, plain)


def test_folding_shift_and_scale_is_a_weighted_mask_and_a_bias():
    """Prune the folded layer by magnitude, feed it scaled and shifted inputs: the same as no fold at all."""
    weight, x, s = layer()
    bias, shift, rows = torch.randn(12).double(), torch.randn(32).double(), torch.rand(12, 1).double() + 0.5
    folded, folded_bias = weight * s, bias + weight @ shift
    keep = keep_best(rows * folded.abs(), HALF)
    folded_output = (folded * keep) @ ((x - shift) / s).T + folded_bias[:, None]
    mask = InducedMask(weight, weight.abs(), HALF, "layer", s.float(), rows=True, mean=shift.float())
    with torch.no_grad():
        mask.log_rows.copy_(rows.log())
    assert torch.equal(mask().bool(), keep)
    pruned = weight * keep
    output = pruned @ x.T + (bias + (weight - pruned) @ shift)[:, None]
    torch.testing.assert_close(output, folded_output)
    torch.testing.assert_close(
        mask.correction(pruned.float()).double(), (weight - pruned) @ shift, rtol=1e-4, atol=1e-4
    )


def test_fast_refresh_is_the_score_on_scaled_inputs():
    weight, x, s = layer()
    fast = weight.abs() * x.square().mean(0).sqrt() * s
    torch.testing.assert_close(fast, wanda_scores(weight, (x * s).square().mean(0)))
    mask = InducedMask(weight, wanda_scores(weight, x.square().mean(0)), HALF, "row", s.float())
    assert torch.equal(mask().bool(), keep_best(fast, HALF, "row"))


def test_with_a_constant_mask_the_output_does_not_depend_on_the_factors():
    weight, x, s = layer()
    s.requires_grad_()
    keep = keep_best((weight * s).abs().detach(), HALF)
    output = (weight * s * keep) @ (x / s).T
    (gradient,) = torch.autograd.grad(output.square().sum(), s)
    assert gradient.abs().max() < 1e-9 * output.detach().square().sum()


def test_the_gradient_through_the_mask_lowers_the_error():
    torch.manual_seed(0)
    weight, x, _ = layer(24, 64)
    loud = x * torch.logspace(-1, 1, 64).double()  # inputs that magnitude knows nothing of

    def error(mask):
        return ((weight * mask() - weight).float() @ loud.float().T).square().mean()

    mask = InducedMask(weight, weight.abs(), HALF, "layer", torch.ones(64))
    before, optimizer = float(error(mask).detach()), torch.optim.Adam(mask.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        error(mask).backward()
        optimizer.step()
    assert float(error(mask).detach()) < 0.5 * before
    learned = mask.importance()[0].log()
    assert learned[32:].mean() > learned[:32].mean() + 1  # it found which ones are loud


def test_the_mean_is_the_best_shift_for_one_layer():
    weight, x, _ = layer()
    gone = weight * ~keep_best(weight.abs(), HALF)
    errors = [(gone @ (x - shift).T).square().mean() for shift in (x.mean(0), 0 * x.mean(0), 1.1 * x.mean(0))]
    assert errors[0] == min(errors)


def test_concentration_is_the_spectral_norm_over_frobenius_and_growth_does_not_change_it():
    weight, _, s = layer()
    mask = InducedMask(weight, weight.abs(), HALF, "layer", s.float())
    for _ in range(200):
        found = mask.concentration().detach()
    scaled = weight * s
    assert float(found) == pytest.approx(float(torch.linalg.matrix_norm(scaled, 2) / scaled.norm()), rel=1e-3)
    grown = InducedMask(weight * 7, weight.abs(), HALF, "layer", 3 * s.float())
    for _ in range(200):
        same = grown.concentration().detach()
    assert float(same) == pytest.approx(float(found), rel=1e-4)


def test_factors_begin_with_geometric_mean_one_and_within_bounds():
    start = skewness_init(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1e-9, 1e9, 1.0]))
    assert start.min() >= 1e-2 and start.max() <= 1e2 and start.isfinite().all()
    even = skewness_init(torch.zeros(5), torch.rand(5) + 0.5)
    assert even.log().mean().abs() < 1e-5
