"""RepQ-ViT does what its paper says, layer by layer and against a second implementation."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import erf, softmax
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import RepQViT
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import LogQuantizer, RangeRule, UniformQuantizer, build_quantizer
from tests.models import Block, Sequences, TinyTransformer, trainer, validate

FOLDED = [f"blocks.{block}.{linear}" for block in range(2) for linear in ("qkv", "fc1")]
PERCENTILES = RangeRule.parse("percentile_mse")


class TinyViT(L.LightningModule):
    """A convolutional stem, two blocks, a final norm and a head."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(bias=bias) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.norm(self.blocks(self.stem(images).flatten(2).transpose(1, 2)))[:, 0])

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).mean(), batch_size=len(batch))


def images(samples=40):
    return torch.randn(samples, 3, 12, 8, generator=torch.Generator().manual_seed(0))


def quantized_vit(bias=True, **arguments):
    torch.manual_seed(0)
    model, callback = TinyViT(bias), RepQViT(**arguments)
    trainer(callback).validate(model, DataLoader(list(images()), batch_size=7), verbose=False)
    return model.eval()


def quantized(bias=True, **arguments):
    model = TinyTransformer(bias)
    validate(model, RepQViT(**arguments))
    return model.eval()


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}


def state_of(quantizer):
    return [getattr(quantizer, name) for name in quantizer.state_names]


# ---------------------------------------------------------------- what stands after calibration


@pytest.mark.parametrize("bias", [True, False])
def test_activations_have_one_scale_and_an_integer_zero_point_each(bias):
    layers = layers_of(quantized(bias))
    assert len(layers) == 10
    for name, layer in layers.items():
        quantizer = layer.input_quantizer
        assert str(quantizer.scheme) == "int4_asym_tensor", name
        assert quantizer.scale.shape == quantizer.zero_point.shape == (), name
        assert quantizer.scale.dtype == torch.float32 and quantizer.scale > 0
        assert torch.equal(quantizer.zero_point, quantizer.zero_point.round()), name
        assert bool(layer.folded) == (name in FOLDED), name


def test_zero_points_stay_fractional_as_in_the_published_code():
    layers = layers_of(quantized(round_zero_point=False))
    for name, layer in layers.items():
        zero_point = layer.input_quantizer.zero_point
        assert torch.equal(zero_point, zero_point.round()) == (name not in FOLDED), name


def test_weights_have_one_scale_per_output_channel():
    for name, layer in layers_of(quantized(weights="int3")).items():
        quantizer = layer.weight_quantizer
        assert str(quantizer.scheme) == "int3_asym_channel" and quantizer.axis == 0, name
        assert quantizer.scale.shape == quantizer.zero_point.shape == (len(layer.weight),), name


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_attention(bits):
    model = quantized(activations=f"int{bits}")
    for block in model.blocks:
        (attention,) = block.attention_quantizers
        for operand in ("query", "key", "value"):
            quantizer = getattr(attention, f"{operand}_quantizer")
            assert isinstance(quantizer, UniformQuantizer) and str(quantizer.scheme) == f"int{bits}_asym_tensor"
            assert quantizer.scale.shape == () and torch.equal(quantizer.zero_point, quantizer.zero_point.round())
        quantizer = attention.probabilities_quantizer
        assert isinstance(quantizer, LogQuantizer) and str(quantizer.scheme) == f"logsqrt2_{bits}"
        assert quantizer.scale.shape == () and 0 < quantizer.scale <= 1


def test_the_stem_input_has_eight_bits_and_its_weight_as_many_as_asked():
    stem = quantized_vit().stem
    assert str(stem.input_quantizer.scheme) == "int8_asym_tensor"
    assert str(stem.weight_quantizer.scheme) == "int4_asym_channel"
    assert quantized_vit(stem_activations=None).stem.input_quantizer.scheme.bits == 4
    assert quantized_vit(stem_activations="int6").stem.input_quantizer.scheme.bits == 6
    assert quantized_vit(overrides={"stem": "int5"}).stem.input_quantizer.scheme.bits == 5
    assert quantized_vit(first_last="int7").stem.input_quantizer.scheme.bits == 7


def test_a_linear_stem_has_no_exemption():
    embed = quantized().embed
    assert embed.input_quantizer.scheme.bits == 4 and embed.weight_quantizer.scheme.bits == 4


def test_the_head_is_quantized_but_the_norm_before_it_is_not_folded():
    model = quantized_vit(bias=False)
    torch.manual_seed(0)
    plain = TinyViT(bias=False)
    assert not model.head.folded and model.head.input_quantizer.scheme.bits == 4
    assert torch.equal(model.norm.weight, plain.norm.weight) and torch.equal(model.head.weight, plain.head.weight)
    assert {name for name, layer in layers_of(model).items() if layer.folded} == set(FOLDED)
    assert not torch.equal(model.blocks[0].norm1.weight, plain.blocks[0].norm1.weight)
    assert set(record_of(model).plans["RepQViT{'target': None}"].created) == set(FOLDED)


def test_weights_are_fitted_to_what_they_are_after_folding():
    model = quantized_vit()
    for name, layer in layers_of(model).items():
        fresh = build_quantizer("int4_asym_channel", axis=0)
        fresh.fit(layer.weight, PERCENTILES)
        for found, want in zip(state_of(layer.weight_quantizer), state_of(fresh), strict=True):
            assert torch.equal(found, want), name


@torch.no_grad()
def test_the_function_is_folded_exactly():
    """Without its quantizers the model computes what it computed before: 1e-4 in float32."""
    torch.manual_seed(0)
    plain = TinyViT(bias=False).eval()
    model, x = quantized_vit(bias=False), images()
    want = plain(x)
    assert not torch.allclose(model(x), want, rtol=0.05)
    with pytest.warns(UserWarning, match="stay folded into 4 layers"):
        RepQViT().remove(model)
    assert float((model(x) - want).norm() / want.norm()) < 1e-4


def test_percentiles_reach_every_search():
    narrow, wide = quantized(percentiles=[0.9]), quantized(percentiles=[1.0])
    for name, layer in layers_of(narrow).items():
        if name in FOLDED:
            continue  # its weights differ
        assert (layer.weight_quantizer.scale < layers_of(wide)[name].weight_quantizer.scale).all(), name
        assert layer.input_quantizer.scale < layers_of(wide)[name].input_quantizer.scale, name
    with pytest.raises(ValueError, match="percentiles"):
        RepQViT(percentiles=[0.3])


def test_all_samples_calibrate_as_one_batch(monkeypatch):
    """Whatever the loader's batch size: the search needs the whole tensor."""
    found = []
    for batch_size in (5, 32, 64):
        model = TinyTransformer()
        validate(model, RepQViT(), data=Sequences(batch_size))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other if "quantizer" in key)


def test_attention_can_be_left_float():
    model = quantized(attention=False)
    assert not any("attention_quantizers" in key for key in model.state_dict())
    assert set(FOLDED) <= set(layers_of(model))


def test_a_float_layer_behind_a_norm_keeps_the_norm_unfolded():
    model, plain = quantized(bias=False, skip=["blocks.0.qkv"]), TinyTransformer(bias=False)
    assert type(model.blocks[0].qkv) is nn.Linear and model.blocks[0].qkv.bias is None
    assert torch.equal(model.blocks[0].norm1.weight, plain.blocks[0].norm1.weight)
    assert not torch.equal(model.blocks[1].norm1.weight, plain.blocks[1].norm1.weight)


def test_one_norm_with_three_readers():
    """Separate q, k and v projections share one fold."""

    class Split(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            nn.init.uniform_(self.norm.weight, 0.2, 3)
            self.q, self.k, self.v, self.head = (nn.Linear(8, 8, bias=i == 3) for i in range(4))

        def forward(self, x):
            x = self.norm(x)
            return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch).mean(), batch_size=len(batch))

    model = Split()
    trainer(RepQViT()).validate(model, DataLoader(list(torch.randn(32, 6, 8)), batch_size=8), verbose=False)
    assert model.q.folded and model.k.folded and model.v.folded and model.q.bias is not None
    assert torch.equal(model.q.input_quantizer.scale, model.k.input_quantizer.scale)
    assert torch.equal(model.q.input_quantizer.zero_point, model.v.input_quantizer.zero_point)


def test_a_dead_channel_survives():
    """Gamma 0 and beta 0: range 0 in every sample."""
    model = TinyTransformer()
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight[3], block.norm1.bias[3] = 0.0, 0.0
            block.norm2.weight[5], block.norm2.bias[5] = 0.0, 0.7
    before = validate(model)
    after = validate(model, RepQViT(weights="int8", activations="int8"))
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05)


def test_refusals():
    with pytest.raises(ValueError, match='"int1"'):
        RepQViT(weights="int1")
    with pytest.raises(ValueError, match='"fp8_e9"'):
        RepQViT(activations="fp8_e9")
    with pytest.raises(ValueError, match="weights='int4_token'"):
        RepQViT(weights="int4_token")
    with pytest.raises(ValueError, match=r"RepQViT folds LayerNorms .* use PostTrainingQuantization"):
        trainer(RepQViT()).validate(WithoutNorm(), DataLoader(list(torch.randn(32, 4))), verbose=False)


@pytest.mark.parametrize("activations", ["int10", "uint1", "fp8_e4m3", "int8_token", "int8_dynamic", "int8_channel"])
def test_activations_that_the_method_cannot_have(activations):
    """There is no logarithm of more than 8 bits, and only one static scale per tensor can come out of the folding."""
    with pytest.raises(ValueError, match=f"activations='{activations}': .*(PostTrainingQuantization|attention=False)"):
        RepQViT(activations=activations)
    with pytest.raises(ValueError, match='"None" is not a number format'):
        RepQViT(activations=None)


def test_more_bits_without_the_logarithm():
    assert layers_of(quantized(activations="int10", attention=False))["head"].input_quantizer.scheme.bits == 10


class WithoutNorm(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).mean(), batch_size=len(batch))


# ---------------------------------------------------------------- a second opinion, from the paper's formulas in numpy


class OneBlock(L.LightningModule):
    """Embedding, one pre-norm block, final norm, head: the smallest model with every part of the method."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.norm, self.head = nn.Linear(6, 16), Block(), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x))).mean(1))

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).mean(), batch_size=len(batch))


class InNumpy:
    """RepQ-ViT written down a second time, for OneBlock only, in float64 and without any of our code."""

    percentiles = (0.999, 0.9999, 0.99999)

    def __init__(self, parameters, bits):
        self.p = {name: value.astype(np.float64) for name, value in parameters.items()}
        self.levels = 2**bits - 1
        self.weights, self.inputs = {}, {}  # name -> (scale, zero point), or the scale of the logarithm

    def uniform(self, x, scale, zero_point):
        return (np.clip(np.round(x / scale) + zero_point, 0, self.levels) - zero_point) * scale

    def logarithm(self, x, scale):
        with np.errstate(divide="ignore"):
            k = np.round(-2 * np.log2(x / scale))
        q = np.clip(k, 0, self.levels)
        values = scale * 2 ** (-np.ceil(q / 2)) * np.where(q % 2 == 1, np.sqrt(2), 1)
        return np.where(k >= self.levels + 1, 0, values)

    def search(self, x, axis=None):
        """Scale and zero point of least squared error; one per index of the axis."""
        rows = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
        best = [(np.inf, 0.0, 0.0)] * len(rows)
        for p in self.percentiles:
            for i, row in enumerate(rows):
                hi, lo = np.quantile(row, p), np.quantile(row, 1 - p)
                scale = (hi - lo) / self.levels
                zero_point = np.round(-lo / scale)
                error = np.mean((self.uniform(row, scale, zero_point) - row) ** 2)
                if error < best[i][0]:
                    best[i] = (error, scale, zero_point)
        scales, zero_points = np.array([b[1] for b in best]), np.array([b[2] for b in best])
        return (scales[0], zero_points[0]) if axis is None else (scales, zero_points)

    def search_logarithm(self, x):
        candidates = [np.quantile(x, p) for p in self.percentiles]
        return min(candidates, key=lambda d: np.mean((self.logarithm(x, d) - x) ** 2))

    def linear(self, name, x, fit):
        if fit:
            per_channel = name in ("block.qkv", "block.fc1")
            self.inputs[name] = self.search(x, axis=-1 if per_channel else None)
        x = self.uniform(x, *self.inputs[name])
        scale, zero_point = self.weights[name]
        weight = self.uniform(self.p[f"{name}.weight"], scale[:, None], zero_point[:, None])
        return x @ weight.T + self.p[f"{name}.bias"]

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attend(self, q, k, v, fit):
        if fit:
            self.inputs.update(query=self.search(q), key=self.search(k), value=self.search(v))
        q, k, v = (self.uniform(x, *self.inputs[n]) for x, n in ((q, "query"), (k, "key"), (v, "value")))
        attention = softmax(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]), axis=-1)
        if fit:
            self.inputs["probabilities"] = self.search_logarithm(attention)
        return self.logarithm(attention, self.inputs["probabilities"]) @ v

    def forward(self, x, fit=False):
        x = self.linear("embed", x, fit)
        batch, tokens, width = x.shape
        qkv = self.linear("block.qkv", self.norm("block.norm1", x), fit).reshape(batch, tokens, 3, 2, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        x = x + self.linear("block.proj", self.attend(q, k, v, fit).swapaxes(1, 2).reshape(batch, tokens, width), fit)
        hidden = self.linear("block.fc1", self.norm("block.norm2", x), fit)
        x = x + self.linear("block.fc2", hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), fit)
        return self.linear("head", self.norm("norm", x).mean(1), fit)

    def calibrate(self, x):
        linears = [name.removesuffix(".weight") for name, value in self.p.items() if value.ndim == 2]
        self.weights = {name: self.search(self.p[f"{name}.weight"], axis=0) for name in linears}
        self.forward(x, fit=True)
        for norm, linear in (("block.norm1", "block.qkv"), ("block.norm2", "block.fc1")):
            scale, zero_point = self.inputs[linear]
            whole_scale, whole_zero_point = scale.mean(), np.round(zero_point.mean())
            r1, r2 = scale / whole_scale, zero_point - whole_zero_point
            self.p[f"{norm}.weight"] = self.p[f"{norm}.weight"] / r1
            self.p[f"{norm}.bias"] = (self.p[f"{norm}.bias"] + scale * r2) / r1
            self.p[f"{linear}.bias"] = self.p[f"{linear}.bias"] - self.p[f"{linear}.weight"] @ (scale * r2)
            self.p[f"{linear}.weight"] = self.p[f"{linear}.weight"] * r1
            self.inputs[linear] = whole_scale, whole_zero_point
            self.weights[linear] = self.search(self.p[f"{linear}.weight"], axis=0)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_second_implementation_finds_the_same(bits):
    torch.manual_seed(bits)
    model = OneBlock().double()  # float64, so that no value falls on the other side of a rounding
    nn.init.uniform_(model.norm.weight, 0.2, 3)
    samples = torch.randn(32, 9, 6).double()
    reference = InNumpy({name: p.detach().numpy().copy() for name, p in model.named_parameters()}, bits)
    reference.calibrate(samples.numpy())
    trainer(RepQViT(f"int{bits}", f"int{bits}")).validate(model, DataLoader(list(samples), batch_size=8), verbose=False)
    model.eval()
    attention = model.block.attention_quantizers[0]

    for name, layer in layers_of(model).items():
        for what, quantizer, want in (
            ("weight", layer.weight_quantizer, reference.weights[name]),
            ("input", layer.input_quantizer, reference.inputs[name]),
        ):
            np.testing.assert_allclose(quantizer.scale, want[0], rtol=1e-4, err_msg=f"{name} {what} scale")
            np.testing.assert_array_equal(quantizer.zero_point, want[1], err_msg=f"{name} {what} zero point")
    for name in ("query", "key", "value"):
        quantizer = getattr(attention, f"{name}_quantizer")
        np.testing.assert_allclose(quantizer.scale, reference.inputs[name][0], rtol=1e-4, err_msg=name)
        np.testing.assert_array_equal(quantizer.zero_point, reference.inputs[name][1], err_msg=name)
    np.testing.assert_allclose(attention.probabilities_quantizer.scale, reference.inputs["probabilities"], rtol=1e-4)
    for name, parameter in model.named_parameters():
        want = reference.p[name]
        np.testing.assert_allclose(parameter.detach(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=name)
    others = torch.randn(16, 9, 6).double()
    logits = model(others).detach()
    np.testing.assert_allclose(logits, reference.forward(others.numpy()), rtol=1e-4, atol=1e-5)


def test_float32_finds_the_same_as_float64():
    """Nearly: a value between two codes may fall either way, and moves the ranges behind it a little."""
    found = {}
    for precision in ("32-true", "64-true"):
        model = TinyTransformer()
        validate(model, RepQViT(), precision=precision)
        found[precision] = {name: layer.input_quantizer.scale for name, layer in layers_of(model).items()}
    for name, scale in found["32-true"].items():
        assert float(scale) == pytest.approx(float(found["64-true"][name]), rel=0.03), name
