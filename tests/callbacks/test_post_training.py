"""Plain post-training quantization: formats land where they were asked for, ranges are what their rule says."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantAttention, QuantizedLayer
from lightning_quant.quantizers import RangeRule, build_quantizer
from tests.models import Block, Sequences, TinyTransformer, validate

RULES = ["minmax", "percentile", "mse", "lp", "percentile_mse", "running", "kl"]
LAYERS = ["embed", *(f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "proj", "fc1", "fc2")), "head"]


def quantized(*args, model=None, data=None, **kwargs):
    model = model or TinyTransformer()
    validate(model, PostTrainingQuantization(*args, **kwargs), data=data)
    return model.eval()


def formats(model):
    """What each layer has, as "weights / inputs"."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            pair = [getattr(layer, f"{what}_quantizer", None) for what in ("weight", "input")]
            found[name] = " / ".join("float" if q is None else str(q.scheme) for q in pair)
    return found


def operands(model):
    """What each attention operand has, by block."""
    return {
        name: [str(q.scheme) for q in module.activation_quantizers().values()]
        for name, module in model.named_modules()
        if isinstance(module, QuantAttention)
    }


class Language(L.LightningModule):
    """An embedding, a block and a head, on token ids."""

    def __init__(self):
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(30, 16), Block(), nn.Linear(16, 30)

    def forward(self, ids):
        return self.head(self.block(self.table(ids)))

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).mean(), batch_size=len(batch))


class Tokens(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(list(torch.randint(30, (32, 6), generator=torch.Generator().manual_seed(0))), batch_size=8)


class ConvNet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(4)
        )
        self.net(torch.zeros(1, 3, 9, 7))

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).mean(), batch_size=len(batch))


class Images(L.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(list(torch.rand(32, 3, 9, 7, generator=torch.Generator().manual_seed(0))), batch_size=8)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("weights", "activations", "layer", "operand"),
    [
        ("int8", "int8", "int8_sym_channel / int8_asym_tensor", "int8_asym_tensor"),
        ("int4", "int8", "int4_sym_channel / int8_asym_tensor", "int8_asym_tensor"),
        ("int4", None, "int4_sym_channel / float", None),
        (None, "int6", "float / int6_asym_tensor", "int6_asym_tensor"),
        ("int4_g8", None, "int4_sym_g8 / float", None),
        ("int4_asym_g4", "int8_token", "int4_asym_g4 / int8_asym_token_dynamic", "int8_asym_token_dynamic"),
        ("int8_tensor", "int8_sym", "int8_sym_tensor / int8_sym_tensor", "int8_sym_tensor"),
        ("int3_asym", "uint8", "int3_asym_channel / uint8_asym_tensor", "uint8_asym_tensor"),
        ("int8", "int8_dynamic", "int8_sym_channel / int8_asym_tensor_dynamic", "int8_asym_tensor_dynamic"),
        ("int8", "int8_sym_token_dynamic", "int8_sym_channel / int8_sym_token_dynamic", "int8_sym_token_dynamic"),
        ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_channel / fp8_e5m2_tensor", "fp8_e5m2_tensor"),
        ("fp4_e2m1_g8", "fp8_e4m3_token", "fp4_e2m1_g8 / fp8_e4m3_token_dynamic", "fp8_e4m3_token_dynamic"),
        ("int16", "int16", "int16_sym_channel / int16_asym_tensor", "int16_asym_tensor"),
    ],
)
def test_formats_and_their_suffixes(weights, activations, layer, operand):
    model = quantized(weights, activations)
    assert formats(model) == dict.fromkeys(LAYERS, layer)
    attention = {} if operand is None else {f"blocks.{i}.attention_quantizers.0": [operand] * 4 for i in range(2)}
    assert operands(model) == attention
    assert PostTrainingQuantization(weights, activations).is_calibrated(model)
    assert bool(model(Sequences().val.tensors[0]).isfinite().all())


@pytest.mark.parametrize("activations", ["int8", "int8_channel", "int8_token", "fp8_e4m3"])
def test_convolutions_have_their_channels_in_the_second_axis(activations):
    model = quantized("int8", activations, model=ConvNet(), data=Images())
    found = formats(model)
    assert set(found) == {"net.0", "net.2", "net.4"}
    for i, channels in ((0, 3), (2, 8), (4, 90)):
        layer = model.net[i]
        assert layer.weight_quantizer.scale.shape == (len(layer.weight),)
        if activations == "int8_channel":
            assert layer.input_quantizer.scale.shape == (channels,)


def test_attention_can_be_left_float():
    model = quantized("int8", "int8", attention=False)
    assert operands(model) == {} and set(formats(model)) == set(LAYERS)


@pytest.mark.parametrize(("weights", "activations"), [("int4", "int4"), ("int4", None), (None, "int4")])
def test_first_and_last(weights, activations):
    model = quantized(weights, activations, first_last="int8")
    bits = {
        name: {q.scheme.bits for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None}
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    assert bits == {name: {8} if name in ("embed", "head") else {4} for name in LAYERS}


def test_first_is_the_first_that_runs_and_no_embedding():
    class Reversed(TinyTransformer):
        """Its layers are registered in another order than they run."""

        def __init__(self):
            super().__init__()
            self.aaa_head, self.head = self.head, nn.Identity()
            self._modules["embed"] = self._modules.pop("embed")  # to the end

        def forward(self, x):
            return self.aaa_head(super().forward(x))

    found = formats(quantized("int4", "int4", first_last="int8", model=Reversed()))
    assert [name for name, text in found.items() if "int8" in text] == ["aaa_head", "embed"]
    found = formats(quantized("int4", "int4", first_last="int8", model=Language(), data=Tokens()))
    assert [name for name, text in found.items() if "int8" in text] == ["block.qkv", "head"]


def test_embeddings():
    model = quantized("int4", "int4", model=Language(), data=Tokens())
    assert type(model.table) is nn.Embedding
    assert record_of(model).plans["PostTrainingQuantization{'target': None}"].skipped == {
        "table": "embeddings stay float; set embeddings="
    }
    model = quantized("int4", "int4", embeddings="int8", model=Language(), data=Tokens())
    assert formats(model)["table"] == "int8_sym_channel / float"
    assert model.table.weight_quantizer.scale.shape == (30,)
    assert formats(model)["head"] == "int4_sym_channel / int4_asym_tensor"
    model = quantized("int4", None, embeddings="int4_g8", overrides={"table": "int6"}, model=Language(), data=Tokens())
    assert formats(model)["table"] == "int6_sym_channel / float"


def test_overrides():
    model = quantized(
        "int4", "int4", overrides={"blocks.0.*": "int8", "fc1": "int6", "blocks.1": "fp8_e4m3", "head": "int3_asym"}
    )
    assert {name: text.split("_")[0] for name, text in formats(model).items()} == {
        "embed": "int4",
        **{f"blocks.0.{name}": "int8" for name in ("qkv", "proj", "fc2")},
        "blocks.0.fc1": "int6",  # the later pattern wins
        **{f"blocks.1.{name}": "fp8" for name in ("qkv", "proj", "fc1", "fc2")},
        "head": "int3",
    }
    assert formats(model)["head"] == "int3_asym_channel / int3_asym_tensor"
    assert operands(model) == {
        "blocks.0.attention_quantizers.0": ["int8_asym_tensor"] * 4,
        "blocks.1.attention_quantizers.0": ["fp8_e4m3_tensor"] * 4,
    }


def test_overrides_of_weights_only_and_of_the_first_layer():
    model = quantized("int4", None, overrides={"head": "int8_g4"}, first_last="int6")
    assert formats(model)["head"] == "int8_sym_g4 / float" and formats(model)["embed"] == "int6_sym_channel / float"


def test_skip():
    model = quantized("int8", "int8", skip=["head", "blocks.0.*"])
    assert set(formats(model)) == {"embed", *(f"blocks.1.{name}" for name in ("qkv", "proj", "fc1", "fc2"))}
    assert set(operands(model)) == {"blocks.1.attention_quantizers.0"}
    (plan,) = record_of(model).plans.values()
    assert plan.skipped["head"] == "skip='head'" and plan.skipped["blocks.0.fc1"] == "skip='blocks.0.*'"
    assert set(formats(quantized("int8", "int8", skip="head"))) == set(LAYERS) - {"head"}  # one pattern, not letters


def test_target():
    model = quantized("int8", "int8", target="blocks.1")
    assert set(formats(model)) == {f"blocks.1.{name}" for name in ("qkv", "proj", "fc1", "fc2")}
    assert set(operands(model)) == {"blocks.1.attention_quantizers.0"}
    assert set(formats(quantized("int8", "int8", target="head"))) == {"head"}


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"skip": ["nothing"]}, r"skip: the pattern 'nothing' matches no layer"),
        ({"overrides": {"hed": "int8"}}, r"overrides: the pattern 'hed' matches no layer .*'head'"),
        ({"target": "block"}, r"target: .*'block'"),
        ({"target": "blocks.0.norm1"}, r"nothing to quantize .*target="),
        ({"calibration_loader": "training"}, r"calibration_loader='training'"),
    ],
)
def test_refusals_leave_the_model_float(kwargs, match):
    model = TinyTransformer()
    before, types = validate(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        validate(model, PostTrainingQuantization(**kwargs))
    assert [type(m) for m in model.modules()] == types and record_of(model) is None and validate(model) == before


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples(samples):
    with pytest.raises(ValueError, match="calibration_samples must be at least 1"):
        PostTrainingQuantization(calibration_samples=samples)


def test_unknown_rule():
    with pytest.raises(ValueError, match=r'"mean" is not a range rule; the rules are minmax, percentile, mse'):
        PostTrainingQuantization(ranges="mean")


# ---------------------------------------------------------------- ranges


def float_inputs(samples=32, batch_size=8):
    """What every layer reads in the float model, batch by batch."""
    model, seen = TinyTransformer().eval(), {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen[name].append(args[0].numpy())
        )
    with torch.no_grad():
        for batch in Sequences().train.tensors[0][:samples].split(batch_size):
            model(batch)
    return seen


def numpy_state(lo, hi, levels=255):
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / levels
    return scale, np.round(-lo / scale)


def test_minmax_is_numpys_min_and_max():
    model = quantized("int8", "int8", ranges="minmax")
    for name, batches in float_inputs().items():
        scale, zero_point = numpy_state(min(x.min() for x in batches), max(x.max() for x in batches))
        quantizer, layer = model.get_submodule(name).input_quantizer, model.get_submodule(name)
        assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6), name
        assert quantizer.zero_point.item() == zero_point, name
        weight = layer.weight.detach().numpy()
        np.testing.assert_allclose(layer.weight_quantizer.scale, np.abs(weight).max(1) / 127, rtol=1e-6, err_msg=name)
        assert not layer.weight_quantizer.zero_point.any()


def test_running_is_a_moving_average_of_the_batches_extremes():
    model = quantized("int8", "int8", ranges="running")
    for name, batches in float_inputs().items():
        lo, hi = batches[0].min(), batches[0].max()
        for x in batches[1:]:
            lo, hi = 0.9 * lo + 0.1 * x.min(), 0.9 * hi + 0.1 * x.max()
        assert model.get_submodule(name).input_quantizer.scale.item() == pytest.approx(numpy_state(lo, hi)[0], rel=1e-5)


def test_percentile_is_numpys_quantile():
    """Up to the width of one of the 4096 bins that activations are counted in."""
    model = quantized("int8", "int8", ranges="percentile", calibration_samples=64)
    for name, batches in float_inputs(64).items():
        x = np.concatenate([x.ravel() for x in batches])
        scale, _ = numpy_state(np.quantile(x, 1e-4), np.quantile(x, 0.9999))
        assert model.get_submodule(name).input_quantizer.scale.item() == pytest.approx(scale, rel=2e-3), name


def error_of(quantizer, x):
    return float((quantizer(x) - x).square().mean())


@pytest.mark.parametrize(
    ("weights", "ranges"),
    [
        *((weights, "mse") for weights in ("int4_tensor", "int4_g8", "fp4_e2m1", "int3_asym")),
        *(("int4", r) for r in RULES),
    ],
)
def test_weights_equal_a_fresh_fit(weights, ranges):
    for name, layer in quantized(weights, None, ranges=ranges).named_modules():
        if isinstance(layer, QuantizedLayer):
            fresh = build_quantizer(layer.weight_quantizer.scheme, axis=0)
            fresh.fit(layer.weight, RangeRule.parse(ranges))
            for state in fresh.state_names:
                assert torch.equal(getattr(layer.weight_quantizer, state), getattr(fresh, state)), (name, state)


@pytest.mark.parametrize("ranges", RULES)
def test_every_rule_calibrates_activations_within_the_extremes(ranges):
    model, widest = quantized("int8", "int4", ranges=ranges), quantized("int8", "int4", ranges="minmax")
    for name in LAYERS:
        scale = model.get_submodule(name).input_quantizer.scale
        assert scale.shape == () and 0 < scale <= widest.get_submodule(name).input_quantizer.scale * (1 + 1e-6), name
    assert abs(validate(model)["loss"] - validate(TinyTransformer())["loss"]) < 0.5


def test_the_searches_beat_minmax_where_they_should():
    found = {rule: quantized("int3", "int3", ranges=rule) for rule in ("minmax", "mse", "percentile_mse")}
    inputs = float_inputs()
    for name in LAYERS:
        x, weight = torch.from_numpy(np.concatenate(inputs[name])), found["mse"].get_submodule(name).weight
        quantizers = {rule: model.get_submodule(name) for rule, model in found.items()}
        assert error_of(quantizers["mse"].weight_quantizer, weight) < error_of(
            quantizers["minmax"].weight_quantizer, weight
        )
        assert error_of(quantizers["mse"].input_quantizer, x) < 1.01 * error_of(quantizers["minmax"].input_quantizer, x)


def test_activations_are_observed_on_the_float_stream():
    """Coarse weights in front do not change what a layer behind them is calibrated for."""
    fine, coarse = quantized("int8", "int8"), quantized("int2", "int8")
    for name in LAYERS:
        assert torch.equal(
            fine.get_submodule(name).input_quantizer.scale, coarse.get_submodule(name).input_quantizer.scale
        )


def test_as_many_samples_as_asked():
    for samples in (5, 32, 64):
        model = quantized("int8", "int8", ranges="minmax", calibration_samples=samples)
        x = Sequences().train.tensors[0][:samples].numpy()
        assert model.embed.input_quantizer.scale.item() == pytest.approx(numpy_state(x.min(), x.max())[0], rel=1e-6)


def test_batch_size_does_not_matter():
    found = [quantized("int8", "int8", data=Sequences(batch_size)).state_dict() for batch_size in (3, 8, 64)]
    for other in found[1:]:
        assert all(torch.allclose(found[0][key], other[key], rtol=1e-5) for key in other if "scale" in key)
