import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import paired_cosine_distances
from torchmetrics.functional import cosine_similarity

from lightning_quant.metrics import cosine_fidelity


@given(st.integers(0, 99), st.sampled_from([(1, 1), (3, 7), (2, 3, 4, 5)]))
def test_equals_scikit_learn_and_torchmetrics(seed, shape):
    quantized, reference = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    found = cosine_fidelity(quantized, reference).item()
    distances = paired_cosine_distances(quantized.flatten(1).double().numpy(), reference.flatten(1).double().numpy())
    assert found == pytest.approx(1 - distances.mean(), abs=1e-6)
    want = cosine_similarity(quantized.flatten(1), reference.flatten(1), reduction="mean")
    assert found == pytest.approx(want.item(), abs=1e-5)


def test_does_not_see_a_factor_but_sees_a_sign():
    x = torch.randn(4, 9)
    assert cosine_fidelity(3 * x, x).item() == pytest.approx(1.0, abs=1e-7)
    assert cosine_fidelity(-x, x).item() == -1.0


def test_samples_count_alike_however_large_they_are():
    x = torch.tensor([[1e4, 0.0], [0.0, 1e-4]])
    assert cosine_fidelity(x, torch.tensor([[1e4, 0.0], [1e-4, 0.0]])) == 0.5


def test_zeros_agree_with_zeros_alone():
    zero, x = torch.zeros(2, 3), torch.ones(2, 3)
    assert cosine_fidelity(zero, zero) == 1
    assert cosine_fidelity(zero, x) == cosine_fidelity(x, zero) == 0


def test_a_vector_is_a_batch_of_numbers():
    assert cosine_fidelity(torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.ones(4)) == 0.5


def test_equal_samples_have_a_cosine_of_exactly_one():
    x = torch.randn(200, 3)
    # the root of each energy alone would miss it by a rounding now and then
    assert all(cosine_fidelity(sample, sample) == 1 for sample in x.split(1))
