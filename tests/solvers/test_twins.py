"""The exponent and the step of a twin format are searched for the least error of the product behind."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.quantizers import UniformQuantizer, build_quantizer
from lightning_quant.solvers import align_twin, product_error


def problem(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "twin_4":
        return F.gelu(2 * torch.randn(40, 24, generator=generator) - 3), torch.randn(24, 9, generator=generator)
    scores = 3 * torch.randn(2, 3, 10, 24, generator=generator)
    return scores.softmax(-1), torch.randn(2, 3, 24, 9, generator=generator)


@pytest.mark.parametrize("kind", ["twin_4", "utwin_4"])
def test_nothing_on_the_grid_of_candidates_is_better(kind):
    a, b = problem(kind)
    quantizer = build_quantizer(kind)
    quantizer.fit(a)
    least = align_twin(quantizer, [(a, b)], candidates=7)
    assert least == product_error(quantizer, [(a, b)])
    other = build_quantizer(kind)
    for exponent in range(9):
        for part in range(1, 8):
            other.align(torch.tensor(1.2 * float(a.max()) * part / 7 / (other.levels_each - 1)), exponent)
            assert float((((other(a) - a) @ b).double() ** 2).sum()) >= least * (1 - 1e-6)


@pytest.mark.parametrize("kind", ["twin_4", "utwin_4"])
def test_two_grids_are_more_exact_than_one_symmetric_one(kind):
    a, b = problem(kind)
    quantizer, plain = build_quantizer(kind), UniformQuantizer("int4_sym")
    quantizer.fit(a)
    plain.fit(a, "mse")
    assert align_twin(quantizer, [(a, b)]) < 0.8 * float((((plain(a) - a) @ b).double() ** 2).sum())


def test_what_is_all_zero_stays_as_it_was():
    quantizer = build_quantizer("utwin_4")
    quantizer.freeze(torch.tensor(0.0), torch.tensor(1.0))
    before = quantizer.scale.clone()
    assert align_twin(quantizer, [(torch.zeros(3, 4), torch.ones(4, 2))]) == 0
    assert torch.equal(quantizer.scale, before)
