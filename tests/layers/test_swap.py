"""A swapped layer is the same object, and comes back as it was."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_quant.layers import QuantizedLayer, quantize_layer, restore, twin_of, why_not_swappable
from lightning_quant.quantizers import Scheme

INT8 = Scheme.parse("int8_sym_channel")
ASYM = Scheme.parse("int8_asym_tensor")
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 7, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
}


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "_"))
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


def calibrate(layer: QuantizedLayer, x: torch.Tensor) -> None:
    for name, quantizer in layer.weight_quantizers().items():
        quantizer.fit(layer.weight_rows(name))
    for quantizer in layer.activation_quantizers().values():
        quantizer.fit(x)


def test_uncalibrated_twin_computes_the_float_layer(layer_and_input):
    layer, x = layer_and_input
    want = layer(x)
    assert torch.equal(quantize_layer(layer, INT8, ASYM)(x), want)


def test_calibrated_twin_is_near_and_not_equal(layer_and_input):
    layer, x = layer_and_input
    want = layer(x)
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    assert not torch.equal(twin(x), want)
    assert torch.allclose(twin(x), want, atol=0.05)


def test_identity_survives_the_swap_and_the_way_back(layer_and_input):
    layer, x = layer_and_input
    layer.eval().requires_grad_(False)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    before, keys, attributes = dict(layer.named_parameters()), list(layer.state_dict()), set(layer.__dict__)
    want = layer(x)
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    assert twin is layer and isinstance(layer, layer.float_class)
    assert all(p is before[name] for name, p in layer.named_parameters())
    assert set(keys) <= set(layer.state_dict())
    assert not layer.training and not layer.input_quantizer.training
    assert layer(x).shape == want.shape and len(seen) == 2
    restore(layer)
    assert type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    assert list(layer.state_dict()) == keys and set(layer.__dict__) == attributes
    assert torch.equal(layer(x), want)


def test_pickle_deepcopy_and_torch_save(layer_and_input):
    layer, x = layer_and_input
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))


def test_a_float_state_dict_loads_and_uncalibrates(layer_and_input):
    layer, x = layer_and_input
    state = copy.deepcopy(layer.state_dict())
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    layer.folded.fill_(True)
    layer.load_state_dict(state)
    assert not layer.input_quantizer.calibrated and not bool(layer.folded)


def test_a_quantized_state_dict_loads_into_an_uncalibrated_twin(layer_and_input):
    layer, x = layer_and_input
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    other = quantize_layer(copy.deepcopy(restored(copy.deepcopy(layer))), INT8, ASYM)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def restored(layer):
    restore(layer)
    return layer


def test_a_missing_scale_is_an_error(layer_and_input):
    layer, x = layer_and_input
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    state = layer.state_dict()
    del state["input_quantizer.zero_point"]
    with pytest.raises(RuntimeError, match=r"input_quantizer\.zero_point"):
        layer.load_state_dict(state)


def test_gradients_reach_weight_and_input(layer_and_input):
    layer, x = layer_and_input
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    x.requires_grad_(True)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_the_scales(layer_and_input, dtype):
    layer, x = layer_and_input
    twin = quantize_layer(layer, INT8, ASYM)
    calibrate(twin, x)
    scale = layer.input_quantizer.scale.clone()
    layer.to(dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.equal(layer.input_quantizer.scale, scale) and layer.input_quantizer.scale.dtype == torch.float32


def test_padding_is_exactly_zero_after_quantization():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    x = torch.rand(1, 1, 4, 4) + 5.0  # far from zero: the zero point lies at the lowest code
    twin = quantize_layer(conv, None, ASYM)
    calibrate(twin, x)
    corner = twin.input_quantizer(x)[0, 0, :2, :2].sum()
    assert torch.allclose(conv(x)[0, 0, 0, 0], corner)


def test_embedding_rows_have_their_own_scale():
    table = nn.Embedding(5, 8, padding_idx=0)
    ids = torch.tensor([[0, 3, 4]])
    want = table(ids)
    twin = quantize_layer(table, INT8, None)
    calibrate(twin, ids)
    assert twin.weight_quantizer.scale.shape == (5,)
    assert torch.allclose(twin(ids), want, atol=0.02) and torch.equal(twin(ids)[0, 0], torch.zeros(8))


def test_transformers_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = Conv1D(6, 4), torch.randn(2, 3, 4)
    want = layer(x)
    twin = quantize_layer(layer, INT8, ASYM)
    assert type(twin).__name__ == "QuantConv1D" and torch.equal(twin(x), want)
    calibrate(twin, x)
    assert twin.weight_quantizer.scale.shape == (6,)  # per output channel, which is axis 1 of this weight
    assert torch.allclose(twin(x), want, atol=0.05)
    restore(layer)
    assert type(layer) is Conv1D and torch.equal(layer(x), want)


class OwnLinear(nn.Linear):
    """Somebody's subclass, whose forward we do not know."""


def test_only_exact_types_have_a_twin():
    assert twin_of(OwnLinear(2, 2)) is None
    with pytest.raises(TypeError, match="OwnLinear"):
        quantize_layer(OwnLinear(2, 2), INT8, None)


@pytest.mark.parametrize("spoil", ["parametrized", "forward"])
def test_refusals_change_nothing(spoil):
    layer = nn.Linear(2, 2)
    if spoil == "parametrized":
        nn.utils.parametrizations.spectral_norm(layer)
    else:
        layer.forward = lambda x: x
    assert why_not_swappable(layer)
    kind = type(layer)
    with pytest.raises(TypeError):
        quantize_layer(layer, INT8, None)
    assert type(layer) is kind and not hasattr(layer, "folded")
