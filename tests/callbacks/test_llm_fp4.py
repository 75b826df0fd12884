"""LLMFP4 in a Trainer: formats by layer, nearer to float than a fixed one, saved and removed."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import LLMFP4, PostTrainingQuantization, TokenWindows
from tests.language import TOKENS, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def data():
    return DataLoader(TokenWindows(tokens(), TOKENS), batch_size=8)


def validate(model, callback):
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **QUIET)
    trainer.validate(model, data(), verbose=False)
    return trainer


def planted():
    torch.manual_seed(0)
    model = llama(tied=False, outlier=20.0)
    for block in model.net.layers:
        for layer in (block.q, block.k, block.v, block.gate, block.up):
            layer.weight.data[:, 3] /= 20
    return model


def test_is_nearer_to_float_than_one_fixed_format():
    errors, ids = {}, tokens()[None]
    search = LLMFP4(steps=15, skip=["head"], calibration_loader=data())
    fixed = PostTrainingQuantization("fp4_e2m1", "fp4_e2m1", "minmax", False, skip=["head"], calibration_loader=data())
    for callback in (search, fixed):
        model = planted()
        exact = model(ids)
        validate(model, callback)
        errors[callback] = (model(ids) - exact).square().mean().item()
    assert errors[search] < 0.7 * errors[fixed]
    assert len(search.chosen) == 14 and all(w.startswith("fp4_e") and e < 0.2 for w, _, e in search.chosen.values())


def test_a_checkpoint_reloads_with_the_chosen_formats(tmp_path):
    model, ids = planted(), tokens()[None]
    callback = LLMFP4(steps=5, rounds=1, skip=["head"], calibration_loader=data())
    exact = model(ids)
    validate(model, callback).save_checkpoint(tmp_path / "fp4.ckpt")
    again = planted()
    again.load_state_dict(torch.load(tmp_path / "fp4.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again(ids), model(ids)) and not torch.equal(model(ids), exact)
    callback.remove(model)
    assert torch.equal(model(ids), exact)


def test_weights_alone_and_one_split_alone():
    model = planted()
    callback = LLMFP4("fp4_e3m0", None, steps=5, rounds=1, skip=["head"], calibration_loader=data())
    validate(model, callback)
    assert {w for w, _, _ in callback.chosen.values()} == {"fp4_e3m0_channel"}
    assert {i for _, i, _ in callback.chosen.values()} == {None}


@pytest.mark.parametrize("arguments", [{"weights": "int4"}, {"activations": "fp3"}, {"rounds": 0}])
def test_other_formats_are_refused(arguments):
    with pytest.raises(ValueError, match=r"'fp4' to 'fp8'|rounds=0|activations"):
        LLMFP4(**arguments)
