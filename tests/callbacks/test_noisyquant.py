"""NoisyQuant adds noise to what PostTrainingQuantization finds, where it helps."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import NoisyQuant, PostTrainingQuantization
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.quantizers import NoisyQuantizer
from tests.callbacks.test_repq_vit import TinyViT, images
from tests.models import Sequences, TinyTransformer, trainer, validate


def quantized(callback):
    torch.manual_seed(0)
    model = TinyViT()
    trainer(callback).validate(model, DataLoader(list(images()), batch_size=8), verbose=False)
    return model.eval()


def noisy_layers(model):
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and isinstance(layer.input_quantizer, NoisyQuantizer)
    }


def output_error(model, name):
    """The squared error of one layer's output on the float stream of the calibration samples, by its inputs alone."""
    layer, inputs = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        with as_float(model):
            model(images()[:32])
        handle.remove()
        error = layer.input_quantizer(inputs[0]) - inputs[0]
        return float((error @ layer.quantized().t()).square().sum())


def test_linear_layers_get_noise_and_convolutions_and_attention_do_not():
    model = quantized(NoisyQuant("int4", "int4"))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(noisy_layers(model)) == linears
    for layer in noisy_layers(model).values():
        assert layer.input_quantizer.noise.shape == (layer.in_features,)
    some = quantized(NoisyQuant("int4", "int4", noisy=["*.fc2"]))
    assert set(noisy_layers(some)) == {"blocks.0.fc2", "blocks.1.fc2"}


def test_no_search_makes_the_error_of_a_layer_larger():
    plain = quantized(PostTrainingQuantization("int4", "int4"))
    stages = [NoisyQuant("int4", "int4", searches=["clip", "mean", "noise"][:n], tokens=1000) for n in (1, 2, 3)]
    models = [plain, *(quantized(callback) for callback in stages)]
    for name in noisy_layers(models[1]):
        errors = [output_error(model, name) for model in models]
        assert all(after <= before * 1.00001 for before, after in itertools.pairwise(errors)), name
    assert output_error(models[3], "blocks.0.fc2") < 0.95 * output_error(plain, "blocks.0.fc2")


def test_where_keeping_is_best_it_is_the_plain_method():
    """One candidate beside what is there, which is no noise: nothing changes."""
    plain = quantized(PostTrainingQuantization("int8", "int8"))
    callback = NoisyQuant("int8", "int8", searches=["noise"], steps=1)
    model = quantized(callback)
    for layer in noisy_layers(model).values():
        scale, zero_point, noise = layer.input_quantizer.state
        layer.input_quantizer.set_state(scale, zero_point, torch.zeros_like(noise))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_the_float_model_is_untouched():
    torch.manual_seed(0)
    before = TinyViT().eval()
    callback = NoisyQuant("int4", "int4")
    model = quantized(callback)
    with torch.no_grad():
        want = before(images())
        with as_float(model):
            assert torch.equal(model(images()), want)
        callback.remove(model)
        assert torch.equal(model(images()), want)


def test_the_noise_depends_on_the_seed_alone():
    first, same, other = (quantized(NoisyQuant("int4", "int4", seed=seed)).state_dict() for seed in (0, 0, 1))
    tensors = [key for key in first if key.endswith("input_quantizer.noise")]
    assert all(torch.equal(first[key], same[key]) for key in tensors)
    assert any(not torch.equal(first[key], other[key]) for key in tensors)


def test_other_formats_of_single_layers_have_no_noise():
    model = TinyTransformer()
    validate(model, NoisyQuant("int8", "int8", overrides={"head": "fp8_e4m3"}), data=Sequences())
    assert "head" not in noisy_layers(model) and "embed" in noisy_layers(model)
    (plan,) = record_of(model).plans.values()
    assert plan.layers["embed"].noisy and not plan.layers["head"].noisy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": "int8_token"}, "a static integer grid"),
        ({"activations": "fp8_e4m3"}, "a static integer grid"),
        ({"searches": ["clips"]}, "must be of 'clip', 'mean', 'noise'"),
        ({"searches": []}, "must be of"),
        ({"steps": 0}, "at least 1"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoisyQuant(**arguments)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="noisy"):
        quantized(NoisyQuant(noisy=["*.fc9"]))
