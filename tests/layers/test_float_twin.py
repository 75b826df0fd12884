"""A quantized model inside `as_float` is its float twin."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import PostTrainingQuantization, RepQViT
from lightning_quant.layers import AttentionSchemes, as_float, quantize_attention, quantize_layer
from lightning_quant.quantizers import Quantizer, Scheme
from tests.models import Sequences, TinyTransformer, validate

INT4 = Scheme.parse("int4_asym_tensor")


def quantizers(model):
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def quantized(method):
    model = TinyTransformer().eval()
    exact = copy.deepcopy(model)
    validate(model, method)
    return model, exact, Sequences().val.tensors[0]


@pytest.mark.parametrize("activations", ["int4", "fp8_e4m3", "int8_token_dynamic", None])
def test_is_the_float_model_bit_for_bit(activations):
    model, exact, x = quantized(PostTrainingQuantization(weights="int4", activations=activations))
    before = model(x)
    with as_float(model):
        assert torch.equal(model(x), exact(x))
    assert torch.equal(model(x), before) and not torch.equal(before, exact(x))


def test_is_the_float_model_up_to_rounding_where_norms_were_folded():
    model, exact, x = quantized(RepQViT(weights="int4", activations="int4"))
    with as_float(model):
        assert torch.allclose(model(x), exact(x), atol=1e-5) and not torch.equal(model(x), exact(x))


class SpelledOut(nn.Module):
    """Attention as older models write it, a convolution, and a layer whose weight is read by a functional call."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 24)

    def forward(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


MODELS = {
    "spelled out": (SpelledOut, ["conv"], {"": {"fused": 0, "spelled": [(0, 0, 1)], "functional": ["qkv"]}}),
    "multihead": (Attends, ["attention"], {"attention": {}}),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        ["self_attn", "self_attn.out_proj", "linear1", "linear2"],
        {"self_attn": {}, "": {"fused": 0}},
    ),
}


@pytest.mark.parametrize(("build", "layers", "sites"), MODELS.values(), ids=[name.replace(" ", "_") for name in MODELS])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])  # torch's fused paths need no_grad
def test_every_way_to_attend_is_torch_again(build, layers, sites, mode):
    model = build().eval()
    exact, x = copy.deepcopy(model), torch.randn(2, 5, 8)
    names = dict.fromkeys([*layers, *(name for site in sites.values() for name in site.get("functional", ()))])
    for name in names:
        quantize_layer(model.get_submodule(name), Scheme.parse("int4_sym_channel"), INT4)
    for name, how in sites.items():
        quantize_attention(model.get_submodule(name), AttentionSchemes(INT4, INT4, INT4, INT4), **how)
    for quantizer in quantizers(model):
        low, high = (-1.0, 1.0) if quantizer.scheme.granularity == "tensor" else (-torch.ones(1), torch.ones(1))
        quantizer.freeze(torch.as_tensor(low), torch.as_tensor(high))
    with mode():
        assert not torch.equal(model(x), exact(x))
        with as_float(model):
            assert torch.equal(model(x), exact(x))
        assert not torch.equal(model(x), exact(x))


def test_leaves_the_state_dict_and_the_classes_alone():
    model, _, _ = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    before, classes = model.state_dict(), [type(module) for module in model.modules()]
    with as_float(model):
        inside = model.state_dict()
    assert list(before) == list(inside) == list(model.state_dict())
    assert all(torch.equal(value, inside[key]) for key, value in before.items())
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
def test_an_exception_gives_back_what_was_there(exception):
    model, _, x = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    want, observed = model(x), quantizers(model)[0]
    seen = []
    observed.observer = lambda x: seen.append(x) or x
    observer, classes = observed.observer, [type(module) for module in model.modules()]

    def fail():
        with as_float(model):
            model(x)
            raise exception

    with pytest.raises(exception):
        fail()
    assert not seen and observed.observer is observer
    assert all(quantizer.observer is None for quantizer in quantizers(model) if quantizer is not observed)
    assert [type(module) for module in model.modules()] == classes
    observed.observer = None
    assert torch.equal(model(x), want)


def test_nests():
    model, exact, x = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    want = model(x)
    with as_float(model):
        with as_float(model.blocks[0]), as_float(model):
            assert torch.equal(model(x), exact(x))
        assert torch.equal(model(x), exact(x))
    assert torch.equal(model(x), want)


def test_a_part_alone():
    model, exact, x = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    with as_float(model.embed):
        assert torch.equal(model.embed(x), exact.embed(x))
        assert not torch.equal(model(x), exact(x))


def test_a_float_model_is_left_alone():
    model, x = TinyTransformer().eval(), Sequences().val.tensors[0]
    want = model(x)
    with as_float(model):
        assert torch.equal(model(x), want)


def test_gradients_are_those_of_the_float_model():
    model, exact, x = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    with as_float(model):
        model(x).square().sum().backward()
    exact(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_compiled_part_follows():
    model, exact, x = quantized(PostTrainingQuantization(weights="int4", activations="int4"))
    want = model(x)
    compiled = torch.compile(model.blocks[0], backend="eager")
    first = compiled(x)
    with as_float(model):
        assert torch.equal(compiled(x), exact.blocks[0](x))
    assert torch.equal(compiled(x), first) and torch.equal(model(x), want)
