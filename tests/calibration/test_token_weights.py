"""The attention that tokens receive, however it is computed."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.calibration import attention_received, column_sums, token_weights

B, H, T, D = 2, 3, 11, 4


def operands(kv=H):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, T, D, generator=generator) for heads in (H, kv, kv)]


def whole_map(q, k, mask=None):
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT / D**0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


@pytest.mark.parametrize("queries", [1, 4, 100])
def test_chunks_of_queries_add_up_to_the_whole_map(queries):
    q, k, _ = operands(kv=1)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    sums = column_sums(q, k, is_causal=True, enable_gqa=True, queries=queries)
    torch.testing.assert_close(sums, whole_map(q, k, causal).sum(-2), rtol=1e-5, atol=1e-6)
    padding = torch.arange(T) < 7
    sums = column_sums(q, k, attn_mask=padding.expand(B, 1, 1, T), enable_gqa=True, queries=queries)
    torch.testing.assert_close(sums, whole_map(q, k, padding).sum(-2), rtol=1e-5, atol=1e-6)


def test_fused_and_spelled_out_attention_are_seen_alike():
    q, k, v = operands()
    fused = attention_received(lambda: F.scaled_dot_product_attention(q, k, v), B)
    spelled = attention_received(lambda: (q @ k.mT / D**0.5).softmax(-1) @ v, B)
    merged = attention_received(lambda: torch.softmax((q @ k.mT / D**0.5).flatten(0, 1), dim=-1), B)
    torch.testing.assert_close(fused, whole_map(q, k).sum((1, 2)))
    torch.testing.assert_close(spelled, fused)
    torch.testing.assert_close(merged, fused)
    torch.testing.assert_close(fused.sum(1), torch.full((B,), float(H * T)))
    assert attention_received(lambda: F.softmax(torch.randn(5, 4), -1), 1) is None


def test_weights_have_a_mean_of_one_and_padding_has_none():
    received = torch.rand(3, 8) + 0.1
    received[0, 5:] = 0
    weights = token_weights(received, least=0.1)
    assert not weights[0, 5:].any() and torch.equal(weights[0] > 0, received[0] > 0)
    torch.testing.assert_close(weights.sum(1), torch.tensor([5.0, 8.0, 8.0]))
    torch.testing.assert_close(weights[1].max() / weights[1].min(), torch.tensor(10.0))
    assert torch.equal(weights[1].argsort(), received[1].argsort())
    torch.testing.assert_close(token_weights(7 * received, least=0.1), weights)


def test_tokens_that_are_alike_weigh_one():
    assert torch.equal(token_weights(torch.full((2, 4), 3.0)), torch.ones(2, 4))
    assert torch.allclose(token_weights(torch.rand(2, 4) + 1, power=0), torch.ones(2, 4))
