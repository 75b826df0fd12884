"""Folding a scale and a shift into a norm and its readers leaves the function as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_quant.layers import QuantizedLayer, quantize_layer
from lightning_quant.quantizers import Scheme
from lightning_quant.transforms import fold_linear, fold_norm, fold_pair, unfolded_on_failure

WEIGHTS, INPUTS = Scheme.parse("int8_asym_channel"), Scheme.parse("int8_asym_tensor")


def conv1d(inputs, outputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


LINEARS = {
    "linear": nn.Linear,
    "linear without bias": lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False),
    "Conv1D": conv1d,
}


def norm_and_readers(kind="linear", readers=1, channels=7, outputs=5, dtype=torch.float32, quantized=True):
    """A norm with an affine of its own and the layers that read it."""
    norm = nn.LayerNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    linears = [LINEARS[kind](channels, outputs + i) for i in range(readers)]
    for module in (norm, *linears):
        module.to(dtype)
    if quantized:
        for linear in linears:
            quantize_layer(linear, WEIGHTS, INPUTS)
    return norm, linears


def scale_and_shift(channels=7, generator=None):
    """r1 over two orders of magnitude, r2 as zero points differ."""
    return (
        torch.exp(1.5 * torch.randn(channels, generator=generator)),
        3 * torch.randn(channels, generator=generator),
    )


def relative_error(found, want):
    return float((found - want).norm() / want.norm())


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@torch.no_grad()
def test_the_function_stays(dtype, tolerance, kind, readers, quantized):
    norm, linears = norm_and_readers(kind, readers, dtype=dtype, quantized=quantized)
    x = torch.randn(3, 11, 7, dtype=dtype)
    want, normed = [linear(norm(x)) for linear in linears], norm(x)
    scale, shift = scale_and_shift()
    fold_pair(norm, linears, scale, shift)
    for linear, before in zip(linears, want, strict=True):
        assert relative_error(linear(norm(x)), before) < tolerance
    assert relative_error(norm(x), (normed + shift) / scale) < tolerance
    assert not torch.allclose(norm(x), normed, rtol=0.1)


@pytest.mark.parametrize("kind", LINEARS)
@torch.no_grad()
def test_square_weights_are_folded_along_the_input(kind):
    """Where (out, in) and (in, out) have the same shape, nothing but the values can tell them apart."""
    norm, (linear,) = norm_and_readers(kind, channels=6, outputs=6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    want = linear(norm(x))
    fold_pair(norm, [linear], *scale_and_shift(6))
    assert relative_error(linear(norm(x)), want) < 1e-9


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_pure_functions_on_any_shape(channels, outputs, seed):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    n, gamma, beta, weight, bias = normal(4, channels), normal(channels), normal(channels), normal(outputs, channels), normal(outputs)  # fmt: skip  # noqa: E501
    scale, shift = (tensor.double() for tensor in scale_and_shift(channels, draw))
    new_gamma, new_beta = fold_norm(gamma, beta, scale, shift)
    new_weight, new_bias = fold_linear(weight, bias, scale, shift)
    before, after = n * gamma + beta, n * new_gamma + new_beta
    assert torch.allclose(after, (before + shift) / scale, rtol=1e-9, atol=1e-12)
    assert torch.allclose(after @ new_weight.T + new_bias, before @ weight.T + bias, rtol=1e-7, atol=1e-9)


def test_against_the_formulas_in_numpy():
    norm, (linear,) = norm_and_readers(dtype=torch.float64)
    gamma, beta, weight, bias = (
        p.detach().numpy().copy() for p in (norm.weight, norm.bias, linear.weight, linear.bias)
    )
    scale, zero_point = np.array([0.1, 0.2, 0.4, 0.8, 0.3, 0.7, 1.0]), np.array([3.0, 4.0, 9.0, 5.0, 2.0, 8.0, 7.0])
    whole_scale, whole_zero_point = scale.mean(), np.round(zero_point.mean())
    r1, r2 = scale / whole_scale, zero_point - whole_zero_point
    fold_pair(norm, [linear], torch.from_numpy(r1), torch.from_numpy(scale * r2))
    np.testing.assert_allclose(norm.weight.detach(), gamma / r1, rtol=1e-12)
    np.testing.assert_allclose(norm.bias.detach(), (beta + scale * r2) / r1, rtol=1e-12)
    np.testing.assert_allclose(linear.weight.detach(), weight * r1, rtol=1e-12)
    np.testing.assert_allclose(linear.bias.detach(), bias - weight @ (scale * r2), rtol=1e-12)
    # The classic mistake is to take the new W for the bias without also taking s~ for s.
    new_weight = weight * r1
    np.testing.assert_allclose(linear.bias.detach(), bias - new_weight @ (whole_scale * r2), rtol=1e-9)
    assert not np.allclose(linear.bias.detach(), bias - new_weight @ (scale * r2), rtol=1e-2)


def test_folding_there_and_back_gives_the_parameters_back():
    norm, (linear,) = norm_and_readers(dtype=torch.float64)
    before = [p.detach().clone() for m in (norm, linear) for p in m.parameters()]
    scale, shift = (tensor.double() for tensor in scale_and_shift())
    fold_pair(norm, [linear], scale, shift)
    linear.folded.fill_(False)
    fold_pair(norm, [linear], 1 / scale, -shift / scale)
    for parameter, value in zip([p for m in (norm, linear) for p in m.parameters()], before, strict=True):
        assert relative_error(parameter, value) < 1e-9


@torch.no_grad()
def test_in_bfloat16_the_fold_is_rounded_once():
    """The algebra is done in float64, so the result is the nearest bfloat16 of the exact one."""
    norm, (linear,) = norm_and_readers(dtype=torch.bfloat16)
    weight, (scale, shift) = linear.weight.double(), scale_and_shift()
    fold_pair(norm, [linear], scale, shift)
    assert linear.weight.dtype == torch.bfloat16
    assert torch.equal(linear.weight, (weight * scale.double()).bfloat16())


# ---------------------------------------------------------------- what is created, and what stays


@pytest.mark.parametrize("quantized", [True, False])
@torch.no_grad()
def test_a_linear_and_a_norm_without_bias_get_one(quantized):
    norm, linear = nn.LayerNorm(7, bias=False), nn.Linear(7, 5, bias=False)
    if quantized:
        quantize_layer(linear, WEIGHTS, INPUTS)
    x = torch.randn(4, 7)
    want = linear(norm(x))
    fold_pair(norm, [linear], *scale_and_shift())
    assert isinstance(linear.bias, nn.Parameter) and linear.bias.shape == (5,)
    assert isinstance(norm.bias, nn.Parameter) and norm.bias.shape == (7,)
    assert relative_error(linear(norm(x)), want) < 1e-4
    assert {"weight", "bias"} <= set(linear.state_dict())


def test_parameters_keep_their_identity_and_their_requires_grad():
    norm, (linear,) = norm_and_readers()
    linear.weight.requires_grad_(False)
    before = [*norm.parameters(), *linear.parameters()]
    fold_pair(norm, [linear], *scale_and_shift())
    after = [*norm.parameters(), *linear.parameters()]
    assert all(p is q for p, q in zip(before, after, strict=True))
    assert not linear.weight.requires_grad and norm.weight.requires_grad
    assert all(p.grad_fn is None and p.is_leaf for p in after)


# ---------------------------------------------------------------- folding twice


def state_of(*modules):
    return [tensor.detach().clone() for m in modules for tensor in (*m.parameters(), *m.buffers())]


@pytest.mark.parametrize("readers", [1, 3])
def test_a_second_fold_refuses_and_changes_nothing(readers):
    norm, linears = norm_and_readers(readers=readers)
    fold_pair(norm, linears, *scale_and_shift())
    assert all(bool(linear.folded) for linear in linears)
    before = state_of(norm, *linears)
    with pytest.raises(ValueError, match="folded already"):
        fold_pair(norm, linears, *scale_and_shift())
    assert all(torch.equal(a, b) for a, b in zip(state_of(norm, *linears), before, strict=True))


def test_one_folded_reader_among_several_is_enough_to_refuse():
    norm, linears = norm_and_readers(readers=3)
    linears[2].folded.fill_(True)
    before = state_of(norm, *linears)
    with pytest.raises(ValueError, match="folded already"):
        fold_pair(norm, linears, *scale_and_shift())
    assert all(torch.equal(a, b) for a, b in zip(state_of(norm, *linears), before, strict=True))


# ---------------------------------------------------------------- interruption


class Stop(BaseException):
    """Not an Exception: as KeyboardInterrupt."""


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_unfolded_on_failure_gives_everything_back(error, kind):
    norm, linears = norm_and_readers(kind, readers=2)
    before, biases = state_of(norm, *linears), [linear.bias for linear in linears]
    with pytest.raises(error), unfolded_on_failure([norm, *linears]):  # noqa: PT012
        fold_pair(norm, linears, *scale_and_shift())
        raise error
    assert all(torch.equal(a, b) for a, b in zip(state_of(norm, *linears), before, strict=True))
    assert all(linear.bias is bias for linear, bias in zip(linears, biases, strict=True))
    assert not any(bool(linear.folded) for linear in linears)
    assert not any(linear._load_state_dict_pre_hooks for linear in linears)


def test_a_failure_in_the_middle_of_a_pair_is_undone_too(monkeypatch):
    import sys

    norm, linears = norm_and_readers("linear without bias", readers=2)
    before = state_of(norm, *linears)

    def failing(*args):
        raise ValueError("in the norm, after both linears")

    monkeypatch.setattr(sys.modules[fold_pair.__module__], "fold_norm", failing)
    with pytest.raises(ValueError, match="after both linears"), unfolded_on_failure([norm, *linears]):
        fold_pair(norm, linears, *scale_and_shift())
    assert all(torch.equal(a, b) for a, b in zip(state_of(norm, *linears), before, strict=True))
    assert all(linear.bias is None for linear in linears)


def test_without_a_failure_the_fold_stays():
    norm, (linear,) = norm_and_readers()
    before = linear.weight.detach().clone()
    with unfolded_on_failure([norm, linear]):
        fold_pair(norm, [linear], *scale_and_shift())
    assert isinstance(linear, QuantizedLayer) and bool(linear.folded) and not torch.equal(linear.weight, before)
