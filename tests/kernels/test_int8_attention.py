"""Attention of integers against the simulated attention that it stands for."""

import copy
import pickle

import pytest
import torch

from lightning_quant.kernels import codes, int8_attention
from lightning_quant.kernels.attention_door import KernelAttention, attend_on, simulate_attention
from lightning_quant.kernels.codes import Grid
from lightning_quant.kernels.int8_attention import Int8Attention
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import AttentionSpec
from lightning_quant.layers import AttentionSchemes, QuantAttention
from lightning_quant.quantizers import Scheme, UniformQuantizer


def operands(queries=(2, 3, 13, 20), keys=(2, 3, 17, 20), values=24):
    q, k, v = torch.randn(queries) + 0.4, torch.randn(keys) - 0.3, torch.randn(*keys[:-1], values) + 0.5
    return q * 2, k, v


def calibrated(q, k, v, formats="int8_asym_tensor", probabilities=None):
    scheme = Scheme.parse(formats)
    schemes = AttentionSchemes(scheme, scheme, scheme, Scheme.parse(probabilities or formats))
    attention = QuantAttention(schemes).eval()
    for operand, x in zip(("query", "key", "value"), (q, k, v), strict=True):
        getattr(attention, f"{operand}_quantizer").fit(x * 0.9)  # some are clipped
    attention.probabilities_quantizer.freeze(torch.tensor(0.0), torch.tensor(0.7))
    return attention


def assert_same(attention, *args, **kwargs):
    """The same to the bit, as far as the simulated one multiplies integers."""
    simulated = attention(*args, **kwargs)
    assert choose(AttentionSpec.of(attention)).kernel is Int8Attention
    attend_on(attention, Int8Attention.of(attention))
    out = attention(*args, **kwargs)
    assert out.dtype == simulated.dtype and out.shape == simulated.shape
    if out.dtype == torch.float32 and attention.probabilities_quantizer.kind == "int":
        assert torch.equal(out, simulated)
    else:
        assert (out - simulated).norm() <= (1e-6 if out.dtype == torch.float32 else 1e-2) * simulated.norm()
    simulate_attention(attention)
    assert type(attention) is QuantAttention and torch.equal(attention(*args, **kwargs), simulated)


FORMATS = ["int8_asym_tensor", "int8_sym_tensor", "uint8_asym_tensor", "int7_asym_tensor", "int4_asym_tensor"]


@pytest.fixture(params=[(2**18, 2**19), (40, 0), (2**18, 0)], ids=["as it is", "in pieces", "one by one"], autouse=True)
def sizes(request, monkeypatch):
    monkeypatch.setattr(int8_attention, "PIECE", request.param[0])
    monkeypatch.setattr(int8_attention, "ONE_BY_ONE", request.param[1])


@torch.no_grad()
@pytest.mark.parametrize("probabilities", [None, "uint8_asym_tensor", "log2_4", "logsqrt2_4"])
@pytest.mark.parametrize("formats", FORMATS)
def test_it_is_what_was_simulated(formats, probabilities):
    q, k, v = operands()
    assert_same(calibrated(q, k, v, formats, probabilities), q, k, v)


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(13, 17) > 0.4,
        torch.randn(2, 1, 13, 17),
        (torch.arange(17) < torch.tensor([[17], [9]]))[:, None, None],  # lengths
        torch.zeros(2, 3, 13, 17, dtype=torch.bool),  # nothing to see: 0, not NaN
    ],
    ids=["bool", "float", "lengths", "nothing"],
)
def test_masks(mask):
    q, k, v = operands()
    assert_same(calibrated(q, k, v), q, k, v, attn_mask=mask)


@torch.no_grad()
def test_causal_grouped_broadcast_scaled_and_empty():
    q, k, v = operands((2, 4, 13, 20), (2, 2, 17, 20))
    attention = calibrated(q, k, v)
    assert_same(attention, q, k, v, enable_gqa=True, is_causal=True, scale=0.3)
    assert_same(attention, q[:, :2], k[:1], v[:1])
    assert_same(attention, q[0, 0], k[0, 0], v[0, 0])
    assert_same(attention, q[:0, :2], k[:0], v[:0])
    assert_same(attention.bfloat16(), *(x[:, :2].bfloat16() for x in (q, k, v)))


@torch.no_grad()
def test_transposed_heads_as_models_hand_them_in():
    qkv = torch.randn(2, 13, 3, 4, 20).permute(2, 0, 3, 1, 4)
    assert_same(calibrated(*qkv), *qkv)


@pytest.mark.parametrize(
    ("formats", "why"),
    [
        ("int8_token", "its query is int8_sym_token_dynamic, not of at most 8 bits with one scale"),
        ("int16", "its query is int16"),
        ("fp8_e4m3", "its query is fp8_e4m3"),
    ],
)
def test_other_formats_are_refused(formats, why):
    scheme = Scheme.parse(formats)
    found = choose(AttentionSpec.of(QuantAttention(AttentionSchemes(scheme, scheme, scheme, None))))
    assert not found.kernel.low_bit and why in found.why_not
    scheme = Scheme.parse("int8")
    found = choose(AttentionSpec.of(QuantAttention(AttentionSchemes(scheme, None, scheme, None))))
    assert "its key is float" in found.why_not
    spelled = AttentionSpec.of(QuantAttention(AttentionSchemes(scheme, scheme, scheme, scheme)), spelled=True)
    assert "spelled out" in choose(spelled).why_not


def test_a_processor_that_cuts_sums_off_is_found_out(monkeypatch):
    def cut(left, right):
        return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(torch, "_int_mm", cut)
    int8_attention.sums_are_exact.cache_clear()
    try:
        assert not int8_attention.sums_are_exact()
        q, k, v = operands()
        assert "not exact" in choose(AttentionSpec.of(calibrated(q, k, v))).why_not
    finally:
        int8_attention.sums_are_exact.cache_clear()


def test_copies_are_simulated_unless_the_kernel_is_kept():
    q, k, v = operands()
    for keep, kind in ((False, QuantAttention), (True, KernelAttention)):
        attention = calibrated(q, k, v)
        before = list(attention.state_dict())
        attend_on(attention, Int8Attention.of(attention), keep)
        answer = attention(q, k, v)
        assert list(attention.state_dict()) == before
        for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert type(twin) is kind
            torch.testing.assert_close(twin(q, k, v), answer, rtol=1e-2, atol=1e-2)
        simulate_attention(attention)
        assert type(attention) is kind


@pytest.mark.parametrize("scheme", ["int8_asym_tensor", "int8_sym_tensor", "uint8_asym_tensor", "uint3_asym_tensor"])
@pytest.mark.parametrize("lo", [-1.0, -200.0, 0.0])
def test_the_bytes_are_the_codes_of_the_quantizer(scheme, lo):
    quantizer = UniformQuantizer(scheme)
    quantizer.freeze(torch.tensor(lo), torch.tensor(3.0))
    grid, steps = Grid.of(quantizer), torch.arange(-300, 600) / 2  # half of them are ties
    x = torch.cat([steps * quantizer.scale, torch.tensor([-torch.inf, torch.inf, 0.0, 1e30])])
    expected = quantizer.encode(x)
    assert torch.equal(grid.unsigned(x).int(), expected)
    assert torch.equal(grid.signed(x).int() - grid.offset - grid.lowest, expected)
    assert torch.equal(grid.signed_(x.clone(), torch.empty_like(x, dtype=torch.int8)), grid.signed(x))


def test_large_inputs_are_worked_on_piece_by_piece_whether_or_not_gradients_are_asked_for(monkeypatch):
    quantizer, x = UniformQuantizer("int8_asym_tensor"), torch.randn(3, 50, 7, requires_grad=True)
    quantizer.fit(x)
    at_once = Grid.of(quantizer).unsigned(x)
    monkeypatch.setattr(codes, "PIECE", 100)
    assert torch.equal(Grid.of(quantizer).unsigned(x), at_once)
    assert torch.equal(Grid.of(quantizer).unsigned(x.transpose(0, 1)), at_once.transpose(0, 1))
