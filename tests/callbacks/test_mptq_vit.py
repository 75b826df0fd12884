"""MPTQ-ViT: what becomes of the norms, where two grids are used, and what is refused."""

import pytest
import torch
from torch import nn

from lightning_quant import MixedPrecision, MPTQViT, PostTrainingQuantization
from lightning_quant.checkpoint import record_of
from lightning_quant.graph import trace
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.quantizers import TwinQuantizer, UniformQuantizer, UnsignedTwinQuantizer
from tests.callbacks.test_repq_vit import TinyViT, images
from tests.callbacks.test_repquant import errors, quantized
from tests.models import Sequences, TinyTransformer, trainer


def test_every_tensor_has_its_format(tmp_path):
    model = quantized(MPTQViT("int4", "int4"), tmp_path)
    for block in model.blocks:
        for linear in (block.qkv, block.fc1):  # behind norms
            assert bool(linear.folded) and linear.input_quantizer.scheme.symmetric
        assert isinstance(block.proj.input_quantizer, UniformQuantizer)
        assert any(isinstance(module, UnsignedTwinQuantizer) for module in block.modules())


def test_the_fold_is_exact_and_centres_every_channel(tmp_path):
    model = quantized(MPTQViT("int4", "int4", twins=[]), tmp_path)
    before = quantized(PostTrainingQuantization("int4", "int4"), tmp_path)
    seen = []
    handle = model.blocks[0].qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), as_float(model), as_float(before):
        x = images()[:32]  # what it was calibrated on
        assert torch.allclose(model(x), before(x), atol=1e-4)
    handle.remove()
    x = seen[0].flatten(0, -2)
    assert torch.allclose(x.amax(0), -x.amin(0), rtol=1e-3)


def test_smoothing_makes_symmetric_activations_more_exact(tmp_path):
    plain = errors(quantized(PostTrainingQuantization("int8", "int4_sym", attention=False), tmp_path))[0]
    smooth = errors(quantized(MPTQViT("int8", "int4", attention=False), tmp_path))[0]
    assert smooth < plain


class WithModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(), nn.Identity(), nn.Linear(32, 16))

    def forward(self, x):
        return x + self.net(x)


class Gelus(TinyTransformer):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(WithModules() for _ in range(2))


def planned_twins(model, callback):
    """The layers that are to have two grids."""
    model.eval()
    graph = trace(model, lambda: model(Sequences().train.tensors[0][:2]))
    layers = callback.plan_for(model, graph).layers
    return [name for name, layer in layers.items() if layer.inputs == "twin_4"]


def test_layers_right_behind_a_gelu_are_found():
    assert planned_twins(Gelus(), MPTQViT("int4", "int4")) == ["blocks.0.net.4", "blocks.1.net.4"]


def test_others_are_named_by_hand():
    named = MPTQViT("int4", "int4", gelu=["fc2"])
    assert planned_twins(TinyTransformer(), named) == ["blocks.0.fc2", "blocks.1.fc2"]
    with pytest.raises(ValueError, match="gelu"):
        planned_twins(TinyTransformer(), MPTQViT("int4", "int4", gelu=["nowhere"]))


@pytest.mark.parametrize(("shift", "kind"), [(-1.5, TwinQuantizer), (2.0, UniformQuantizer)])
def test_a_layer_keeps_two_grids_only_where_they_are_more_exact(shift, kind, tmp_path):
    """Behind a GELU of small numbers the negative ones count; behind one of large numbers there are none."""
    model = TinyTransformer()
    for block in model.blocks:
        nn.init.ones_(block.norm2.weight)
        nn.init.constant_(block.fc1.bias, shift)
    callback = MPTQViT("int8", "int4", gelu=["fc2"])
    trainer(callback, default_root_dir=tmp_path).validate(model, datamodule=Sequences(), verbose=False)
    assert [type(block.fc2.input_quantizer) for block in model.blocks] == [kind, kind]
    plan = next(iter(record_of(model).plans.values()))
    assert plan.layers["blocks.0.fc2"].inputs == str(model.blocks[0].fc2.input_quantizer.scheme)


def test_without_its_parts_it_is_plain_quantization(tmp_path):
    plain = quantized(PostTrainingQuantization("int4", "int4"), tmp_path)
    same = quantized(MPTQViT("int4", "int4", alpha=None, twins=[]), tmp_path)
    assert torch.equal(plain(images()), same(images()))


def test_the_head_s_norm_and_float_inputs_are_left_alone(tmp_path):
    model = quantized(MPTQViT("int4", "int4", skip=["blocks.0.fc1"]), tmp_path)
    assert not model.blocks[0].fc1.weight.requires_grad or type(model.blocks[0].fc1) is nn.Linear
    assert isinstance(model, TinyViT) and bool(model.blocks[0].qkv.folded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": "fp8_e4m3"}, "use PostTrainingQuantization"),
        ({"activations": "int8_token"}, "use PostTrainingQuantization"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"twins": ["relu"]}, "'gelu' and 'softmax'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MPTQViT(**arguments)


def test_the_smallest_format_of_two_grids_is_made(tmp_path):
    model = quantized(MPTQViT("int2", "int2"), tmp_path)
    assert any(isinstance(m, UnsignedTwinQuantizer) for m in model.modules())


def test_mixed_precision_finds_its_bits_greedily(tmp_path):
    method = MPTQViT("int8", "int8", calibration_samples=32)
    callback = MixedPrecision(budget="5.0bit", method=method, search="greedy", weight_bits=(4, 5, 6, 8))
    layers = [m for m in quantized(callback, tmp_path).modules() if isinstance(m, QuantizedLayer)]
    stored = [(m.weight_quantizer.scheme.bits, m.weight.numel()) for m in layers]
    assert sum(bits * size for bits, size in stored) / sum(size for _, size in stored) <= 5 + 1e-6
    assert len({bits for bits, _ in stored}) > 1
