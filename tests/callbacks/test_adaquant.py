"""AdaQuant moves weights freely, and more than one step if need be."""

import pytest
import torch

from lightning_quant import AdaQuant, Reconstruction
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import to_steps
from lightning_quant.solvers import PRESETS
from tests.callbacks.test_repquant import errors, quantized

QUICK = Reconstruction(**{**PRESETS["adaquant"], "iterations": 60, "samples": 32, "batch_size": 8})


def test_a_layer_comes_nearer_to_its_float_twin(tmp_path):
    nearest = errors(quantized(AdaQuant("int4", "int4", reconstruct=Reconstruction.parse(STILL)), tmp_path))[0]
    assert errors(quantized(AdaQuant("int4", "int4", reconstruct=QUICK), tmp_path))[0] < nearest


STILL = {"granularity": "layer", "rounding": "nearest", "scale_learning_rate": None, "inputs": "quantized", "keep": 1.0,
         "iterations": 1, "samples": 8, "batch_size": 4}  # fmt: skip


def test_with_nothing_to_learn_it_rounds_asymmetric_weights_to_the_nearest(tmp_path):
    model = quantized(AdaQuant("int4", "int4", reconstruct=Reconstruction.parse(STILL)), tmp_path)
    for layer in (m for m in model.modules() if isinstance(m, QuantizedLayer)):
        assert str(layer.weight_quantizer.scheme) == "int4_asym_channel" and layer.weight_quantizer.codes is None


def test_weights_may_move_by_more_than_a_step_and_floats_stay(tmp_path):
    fast = Reconstruction(**{**vars(QUICK), "learning_rate": 0.2})
    model, plain = (
        quantized(callback, tmp_path)
        for callback in (AdaQuant("int4", "int4", reconstruct=fast), PostTrainingQuantization("int4", "int4"))
    )
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    moved = [
        (to_steps(layer.weight_quantizer, layer.weight_rows()) - to_steps(layer.weight_quantizer, layer.quantized()))
        for layer in layers
        if layer.weight_rows().dim() == 2
    ]
    assert max(float(steps.abs().max()) for steps in moved) > 1.5


def test_formats_without_a_zero_point_are_refused_before_anything_is_learned(tmp_path):
    with pytest.raises(ValueError, match="takes formats like 'int4'"):
        quantized(AdaQuant("fp4_e2m1", "int4", reconstruct=QUICK), tmp_path)
