"""Pruned language models by method: stories260K calibrated on WikiText-2, judged by the stories that it can tell."""

import pytest

from lightning_quant import OSAQ, MagnitudePruning, RotatedPTQ, SparseGPT, SparsityInduction, Wanda
from tests.models import trainer
from tests.real import StoriesData, stories260k

pytestmark = pytest.mark.evidence


def perplexity(*callbacks):
    return trainer(*callbacks).validate(stories260k(), datamodule=StoriesData(), verbose=False)[0]["perplexity"]


@pytest.mark.timeout(600)
def test_sparsegpt_below_wanda_below_magnitude_at_two_of_four(assets, capsys):
    dense, magnitude = perplexity(), perplexity(MagnitudePruning("2:4"))
    wanda, sparsegpt = perplexity(Wanda("2:4")), perplexity(SparseGPT("2:4"))
    with capsys.disabled():
        print(f"\n  2:4: dense {dense:.2f}, magnitude {magnitude:.1f}, Wanda {wanda:.1f}, SparseGPT {sparsegpt:.1f}")
    assert dense == pytest.approx(3.548, abs=2e-3)
    assert 1.3 * sparsegpt < wanda and 1.3 * wanda < magnitude


@pytest.mark.timeout(900)
def test_induction_takes_magnitude_far_down_at_half(assets, capsys):
    magnitude = perplexity(MagnitudePruning(0.5))
    induced = perplexity(SparsityInduction(0.5, host="magnitude", calibration_samples=64))
    with capsys.disabled():
        print(f"\n  50 %: magnitude {magnitude:.1f}, with Sparsity Induction {induced:.1f}")
    assert induced < 0.55 * magnitude


@pytest.mark.timeout(900)
def test_rotated_absorbed_rounded_and_pruned_in_one_list(assets, capsys):
    few = {"calibration_samples": 32}
    rotated, absorbed = RotatedPTQ(weights=None, activations="int8_token_dynamic", **few), OSAQ("int4", **few)
    callbacks, model = [rotated, absorbed, SparseGPT("2:4", **few)], stories260k()
    found = trainer(*callbacks).validate(model, datamodule=StoriesData(), verbose=False)[0]["perplexity"]
    layer = model.net.model.layers[0].mlp.up_proj
    assert layer.filled() == {"weights", "inputs", "pruned"}
    assert ((layer.quantized().unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    for callback in reversed(callbacks):
        callback.remove(model)
    dense = trainer().validate(model, datamodule=StoriesData(), verbose=False)[0]["perplexity"]
    with capsys.disabled():
        print(f"\n  rotated, OSAQ W4A8, 2:4 SparseGPT: {found:.1f}, and {dense:.3f} when all is removed")
    assert found < 60 and dense == pytest.approx(3.548, abs=2e-3)
