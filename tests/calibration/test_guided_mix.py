"""DGC: distances against the formula, and a share that follows what groups tell."""

import pytest
import torch

from lightning_quant.calibration import chosen_samples, conditional_share, mahalanobis


def group(spread, rows=128, loud=0.0, seed=0):
    """Rows of a normal distribution, a share of which reach six times as far."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(rows, 4, generator=generator)
    x[: round(loud * rows)] *= 6
    return x


def test_the_distance_is_that_of_the_formula():
    x = group(2.0).double() @ torch.randn(4, 4).double()
    centred = x - x.mean(0)
    inverse = torch.linalg.pinv(torch.cov(x.T))
    torch.testing.assert_close(mahalanobis(x), torch.einsum("ni,ij,nj->n", centred, inverse, centred).sqrt())


def test_with_more_dimensions_than_rows_distances_still_differ():
    distances = mahalanobis(torch.randn(32, 500))
    assert distances.isfinite().all() and distances.max() > 1.2 * distances.min()


def test_groups_alike_share_equally_and_the_one_that_tells_more_has_more():
    assert conditional_share(group(1.0), group(3.0)) == 0.5  # alike but for their size, which the distance ignores
    few, many = group(1.0, loud=0.02, seed=1), group(1.0, loud=0.0, seed=2)
    assert conditional_share(few, many) + conditional_share(many, few) == 1
    shares = [conditional_share(group(1.0, loud=loud, seed=3), group(1.0, seed=4)) for loud in (0.05, 0.5)]
    assert shares[0] != shares[1]


@pytest.mark.parametrize("pick", [False, True])
def test_as_many_are_chosen_as_a_group_has(pick):
    loud, quiet = group(1.0, loud=0.1, seed=3), group(1.0, seed=4)
    chosen = chosen_samples(loud, quiet, pick)
    assert len(chosen) == len({*chosen}) == 128
    assert sum(place < 128 for place in chosen) == round(128 * conditional_share(loud, quiet))
    if pick:
        both = torch.cat([mahalanobis(loud), mahalanobis(quiet)])
        assert both[chosen].min() >= both.sort(descending=True).values[127]


@pytest.mark.parametrize("pick", [False, True])
def test_of_a_group_that_does_not_vary_half_are_taken(pick):
    constant = group(1.0)[:1].expand(128, -1) + 1e-9 * group(1.0)
    assert mahalanobis(constant) is None
    assert chosen_samples(group(1.0), constant, pick) == [*range(64), *range(128, 192)]
