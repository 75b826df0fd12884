"""Networks of kernels can be compiled by Inductor, which must not look into packed weights."""

import shutil

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import KernelSwap, PostTrainingQuantization
from tests.models import trainer

pytestmark = [pytest.mark.evidence, pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")]


class Mixed(L.LightningModule):
    """Convolutions whose windows overlap and do not, linear layers, an activation and a norm between them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.Flatten(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.net(x))

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def test_compiled_kernels_answer_like_the_simulated_model():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32)), batch_size=4)
    model, ptq = Mixed(), PostTrainingQuantization()
    trainer(ptq).validate(model, data, verbose=False)
    simulated = torch.cat(trainer(ptq).predict(model, data))
    swap = KernelSwap(compile=True)
    compiled = torch.cat(trainer(ptq, swap).predict(model, data))
    assert all(row.kernel.startswith("int8") for row in swap.table.rows) and len(swap.table.rows) == 4
    assert (compiled - simulated).norm() < 0.02 * simulated.norm()
    assert torch.equal(torch.cat(trainer(ptq).predict(model, data)), simulated)
