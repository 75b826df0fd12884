"""CrossQuant in a Trainer: nearer to float than a scale per token, saved, and refused where it has no meaning."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import CrossQuant, PostTrainingQuantization, TokenWindows
from tests.language import TOKENS, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def data():
    return DataLoader(TokenWindows(tokens(), TOKENS), batch_size=4)


def validate(model, callback):
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **QUIET)
    trainer.validate(model, data(), verbose=False)
    return trainer


def planted():
    """A loud channel that the weights behind listen to no more than to the others."""
    torch.manual_seed(0)
    model = llama(tied=False, outlier=30.0)
    for block in model.net.layers:
        for layer in (block.q, block.k, block.v, block.gate, block.up):
            layer.weight.data[:, 3] /= 30
    return model


def test_is_nearer_to_float_than_a_scale_per_token_and_rounds_less_to_zero():
    errors, ids = {}, tokens()[None]
    common = {"attention": False, "skip": ["head"], "calibration_loader": data()}
    cross = CrossQuant(None, "int4", **common)
    for callback in (cross, PostTrainingQuantization(None, "int4_sym_token", **common)):
        model = planted()
        exact = model(ids)
        validate(model, callback)
        errors[callback] = (model(ids) - exact).square().mean().item()
    assert errors[cross] < 0.5 * errors[callback]
    assert cross.kernels["net.layers.0.q"][0] < 0.5 * cross.kernels["net.layers.0.q"][1]


def test_a_checkpoint_reloads_with_its_channels(tmp_path):
    model, ids = planted(), tokens()[None]
    trainer = validate(model, CrossQuant("int8", "int8", skip=["head"], calibration_loader=data()))
    trainer.save_checkpoint(tmp_path / "cross.ckpt")
    again = planted()
    again.load_state_dict(torch.load(tmp_path / "cross.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again(ids), model(ids)) and not torch.equal(model(ids), planted()(ids))


def test_remove_gives_the_float_model_back():
    model, ids = planted(), tokens()[None]
    exact, callback = model(ids), CrossQuant(skip=["head"], calibration_loader=data())
    validate(model, callback)
    callback.remove(model)
    assert torch.equal(model(ids), exact)


def test_formats_without_such_a_step_are_refused():
    for activations in ("int8_tensor", "int8_asym", "fp8_e4m3"):
        with pytest.raises(ValueError, match=f"activations='{activations}'"):
            CrossQuant(activations=activations)
    with pytest.raises(ValueError, match=r"alpha=2"):
        CrossQuant(alpha=2)
