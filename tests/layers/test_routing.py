"""Calls that no layer's forward shows are routed to the quantizers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.layers import AttentionSchemes, quantize_attention, quantize_layer, restore
from lightning_quant.quantizers import Quantizer, Scheme

ASYM, CHANNEL = Scheme.parse("int8_asym_tensor"), Scheme.parse("int8_sym_channel")
INT8, FLOAT = AttentionSchemes(ASYM, ASYM, ASYM, ASYM), AttentionSchemes(None, None, None, None)


class Spelled(nn.Module):
    """Attention as older models write it."""

    def __init__(self, multiply=torch.matmul):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.softmax, self.multiply = nn.Softmax(-1), multiply

    def forward(self, x):
        x = x + torch.matmul(x.transpose(1, 2), x).mean()
        scores = self.multiply(self.q(x), self.k(x).transpose(1, 2)) / 3
        return self.multiply(self.softmax(scores), self.v(x))


def einsum(a, b):
    return torch.einsum("bij,bjk->bik", a, b)


def baddbmm(a, b):
    return torch.baddbmm(torch.ones(1), a, b)


def quantizers(module):
    return {name: q for name, q in module.named_modules() if isinstance(q, Quantizer)}


def fit(module, run):
    for quantizer in quantizers(module).values():
        quantizer.observer = lambda x, quantizer=quantizer: quantizer.fit(x) or x
    run()
    for quantizer in quantizers(module).values():
        quantizer.observer = None


@pytest.mark.parametrize("multiply", [torch.matmul, torch.bmm, torch.Tensor.matmul, einsum, baddbmm])
def test_spelled_attention(multiply):
    site, x = Spelled(multiply).eval(), torch.randn(2, 5, 8)
    want = site(x)
    quantize_attention(site, INT8, fused=0, spelled=[(1, 0, 2)])
    assert torch.equal(site(x), want)
    fit(site, lambda: site(x))
    assert len(quantizers(site)) == 4 and all(q.calibrated for q in quantizers(site).values())
    with torch.no_grad():  # by hand
        y = x + torch.matmul(x.transpose(1, 2), x).mean()
        attention = site.attention_quantizers[0]
        q, k, v = attention.query_quantizer(site.q(y)), attention.key_quantizer(site.k(y).transpose(1, 2)), site.v(y)
        by_hand = multiply(
            attention.probabilities_quantizer((multiply(q, k) / 3).softmax(-1)), attention.value_quantizer(v)
        )
        assert torch.equal(site(x), by_hand) and not torch.equal(by_hand, want)
        assert torch.allclose(by_hand, want, atol=0.1)
        for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site)) if multiply is torch.matmul else site):
            assert torch.equal(twin(x), by_hand)
    restore(site)
    assert type(site) is Spelled and not {"spelled", "functional"} & set(site.__dict__) and torch.equal(site(x), want)


def test_spelled_attention_compiles():
    site, x = Spelled().eval(), torch.randn(2, 5, 8)
    quantize_attention(site, INT8, fused=0, spelled=[(1, 0, 2)])
    fit(site, lambda: site(x))
    with torch.no_grad():
        assert torch.allclose(torch.compile(site, backend="eager")(x), site(x), atol=1e-6)


class ReadsWeight(nn.Module):
    """As BEiT: the layer's forward is not called, and the bias is another one."""

    def __init__(self, own_bias):
        super().__init__()
        self.qkv = nn.Linear(8, 6, bias=own_bias)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.linear(x, weight=self.qkv.weight, bias=self.bias)


@pytest.mark.parametrize("own_bias", [True, False])
def test_a_weight_that_is_read_directly(own_bias):
    net, x = ReadsWeight(own_bias), torch.randn(3, 8)
    want = net(x)
    layer = quantize_layer(net.qkv, CHANNEL, ASYM)
    quantize_attention(net, FLOAT, fused=0, functional=["qkv"])
    assert torch.allclose(net(x), want, atol=1e-6)
    layer.weight_quantizer.fit(layer.weight)
    layer.input_quantizer.fit(x)
    by_hand = F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), net.bias)
    assert torch.allclose(net(x), by_hand, atol=1e-6) and not torch.allclose(by_hand, want, atol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_runs_its_quantized_layers(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.inference_mode():
        want = net(x, src_key_padding_mask=padding)
    ran = []
    for block in net.layers:
        quantize_layer(block.linear1, CHANNEL, None).register_forward_hook(lambda *_: ran.append(1))
        quantize_layer(block.self_attn, CHANNEL, ASYM).add_attention(INT8)
        quantize_attention(block, FLOAT, fused=0)
    quantize_attention(net, FLOAT, fused=0)
    with torch.inference_mode():
        got = net(x, src_key_padding_mask=padding)
    assert (
        len(ran) == 2
        and torch.allclose(got[0], want[0], atol=1e-5)
        and torch.allclose(got[1, :2], want[1, :2], atol=1e-5)
    )
