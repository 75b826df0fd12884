"""PTQ4ARVG on a small painter of digits, token by token and at once, and on a small DiT."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PTQ4ARVG, PostTrainingQuantization, load_quantized, save_quantized
from lightning_quant.layers import as_float
from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import PositionQuantizer, UniformQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, seeds
from tests.models import TinyTransformer, trainer, validate

spec = importlib.util.spec_from_file_location(
    "painting", Path(__file__).parents[2] / "examples" / "autoregressive_digits.py"
)
painting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(painting)


def painter(loud=1.0):
    """Two blocks with random weights; the first token is loud, and so are two channels of what the norms give."""
    torch.manual_seed(3)
    model = painting.Painter(width=16, blocks=2, heads=2).eval()
    with torch.no_grad():
        for block in model.net.blocks:
            block.modulation.weight.mul_(2)
            block.modulation.bias[:32:9] += loud - 1  # shifts and scales
            block.fc2.weight.mul_(2)
        model.net.tokens.weight[painting.BEGIN] *= loud
        model.net.targets[0] *= loud
    return model


def sequences(count=24):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(painting.LEVELS, (count, painting.PIXELS), generator=generator)
    return TensorDataset(pixels, torch.arange(count) % painting.CLASSES)


def quantized(model, callback=None, **arguments):
    loader = DataLoader(sequences(), batch_size=8)
    arguments = {"calibration_samples": 24, "calibration_loader": loader, **arguments}
    callback = callback or PTQ4ARVG(**arguments)
    trainer(callback).validate(model, DataLoader(sequences(8), batch_size=8), verbose=False)
    return callback


def logits(model):
    with torch.no_grad():
        return model(*sequences().tensors)


def inputs_of(model, run):
    """What every layer's input quantizer gives, along the tokens."""
    seen = {}

    def hook(name):
        return lambda module, args, out: seen.setdefault(name, []).append(out)

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, UniformQuantizer) and name.endswith("input_quantizer")
    ]
    with torch.no_grad():
        out = run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values, dim=1) for name, values in seen.items()}, out


def test_the_float_twin_computes_what_it_did():
    model = painter(loud=5.0).double()
    exact = logits(model)
    quantized(model)
    with as_float(model):
        torch.testing.assert_close(logits(model), exact, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(logits(model), exact, atol=1e-3)


def test_token_by_token_has_the_values_of_one_full_pass():
    model = painter(loud=5.0).double()
    quantized(model)
    pixels, labels = (tensor[:3] for tensor in sequences().tensors)
    given = torch.cat([torch.full_like(pixels[:, :1], painting.BEGIN), pixels[:, :-1]], dim=1)

    def decoded():
        cache = []
        return torch.cat(
            [model.net(given[:, p : p + 1], labels, start=p, cache=cache) for p in range(painting.PIXELS)], dim=1
        )

    whole, exact = inputs_of(model, lambda: model.net(given, labels))
    pieces, out = inputs_of(model, decoded)
    assert len(whole) == 2 * 5 + 2
    for name, values in whole.items():
        assert torch.equal(pieces[name], values), name
    torch.testing.assert_close(out, exact, atol=1e-9, rtol=1e-9)


def test_sinks_have_their_rows_and_modulations_one_for_each_position():
    model = painter()
    quantized(model)
    rows = {
        name.removeprefix("net.").removesuffix(".input_quantizer"): len(module.scale)
        for name, module in model.named_modules()
        if isinstance(module, PositionQuantizer)
    }
    assert rows["modulation"] == rows["blocks.0.modulation"] == painting.PIXELS
    assert {rows[f"blocks.1.{layer}"] for layer in ("qkv", "proj", "fc1", "fc2")} == {3}
    assert "head" not in rows
    assert not any(isinstance(m, PositionQuantizer) for m in quantized_without_positions().modules())


def quantized_without_positions():
    model = painter()
    quantized(model, sinks=None)
    return model


def test_it_is_nearer_than_plain_and_each_part_helps():
    found = {}
    loader = {"calibration_samples": 24, "calibration_loader": DataLoader(sequences(), batch_size=8)}
    for name, callback in {
        "plain": PostTrainingQuantization("int6", "int6", "percentile_mse", **loader),
        "GPS": PTQ4ARVG(sinks=None, mix=None, **loader),
        "STWQ": PTQ4ARVG(gain=False, mix=None, **loader),
        "both": PTQ4ARVG(**loader),
    }.items():
        model = painter(loud=8.0)
        exact = logits(model)
        quantized(model, callback)
        found[name] = float(sqnr(logits(model), exact))
    assert found["both"] > found["plain"] + 1, found
    assert min(found["GPS"], found["STWQ"]) > found["plain"] + 0.3, found


@pytest.mark.parametrize("mix", ["ratio", "topk"])
def test_samples_are_mixed_and_there_are_as_many_as_asked_for(mix, caplog):
    model, fed = painter(), []
    step = model.calibration_step
    model.calibration_step = lambda batch: (fed.append(batch), step(batch))[1]
    quantized(model, mix=mix)
    assert len(fed[-1][0]) == 24
    assert int((fed[-1][1] == painting.NOBODY).sum()) == 12  # its first token is always the same without a class


def test_a_model_that_knows_no_absent_condition_is_refused_and_taken_without_a_mix():
    with pytest.raises(ValueError, match=r"define unconditional_batch.*mix=None"):
        validate(TinyTransformer(), PTQ4ARVG())
    validate(TinyTransformer(), PTQ4ARVG(mix=None))


def test_a_dit_is_scaled_through_its_modulations():
    module = labelled()
    exact = torch.cat(trainer().predict(module, seeds()))
    callback = PTQ4ARVG("int8", "int8", calibration_samples=16)
    trainer(callback).validate(module, pictures(), verbose=False)
    block = module.denoiser.transformer_blocks[1]
    assert block.attn1.to_q.folded and isinstance(block.ff.net[2].input_quantizer, PositionQuantizer)
    with as_float(module):
        torch.testing.assert_close(torch.cat(trainer().predict(module, seeds())), exact, atol=2e-3, rtol=1e-3)


def test_what_is_saved_paints_the_same_and_what_is_removed_is_float(tmp_path):
    model, again = painter(), painter()
    callback = quantized(model)
    exact = logits(model)
    save_quantized(model, tmp_path)
    load_quantized(again, tmp_path)
    assert torch.equal(logits(again), exact)
    some = torch.arange(3)
    with torch.no_grad():
        assert torch.equal(again.paint(some, some), model.paint(some, some))
    with pytest.warns(UserWarning, match="stay folded"):
        callback.remove(model)
    assert is_float(model) and not model.net._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sinks": -1}, "sinks=-1"), ({"mix": "all"}, "mix='all'"), ({"weights": "fp8_e4m3"}, "gain=False")],
)
def test_what_cannot_be_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        PTQ4ARVG(**arguments)
