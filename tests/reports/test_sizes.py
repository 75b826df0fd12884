"""The size that is told is the size of what is saved."""

import pytest
from safetensors.torch import load_file
from torch import nn

from lightning_quant import PostTrainingQuantization, RepQViT, save_quantized
from lightning_quant.reports import model_sizes
from tests.models import NoBias, TinyTransformer, validate


class Tied(TinyTransformer):
    """Two layers share a weight, and a float layer reads another one's."""

    def __init__(self):
        super().__init__()
        self.blocks[1].proj.weight = self.blocks[0].proj.weight


METHODS = {
    "ptq": lambda: PostTrainingQuantization(weights="int4", activations="int8", ranges="minmax"),
    "group": lambda: PostTrainingQuantization(weights="int3_g8", activations=None, ranges="minmax"),
    "fp8": lambda: PostTrainingQuantization(weights="fp8_e4m3", activations=None, ranges="minmax"),
    "inputs": lambda: PostTrainingQuantization(weights=None, activations="int8", ranges="minmax"),
    "repq": lambda: RepQViT(weights="int4", activations="int4"),
    "skip": lambda: PostTrainingQuantization(weights="int4", activations=None, skip=["blocks.1.proj"]),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model", [TinyTransformer, NoBias, Tied])
def test_bytes_are_those_of_the_saved_tensors(method, model, tmp_path):
    model = model()
    exact = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    numbers = sum(p.numel() for p in model.parameters())
    validate(model, method())
    sizes = model_sizes(model)
    save_quantized(model, tmp_path)
    assert sizes.after == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert (sizes.before, sizes.parameters) == (exact, numbers)
    assert sizes.ratio == exact / sizes.after and sizes.bits == 8 * sizes.after / numbers


def test_a_float_model_stays_as_large_as_it_is():
    sizes = model_sizes(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    assert sizes.before == sizes.after == 4 * (15 + 5 + 4 * 5) + 8
    assert sizes.layers == {}
