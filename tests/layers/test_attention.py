"""Quantized attention equals torch's own until it is calibrated, and every door leads to it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.layers import AttentionSchemes, QuantAttention, quantize_attention, quantize_layer, restore
from lightning_quant.quantizers import Scheme

FLOAT = AttentionSchemes(None, None, None, None)
ASYM = Scheme.parse("int8_asym_tensor")
INT8 = AttentionSchemes(ASYM, ASYM, ASYM, ASYM)


def operands(length=5, source=7, heads=4, kv_heads=4, dim=6, batch=2):
    return (
        torch.randn(batch, heads, length, dim),
        torch.randn(batch, kv_heads, source, dim),
        torch.randn(batch, kv_heads, source, 3),
    )


ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(5, 7) > 0.4},
    "a row that sees nothing": {"attn_mask": torch.arange(5).view(5, 1) > torch.zeros(7)},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 7)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_equals_torch(arguments):
    q, k, v = operands()
    assert torch.allclose(
        QuantAttention(FLOAT)(q, k, v, **arguments), F.scaled_dot_product_attention(q, k, v, **arguments), atol=1e-5
    )


def test_grouped_queries_equal_torch():
    q, k, v = operands(heads=4, kv_heads=2)
    assert torch.allclose(
        QuantAttention(FLOAT)(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        atol=1e-5,
    )


class Attention(nn.Module):
    """What users write."""

    def __init__(self, calls=1, views=False):
        super().__init__()
        self.qkv, self.calls, self.views = nn.Linear(8, 24), calls, views

    def forward(self, x, *, flip=False):
        qkv = self.qkv(x)
        qkv = qkv.view(*x.shape[:2], 3, 2, 4) if self.views else qkv.unflatten(-1, (3, 2, 4))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        for _ in range(self.calls):
            v = F.scaled_dot_product_attention(q, k, v)
        return v.flip(0) if flip else v


def calibrate(module, run):
    from lightning_quant.quantizers import Quantizer

    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.observer = lambda x, quantizer=quantizer: quantizer.fit(x) or x
    run()
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.observer = None


def test_site_routes_only_its_own_calls_and_only_while_it_runs():
    site, x = Attention(), torch.randn(2, 5, 8)
    want = site(x, flip=True)
    quantize_attention(site, INT8)
    assert isinstance(site, Attention) and torch.allclose(site(x, flip=True), want, atol=1e-6)
    calibrate(site, lambda: site(x))
    got = site(x, flip=True)
    assert not torch.equal(got, want) and torch.allclose(got, want, atol=0.05)
    q, k, v = operands()
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    restore(site)
    assert (
        type(site) is Attention and not hasattr(site, "attention_quantizers") and torch.equal(site(x, flip=True), want)
    )


def test_each_call_of_a_forward_has_its_own_quantizers():
    site, x = Attention(calls=2), torch.randn(2, 5, 8)
    quantize_attention(site, INT8, fused=2)
    calibrate(site, lambda: site(x))
    first, second = (attention.value_quantizer.scale for attention in site.attention_quantizers)
    assert first != second  # the second call attends to the output of the first


def test_nested_sites_count_once():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            v = self.inner(x)
            return F.scaled_dot_product_attention(v, v, v)

    net, x = Outer(), torch.randn(2, 5, 8)
    quantize_attention(net.inner, INT8)
    quantize_attention(net, INT8)
    calibrate(net, lambda: net(x))
    inner = net.inner(x)
    seen = net.attention_quantizers[0].query_quantizer
    assert torch.isclose(seen.scale, (inner.max().clamp(min=0) - inner.min().clamp(max=0)) / 255, rtol=0.05)


def test_site_survives_pickle_and_deepcopy():
    site, x = Attention(), torch.randn(2, 5, 8)
    quantize_attention(site, INT8)
    calibrate(site, lambda: site(x))
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert type(twin) is type(site) and torch.equal(twin(x), site(x))
        restore(twin)
        assert type(twin) is Attention


@pytest.mark.parametrize("fullgraph", [True, False])
def test_site_compiles(fullgraph):
    site, x = (
        Attention(views=fullgraph),
        torch.randn(2, 5, 8),
    )  # dynamo breaks the graph at Tensor.unflatten under a mode
    quantize_attention(site, INT8)
    calibrate(site, lambda: site(x))
    with torch.no_grad():
        want = site(x)
        assert torch.allclose(torch.compile(site, backend="eager", fullgraph=fullgraph)(x), want, atol=1e-6)


MULTIHEAD = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "own key and value sizes": ({"kdim": 5, "vdim": 7}, {}),
    "extra tokens": (
        {"add_bias_kv": True, "add_zero_attn": True},
        {"key_padding_mask": torch.tensor([[False, False, True]] * 2)},
    ),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False, True, False], [False, False, True]])}),
    "mask": ({}, {"attn_mask": torch.randn(4, 3)}),
    "bool mask of all heads": ({}, {"attn_mask": (torch.rand(4, 4, 3) > 0.8) & torch.tensor([False, True, True])}),
    "both masks": ({}, {"attn_mask": torch.zeros(4, 3), "key_padding_mask": torch.tensor([[False, True, False]] * 2)}),
    "no maps": ({}, {"need_weights": False}),
    "maps of all heads": ({}, {"average_attn_weights": False}),
}


@pytest.mark.parametrize(("build", "call"), MULTIHEAD.values(), ids=MULTIHEAD)
def test_multihead_equals_torch(build, call):
    mha = nn.MultiheadAttention(8, 2, **build).eval()
    query, key, value = (
        torch.randn(4, 2, 8),
        torch.randn(3, 2, build.get("kdim", 8)),
        torch.randn(3, 2, build.get("vdim", 8)),
    )
    if build.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    want = mha(query, key, value, **call)
    quantize_layer(mha, Scheme.parse("int8_sym_channel"), ASYM)
    mha.add_attention(INT8)
    got = mha(query, key, value, **call)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


def test_multihead_unbatched_and_causal():
    mha, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(4, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    want = mha(x, x, x, attn_mask=causal, is_causal=True)[0]
    quantize_layer(mha, None, ASYM)
    assert torch.allclose(mha(x, x, x, attn_mask=causal, is_causal=True)[0], want, atol=1e-5)
    assert torch.allclose(mha(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0], want, atol=1e-5)


def test_multihead_quantizes_every_operand_and_comes_back():
    mha, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 4, 8)
    want = mha(x, x, x)[0]
    quantize_layer(mha, Scheme.parse("int8_sym_channel"), ASYM)
    mha.add_attention(INT8)
    mha.in_proj_weight_quantizer.fit(mha.in_proj_weight)
    calibrate(nn.ModuleList(mha.activation_quantizers().values()), lambda: mha(x, x, x))
    assert len(mha.activation_quantizers()) == 7 and all(q.calibrated for q in mha.activation_quantizers().values())
    got = mha(x, x, x)[0]
    assert not torch.equal(got, want) and torch.allclose(got, want, atol=0.05)
    restore(mha)
    assert type(mha) is nn.MultiheadAttention and torch.allclose(mha(x, x, x)[0], want, atol=1e-6)


def test_encoder_layer_keeps_off_its_fused_path():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 4, 8)
    with torch.inference_mode():
        want = layer(x)
        ran = []
        quantize_layer(layer.linear1, Scheme.parse("int8_sym_channel"), None).register_forward_hook(
            lambda *_: ran.append(1)
        )
        quantize_attention(layer, FLOAT, fused=0)
        assert torch.allclose(layer(x), want, atol=1e-5) and ran
