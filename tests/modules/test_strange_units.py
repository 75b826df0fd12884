"""Units that are called or built in unusual ways are reconstructed as well, and right."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import PostTrainingQuantization, Reconstruction
from lightning_quant.layers import QuantizedLayer, as_float
from tests.models import Sequences, trainer

QUICK = Reconstruction(iterations=40, samples=32, batch_size=8, learning_rate=0.03, penalty=1e-4)


class TwoInputs(nn.Module):
    """Two tensors with samples, one of them a keyword; a tensor without, a number and a flag beside them."""

    def __init__(self):
        super().__init__()
        self.own, self.other, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, gate, *, context, strength=1.0, residual=False):
        out = self.out(torch.relu(self.own(x) * gate + self.other(context))) * strength
        return x + out if residual else out


class Normed(nn.Module):
    """BatchNorm and dropout between the layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.second = nn.Linear(24, 16)
        nn.init.uniform_(self.norm.running_mean, -1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        hidden = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.second(self.dropout(torch.relu(hidden)))


class Constant(nn.Module):
    """Says the same whatever it is given."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 16)
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Model(L.LightningModule):
    """Two blocks of a kind, called in their own way."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(16, 3)
        self.register_buffer("gate", torch.linspace(0.2, 1.4, 32))

    def call(self, block, x):
        if isinstance(block, TwoInputs):
            return block(x, self.gate, context=x.flip(1), strength=0.5, residual=True)
        return block(x)

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x.mean(1))

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch[0]).mean())


class Shared(Model):
    """Both blocks are called twice in one forward."""

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = self.call(block, x)
        return self.head(x.mean(1))


def quantized(model, tmp_path, reconstruct=None):
    callback = PostTrainingQuantization("int3", "int8", reconstruct=reconstruct, calibration_samples=32)
    trainer(callback, default_root_dir=tmp_path).validate(model, datamodule=Sequences(), verbose=False)
    return model


def error(model):
    """How far what the last block gives is from what it gives in the float twin."""
    model.eval()
    x, outputs = Sequences().val.tensors[0], []
    handle = model.blocks[-1].register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        model(x)
        found = outputs[-1]
        with as_float(model):
            model(x)
    handle.remove()
    return float((found - outputs[-1]).square().mean())


def codes(model):
    return [m.weight_quantizer.codes for m in model.modules() if isinstance(m, QuantizedLayer)]


TERMS = {"global_weight": 0.5, "layer_weight": 0.5, "balance": True}


@pytest.mark.parametrize(
    ("model", "kind", "terms"),
    [
        (Model, TwoInputs, {}),
        (Model, TwoInputs, TERMS),
        (Model, Normed, {}),
        (Model, Normed, TERMS),
        (Shared, TwoInputs, {}),  # with a tail it is refused by name, see test_unit_tail
    ],
)
def test_it_is_nearer_to_the_float_model_than_rounding_to_the_nearest(model, kind, terms, tmp_path):
    settings = Reconstruction(**{**vars(QUICK), **terms})
    learned = quantized(model(kind), tmp_path, settings)
    assert error(learned) < 0.9 * error(quantized(model(kind), tmp_path))
    assert all(found is not None for found in codes(learned))


def test_batch_statistics_stand_still_and_dropout_rests(tmp_path):
    model, untouched = Model(Normed), Model(Normed)
    model.blocks[1].dropout.eval()  # a flag of its own
    quantized(model, tmp_path, QUICK)
    for mine, theirs in zip(model.blocks, untouched.blocks, strict=True):
        assert all(map(torch.equal, mine.norm.state_dict().values(), theirs.norm.state_dict().values()))
    assert model.blocks[0].dropout.training and not model.blocks[1].dropout.training
    torch.manual_seed(99)  # what dropout would have drawn from
    again = quantized(Model(Normed), tmp_path, QUICK)
    assert all(map(torch.equal, codes(model), codes(again)))


@pytest.mark.parametrize("loss", ["mse", "fisher"])
@pytest.mark.parametrize("terms", [{}, {"global_weight": 0.5, "layer_weight": 0.5, "layer_loss": "moments"}])
def test_a_unit_whose_output_is_constant_stays_so(loss, terms, tmp_path):
    settings = Reconstruction(**{**vars(QUICK), **terms, "loss": loss, "balance": bool(terms), "iterations": 5})
    model = quantized(Model(Constant), tmp_path, settings)
    assert error(model) == pytest.approx(0, abs=1e-6)
    assert all(p.isfinite().all() for p in model.state_dict().values() if isinstance(p, torch.Tensor))
