"""RotatedPTQ rotates what may be rotated, and the model computes what it did."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import GPTQ, LanguageModule, PostTrainingQuantization, RotatedPTQ, TokenWindows
from lightning_quant.layers import rotates
from tests.language import TOKENS, WIDTH, gpt2, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def data(batch_size=4):
    return DataLoader(TokenWindows(tokens(), TOKENS), batch_size=batch_size)


def validate(model, *callbacks):
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    (got,) = trainer.validate(model, data(), verbose=False)
    return got["perplexity"], trainer


def rotation(**arguments):
    return RotatedPTQ(**{"weights": None, "activations": None, "calibration_loader": data(), **arguments})


def online(model):
    return [name for name, module in model.named_modules() if rotates(module)]


@pytest.mark.parametrize("kind", ["auto", "kronecker", "random", "block"])
@pytest.mark.parametrize("build", ["rms", "rms untied", "layer", "layer untied", "gpt2"])
def test_the_function_is_preserved_in_float64(build, kind):
    norm = nn.LayerNorm if "layer" in build else nn.RMSNorm
    model = gpt2() if build == "gpt2" else llama(norm=norm, bias="layer" in build, tied="untied" not in build)
    model, ids = model.double(), tokens(2 * TOKENS).view(2, TOKENS)
    exact, before = model(ids), {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = rotation(rotation=kind, residual=True)
    validate(model, callback)
    assert callback.is_calibrated(model)
    torch.testing.assert_close(model(ids), exact, rtol=0, atol=1e-9)
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    weights = [name for name in before if name.endswith("weight") and "norm" not in name and "ln_" not in name]
    shared = {"net.table.weight", "net.head.weight", "net.transformer.wte.weight"} if "untied" not in build else set()
    assert {*weights} - {*changed} <= shared, "every weight but a shared table has been rotated"
    with pytest.warns(UserWarning, match="rotated back"):
        callback.remove(model)
    assert online(model) == []
    torch.testing.assert_close(model(ids), exact, rtol=0, atol=1e-9)


def test_what_is_fused_costs_nothing_and_what_cannot_be_runs_online():
    model = llama(tied=False)
    validate(model, rotation())
    assert online(model) == ["net.layers.0.down", "net.layers.1.down"]
    model = llama(tied=True)
    validate(model, rotation())
    assert online(model) == ["net.table", "net.layers.0.down", "net.layers.1.down", "net.norm"]
    assert model.net.head.weight is model.net.table.weight
    model = llama(tied=False)
    validate(model, rotation(online=False))
    assert online(model) == []


def test_a_post_norm_model_is_refused_by_name_or_rotated_online():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(29, WIDTH), nn.LayerNorm(WIDTH)
            self.fc, self.out, self.head = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH), nn.Linear(WIDTH, 29)
            self.norm2 = nn.LayerNorm(WIDTH)

        def forward(self, input_ids):
            x = self.norm(self.table(input_ids))
            return self.head(self.norm2(x + self.out(nn.functional.gelu(self.fc(x)))))

    model = LanguageModule(PostNorm()).double()
    exact = model(tokens()[None])
    with pytest.raises(ValueError, match=r"`net.norm`: it is also read by .*residual=False"):
        validate(model, rotation(residual=True))
    assert torch.equal(model(tokens()[None]), exact) and online(model) == []
    validate(model, rotation())
    assert online(model) == ["net.fc", "net.out", "net.head"]
    torch.testing.assert_close(model(tokens()[None]), exact, rtol=0, atol=1e-9)


def test_a_size_without_a_hadamard_matrix_is_refused_and_the_weights_are_as_they_were():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(29, 22), nn.RMSNorm(22), nn.Linear(22, 29)

        def forward(self, input_ids):
            return self.head(self.norm(self.table(input_ids)))

    model = LanguageModule(Odd())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="no Hadamard matrix of size 22"):
        validate(model, rotation(rotation="hadamard"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not online(model)
    validate(model, rotation())
    torch.testing.assert_close(
        model(tokens()[None]), torch.func.functional_call(model, before, tokens()[None]), rtol=0, atol=1e-4
    )


def test_outliers_are_spread_and_four_bits_are_nearer_to_float():
    model, ids = llama(tied=False, outlier=20.0), tokens()[None]
    exact = model(ids)
    formats = {"weights": "int8", "activations": "int4_token_dynamic"}
    common = {"calibration_loader": data(), "attention": False, "skip": ["head"]}
    inputs = {}

    def peak(module, args):
        inputs[module] = (args[0].abs().amax(-1) / args[0].square().mean(-1).sqrt()).mean().item()

    results = {}
    for name, callback in (
        ("nearest", PostTrainingQuantization(**formats, **common)),
        ("rotated", RotatedPTQ(**formats, **common)),
    ):
        validate(model, callback)
        handle = model.net.layers[0].q.register_forward_pre_hook(peak)
        error = (model(ids) - exact).square().mean().item()
        handle.remove()
        results[name] = error, inputs[model.net.layers[0].q]
        callback.remove(model)
    assert results["rotated"][1] < 0.7 * results["nearest"][1]
    assert results["rotated"][0] < 0.5 * results["nearest"][0]


@pytest.mark.parametrize("solver", ["nearest", "gptq"])
def test_a_checkpoint_reloads_with_its_rotations(tmp_path, solver):
    model = llama()
    callback = RotatedPTQ("int4", "int8_token_dynamic", solver, calibration_loader=data(), skip=["head"])
    got, trainer = validate(model, callback)
    trainer.save_checkpoint(tmp_path / "rotated.ckpt")
    again = llama()
    again.load_state_dict(torch.load(tmp_path / "rotated.ckpt", weights_only=True)["state_dict"])
    assert online(again) == online(model)
    assert validate(again)[0] == pytest.approx(got, rel=1e-6)
    fresh = RotatedPTQ("int4", "int8_token_dynamic", solver, calibration_loader=data(), skip=["head"])
    with pytest.warns(UserWarning, match="rotated back"):
        fresh.remove(again)
    assert not online(again)


def test_a_float_checkpoint_makes_a_rotated_model_float_again(tmp_path):
    model = llama()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    exact, _ = validate(model)
    validate(model, rotation())
    model.load_state_dict(state)
    assert not online(model) and validate(model)[0] == exact


def test_rotates_alone_and_another_callback_quantizes():
    model = llama(tied=False, outlier=30.0)
    both = validate(model, rotation(), GPTQ("int3", calibration_loader=data(), min_tokens=0.1, skip=["head"]))[0]
    assert online(model) and both > 0
    one = llama(tied=False, outlier=30.0)
    one.load_state_dict(model.state_dict())
    assert validate(one)[0] == pytest.approx(both, rel=1e-6)


def test_a_second_rotation_is_refused():
    model = llama()
    validate(model, rotation())
    with pytest.raises(ValueError, match="already"):
        validate(model, rotation(seed=1))
