"""Maps and values are shown once, unrounded, and the quantizers are left alone."""

import pytest
import torch

from lightning_quant.calibration import seen_maps
from lightning_quant.layers import AttentionSchemes, QuantAttention
from lightning_quant.quantizers import Scheme


@pytest.fixture
def call():
    torch.manual_seed(0)
    attention = QuantAttention(AttentionSchemes(*[Scheme.parse("uint3_asym")] * 4))
    for quantizer in attention.activation_quantizers().values():
        quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    return attention


def test_the_first_map_and_its_values(call):
    q, k, v = torch.rand(2, 5, 4), torch.rand(2, 6, 4), torch.rand(2, 6, 3)
    want, seen = call(q, k, v), []
    with seen_maps([call], lambda *one: seen.append(one)):
        first, second = call(q, k, v), call(q, k, 2 * v)
    torch.testing.assert_close(first, want)  # quantized all the while
    assert (second - want).norm() > 0.1 * want.norm()
    ((owner, maps, values),) = seen
    assert owner is call and torch.equal(values, v)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(call.probabilities_quantizer(maps) @ call.value_quantizer(values), want)


def test_nothing_is_left_behind_after_an_exception(call):
    with pytest.raises(KeyboardInterrupt), seen_maps([call], lambda *one: None):
        raise KeyboardInterrupt
    assert all(quantizer.observer is None for quantizer in call.activation_quantizers().values())
