import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_quant.quantizers import LearnedQuantizer, UniformQuantizer, scale_gradient
from lightning_quant.quantizers.uniform import TINY


def calibrated(scheme="int4_sym", axis=None, shape=(), offset=False, lo=-3.0, hi=5.0):
    quantizer = LearnedQuantizer(scheme, axis, shape, offset)
    quantizer.freeze(torch.full(shape, lo), torch.full(shape, hi))
    return quantizer


def closed_form(x, scale, zero_point, qmin, qmax, upstream):
    """Gradients by x, scale and zero point, element by element as LSQ and LSQ+ write them."""
    v = x / scale + zero_point
    inside = (v.round() >= qmin) & (v.round() <= qmax)  # half a step beyond the ends still rounds to them
    by_scale = np.where(inside, np.round(x / scale) - x / scale, np.where(v < qmin, qmin, qmax) - zero_point)
    by_zero_point = np.where(inside, 0.0, -scale)
    return upstream * inside, upstream * by_scale, upstream * by_zero_point


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (0.3, 1 - 0.6),  # inside, rounded up
        (0.2, 0 - 0.4),  # inside, rounded down
        (-0.7, -1 + 1.4),
        (9.0, 7.0),  # above
        (-9.0, -8.0),  # below
    ],
)
def test_gradient_of_the_scale_inside_above_and_below_the_range(x, want):
    quantizer = LearnedQuantizer("int4_sym", axis=0)
    quantizer.freeze(torch.tensor(-3.5), torch.tensor(3.5))  # scale 0.5
    quantizer(torch.tensor([[x]])).sum().backward()
    assert quantizer.scale.grad.item() == pytest.approx(want / math.sqrt(7), rel=1e-5)


@given(st.integers(0, 10**6), st.sampled_from(["int2_sym", "int4_sym", "uint3_asym", "int8_asym"]), st.booleans())
def test_gradients_equal_the_closed_form(seed, scheme, channels):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64).mul(2)
    upstream = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    shape = (7,) if channels else ()
    scheme = f"{scheme}_{'channel' if channels else 'tensor'}"
    quantizer = calibrated(scheme, -1, shape, offset="asym" in scheme, lo=-1.0, hi=1.5)
    x.requires_grad_()
    (quantizer(x) * upstream).sum().backward()

    scale, zero_point = quantizer.scale.detach().double(), quantizer.zero_point.detach().double()
    numbers = (t.detach().numpy() for t in (x, scale, zero_point))
    by_x, by_scale, by_zero_point = closed_form(
        *numbers, quantizer.scheme.qmin, quantizer.scheme.qmax, upstream.numpy()
    )
    sharing = 1 if channels else 7  # activations of one sample
    factor = 1 / math.sqrt(sharing * quantizer.scheme.qmax)
    total = (lambda a: a.sum(0)) if channels else np.sum
    assert np.allclose(x.grad.numpy(), by_x)
    assert np.allclose(quantizer.scale.grad.numpy(), factor * total(by_scale), rtol=1e-4, atol=1e-5)
    if quantizer.zero_point.requires_grad:
        assert np.allclose(quantizer.zero_point.grad.numpy(), factor * total(by_zero_point), rtol=1e-4, atol=1e-5)


def test_gradient_scale_multiplies_the_scale_alone(monkeypatch):
    def gradients():
        torch.manual_seed(1)
        quantizer, x = (
            calibrated("uint4_asym", axis=-1, offset=True, lo=-0.5, hi=0.5),
            torch.randn(6, 9, requires_grad=True),
        )
        out = quantizer(x)
        out.square().sum().backward()
        return out, x.grad, quantizer.scale.grad, quantizer.zero_point.grad

    out, by_x, by_scale, by_zero_point = gradients()
    monkeypatch.setattr("lightning_quant.quantizers.learned.scale_gradient", lambda x, factor: x)
    plain = gradients()
    assert torch.equal(out, plain[0]) and torch.equal(by_x, plain[1])
    factor = 1 / math.sqrt(9 * 15)
    assert torch.allclose(by_scale, plain[2] * factor) and torch.allclose(by_zero_point, plain[3] * factor)


@pytest.mark.parametrize(
    ("scheme", "axis", "shape", "x_shape", "sharing"),
    [
        ("int4_sym_tensor", 0, (), (6, 4), 24),  # a weight: all of it
        ("int4_sym_channel", 0, (6,), (6, 4, 3, 3), 36),  # a convolution's filter
        ("int4_sym_g2", 0, (6, 2), (6, 4), 2),
        ("int4_sym_tensor", -1, (), (8, 5, 4), 20),  # an activation: one sample of the batch
        ("int4_sym_channel", 1, (5,), (8, 5, 3, 3), 9),
    ],
)
def test_number_of_elements_that_share_a_scale(scheme, axis, shape, x_shape, sharing, monkeypatch):
    factors = []
    monkeypatch.setattr(
        "lightning_quant.quantizers.learned.scale_gradient", lambda x, factor: factors.append(factor) or x
    )
    calibrated(scheme, axis, shape)(torch.randn(x_shape))
    assert factors == [1 / math.sqrt(sharing * 7)]


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor(0.7), torch.randn(3)])
def test_odd_shapes(x):
    quantizer = calibrated(axis=-1)
    quantizer(x.requires_grad_()).sum().backward()
    assert quantizer.scale.grad.isfinite()


def test_scale_gradient_is_the_identity_forward():
    x = torch.randn(5, requires_grad=True)
    out = scale_gradient(x, 0.25)
    out.sum().backward()
    assert torch.equal(out, x) and torch.equal(x.grad, torch.full((5,), 0.25))


def test_descent_finds_the_better_scale():
    torch.manual_seed(0)
    x, quantizer = torch.randn(4096), LearnedQuantizer("int3_sym")
    quantizer.freeze(-x.abs().max(), x.abs().max())
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.01)

    def error():
        return (quantizer(x) - x).square().mean()

    before = error().item()
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
        quantizer.keep_positive()
    searched = UniformQuantizer("int3_sym")
    searched.fit(x, "mse")
    assert error().item() < 0.5 * before and error().item() < 1.05 * (searched(x) - x).square().mean().item()


# ---------------------------------------------------------------- the scale


@pytest.mark.parametrize("value", [0.0, -0.3, -float(TINY)])
def test_scale_is_positive_whatever_the_optimizer_does(value):
    quantizer, x = calibrated(), torch.tensor([[-1.0, 0.0, 1e-3, 2.0]], requires_grad=True)
    with torch.no_grad():
        quantizer.scale.fill_(value)
    out = quantizer(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and quantizer.scale.grad.isfinite()
    quantizer.keep_positive()
    assert quantizer.scale == max(abs(value), TINY)


@pytest.mark.parametrize("offset", [False, True])
def test_scale_stays_float32_and_the_same_parameter(offset):
    quantizer = calibrated("uint8_asym", offset=offset, hi=0.1234568)
    scale, zero_point, value = quantizer.scale, quantizer.zero_point, quantizer.scale.item()
    quantizer(torch.randn(2, 3)).sum().backward()
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)):
        cast(quantizer)
        assert quantizer.scale is scale and scale.dtype == torch.float32 and scale.item() == value
        assert scale.grad.dtype == torch.float32 and quantizer.zero_point.dtype == torch.float32
    assert not offset or quantizer.zero_point is zero_point
    assert quantizer(torch.randn(3).bfloat16()).dtype == torch.bfloat16


def test_calibrating_keeps_the_parameter():
    quantizer = LearnedQuantizer("int4_sym_channel", 0, (3,))
    scale, memory = quantizer.scale, quantizer.scale.data_ptr()
    quantizer.fit(torch.randn(3, 8))
    assert quantizer.scale is scale and scale.data_ptr() == memory and quantizer.calibrated
    quantizer.reset()
    assert quantizer.scale is scale and not quantizer.calibrated


def test_uncalibrated_hands_on_floats_and_takes_part_in_the_loss():
    quantizer = LearnedQuantizer("uint4_asym", offset=True)
    x = torch.randn(4, 3, requires_grad=True)
    out = quantizer(x)
    out.square().sum().backward()
    assert torch.equal(out, x) and torch.equal(x.grad, 2 * x)
    assert quantizer.scale.grad == 0 and quantizer.zero_point.grad == 0
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        assert quantizer(x) is x


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("scheme", "axis", "shape"), [("uint4_asym", -1, ()), ("uint4_asym_channel", 0, (3,))])
def test_interchangeable_with_the_plain_quantizer(scheme, axis, shape, offset):
    x, plain = torch.randn(3, 8), UniformQuantizer(scheme, axis)
    plain.fit(x)
    learned = LearnedQuantizer.of(plain, offset)
    assert list(learned.state_dict()) == list(plain.state_dict())
    assert torch.equal(learned(x), plain(x)) and torch.equal(learned.settled()(x), plain(x))
    assert type(learned.settled()) is UniformQuantizer
    assert len(list(learned.parameters())) == 1 + offset

    with torch.no_grad():
        learned.scale.mul_(1.5)
    other = UniformQuantizer(scheme, axis)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other(x), learned(x)) and not torch.equal(other(x), plain(x))
    fresh = LearnedQuantizer(scheme, axis, shape, offset)
    scale = fresh.scale
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(fresh(x), learned(x)) and fresh.scale is scale


def test_uncalibrated_state_dicts_are_interchangeable_too():
    plain, learned = UniformQuantizer("int4_sym_channel", 0), LearnedQuantizer("int4_sym_channel", 0, (3,))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), learned.state_dict().values(), strict=True)
    )
    for source in (plain, learned):
        for target in (calibrated("int4_sym_channel", 0, (3,)), UniformQuantizer("int4_sym_channel", 0)):
            assert target.load_state_dict(source.state_dict()) and not target.calibrated
    assert learned.scale.shape == (3,)


def test_a_float_state_dict_loads_strictly_and_leaves_it_uncalibrated():
    class Layer(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight_quantizer = calibrated("int4_sym_channel", 0, (3,))

    layer = Layer()
    layer.load_state_dict(nn.Linear(4, 3).state_dict())
    assert not layer.weight_quantizer.calibrated
    layer.load_state_dict(Layer().state_dict())
    assert layer.weight_quantizer.calibrated
    state = Layer().state_dict()
    del state["weight_quantizer.zero_point"]
    with pytest.raises(RuntimeError, match="zero_point"):
        layer.load_state_dict(state)


def test_stored_shape_and_type_are_taken_over():
    learned = LearnedQuantizer("int4_sym_channel", 0, (3,))
    scale = learned.scale
    learned.load_state_dict({"scale": torch.ones(5).bfloat16(), "zero_point": torch.zeros(5).bfloat16()})
    assert learned.scale is scale and scale.shape == (5,) and scale.dtype == torch.float32
    learned.load_state_dict({"scale": torch.ones(5).bfloat16(), "zero_point": torch.zeros(5).bfloat16()}, assign=True)
    assert learned.scale.dtype == torch.float32 and learned.zero_point.dtype == torch.float32
    assert learned.scale.requires_grad and learned(torch.randn(5, 2)).shape == (5, 2)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(make):
    quantizer, x = calibrated(), torch.randn(9)
    twin = make(quantizer)
    assert torch.equal(twin(x), quantizer(x)) and twin.scale is not quantizer.scale


def test_codes_do_not_depend_on_learning():
    x, plain = torch.randn(3, 8), UniformQuantizer("int4_sym_channel", 0)
    plain.fit(x)
    learned = LearnedQuantizer.of(plain)
    codes = learned.encode(x)
    assert torch.equal(codes, plain.encode(x)) and torch.equal(learned.decode(codes), learned(x))
    assert not learned.decode(codes).requires_grad


def test_compiled_equals_eager():
    quantizer, x = calibrated(), torch.randn(4, 6)
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), quantizer(x))
    compiled(x).sum().backward()
    found, quantizer.scale.grad = quantizer.scale.grad, None
    quantizer(x).sum().backward()
    assert torch.allclose(found, quantizer.scale.grad)


def test_refuses_what_cannot_be_learned():
    with pytest.raises(ValueError, match="anew for every tensor"):
        LearnedQuantizer("int8_token_dynamic", -1)
    with pytest.raises(ValueError, match="zero point at 0"):
        LearnedQuantizer("int8_sym", offset=True)
    with pytest.raises(ValueError, match="kind"):
        LearnedQuantizer("fp8_e4m3")
