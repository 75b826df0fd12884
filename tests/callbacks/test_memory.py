"""Calibration holds one batch at a time: its peak memory does not grow with the number of batches."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCH, WIDTH, TOKENS, LAYERS = 16, 64, 64, 6  # 256 KB of input for each layer and batch


def calibrate(batches, method):
    """Calibrate in this process on so many batches; returns the peak of its resident memory in bytes."""
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from lightning_quant import PostTrainingQuantization

    class Samples(Dataset):
        """Made on demand, so that the data themselves take no memory."""

        def __len__(self):
            return batches * BATCH

        def __getitem__(self, index):
            return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(index))

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

        def forward(self, x):
            return self.layers(x)

        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch).mean())

    class Hoarding(PostTrainingQuantization):
        """What the test is there to find: every layer input is kept until the ranges are searched."""

        def calibrate_plan(self, model, plan, graph, batches, run):
            kept = []
            hooks = [layer.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for layer in model.layers]
            super().calibrate_plan(model, plan, graph, batches, run)
            for hook in hooks:
                hook.remove()

    torch.set_num_threads(1)
    ranges = "mse" if method == "hoarding" else method
    callback = (Hoarding if method == "hoarding" else PostTrainingQuantization)(
        ranges=ranges, calibration_samples=batches * BATCH, calibration_loader="val"
    )
    trainer = L.Trainer(accelerator="cpu", barebones=True, callbacks=[callback], limit_val_batches=1)
    trainer.validate(Net(), DataLoader(Samples(), batch_size=BATCH), verbose=False)
    return peak()


def peak():
    """The largest resident set of this process. getrusage tells that of the process it was forked from, if larger."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def peaks(*runs):
    """The peaks of fresh processes, side by side, one for each (number of batches, method)."""
    code = (
        "import sys; from tests.callbacks.test_memory import calibrate; print(calibrate(int(sys.argv[1]), sys.argv[2]))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(number), method], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number, method in runs
    ]
    printed = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return [int(text.splitlines()[-1]) for text in printed]


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_batches():
    few, many, hoarded = peaks((8, "mse"), (80, "mse"), (80, "hoarding"))
    allowed = 0.05 * few + 20 * 2**20
    assert abs(many - few) <= allowed, (few, many)
    # and a method that kept its activations would be seen
    kept = 80 * BATCH * TOKENS * WIDTH * 4 * LAYERS
    assert hoarded - few > max(allowed, 0.8 * kept), (few, hoarded)
