"""Hadamard matrices by their definition, and rotations that are fast, orthogonal and deterministic."""

import pytest
import torch

from lightning_quant.layers import Rotation, hadamard, has_hadamard
from lightning_quant.layers.hadamard import factors, fast_sylvester, paley_orders, sylvester

ORDERS = [1, 2, 4, 12, 20, 28, 36, 44, 60, 76, 84, 108, 140, 148]
PRODUCTS = [24, 192, 384, 576, 768, 1152, 1280, 1536]


@pytest.mark.parametrize("size", ORDERS + PRODUCTS)
def test_is_of_ones_with_orthogonal_rows(size):
    matrix = hadamard(size)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0} and matrix.shape == (size, size)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1408, 2560, 3072, 3584, 4608, 4864, 5120, 8960, 13824, 14336, 18944])
def test_widths_of_known_models_are_reached(size):
    base, twos = factors(size)
    assert base * twos == size and base in {1, *paley_orders(base)}


@pytest.mark.parametrize("size", [3, 52, 92, 116, 172, 188, 4304, 11008])
def test_a_size_that_paley_does_not_reach_is_refused_with_those_that_are(size):
    assert not has_hadamard(size)
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size}.* beside {size} these are") as error:
        hadamard(size)
    lower, upper = (int(word) for word in str(error.value).split(" these are ")[1].split(" and "))
    assert lower < size < upper and has_hadamard(lower) and has_hadamard(upper)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_fast_product_is_that_with_the_matrix(size):
    x = torch.randn(3, 5, size, dtype=torch.float64)
    torch.testing.assert_close(fast_sylvester(x), x @ sylvester(size))


@pytest.mark.parametrize("kind", ["hadamard", "kronecker", "random", "block"])
@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize(("size", "block"), [(24, None), (48, 12), (36, None)])
def test_a_rotation_is_its_matrix_and_orthogonal(kind, keeps_mean, size, block):
    rotation = Rotation(size, kind, seed=3, block=block, keeps_mean=keeps_mean)
    matrix, x = rotation.matrix(), torch.randn(2, 7, size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation(x), x @ matrix)
    torch.testing.assert_close(rotation(x, inverse=True), x @ matrix.T)
    if keeps_mean:
        torch.testing.assert_close(rotation(x).mean(-1), x.mean(-1))
    if block is not None and not keeps_mean:
        outside = torch.block_diag(*[torch.ones(block, block)] * (size // block)) == 0
        assert matrix[outside].abs().max() == 0


def test_the_fallback_reaches_any_size_and_the_seed_decides():
    for size in (172, 11008 // 16, 269 * 16):
        x = torch.randn(3, size, dtype=torch.float64)
        rotation = Rotation(size, "kronecker", seed=1)
        torch.testing.assert_close(rotation(rotation(x), inverse=True), x)
        assert torch.equal(rotation(x), Rotation(size, "kronecker", seed=1)(x))
        assert not torch.equal(rotation(x), Rotation(size, "kronecker", seed=2)(x))


def test_every_entry_of_a_rotated_outlier_is_of_one_size():
    outlier = torch.zeros(36, dtype=torch.float64)
    outlier[5] = 6.0
    assert torch.allclose(Rotation(36, seed=0)(outlier).abs(), torch.ones(36, dtype=torch.float64))


def test_half_precision_does_not_overflow_and_a_cast_leaves_the_matrix():
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    rotation = Rotation(64).to(torch.bfloat16)
    assert rotation.base.dtype == torch.float64
    assert torch.allclose(rotation(rotation(x / 64), inverse=True), x / 64, rtol=2e-3)


def test_unknown_kinds_and_blocks_are_refused():
    with pytest.raises(ValueError, match="'kronecker'"):
        Rotation(4, "spin")
    with pytest.raises(ValueError, match="blocks of 3 do not divide 8"):
        Rotation(8, block=3)
