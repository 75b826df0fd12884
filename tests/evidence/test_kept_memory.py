"""What a kept model of integers takes of the machine's memory, beside its float self."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.evidence

SCRIPT = """
import json
import sys

import lightning as L
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.memory import give_freed_memory_back
from tests.models import trainer


class Wide(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8)))

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def megabytes(model):
    give_freed_memory_back()  # what only the C library holds is nobody's
    state = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return state / 2**20, psutil.Process().memory_info().rss / 2**20


torch.set_num_threads(1)
weights, activations = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
data = DataLoader(TensorDataset(torch.randn(32, 4096)), batch_size=8)
nothing = psutil.Process().memory_info().rss / 2**20
model, ptq = Wide(), PostTrainingQuantization(weights, activations, ranges="minmax")
before = megabytes(model)
trainer(ptq).validate(model, data, verbose=False)
simulated = torch.cat(trainer(ptq).predict(model, data))
kept = torch.cat(trainer(ptq, KernelSwap(keep=True)).predict(model, data))
after = megabytes(model)
error = float((kept - simulated).norm() / simulated.norm())
print(json.dumps({"nothing": nothing, "before": before, "after": after, "error": error}))
"""


@pytest.mark.parametrize(("formats", "smaller"), [(("int8", "int8"), 3.9), (("int4",), 7.5)], ids=["W8A8", "W4"])
def test_a_model_of_half_a_gigabyte(formats, smaller, tmp_path):
    script = tmp_path / "keep.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-W", "ignore", script, *formats], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (state, resident), (state_after, resident_after) = found["before"], found["after"]
    print(found)
    assert state > 500 and state / state_after > smaller
    # the resident set falls by as much, but for what a Trainer has loaded meanwhile
    assert resident - resident_after > 0.85 * (state - state_after) and found["error"] < 1e-3
