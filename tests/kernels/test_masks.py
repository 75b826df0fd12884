"""What can be read from an attention mask, and that everything else is left alone."""

import pytest
import torch

from lightning_quant.kernels.sparse_attention import KeyMask, read_mask

PADDING = torch.tensor([[True, True, False, True], [False, True, True, True]])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def as_bias(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda mask: mask, as_bias, lambda mask: as_bias(mask).clamp(min=float("-inf"))])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_differs_between_samples(form, causal):
    mask = PADDING[:, None, None, :] & (CAUSAL if causal else torch.ones_like(CAUSAL))
    found = read_mask(form(mask), 4, 4)
    assert found.causal is causal and torch.equal(found.valid, PADDING)


def test_one_row_and_expanded_views_are_read_without_looking_at_all_rows():
    assert torch.equal(read_mask(PADDING[:, None, None], 4, 4).valid, PADDING)
    assert torch.equal(read_mask(PADDING[:, None, None].expand(2, 8, 4, 4), 4, 4).valid, PADDING)
    assert torch.equal(read_mask(PADDING[0], 4, 4).valid, PADDING[:1])


def test_nothing_hidden_is_no_mask():
    assert read_mask(None, 4, 4) == KeyMask()
    assert read_mask(torch.zeros(4, 4), 4, 4) == KeyMask()
    assert read_mask(CAUSAL, 4, 4) == KeyMask(causal=True)


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(4, 4),  # a bias
        CAUSAL.flip(0),  # neither padding nor causal
        torch.stack([CAUSAL, torch.ones_like(CAUSAL)]),  # heads differ
        torch.eye(4, dtype=torch.bool),
    ],
)
def test_other_masks_are_not_read(mask):
    assert read_mask(mask, 4, 4) is None
