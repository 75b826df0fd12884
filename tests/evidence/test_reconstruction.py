"""Reconstruction earns its time on a real model, and survives being killed."""

import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from lightning_quant import Reconstruction, RepQuant, RepQViT
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny

pytestmark = pytest.mark.evidence

SCRIPT = """
import sys
import torch
from lightning_quant import PostTrainingQuantization, Reconstruction
from tests.models import Sequences, TinyTransformer, trainer

torch.manual_seed(0)
model = TinyTransformer()
callback = PostTrainingQuantization("int3", "int8", reconstruct=Reconstruction(iterations=150, samples=32))
trainer(callback, default_root_dir=sys.argv[1]).validate(model, datamodule=Sequences(), verbose=False)
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.timeout(900)
def test_killed_five_times_it_ends_with_the_same_weights(tmp_path):
    script = tmp_path / "reconstruct.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def start(root, out):
        return subprocess.Popen([sys.executable, "-W", "ignore", script, root, out], stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(tmp_path / "whole", tmp_path / "whole.pt").wait() == 0
    seconds = time.monotonic() - began
    pick, kills = random.Random(0), 0
    for _ in range(5):
        process = start(tmp_path / "killed", tmp_path / "killed.pt")
        time.sleep(seconds * pick.uniform(0.6, 0.9))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills and start(tmp_path / "killed", tmp_path / "killed.pt").wait() == 0
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole if isinstance(whole[key], torch.Tensor))


@pytest.mark.timeout(3000)
def test_repquant_is_three_points_above_repq_vit_at_w4a4(tmp_path, own_cores, capsys):
    def top1(callback):
        run = trainer(callback, default_root_dir=tmp_path)
        return 100 * run.validate(deit_tiny(), datamodule=ImageNetData(), verbose=False)[0]["top1"]

    plain = top1(RepQViT())
    learned = top1(RepQuant(reconstruct=Reconstruction(samples=32, iterations=60, batch_size=8)))
    with capsys.disabled():
        print(f"\n  W4A4: RepQViT {plain:.1f}, RepQuant {learned:.1f}")
    assert learned >= plain + 3
