"""Quantized attention with masks, dropout and shared keys: the same thing said in two ways gives the same answer."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.layers import AttentionSchemes, QuantAttention
from lightning_quant.quantizers import Scheme

LENGTH, SOURCE, HEADS, KV_HEADS, WIDTH = 5, 7, 4, 2, 6


def operands(kv_heads=HEADS):
    return (
        torch.randn(2, HEADS, LENGTH, WIDTH),
        torch.randn(2, kv_heads, SOURCE, WIDTH),
        torch.randn(2, kv_heads, SOURCE, 3),
    )


def calibrated(query, key, value, **arguments):
    """Quantized attention whose four operands have known scales."""
    scheme = Scheme.parse("int8_asym_tensor")
    attention = QuantAttention(AttentionSchemes(scheme, scheme, scheme, scheme))
    for quantizer in attention.activation_quantizers().values():
        quantizer.observer = lambda x, quantizer=quantizer: quantizer.fit(x) or x
    attention(query, key, value, **arguments)
    for quantizer in attention.activation_quantizers().values():
        quantizer.observer = None
    assert all(quantizer.calibrated for quantizer in attention.activation_quantizers().values())
    return attention


VISIBLE = torch.ones(LENGTH, SOURCE, dtype=torch.bool).tril()
HIDDEN = torch.zeros(LENGTH, SOURCE).masked_fill(~VISIBLE, -torch.inf)
SAID_TWICE = {
    "boolean and added": ({"attn_mask": VISIBLE}, {"attn_mask": HIDDEN}),
    "boolean and very small": ({"attn_mask": VISIBLE}, {"attn_mask": HIDDEN.clamp(min=-1e30)}),
    "causal and boolean": ({"is_causal": True}, {"attn_mask": VISIBLE}),
    "no mask and one that hides nothing": ({}, {"attn_mask": torch.ones(1, 1, LENGTH, SOURCE, dtype=torch.bool)}),
    "no dropout and dropout of nothing": ({}, {"dropout_p": 0.0}),
    "the usual scale": ({}, {"scale": WIDTH**-0.5}),
}


@pytest.mark.parametrize(("one", "other"), SAID_TWICE.values(), ids=SAID_TWICE)
def test_two_ways_to_say_the_same(one, other):
    q, k, v = operands()
    attention = calibrated(q, k, v, **one)
    answer = attention(q, k, v, **one)
    assert torch.equal(attention(q, k, v, **other), answer)
    exact = F.scaled_dot_product_attention(q, k, v, **one)
    assert 0 < (answer - exact).abs().max() < 0.05


def test_what_a_mask_hides_does_not_matter():
    q, k, v = operands()
    attention = calibrated(q, k, v, attn_mask=VISIBLE)
    want = attention(q, k, v, attn_mask=VISIBLE)
    k[..., LENGTH:, :], v[..., LENGTH:, :] = 1e3, -1e3  # the last two, which no query sees
    assert torch.equal(attention(q, k, v, attn_mask=VISIBLE), want)


def test_keys_and_values_that_heads_share_are_rounded_as_if_they_were_repeated():
    q, k, v = operands(KV_HEADS)
    attention = calibrated(q, k, v, enable_gqa=True)
    repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v)]
    assert torch.equal(attention(q, k, v, enable_gqa=True), attention(q, *repeated))


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_takes_whole_probabilities_and_makes_up_for_them(dropout):
    """With the identity for values the answer is the map itself."""
    q, k = torch.randn(8, HEADS, LENGTH, WIDTH), torch.randn(8, HEADS, SOURCE, WIDTH)
    v = torch.eye(SOURCE).expand(8, HEADS, SOURCE, SOURCE)
    attention = calibrated(q, k, v)
    exact, dropped = attention(q, k, v), attention(q, k, v, dropout_p=dropout)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], exact[kept] / (1 - dropout + (dropout == 1)), atol=1e-6)
    assert abs(kept[exact != 0].float().mean() - (1 - dropout)) < 0.05
