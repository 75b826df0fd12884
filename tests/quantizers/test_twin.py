"""Two uniform grids whose steps differ by a power of two."""

import pytest
import torch

from lightning_quant.quantizers import (
    TwinQuantizer,
    UniformQuantizer,
    UnsignedTwinQuantizer,
    build_quantizer,
    from_steps,
    to_steps,
)


def frozen(text, lo, hi):
    quantizer = build_quantizer(text)
    quantizer.freeze(torch.tensor(lo), torch.tensor(hi))
    return quantizer


def nearest(x, quantizer):
    """The nearest of all values that a code stands for, the slow way; for a signed twin of those on its side of 0."""
    values = quantizer.decode(torch.arange(2**quantizer.scheme.bits))
    out = []
    for number in x.tolist():
        own = [v for v in values.tolist() if quantizer.kind == "utwin" or (v <= 0 if number < 0 else v >= 0)]
        out.append(min(own, key=lambda v: abs(v - number)))
    return torch.tensor(out)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0, 1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["twin", "utwin"])
def test_every_number_becomes_the_nearest_value(kind, exponent, bits):
    quantizer = frozen(f"{kind}_{bits}", -0.2, 3.0)
    quantizer.align(torch.tensor(3.0 / max(1, 2 ** (bits - 1) - 1)), exponent)
    x = torch.cat([torch.linspace(-0.4, 3.3, 997), torch.linspace(0, 0.05, 101)])
    found, want = quantizer(x), nearest(x, quantizer)
    assert torch.allclose((found - x).abs(), (want - x).abs(), atol=1e-6)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), found)
    assert int(quantizer.encode(x).min()) >= 0 and int(quantizer.encode(x).max()) < 2**bits
    steps = quantizer.decode(torch.tensor([2**bits - 1])) / (2 ** (bits - 1) - 1) / quantizer.scale
    assert torch.allclose(steps, torch.tensor(2.0**exponent))  # coarse over fine


def test_with_exponent_0_it_is_the_symmetric_uniform_grid():
    twin, plain = frozen("twin_4", -3.5, 3.0), UniformQuantizer("int4_sym")
    twin.align(torch.tensor(0.4), 0)
    plain.freeze(torch.tensor(-2.8), torch.tensor(2.8))
    x = torch.linspace(-5, 5, 1001)
    assert torch.allclose(twin(x), plain(x)) and torch.equal(twin.encode(x), plain.encode(x))


def test_a_range_is_covered_on_both_sides():
    quantizer = frozen("twin_4", -0.17, 7.0)
    values = quantizer.decode(torch.arange(16))
    assert values.max() == 7 and -0.34 < values.min() <= -0.17
    deep = frozen("twin_4", -8.0, 0.0)  # nothing positive
    assert deep.decode(torch.arange(16)).min() == -8


@pytest.mark.parametrize("kind", ["twin_4", "utwin_4"])
def test_gradients_pass_between_the_ends_and_nowhere_else(kind):
    quantizer = frozen(kind, -0.2, 3.0)
    x = torch.tensor([-9.0, 0.1, 2.0, 9.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert torch.equal(quantizer(x).detach(), quantizer(x.detach()))


@pytest.mark.parametrize("kind", ["twin_4", "utwin_4"])
def test_it_is_saved_and_loaded(kind):
    quantizer, x = frozen(kind, -0.2, 3.0), torch.linspace(-1, 4, 99)
    quantizer.align(torch.tensor(0.3), 5)
    other = build_quantizer(kind)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x)) and str(other.scheme) == kind


def test_places_on_the_ruler_are_one_apart():
    quantizer = frozen("twin_3", -0.2, 3.0)
    values = quantizer.decode(torch.arange(8))
    assert torch.allclose(to_steps(quantizer, values), torch.arange(-4.0, 4.0))
    assert torch.allclose(from_steps(quantizer, torch.arange(-4.0, 4.0)), values)


@pytest.mark.parametrize("text", ["twin_1", "utwin_9", "twin_4_channel", "twin_4_asym", "twin4"])
def test_what_it_is_not_is_refused(text):
    with pytest.raises(ValueError, match="is not a number format"):
        build_quantizer(text)


def test_out_of_range_is_refused():
    for quantizer in (TwinQuantizer("twin_4"), UnsignedTwinQuantizer("utwin_4")):
        with pytest.raises(ValueError, match="exponent from 0 to 8"):
            quantizer.align(torch.tensor(0.1), 9)
        with pytest.raises(ValueError, match="above 0"):
            quantizer.align(torch.tensor(0.0), 2)
