"""The search for noise: what is scored is the error of the layer's output."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.quantizers import NoisyQuantizer, build_quantizer
from lightning_quant.solvers import OutputError, clip_states, denoising_bias, mean_states, noise_states
from lightning_quant.solvers.noise import some_tokens


@pytest.fixture
def layer():
    """Inputs with a peak beside a rounding edge, their quantizer, and the quantized weight (out, in)."""
    torch.manual_seed(0)
    x = F.gelu(torch.randn(6, 37, 12))
    quantizer = NoisyQuantizer("int4_asym", axis=-1)
    quantizer.fit(x, "mse")
    weight = torch.randn(20, 12)
    rounding = build_quantizer("int4_sym_channel", axis=0)
    rounding.fit(weight)
    return x, quantizer, rounding(weight)


def states(quantizer):
    template = torch.linspace(-1, 1, 12)
    return [
        *clip_states(quantizer.state, 5),
        *mean_states(quantizer.state, 5),
        *noise_states(quantizer.state, template, 5),
    ]


@pytest.mark.parametrize("rows", [7, 12, 20])  # fewer outputs than inputs, as many, and more
def test_the_score_is_the_squared_error_of_the_output(layer, rows):
    x, quantizer, weight = layer
    weight = weight[:rows]
    error = OutputError(quantizer, weight, states(quantizer), tokens=37)
    assert error(x) is x
    for state, found in zip(error.states, error.errors, strict=True):
        candidate = NoisyQuantizer("int4_asym", axis=-1)
        candidate.freeze(torch.tensor(0.0), torch.tensor(1.0))
        candidate.set_state(*state)
        difference = F.linear(candidate(x), weight) - F.linear(x, weight)
        assert float(found) == pytest.approx(float(difference.square().sum()), rel=1e-4)


def test_the_first_candidate_is_what_was_there(layer):
    _, quantizer, _ = layer
    for first in (states(quantizer)[index] for index in (0, 6, 12)):
        assert all(map(torch.equal, first, quantizer.state))


def test_sums_over_batches_and_ranks_add_up(layer):
    x, quantizer, weight = layer
    whole, parts = (OutputError(quantizer, weight, states(quantizer), tokens=5) for _ in range(2))
    whole(x)
    for part in (x[:1], x[1:4], x[4:]):
        parts(part)
    assert torch.allclose(whole.errors, parts.errors, rtol=1e-6)


def test_both_forms_of_the_layer_agree(layer):
    """Taking the noise off before the product, or off its bias."""
    x, quantizer, weight = layer
    noise, bias = 0.3 * torch.randn(12), torch.randn(20)
    scale, zero_point, _ = quantizer.state
    quantizer.set_state(scale, zero_point, noise)
    plain = build_quantizer("int4_asym")
    plain.scale, plain.zero_point = scale, zero_point
    for given in (bias, None):
        before = F.linear(quantizer(x), weight, given)
        behind = F.linear(plain(x + noise), weight, denoising_bias(weight, given, noise))
        assert torch.allclose(before, behind, atol=1e-5)


def test_tokens_are_evenly_spaced_in_every_layout():
    x = torch.arange(2 * 5 * 3).view(2, 5, 3)
    assert torch.equal(some_tokens(x, 9), x.flatten(0, 1))
    assert torch.equal(some_tokens(x, 2), x[:, [0, 4]].flatten(0, 1))
    assert torch.equal(some_tokens(x[:, 0], 2), x[:, 0])
    assert torch.equal(some_tokens(x.view(2, 5, 1, 3), 2), x[:, [0, 4]].flatten(0, 1))
