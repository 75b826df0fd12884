"""The column solver beside its slow and obvious form: every column against the explicit inverse of what is left."""

import pytest
import torch

from lightning_quant.quantizers import build_quantizer
from lightning_quant.solvers import Binarizing, ColumnSolver, Masking, Rounding, inverse_factor, output_error, settle

OUT, IN = 11, 30


def layer(rank=IN, tokens=200, seed=0, inputs=IN):
    """A weight, and the Hessian of correlated inputs of some rank."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, rank, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(OUT, inputs, generator=generator, dtype=torch.float64), 2 * x.T @ x / tokens


def rounding(text="int3_asym_channel", **arguments):
    return Rounding(build_quantizer(text, axis=0), **arguments)


def naive(weight, hessian, fix, damp=0.01, act_order=False):
    """Column by column, each time with the inverse of the damped Hessian of the columns that are left."""
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    fix.start(weight, order)
    hessian[dead, dead] = 1
    hessian = hessian[order][:, order]
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    work = weight[:, order].clone()
    spread = [torch.linalg.inv(hessian[i:, i:])[0, 0].sqrt() for i in range(len(hessian))]
    for i in range(len(hessian)):
        fix.look_ahead(work[:, i:], i, torch.stack(spread[i:]))
        inverse = torch.linalg.inv(hessian[i:, i:])
        value = fix(work[:, i], i)
        error = (work[:, i] - value) / inverse[0, 0]
        work[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
        work[:, i] = value
    solved = torch.empty_like(work)
    solved[:, order] = work
    return solved


FIXES = {
    "channel": lambda: rounding(),
    "tensor": lambda: rounding("int4_sym_tensor"),
    "groups": lambda: rounding("int3_asym_g5"),
    "uneven groups": lambda: rounding("int3_asym_g7"),
    "static groups": lambda: rounding("int3_asym_g5", static=True),
    "mse": lambda: rounding("int2_asym_g10", rule="mse"),
    "float": lambda: rounding("fp4_e2m1_channel"),
    "unstructured": lambda: Masking(density=0.5, mask_block=6),
    "2:4": lambda: Masking(pattern=(2, 5)),
    "masked and rounded": lambda: Masking(pattern=(1, 3), then=rounding("int4_asym_g5")),
    "given mask": lambda: Masking(mask=torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) > 0.4),
    "binary": lambda: Binarizing(group=6),
}


@pytest.mark.parametrize("rank", [IN, 7], ids=["full rank", "rank deficient"])
@pytest.mark.parametrize("fix", FIXES.values(), ids=FIXES)
def test_it_does_what_the_explicit_inverses_do(fix, rank):
    weight, hessian = layer(rank)
    if rank < IN:
        hessian[3], hessian[:, 3] = 0, 0  # a dead input
    torch.testing.assert_close(
        ColumnSolver(block_size=7).solve(weight, hessian, fix()).values,
        naive(weight, hessian, fix()),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("fix", ["channel", "static groups", "unstructured", "given mask"])
def test_so_it_does_with_the_largest_inputs_first(fix):
    weight, hessian = layer()
    hessian *= torch.linspace(0.1, 3, IN)[:, None] * torch.linspace(0.1, 3, IN)
    solved = ColumnSolver(act_order=True).solve(weight, hessian, FIXES[fix]()).values
    torch.testing.assert_close(solved, naive(weight, hessian, FIXES[fix](), act_order=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fix", FIXES.values(), ids=FIXES)
def test_the_size_of_blocks_changes_nothing(fix):
    weight, hessian = layer()
    results = [ColumnSolver(block_size=size).solve(weight, hessian, fix()).values for size in (1, 4, 128)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


def test_without_correlation_it_rounds_to_the_nearest():
    weight, _ = layer()
    for damp in (0.0, 0.01):
        solved = ColumnSolver(damp).solve(weight, torch.eye(IN), rounding()).values
        assert torch.equal(solved, rounding().nearest(weight))


def test_the_loss_it_tells_is_half_the_damped_output_error():
    weight, hessian = layer()
    solved = ColumnSolver().solve(weight, hessian, rounding())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    assert solved.loss == pytest.approx(output_error(weight, solved.values, damped).sum().item() / 2, rel=1e-9)


def test_it_beats_the_nearest_on_correlated_inputs():
    better = 0
    for seed in range(20):
        weight, hessian = layer(seed=seed)
        solved = ColumnSolver().solve(weight, hessian, rounding()).values
        error, nearest = (output_error(weight, w, hessian).sum() for w in (solved, rounding().nearest(weight)))
        better += bool(error <= nearest)
    assert better >= 19


@pytest.mark.parametrize(
    "text", ["int3_asym_g5", "int4_sym_channel", "int2_asym_tensor", "fp4_e2m1_g10", "int3_sym_g7"]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_scales_and_codes_give_the_solved_weight_back(text, act_order):
    weight, hessian = layer()
    fix = rounding(text, static=act_order)
    solved = ColumnSolver(act_order=act_order).solve(weight, hessian, fix).values
    quantizer = build_quantizer(text, axis=0)
    settle(quantizer, fix.state, solved)
    torch.testing.assert_close(quantizer(weight.float()), solved.float(), rtol=1e-6, atol=1e-7)


def test_a_dead_input_gets_no_weight_and_disturbs_nobody():
    weight, hessian = layer()
    hessian[4], hessian[:, 4] = 0, 0
    solved = ColumnSolver().solve(weight, hessian, rounding()).values
    assert not solved[:, 4].any() and solved.isfinite().all()


def test_a_matrix_without_a_factor_is_damped_until_it_has_one():
    factor, damp = inverse_factor(torch.ones(4, 4, dtype=torch.float64) - 1e-3 * torch.eye(4))
    assert 0 < damp < 0.1 and factor.isfinite().all()
    with pytest.raises(ValueError, match="no Cholesky factor"):
        inverse_factor(torch.full((3, 3), float("nan")))


def test_of_every_four_two_are_zero_and_the_density_is_exact():
    weight, hessian = layer(inputs=32, rank=32)
    solved = ColumnSolver().solve(weight, hessian, Masking(pattern=(2, 4))).values
    assert ((solved.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    masking = Masking(density=0.7, mask_block=16)
    solved = ColumnSolver().solve(weight, hessian, masking).values
    assert int((solved == 0).sum()) == int((~masking.kept).sum()) == 2 * round(0.3 * 16 * OUT)


def test_zeros_stay_zero_when_they_are_rounded():
    weight, hessian = layer()
    fix = Masking(density=0.5, then=rounding("int3_asym_g5"))
    solved = ColumnSolver().solve(weight + 3, hessian, fix).values
    quantizer = build_quantizer("int3_asym_g5", axis=0)
    settle(quantizer, fix.then.state, solved)
    assert torch.equal(quantizer(weight.float()) == 0, solved == 0) and (solved[~fix.kept] == 0).all()


def test_a_better_start_is_what_gets_rounded():
    weight, hessian = layer()
    seen = {}

    def shrink(w, h):
        seen["hessian"] = h.clone()
        return w / 2

    solved = ColumnSolver().solve(weight, hessian, rounding(), pre_edit=shrink).values
    assert torch.equal(solved, ColumnSolver().solve(weight / 2, hessian, rounding()).values)
    assert torch.equal(seen["hessian"], hessian)


def test_what_cannot_be_is_refused():
    weight, hessian = layer()
    with pytest.raises(ValueError, match="static_groups=True"):
        ColumnSolver(act_order=True).solve(weight, hessian, rounding("int4_g5"))
    with pytest.raises(ValueError, match="act_order must be False"):
        ColumnSolver(act_order=True).solve(weight, hessian, Masking(pattern=(1, 2)))
    with pytest.raises(ValueError, match="no multiple of 4"):
        ColumnSolver().solve(weight, hessian, Masking(pattern=(2, 4)))
    with pytest.raises(ValueError, match="give one of"):
        Masking(density=0.5, pattern=(2, 4))
    with pytest.raises(ValueError, match="damp=-1"):
        ColumnSolver(damp=-1)
