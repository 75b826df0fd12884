"""LRQDiT as a user meets it: on a small DiT, on any transformer, saved and loaded, and taken off again."""

import pytest
import torch

from lightning_quant import KernelSwap, LRQDiT, PostTrainingQuantization, load_quantized, save_quantized
from lightning_quant.layers import BlockRotation, SmoothedRotation, as_float, online_rotation, rotates
from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import TwinLogQuantizer
from tests.cases import is_float
from tests.diffusion import labelled, pictures, seeds
from tests.models import TinyTransformer, trainer, validate


def quantized(module, **arguments):
    callback = LRQDiT(**{"calibration_loader": seeds(8), "calibration_samples": 8, "block": 8, **arguments})
    trainer(callback).validate(module, pictures(), verbose=False)
    return callback


def images(module, *callbacks):
    return torch.cat(trainer(*callbacks).predict(module, seeds()))


def rotations(module):
    return {name: online_rotation(layer) for name, layer in module.named_modules() if rotates(layer)}


@pytest.mark.parametrize("rotation", ["adaptive", "hadamard", "greedy", None])
def test_the_float_twin_computes_what_it_did(rotation):
    module = labelled()
    exact = images(module)
    quantized(module, rotation=rotation)
    with as_float(module):
        torch.testing.assert_close(images(module), exact, atol=2e-3, rtol=1e-3)
    assert all(isinstance(found, SmoothedRotation) for found in rotations(module).values())
    assert "denoiser.transformer_blocks.0.ff.net.2" in rotations(module)
    assert "denoiser.pos_embed.proj" not in rotations(module)  # a convolution
    kinds = {type(found.rotation).__name__ for found in rotations(module).values()}
    assert kinds == {
        "adaptive": {"Rotation", "BlockRotation"}, "hadamard": {"Rotation"}, "greedy": {"BlockRotation"},
        None: {"NoneType"},
    }[rotation]  # fmt: skip


def test_massive_layers_are_a_share_or_named():
    module = labelled()
    quantized(module, massive=["*.ff.net.2"])
    greedy = [name for name, found in rotations(module).items() if isinstance(found.rotation, BlockRotation)]
    assert greedy == [f"denoiser.transformer_blocks.{block}.ff.net.2" for block in range(3)]
    module = labelled()
    quantized(module, massive=0.0)
    count = len(rotations(module))
    assert not any(isinstance(found.rotation, BlockRotation) for found in rotations(module).values())
    module = labelled()
    quantized(module, massive=0.5)
    greedy = [found for found in rotations(module).values() if isinstance(found.rotation, BlockRotation)]
    assert len(greedy) == round(count / 2)
    with pytest.raises(ValueError, match=r"massive: the pattern '\*.nowhere'"):
        quantized(labelled(), massive=["*.nowhere"])


def test_every_weight_has_logarithmic_levels_and_every_token_its_range():
    module = labelled()
    quantized(module)
    layer = module.denoiser.transformer_blocks[0].attn1.to_q
    assert isinstance(layer.weight_quantizer, TwinLogQuantizer) and layer.weight_quantizer.scale.shape == (16,)
    assert str(layer.input_quantizer.scheme) == "int8_sym_token_dynamic"


def test_outliers_cost_less_than_with_plain_rounding():
    """One channel behind each GELU is loud; the weights that read it are quiet, so the function stays."""

    def loud():
        module = labelled()
        for block in module.denoiser.transformer_blocks:
            with torch.no_grad():
                block.ff.net[0].proj.bias[3] = 40.0
                block.ff.net[2].weight[:, 3] /= 40.0
        return module

    exact, found = images(loud()), {}
    common = {"calibration_loader": seeds(8), "calibration_samples": 8, "attention": False}
    for name, callback in (
        ("plain", PostTrainingQuantization("int4", "int4_sym_token_dynamic", **common)),
        ("log-rotation", LRQDiT("twinlog_4", "int4", block=8, **common)),
    ):
        module = loud()
        trainer(callback).validate(module, pictures(), verbose=False)
        found[name] = float(sqnr(images(module), exact))
    assert found["log-rotation"] > found["plain"] + 1


@pytest.mark.parametrize("how", ["checkpoint", "folder"])
def test_what_is_saved_samples_the_same_images(tmp_path, how):
    module = labelled()
    callback = quantized(module, massive=0.3)
    exact, again = images(module), labelled()
    if how == "folder":
        save_quantized(module, tmp_path)
        load_quantized(again, tmp_path)
    else:
        trainer(callback).strategy.connect(module)
        torch.save({"state_dict": module.state_dict()}, tmp_path / "model.ckpt")
        load_quantized(again, tmp_path / "model.ckpt")
    assert torch.equal(images(again), exact)
    fresh = LRQDiT(calibration_loader=seeds(8), calibration_samples=8, block=8, massive=0.3)
    assert torch.equal(images(again, fresh), exact)


def test_removed_it_is_float_and_rotated_back():
    module = labelled()
    exact = images(module)
    callback = quantized(module)
    with pytest.warns(UserWarning, match="rotated back"):
        callback.remove(module)
    assert is_float(module) and not rotations(module)
    torch.testing.assert_close(images(module), exact, atol=2e-3, rtol=1e-3)


def test_kernels_compute_what_was_simulated():
    module = labelled()
    quantized(module)
    exact = images(module)
    torch.testing.assert_close(images(module, KernelSwap("torch")), exact, atol=1e-4, rtol=1e-4)


def test_any_transformer_is_taken_and_a_second_rotation_refused():
    model = TinyTransformer()
    callback = LRQDiT()
    validate(model, callback)
    assert rotations(model)
    with pytest.raises(ValueError, match="rotates already"):
        validate(model, LRQDiT(target="blocks"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": "random"}, "rotation='random'"),
        ({"smooth": 1.5}, "smooth=1.5"),
        ({"massive": 2.0}, "massive=2.0"),
        ({"block": 1}, "block=1"),
        ({"activations": "twinlog_4"}, "is for weights"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRQDiT(**arguments)
