"""SmoothQuant moves outliers into the weights, and the model computes what it did."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, SmoothQuant, TokenWindows
from tests.language import TOKENS, gpt2, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def data():
    return DataLoader(TokenWindows(tokens(), TOKENS), batch_size=4)


def validate(model, callback):
    L.Trainer(accelerator="cpu", callbacks=[callback], **QUIET).validate(model, data(), verbose=False)


@pytest.mark.parametrize(
    "build", [llama, lambda: llama(norm=nn.LayerNorm, bias=True), gpt2], ids=["rms", "layer", "gpt2"]
)
def test_the_function_is_preserved_and_the_reaches_are_alike(build):
    model, ids = build().double(), tokens()[None]
    exact, readers = model(ids), {}
    callback = SmoothQuant(None, None, alpha=0.5, calibration_loader=data(), calibration_samples=8)
    validate(model, callback)
    torch.testing.assert_close(model(ids), exact, rtol=0, atol=1e-9)
    name = "net.transformer.h.0.mlp.c_fc" if build is gpt2 else "net.layers.0.gate"
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: readers.update({m: args[0].abs().flatten(0, -2)}))
    for batch in data():
        model(batch["input_ids"])
        readers["max"] = torch.maximum(readers.get("max", torch.zeros(())), readers[layer].amax(0))
    handle.remove()
    weights = layer.weight.t() if build is gpt2 else torch.cat([layer.weight, model.net.layers[0].up.weight])
    torch.testing.assert_close(readers["max"], weights.abs().amax(0), rtol=1e-6, atol=0)


def test_a_tied_head_is_left_alone():
    model = llama(tied=True)
    head, norm = model.net.head.weight.detach().clone(), model.net.norm.weight.detach().clone()
    validate(model, SmoothQuant(None, None, calibration_loader=data()))
    assert torch.equal(model.net.head.weight, head) and torch.equal(model.net.norm.weight, norm)
    assert model.net.head.weight is model.net.table.weight


def test_eight_bits_per_tensor_are_nearer_to_float_with_a_planted_outlier():
    errors, ids = {}, tokens()[None]
    for method in (PostTrainingQuantization, SmoothQuant):
        torch.manual_seed(0)
        model = llama(tied=False, outlier=100.0)
        for block in model.net.layers:  # a loud channel that the weights behind listen to no more than to the others
            for layer in (block.q, block.k, block.v, block.gate, block.up):
                layer.weight.data[:, 3] /= 100
        model.net.head.weight.data[:, 3] /= 100
        exact = model(ids)
        validate(
            model,
            method("int8_tensor", "int8", "minmax", attention=False, skip=["head"], calibration_loader=data()),
        )
        errors[method] = (model(ids) - exact).square().mean().item()
    assert errors[SmoothQuant] < 0.5 * errors[PostTrainingQuantization]


def test_remove_leaves_the_function_and_says_so():
    model, ids = llama(), tokens()[None]
    exact = model(ids)
    callback = SmoothQuant("int4", "int4", calibration_loader=data(), skip=["head"])
    validate(model, callback)
    assert not torch.allclose(model(ids), exact, atol=1e-3)
    with pytest.warns(UserWarning, match="norms stay folded"):
        callback.remove(model)
    torch.testing.assert_close(model(ids), exact, rtol=0, atol=1e-4)


def test_a_model_without_such_a_norm_is_refused():
    model = llama()
    model.net.layers, model.net.norm = nn.ModuleList(), nn.Identity()
    with pytest.raises(ValueError, match="has none that linear layers alone read"):
        validate(model, SmoothQuant(calibration_loader=data()))
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        SmoothQuant(alpha=1.5)
