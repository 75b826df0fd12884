"""The sum over batches is that over all tokens at once."""

import pytest
import torch
from torch import nn

from lightning_quant.calibration import Hessian, input_rows


def test_batches_of_any_size_add_up_to_all_tokens_at_once():
    x = torch.randn(12, 9, 6)
    hessian = Hessian(6)
    for batch in x.split([1, 4, 7]):
        hessian.add(batch)
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(hessian.matrix(), 2 * rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert hessian.tokens == 12 * 9


def test_how_samples_are_batched_does_not_matter_at_all():
    x = torch.randn(12, 9, 6)
    one, other = Hessian(6), Hessian(6)
    one.add(x)
    for batch in x.split([1, 4, 7]):
        other.add(batch)
    torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-14, atol=0)


def test_weights_of_one_change_no_bit_and_weights_of_zero_leave_out():
    x = torch.randn(3, 10, 4)
    plain, ones, some, part = (Hessian(4) for _ in range(4))
    plain.add(x)
    ones.add(x, torch.ones(3, 10))
    assert torch.equal(plain.matrix(), ones.matrix())
    some.add(x, (torch.arange(10) < 6).float().expand(3, 10))
    part.add(x[:, :6])
    torch.testing.assert_close(some.matrix(), part.matrix(), rtol=1e-5, atol=1e-5)
    assert some.tokens == part.tokens == 18


def test_a_token_counts_as_often_as_its_weight():
    x = torch.randn(2, 5, 4)
    twice, weighted = Hessian(4), Hessian(4)
    twice.add(torch.cat([x, x[:, :2]], 1))
    weighted.add(x, torch.tensor([2.0, 2, 1, 1, 1]).expand(2, 5))
    torch.testing.assert_close(weighted.total, twice.total, rtol=1e-5, atol=1e-5)


def test_the_diagonal_alone_is_that_of_the_matrix():
    x = torch.randn(2, 70, 4)
    full, diagonal = Hessian(4), Hessian(4, diagonal=True)
    full.add(x)
    diagonal.add(x)
    torch.testing.assert_close(diagonal.diagonal(), full.matrix().diagonal(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="diagonal=False"):
        diagonal.matrix()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_float(autocast):
    x = torch.randn(2, 300, 4).bfloat16()
    hessian = Hessian(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hessian.add(x)
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(hessian.matrix(), 2 * rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


CONVOLUTIONS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 1), dilation=2, padding="same", padding_mode="reflect"), (5, 4, 9, 8)),
    (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 6, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular"), (2, 4, 11)),
    (nn.Conv1d(4, 6, 5, groups=2), (2, 4, 11)),
    (nn.Linear(4, 6), (2, 3, 7, 4)),
    (nn.Linear(4, 6), (9, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_a_layer_is_its_flat_weight_times_the_rows_of_its_input(layer, shape):
    x = torch.randn(shape)
    rows, weight, groups = input_rows(layer, x), layer.weight.flatten(1), getattr(layer, "groups", 1)
    exact = layer(x)
    if isinstance(layer, nn.Linear):
        assert torch.equal(rows, x)
    else:
        grouped = weight.unflatten(0, (groups, -1))
        rows = rows if groups > 1 else rows.unsqueeze(1)
        out = torch.einsum("bgtf,gof->bgot", rows, grouped).flatten(1, 2) + layer.bias[:, None]
        torch.testing.assert_close(out.reshape(exact.shape), exact, rtol=1e-4, atol=1e-5)
    hessian = Hessian.of(layer)
    hessian.add(input_rows(layer, x))
    assert hessian.matrix().shape == (*([groups] if groups > 1 else []), weight.shape[1], weight.shape[1])
    outputs = exact.shape[-1] if isinstance(layer, nn.Linear) else exact.shape[1]
    assert hessian.tokens == exact.numel() // outputs


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="has no rows of inputs; leave it float with skip="):
        input_rows(nn.ConvTranspose2d(2, 2, 3), torch.randn(1, 2, 4, 4))
