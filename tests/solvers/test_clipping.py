"""Clips learned per channel."""

import pytest
import torch

from lightning_quant.quantizers import build_quantizer
from lightning_quant.solvers import clipping_error, learn_clips


def activations(outlier=None):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 8)
    if outlier is not None:
        x[0, outlier] = 60.0
    return x, [torch.randn(16, 8, generator=torch.Generator().manual_seed(1))]


def gram(weights):
    return sum(w.t() @ w for w in weights)


def test_the_error_is_that_of_a_quantizer_behind_the_weights():
    x, weights = activations()
    quantizer = build_quantizer("uint4_asym_channel", axis=-1)
    quantizer.freeze(x.amin(0), x.amax(0))
    want = ((x - quantizer(x)) @ weights[0].t()).square().sum(-1).mean()
    assert torch.isclose(clipping_error(x, x.amin(0), x.amax(0), 15, gram(weights)), want, rtol=1e-4)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_learned_clips_never_raise_the_error(bits):
    x, weights = activations()
    start = x.amin(0), x.amax(0)
    learned = learn_clips(x, weights, *start, bits)
    before, after = (clipping_error(x, *ends, 2**bits - 1, gram(weights)) for ends in (start, learned))
    assert after <= before and (bits > 4 or after < 0.95 * before)


def test_a_planted_outlier_is_clipped_and_the_other_channels_hardly_move():
    x, weights = activations(outlier=3)
    clean, _ = activations()
    _, hi = learn_clips(x, weights, x.amin(0), x.amax(0), bits=4)
    _, without = learn_clips(clean, weights, clean.amin(0), clean.amax(0), bits=4)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert hi[3] < 0.7 * x[:, 3].max()
    assert torch.allclose(hi[others], without[others], rtol=0.25)


def test_no_steps_keep_the_start():
    x, weights = activations()
    lo, hi = learn_clips(x, weights, x.amin(0), x.amax(0), bits=4, steps=0)
    assert torch.equal(lo, x.amin(0)) and torch.equal(hi, x.amax(0))


def test_a_dead_channel_gives_no_nan():
    x, weights = activations()
    x[:, 2] = 0
    lo, hi = learn_clips(x, weights, x.amin(0), x.amax(0), bits=4, steps=20)
    assert lo.isfinite().all() and hi.isfinite().all() and lo[2] == hi[2] == 0
