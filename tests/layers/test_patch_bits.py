"""Patch-wise bits: which tokens keep them, and that nothing is left behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.layers import AttentionSchemes, PatchBits, QuantAttention, as_float, quantize_attention
from lightning_quant.layers.patch_bits import coarser, important_tokens
from lightning_quant.quantizers import Scheme, UniformQuantizer


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Twice(nn.Module):
    """Two attentions, one behind the other: (B, H, T, d)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attend(), Attend()

    def forward(self, x):
        return self.second(self.first(x) + x)


def quantized(x):
    net = Twice()
    four = Scheme.parse("int4_asym_tensor")
    for site in (net.first, net.second):
        quantize_attention(site, AttentionSchemes(four, four, four, Scheme.parse("logsqrt2_4")))
    for quantizers in (net.first.attention_quantizers[0], net.second.attention_quantizers[0]):
        for quantizer in quantizers.activation_quantizers().values():
            quantizer.freeze(
                torch.tensor(-4.0 if isinstance(quantizer, UniformQuantizer) else 0.0),
                torch.tensor(4.0 if isinstance(quantizer, UniformQuantizer) else 1.0),
            )
    return net


X = torch.randn(3, 2, 7, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("share", "always"), [(0.5, 1), (0.3, 2), (0.01, 3), (1.0, 0)])
def test_so_many_tokens_are_important_and_the_first_among_them(share, always):
    maps = torch.rand(5, 3, 11, 11).softmax(-1)
    mask = important_tokens(maps, share, always)
    assert mask.sum(1).tolist() == [max(math.ceil(share * 11), always)] * 5 and bool(mask[:, :always].all())


def test_a_coarser_quantizer_covers_the_same_range():
    fine = UniformQuantizer("int6_asym_tensor")
    fine.freeze(torch.tensor(-1.0), torch.tensor(2.0))
    coarse = coarser(fine, 4)
    ends = torch.tensor([-9.0, 9.0])
    assert torch.allclose(coarse(ends), fine(ends), atol=float(coarse.scale)) and coarse.scale > 4 * fine.scale


def test_with_all_tokens_important_nothing_changes():
    net = quantized(X)
    want = net(X)
    with PatchBits(share=1.0).at_work(net):
        assert torch.equal(net(X), want)


def test_unimportant_tokens_of_the_second_attention_are_coarser_and_nothing_stays_behind():
    net = quantized(X)
    want, exact = net(X), None
    with as_float(net):
        exact = net(X)
    rows = []
    handle = net.second.attention_quantizers[0].value_quantizer.register_forward_hook(lambda *call: rows.append(call))
    with PatchBits(share=0.5).at_work(net):
        coarse = net(X)
        with as_float(net):
            assert torch.equal(net(X), exact)
    handle.remove()
    quantizer, *_ = rows[0]
    assert not torch.equal(coarse, want) and torch.equal(net(X), want)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    assert quantizer.scheme.bits == 4


def test_the_mask_is_that_of_the_attention_before():
    net, patches = quantized(X), PatchBits(share=0.5)
    maps, values = [], []
    first, second = net.first.attention_quantizers[0], net.second.attention_quantizers[0]
    with patches.at_work(net):
        handles = [
            first.probabilities_quantizer.register_forward_hook(lambda m, args, out: maps.append(args[0])),
            second.value_quantizer.register_forward_hook(lambda m, args, out: values.append((args[0], out))),
        ]
        net(X)
    for handle in handles:
        handle.remove()
    mask = important_tokens(maps[0], 0.5)[:, None, :, None].expand_as(X)
    x, out = values[0]
    fine, coarse = second.value_quantizer(x), coarser(second.value_quantizer, 2)(x)
    assert torch.equal(out[mask], fine[mask]) and torch.equal(out[~mask], coarse[~mask])


def test_attention_over_other_tokens_keeps_its_bits():
    net, patches = quantized(X), PatchBits(share=0.5)
    with patches.at_work(net):
        patches.following = torch.zeros(3, 9, dtype=torch.bool)  # of nine tokens
        fine = QuantAttention.forward(net.second.attention_quantizers[0], X, X, X)
    assert torch.equal(fine, net.second.attention_quantizers[0](X, X, X))
