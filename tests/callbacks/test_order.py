"""Several callbacks on the same layers: what each leaves to the others, and in which order they may come."""

import copy

import pytest
import torch
from torch import nn

from lightning_quant import (
    GPTQ,
    MagnitudePruning,
    MPTQViT,
    PostTrainingQuantization,
    RepQViT,
    SparseGPT,
    SparsityInduction,
    Wanda,
    load_quantized,
    save_quantized,
)
from lightning_quant.calibration import Hessian
from lightning_quant.layers import as_float, quantize_layer
from lightning_quant.quantizers import Pattern, Scheme
from lightning_quant.solvers import output_error
from tests.callbacks.test_pruning import QUICK, layers, outputs, weights
from tests.models import NoDropout, Sequences, trainer, validate

INT4 = {"weights": "int4", "activations": None}
HALVES = {
    "magnitude": lambda: MagnitudePruning("2:4"),
    "wanda": lambda: Wanda("2:4", **QUICK),
    "sparsegpt": lambda: SparseGPT("2:4", **QUICK),
    "induction": lambda: SparsityInduction("2:4", host="wanda", epochs=1, **QUICK),
}
ROUNDINGS = {
    "ptq": lambda: PostTrainingQuantization(**INT4),
    "ptq_asym": lambda: PostTrainingQuantization("int4_asym", "int8"),
    "ptq_fp4": lambda: PostTrainingQuantization("fp4_e2m1", None),
    "gptq": lambda: GPTQ("int4_asym", **QUICK),
}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture(params=ROUNDINGS)
def rounding(request):
    return ROUNDINGS[request.param]


def on_grid(layer):
    """Whether a layer computes with nothing but values of its format."""
    weight, quantizer = layer.quantized().detach(), copy.deepcopy(layer.weight_quantizer)
    quantizer.codes = None
    return torch.allclose(quantizer(weight), weight, atol=1e-6)


@pytest.mark.parametrize("pruned_first", [True, False])
def test_pruning_and_rounding_share_a_layer_in_either_order(half, rounding, pruned_first, tmp_path):
    model, callbacks = NoDropout(), [half(), rounding()]
    want, state = outputs(model), copy.deepcopy(model.state_dict())
    run = trainer(*(callbacks if pruned_first else reversed(callbacks)))
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert len(layers(model)) == 8
    for name, layer in layers(model).items():
        weight = layer.quantized()
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all(), name
        assert on_grid(layer) and torch.equal(layer.weight, state[f"{name}.weight"])
    # the same again from a checkpoint and from a folder
    run.save_checkpoint(tmp_path / "both.ckpt")
    fresh = [half(), rounding()] if pruned_first else [rounding(), half()]
    assert validate(NoDropout(), *fresh, ckpt_path=tmp_path / "both.ckpt") == metrics
    save_quantized(model, tmp_path / "folder")
    loaded = NoDropout()
    load_quantized(loaded, tmp_path / "folder")
    torch.testing.assert_close(outputs(loaded), outputs(model))
    # the way back
    with as_float(model):
        assert torch.equal(outputs(model), want)
    first, last = callbacks if pruned_first else reversed(callbacks)
    with pytest.raises(ValueError, match=rf"{type(last).__name__} came after {type(first).__name__} .* before"):
        first.remove(model)
    last.remove(model)
    assert first.is_calibrated(model)
    first.remove(model)
    assert torch.equal(outputs(model), want) and model.state_dict().keys() == state.keys()


def test_what_was_rounded_comes_back_when_the_pruning_behind_it_is_removed(half, rounding):
    model, quantizing, pruning = NoDropout(), rounding(), half()
    validate(model, quantizing)
    want, codes = outputs(model), {name: value.clone() for name, value in model.state_dict().items() if "codes" in name}
    validate(model, quantizing, pruning)
    assert not torch.equal(outputs(model), want)
    pruning.remove(model)
    assert torch.equal(outputs(model), want)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in codes.items())


def test_sparsegpt_on_a_grid_errs_less_than_the_same_rounded_afterwards():
    torch.manual_seed(0)
    x, linear, pattern = torch.randn(500, 32) @ torch.randn(32, 32), nn.Linear(32, 24), Pattern.parse("2:4")
    errors = []
    for joint in (True, False):
        layer = quantize_layer(copy.deepcopy(linear), Scheme.parse("int3_asym_channel"), None, pattern)
        hessian, method = Hessian.of(layer), SparseGPT("2:4")
        hessian.add(x)
        method.patterns = {"linear": pattern}
        if joint:
            layer.weight_quantizer.fit(layer.weight)
        method.solve("linear", layer, hessian)
        layer.weight_quantizer.fit(layer.weight)
        assert ((layer.quantized().unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
        errors.append(float(output_error(linear.weight, layer.quantized(), hessian.matrix()).sum()))
    assert errors[0] < errors[1]


def test_methods_that_take_different_slots_of_a_layer_go_together():
    model = NoDropout()
    validate(
        model,
        PostTrainingQuantization(None, "int8", attention=False),
        GPTQ("int4", attention=False, **QUICK),
        MagnitudePruning(),
    )
    layer = model.blocks[0].fc1
    assert layer.filled() == {"weights", "inputs", "pruned"}


def test_one_slot_twice_is_refused():
    model = NoDropout()
    with pytest.raises(ValueError, match=r"`embed` is quantized already"):
        validate(model, PostTrainingQuantization(**INT4), GPTQ("int4", **QUICK))


@pytest.mark.parametrize("rewriting", [RepQViT, MPTQViT])
def test_what_rewrites_weights_comes_first(rewriting, half):
    """In the list of callbacks, before anything runs; and on a model that was pruned before."""
    pruning, model = half(), NoDropout()
    says = rf"{rewriting.__name__} .*has to come before {type(pruning).__name__}.*put {rewriting.__name__} before"
    with pytest.raises(ValueError, match=says):
        validate(model, pruning, rewriting())
    assert not layers(model)
    validate(model, pruning)
    before = weights(model)
    with pytest.raises(ValueError, match=says + f"|{rewriting.__name__} .* `blocks"):
        validate(model, rewriting(activations="int8", weights="int8"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_rewrite_before_pruning_is_fine():
    model = NoDropout()
    validate(model, RepQViT(weights="int8", activations="int8"), Wanda("2:4", **QUICK))
    assert all(((w.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all() for w in weights(model).values())


def test_callbacks_on_different_parts_come_in_any_order():
    model = NoDropout()
    validate(model, MagnitudePruning(target="blocks.0"), RepQViT("int8", "int8", target="blocks.1"))
    assert set(weights(model)) == {f"blocks.0.{name}" for name in ("qkv", "proj", "fc1", "fc2")}


def test_learned_rounding_after_pruning_is_refused_and_before_it_is_not():
    few = {"iterations": 2, "samples": 8, "batch_size": 4}
    rounding = PostTrainingQuantization(**INT4, reconstruct=few)
    with pytest.raises(ValueError, match=r"reconstruct=.* away from 0: put PostTrainingQuantization before Magnitude"):
        validate(NoDropout(), MagnitudePruning(), rounding)
    model = NoDropout()
    validate(model, PostTrainingQuantization(**INT4, reconstruct=few), MagnitudePruning("2:4"))
    for layer in layers(model.requires_grad_(False)).values():
        assert ((layer.quantized().unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all() and on_grid(layer)
