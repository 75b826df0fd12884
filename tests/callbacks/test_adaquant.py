"""AdaQuant moves weights freely, and more than one step if need be."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import AdaQuant, Reconstruction
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import to_steps
from lightning_quant.solvers import PRESETS, output_distance
from tests.callbacks.test_repquant import errors, quantized
from tests.models import trainer

QUICK = Reconstruction(**{**PRESETS["adaquant"], "iterations": 60, "samples": 32, "batch_size": 8})


def test_a_layer_comes_nearer_to_its_float_twin(tmp_path):
    nearest = errors(quantized(AdaQuant("int4", "int4", reconstruct=None), tmp_path))[0]
    assert errors(quantized(AdaQuant("int4", "int4", reconstruct=QUICK), tmp_path))[0] < nearest


def test_with_nothing_to_learn_it_rounds_asymmetric_weights_to_the_nearest(tmp_path):
    model = quantized(AdaQuant("int4", "int4", reconstruct=None), tmp_path)
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


class ConvNet(L.LightningModule):
    """Two convolutions without bias, each with its BatchNorm, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return self.head(x.mean((2, 3)))

    def validation_step(self, batch, batch_idx):
        self(batch)


def trained_statistics():
    torch.manual_seed(0)
    net, x = ConvNet(), torch.randn(32, 3, 8, 8)
    for _ in range(50):
        net(x)
    return net.eval(), x


@pytest.mark.parametrize(
    ("settings", "repairs"),
    [(None, {}), (None, {"bias_steps": 0}), (None, {"tune_norms": False}), (QUICK, {"bias_steps": 20})],
    ids=["light", "norms", "biases", "fitted"],
)
def test_the_whole_is_repaired_and_norms_stay(tmp_path, settings, repairs):
    outputs = []
    for given in ({"tune_norms": False, "bias_steps": 0}, repairs):
        net, x = trained_statistics()
        with torch.no_grad():
            exact, state = net(x), {key: value.clone() for key, value in net.state_dict().items()}
        callback = AdaQuant("int3", "int3", reconstruct=settings, **given)
        trainer(callback, default_root_dir=tmp_path).validate(net, DataLoader(list(x), batch_size=8), verbose=False)
        with torch.no_grad():
            outputs.append(output_distance(net.eval()(x), exact))
            assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
            callback.remove(net)
            assert torch.equal(net(x), exact)
    assert outputs[1] < outputs[0]


def test_formats_without_a_zero_point_are_refused_before_anything_is_learned(tmp_path):
    with pytest.raises(ValueError, match="takes formats like 'int4'"):
        quantized(AdaQuant("fp4_e2m1", "int4", reconstruct=QUICK), tmp_path)
