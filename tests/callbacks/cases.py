"""The methods that the tests of faults run over: one line each, quick and mild, so that metrics stay close to float."""

from __future__ import annotations

import pytest

from lightning_quant import PostTrainingQuantization, RepQViT
from lightning_quant.layers import AttentionSite, QuantizedLayer


def ptq(**arguments):
    return PostTrainingQuantization(**{"weights": "int8", "activations": "int8", "ranges": "minmax", **arguments})


def repq(**arguments):
    return RepQViT(**{"weights": "int8", "activations": "int8", **arguments})


METHODS = {"ptq": ptq, "repq": repq}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def quantized(model):
    """The names of the quantized layers."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def is_float(model):
    """Whether nothing in the model is quantized, nor remembered to be."""
    swapped = any(isinstance(module, (QuantizedLayer, AttentionSite)) for module in model.modules())
    return not swapped and "_lightning_quant" not in vars(model)
