"""Searches of float formats, against brute force and against what they start from."""

import itertools

import pytest
import torch

from lightning_quant.quantizers.floating import float_max, float_quantize
from lightning_quant.solvers.float_formats import FloatFormat, formats_of, power_of_two_scales, search_formats


def planted(tokens=96, channels=10, outputs=7):
    x = torch.randn(tokens, channels) * 2.0 ** torch.arange(channels).flip(0)
    return x, torch.randn(outputs, channels) * 2.0 ** -torch.arange(channels).flip(0)


def error(x, weight, weights, inputs):
    rounded = inputs.rounded(x) @ weights.rounded(weight.T)
    return ((rounded - x @ weight.T).square().sum() / (x @ weight.T).square().sum()).item()


def test_the_formats_hold_the_values_of_their_names():
    grid = torch.linspace(-8, 8, 4001)
    values = lambda e, m: float_quantize(grid, e, m).unique().tolist()  # noqa: E731
    assert values(2, 1)[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    steps = torch.tensor(values(1, 2)).diff()
    assert torch.allclose(steps, steps[0].expand_as(steps))  # E1M2 is uniform
    for e, m in formats_of(4):
        once = float_quantize(grid, e, m)
        assert torch.equal(float_quantize(once, e, m), once)


def test_the_exponents_of_channels_move_into_the_weight_exactly():
    x, weight = planted()
    scale = power_of_two_scales(x.abs().amax(0), 2, 1)
    power = (scale / scale.amax()).log2()
    assert torch.equal(power, power.round()) and power.min() >= -3 and power.unique().numel() > 1
    shift = torch.exp2(-power)
    inputs = FloatFormat(2, 1, scale)
    whole = FloatFormat(2, 1, scale.amax().expand_as(scale))
    # the codes are those of the shifted input on the one scale of the tensor, and the shift goes into the weight
    assert torch.equal(inputs.rounded(x), whole.rounded(x * shift) / shift)
    assert torch.equal(
        (whole.rounded(x * shift).double() @ (weight / shift).double().T),
        inputs.rounded(x).double() @ weight.double().T,
    )


def test_the_weight_search_finds_the_best_of_all_candidates():
    x, weight = torch.randn(40, 6), torch.randn(3, 6)
    found, _, _ = search_formats(x, weight, formats_of(4), None, rounds=1, steps=12)
    rows, best = weight.abs().amax(1), []
    for e, m in formats_of(4):
        errors = torch.stack(
            [
                (x @ (FloatFormat(e, m, rows * cut / float_max(e, m)).rounded(weight.T) - weight.T)).square().sum(0)
                for cut in torch.linspace(0.2, 1.0, 12)
            ]
        )
        best.append((errors.amin(0).sum().item(), (e, m)))
    assert (found.exponent, found.mantissa) == min(best)[1]
    got = (x @ (found.rounded(weight.T) - weight.T)).square().sum().item()
    assert got == pytest.approx(min(best)[0], rel=1e-4)


def test_no_turn_makes_it_worse_and_channels_with_exponents_are_better():
    x, weight = planted()
    plain, shifted = (
        search_formats(x, weight, formats_of(4), formats_of(4), rounds=3, steps=20, preshift=preshift)
        for preshift in (False, True)
    )
    start = error(
        x,
        weight,
        FloatFormat(2, 1, weight.abs().amax(1) / float_max(2, 1)),
        FloatFormat(2, 1, power_of_two_scales(x.abs().amax(0), 2, 1, preshift=False)),
    )
    assert plain[2][-1] < start
    for *_, errors in (plain, shifted):
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    only_inputs = [search_formats(x, weight, None, formats_of(4), 1, 20, preshift)[2][0] for preshift in (False, True)]
    assert only_inputs[1] < 0.5 * only_inputs[0]
    assert shifted[2][-1] == pytest.approx(error(x, weight, *shifted[:2]), rel=1e-4)


def test_dead_channels_give_no_nan():
    x, weight = planted()
    x[:, 2], weight[:, 3], weight[1] = 0, 0, 0
    weights, inputs, errors = search_formats(x, weight, formats_of(4), formats_of(4), rounds=1, steps=5)
    assert weights.rounded(weight.T).isfinite().all() and inputs.rounded(x).isfinite().all() and errors[0] < 1
