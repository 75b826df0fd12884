import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from lightning_quant.metrics import top_one_agreement


@given(st.integers(0, 99), st.sampled_from([(1, 2), (9, 4), (3, 5, 7)]))
def test_equals_scikit_learn_on_scores_and_on_indices(seed, shape):
    quantized, reference = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    want = accuracy_score(reference.argmax(-1).flatten(), quantized.argmax(-1).flatten())
    assert top_one_agreement(quantized, reference) == want
    assert top_one_agreement(quantized.argmax(-1), reference.argmax(-1)) == want


def test_does_not_see_what_leaves_the_order_alone():
    scores = torch.randn(20, 6)
    assert top_one_agreement(scores.softmax(-1), 3 * scores + 1) == 1
