"""The roofline's closed forms, on LLaMA-2-7B by hand and on small models as they are traced."""

import pytest
import torch
from torch import nn

from lightning_quant.graph import Bits, Machine, Operator, kv_bytes, machine_table, trace_operators, work
from tests.language import HEADS, HIDDEN, KV_HEADS, WIDTH, WORDS, llama, tokens

A6000 = Machine.named("A6000")


def linear(inputs=4096, outputs=4096, name="q"):
    return Operator(name, "linear", 2 * inputs * outputs, inputs * outputs, inputs, outputs)


def test_llama_2_7b_by_its_published_numbers():
    (prefill,) = work([linear()], A6000, "prefill", 1, 2048)
    assert (round(prefill.ops / 1e9, 1), round(prefill.bytes / 1e6), prefill.intensity) == (68.7, 67, 1024)
    (decode,) = work([linear()], A6000, "decode", 1, 2048)
    assert (round(decode.ops / 1e6, 1), round(decode.bytes / 1e6, 1), round(decode.intensity, 2)) == (33.6, 33.6, 1.0)
    assert (prefill.bound, decode.bound) == ("compute", "memory")
    attention = [Operator("a", "attention", heads=32, kv_heads=32, head_size=128)] * 32
    assert round(kv_bytes(attention, 1, 2048) / 1e9, 2) == 1.07


def test_what_bits_buy_in_prefill_and_in_decode():
    def seconds(stage, bits):
        return work([linear()], A6000, stage, 1, 2048, {"q": bits})[0].seconds

    full = Bits()
    for bits in (8, 4, 2):
        assert seconds("decode", full) / seconds("decode", Bits(bits)) == pytest.approx(16 / bits, rel=0.01)
        assert seconds("prefill", Bits(bits)) == seconds("prefill", full)
    assert seconds("prefill", full) / seconds("prefill", Bits(8, 8, 8)) == pytest.approx(309.7 / 154.8)


def test_intensity_grows_with_the_batch_until_the_ridge():
    decoded = [work([linear()], A6000, "decode", batch, 1)[0] for batch in (1, 2, 4, 1024)]
    assert decoded[1].intensity / decoded[0].intensity == pytest.approx(2, rel=0.01)
    assert [each.bound for each in decoded] == ["memory", "memory", "memory", "compute"]
    assert A6000.attainable(decoded[-1].intensity, False) == A6000.peak


def test_fused_attention_moves_less_and_computes_the_same():
    attention = [Operator("a", "attention", heads=32, kv_heads=8, head_size=128)]
    fused, apart = (work(attention, A6000, "prefill", 2, 512, fused_attention=fused) for fused in (True, False))
    assert sum(w.ops for w in fused) == sum(w.ops for w in apart)
    assert sum(w.bytes for w in fused) < 0.2 * sum(w.bytes for w in apart)


def test_what_is_traced_is_the_closed_form():
    model, ids = llama(), tokens(3 * 7).view(3, 7)
    traced = trace_operators(model, lambda: model(ids), samples=3)
    assert (traced.samples, traced.tokens) == (3, 7)
    size = WIDTH // HEADS
    b, t = 5, 11
    layer = {
        "linear": 2 * b * t * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * size + 3 * WIDTH * HIDDEN),
        "qk": 2 * b * t * t * size * HEADS,
        "softmax": 5 * b * t * t * HEADS,
        "sv": 2 * b * t * t * size * HEADS,
        "norm": 2 * 7 * WIDTH * b * t,
        "elementwise": 2 * WIDTH * b * t + 2 * HIDDEN * b * t,
    }
    got: dict[str, float] = {}
    for each in work(traced.operators, A6000, "prefill", b, t):
        got[each.kind] = got.get(each.kind, 0) + each.ops
    want = {kind: 2 * ops for kind, ops in layer.items()}
    want["norm"] += 7 * WIDTH * b * t
    want["linear"] += 2 * b * WIDTH * WORDS  # the head, for one token
    assert got == pytest.approx(want)
    attention = [o for o in traced.operators if o.kind == "attention"]
    assert [(o.heads, o.kv_heads, o.head_size) for o in attention] == [(HEADS, KV_HEADS, size)] * 2


def test_a_vision_transformer_is_traced_like_its_costs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.fc(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    net = Net()
    traced = trace_operators(net, lambda: net(torch.ones(2, 3, 12, 16)), samples=2)
    ops = {w.name: w.ops for w in work(traced.operators, A6000, "forward", 2, traced.tokens)}
    assert ops == pytest.approx({"stem": 2 * 2 * 12 * 8 * 48, "fc": 2 * 2 * 12 * 8 * 16, "head": 2 * 2 * 16 * 5})


def test_machines_are_a_table():
    assert len(machine_table()) == 9 and Machine.named("H100-SXM").peak == pytest.approx(989.5e12)
    with pytest.raises(ValueError, match="A100-80G"):
        Machine.named("abacus")
