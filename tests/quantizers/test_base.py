from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_quant.quantizers import UniformQuantizer, build_quantizer, straight_through

STATIC = ["int8_sym", "int4_asym", "uint4_sym", "fp8_e4m3", "fp4_e2m1", "log2_4", "logsqrt2_4"]


def fitted(text, x=None, axis=None, rule="minmax"):
    quantizer = build_quantizer(text, axis)
    quantizer.fit(torch.rand(7, 12) if x is None else x, rule)
    return quantizer


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("text", STATIC)
def test_uncalibrated_hands_on_the_very_tensor_and_calibrated_quantizes(text):
    x = torch.rand(5, 12)
    quantizer = build_quantizer(text)
    assert not quantizer.calibrated
    assert quantizer(x) is x
    quantizer.fit(x)
    assert quantizer.calibrated
    assert not torch.equal(quantizer(x), x)
    quantizer.reset()
    assert not quantizer.calibrated
    assert quantizer(x) is x


def test_observer_takes_over_while_it_is_set():
    quantizer, x = fitted("int8_sym"), torch.rand(3)
    quantizer.observer = lambda x: x * 100
    assert torch.equal(quantizer(x), x * 100)
    quantizer.observer = None
    assert float((quantizer(x) - x).abs().max()) < 0.01


@pytest.mark.parametrize("text", STATIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(text, dtype):
    quantizer, x = fitted(text), torch.rand(33).to(dtype)
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("text", STATIC)
def test_float64_stays_float64(text):
    quantizer, x = fitted(text), torch.rand(33, dtype=torch.float64)
    y = quantizer(x)
    assert y.dtype == torch.float64
    assert torch.allclose(y, quantizer(x.float()).double(), rtol=1e-5)
    if text == "int8_sym":
        steps = y / quantizer.scale.double()
        assert torch.allclose(steps, steps.round(), rtol=1e-15, atol=1e-13)


@pytest.mark.parametrize("text", ["int8_sym", "int4_asym_channel", "int8_token", "fp8_e4m3", "log2_4"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_a_graph_break(text, grad):
    torch._dynamo.reset()
    quantizer = fitted(text, axis=-1)
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    x = torch.rand(7, 12, requires_grad=grad)
    assert torch.equal(compiled(x), quantizer(x))


def test_empty_and_noncontiguous_inputs():
    quantizer = fitted("int8_sym")
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    x = torch.rand(6, 8)
    assert torch.equal(quantizer(x.t()), quantizer(x).t())
    assert torch.equal(quantizer(x[:, ::2]), quantizer(x)[:, ::2])


def test_straight_through_gives_the_value_of_one_and_the_gradient_of_the_other():
    x = torch.randn(4, requires_grad=True)
    value = torch.randn(4)
    y = straight_through(x, value)
    assert torch.equal(y, value)
    y.pow(2).sum().backward()
    assert torch.equal(x.grad, 2 * value)


# ---------------------------------------------------------------- granularity


@pytest.mark.parametrize(("axis", "channels"), [(0, 3), (1, 4), (2, 5), (-1, 5)])
def test_channel_equals_one_tensor_quantizer_per_channel(axis, channels):
    x = torch.randn(3, 4, 5)
    quantizer = fitted("int4_asym_channel", x, axis, "mse")
    assert quantizer.scale.shape == quantizer.zero_point.shape == (channels,)
    y = quantizer(x)
    for channel in range(channels):
        part = x.select(axis, channel)
        assert torch.equal(fitted("int4_asym", part, rule="mse")(part), y.select(axis, channel))


def test_groups_of_a_linear_and_of_a_convolution_weight():
    for weight in (torch.randn(4, 12), torch.randn(4, 3, 2, 2)):
        quantizer = fitted("int4_sym_g6", weight, 0, "mse")
        assert quantizer.scale.shape == (4, 2)
        y = quantizer(weight)
        assert y.shape == weight.shape
        group = weight.flatten(1)[2, 6:]
        assert torch.equal(fitted("int4_sym", group, rule="mse")(group), y.flatten(1)[2, 6:])
        assert torch.equal(quantizer.decode(quantizer.encode(weight)), y)


@pytest.mark.parametrize("scheme", ["int4_sym_g5", "int4_asym_g5", "fp4_e2m1_g5", "int4_asym_g64"])
@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 2, 2)])
def test_the_last_group_of_a_row_may_be_shorter(scheme, shape):
    weight = torch.randn(shape) + 0.5
    quantizer, alone = fitted(scheme, weight, 0, "mse"), scheme.rsplit("_", 1)[0]
    found, rows = quantizer(weight), weight.flatten(1)
    for row, values in zip(rows, found.flatten(1), strict=True):
        for group, value in zip(
            row.split(int(scheme.rsplit("g", 1)[1])), values.split(int(scheme.rsplit("g", 1)[1])), strict=True
        ):
            assert torch.equal(fitted(alone, group, rule="mse")(group), value)
    assert torch.equal(quantizer.decode(quantizer.encode(weight)), found)


def test_static_groups_of_activations_are_refused_and_dynamic_ones_work():
    with pytest.raises(ValueError, match="int4_sym_g4_dynamic"):
        build_quantizer("int4_g4", axis=-1)
    x = torch.randn(2, 3, 8)
    y = build_quantizer("int8_g4_dynamic", axis=-1)(x)
    part = x[1, 2, 4:]
    assert torch.equal(y[1, 2, 4:], fitted("int8_sym", part)(part))


@pytest.mark.parametrize("text", ["int8_sym", "int8_asym"])
def test_token_scales_follow_each_token(text):
    x = torch.randn(2, 3, 16) * torch.tensor([1e-3, 1.0, 1e3]).view(1, 3, 1)
    y = build_quantizer(f"{text}_token")(x)
    for token in range(3):
        assert torch.equal(y[1, token], fitted(text, x[1, token])(x[1, token]))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_dynamic_equals_a_fresh_minmax_fit(axis):
    for x in (torch.randn(3, 4, 5), torch.rand(3, 4, 5) + 1):
        assert torch.equal(build_quantizer("int8_asym_dynamic")(x), fitted("int8_asym", x)(x))
        dynamic = build_quantizer("int8_channel_dynamic", axis)
        assert torch.equal(dynamic(x), fitted("int8_channel", x, axis)(x))


def test_dynamic_has_no_state_and_no_codes():
    quantizer = build_quantizer("int8_dynamic")
    quantizer.fit(torch.randn(3))
    quantizer.freeze(torch.tensor(0.0), torch.tensor(1.0))
    assert quantizer.calibrated
    assert quantizer.scale.numel() == 0
    with pytest.raises(ValueError, match="dynamic"):
        quantizer.encode(torch.randn(3))


# ---------------------------------------------------------------- refusals


def test_refusals():
    with pytest.raises(ValueError, match="which axis"):
        build_quantizer("int8_channel")
    with pytest.raises(ValueError, match='kind "int"'):
        UniformQuantizer("fp8_e4m3")
    quantizer = build_quantizer("int8_channel", axis=0)
    with pytest.raises(ValueError, match="not calibrated"):
        quantizer.encode(torch.ones(3, 2))
    with pytest.raises(ValueError, match="1 dimensions"):
        quantizer.freeze(torch.tensor(0.0), torch.tensor(1.0))
    for lo, hi in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="finite range"):
            quantizer.freeze(torch.tensor([lo]), torch.tensor([hi]))
    for bad in (torch.tensor([[1.0, float("nan")]]), torch.empty(0, 3), torch.tensor([[float("-inf"), 0.0]])):
        with pytest.raises(ValueError, match="cannot be found"):
            quantizer.fit(bad)
    assert not quantizer.calibrated, "a refused call changes nothing"
    with pytest.raises(ValueError, match="NaN"):
        fitted("int8_sym").encode(torch.tensor([float("nan")]))


# ---------------------------------------------------------------- state


class Layer(nn.Module):
    def __init__(self, text="int8_asym_channel"):
        super().__init__()
        self.linear = nn.Linear(12, 7)
        self.quantizer = build_quantizer(text, axis=0)


def calibrated_layer():
    layer = Layer()
    layer.quantizer.fit(layer.linear.weight)
    return layer


def test_state_dict_round_trip_adopts_the_stored_shape():
    source, target = calibrated_layer(), Layer()
    missing, unexpected = target.load_state_dict(source.state_dict())
    assert not missing
    assert not unexpected
    assert torch.equal(target.quantizer.scale, source.quantizer.scale)
    assert torch.equal(target.quantizer.zero_point, source.quantizer.zero_point)
    assert target.quantizer.scale.data_ptr() != source.quantizer.scale.data_ptr()


def test_an_uncalibrated_state_loads_as_uncalibrated():
    target = calibrated_layer()
    target.load_state_dict(Layer().state_dict())
    assert not target.quantizer.calibrated


def test_a_float_checkpoint_is_complete_and_resets():
    target = calibrated_layer()
    float_state = {key: value for key, value in target.state_dict().items() if "quantizer" not in key}
    target.load_state_dict(float_state, strict=True)
    assert not target.quantizer.calibrated


def test_half_of_the_state_is_reported_missing():
    state = calibrated_layer().state_dict()
    del state["quantizer.zero_point"]
    with pytest.raises(RuntimeError, match=r"Missing key.*quantizer\.zero_point"):
        Layer().load_state_dict(state)


def test_unknown_keys_are_still_reported():
    state = calibrated_layer().state_dict() | {"quantizer.bogus": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*quantizer\.bogus"):
        Layer().load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_stored_half_precision_state_becomes_float32(assign):
    state = {key: value.bfloat16() for key, value in calibrated_layer().state_dict().items()}
    target = Layer()
    target.load_state_dict(state, assign=assign)
    assert target.quantizer.scale.dtype == target.quantizer.zero_point.dtype == torch.float32
    assert target.quantizer.calibrated


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_casting_the_model_leaves_the_state_float32(cast):
    layer = calibrated_layer()
    scale = layer.quantizer.scale.clone()
    getattr(layer, cast)()
    assert layer.linear.weight.dtype == getattr(torch, cast)
    assert layer.quantizer.scale.dtype == torch.float32
    assert torch.equal(layer.quantizer.scale, scale)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.quantizer.scale, scale)


def test_meta_device():
    layer = calibrated_layer().to("meta")
    assert layer.quantizer.scale.is_meta
    assert layer.quantizer.calibrated
    assert "scale=(7,)" in repr(layer.quantizer)
    with torch.device("meta"):
        built = Layer()
    built = built.to(torch.bfloat16).to_empty(device="cpu")
    assert not built.quantizer.calibrated
    assert built.quantizer.scale.dtype == torch.float32


def test_state_follows_meta_and_dtype_in_one_call():
    layer = calibrated_layer().to(device="meta", dtype=torch.bfloat16)
    assert layer.quantizer.scale.is_meta
    assert layer.quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("text", [*STATIC, "int8_token"])
def test_copy_pickle_and_torch_save(text):
    quantizer, x = fitted(text), torch.rand(5, 3)
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), loaded):
        assert torch.equal(other(x), quantizer(x))
        assert other.scheme == quantizer.scheme
        other.reset()
    assert quantizer.calibrated


def test_repr_says_format_and_scale():
    quantizer = build_quantizer("uint4_asym")
    assert repr(quantizer) == "UniformQuantizer(uint4_asym_tensor, uncalibrated)"
    quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
    assert repr(quantizer) == "UniformQuantizer(uint4_asym_tensor, scale=1)"


def test_open_formats_are_resolved():
    assert str(build_quantizer("int8").scheme) == "int8_sym_tensor"
    assert str(build_quantizer("uint8").scheme) == "uint8_asym_tensor"
    assert str(build_quantizer("fp8_e4m3").scheme) == "fp8_e4m3_tensor"
