"""The dry run says what calibration will do, and changes nothing."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from lightning_quant import PostTrainingQuantization, RepQViT, save_quantized
from lightning_quant.checkpoint import record_of
from tests.models import Sequences, TinyTransformer, validate


@pytest.mark.parametrize("callback", [PostTrainingQuantization("int4", "int8"), RepQViT(skip=["head"])])
def test_it_is_what_calibration_does(callback, tmp_path):
    model = TinyTransformer()
    state, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    planned = callback.plan(model, next(iter(Sequences().val_dataloader())))
    assert [type(m) for m in model.modules()] == types and record_of(model) is None and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    validate(model, callback)
    (plan,) = record_of(model).plans.values()
    assert planned.plan.layers == plan.layers and planned.plan.attention == plan.attention
    save_quantized(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    of_activations = ("input_quantizer", "attention_quantizers", "folded")
    size = sum(x.nbytes for name, x in tensors.items() if not any(part in name for part in of_activations))
    assert planned.quantized_bytes == size
    assert planned.quantized_bytes < planned.model_bytes


def test_the_table_names_every_layer_and_reason():
    planned = RepQViT(skip=["head"]).plan(TinyTransformer(), [torch.randn(2, 5, 16)])
    text = str(planned)
    assert "blocks.1.fc2" in text and "skip='head'" in text and "logsqrt2_4" in text and "% of the layers" in text
    assert 0.9 < planned.quantized_macs < 1.0


def test_macs_are_counted():
    planned = PostTrainingQuantization().plan(TinyTransformer(), [torch.randn(2, 5, 16), None])
    macs = {layer.name: layer.macs for layer in planned.layers}
    assert macs["blocks.0.fc1"] == 2 * 5 * 16 * 64 and macs["head"] == 2 * 16 * 3 and planned.quantized_macs == 1.0
