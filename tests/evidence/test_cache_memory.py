"""Reconstruction from 512 samples in a stated memory: with their activations on disk it fits, in RAM it does not."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.evidence
LIMIT = 1200  # MB of private memory in all: torch and the model 400, the images 310, and the rest to work with

SCRIPT = """
import resource
import sys

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_quant import PostTrainingQuantization, Reconstruction, ReconstructionStage
from tests.models import trainer
from tests.real import deit_tiny


class Pictures(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):  # made when they are asked for, so that the loader holds none of them
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index)), 0


cache, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]) * 2**20
torch.set_num_threads(1)
model, quick = deit_tiny(), PostTrainingQuantization("int4", "int4", ranges="minmax", calibration_samples=8)
trainer(quick).validate(model, DataLoader(Pictures(8), batch_size=8), verbose=False)

resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # pages of a mapped file do not count: they can be evicted
blocks = {"granularity": ["net.blocks.0", "net.blocks.1"], "layer_weight": 0.1, "cache": cache}
stage = ReconstructionStage(model, Reconstruction(samples=512, iterations=3, batch_size=8, **blocks))
trainer(default_root_dir=folder).fit(stage, DataLoader(Pictures(512), batch_size=16))
assert len(stage.losses) == 2
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_DATA")
def test_512_samples_on_disk_stay_within_a_limit_that_they_exceed_in_ram(assets, tmp_path):
    script = tmp_path / "reconstruct.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", script]
    ended = {
        cache: subprocess.run([*command, cache, tmp_path / cache, str(LIMIT)], capture_output=True, text=True)
        for cache in ("disk", "ram")
    }
    assert ended["disk"].returncode == 0, ended["disk"].stderr[-2000:]
    assert ended["ram"].returncode != 0 and "memory" in ended["ram"].stderr
    assert not list(tmp_path.rglob("*.bin"))
