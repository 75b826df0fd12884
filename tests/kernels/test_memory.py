"""What is freed is kept for what is asked for next, and handed back in the end."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json

import psutil
import torch

from lightning_quant.kernels.memory import give_freed_memory_back, keep_freed_memory


def resident():
    return psutil.Process().memory_info().rss / 2**20


def come_and_go():
    return len([torch.ones(2**21) for _ in range(16)])  # 8 MB each


can, before = keep_freed_memory(), resident()
come_and_go()
kept = resident() - before
give_freed_memory_back()
print(json.dumps({"can": can, "kept": kept, "left": resident() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no mallopt")
def test_memory_is_kept_and_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if not found["can"]:
        pytest.skip("this C library has no mallopt")
    assert found["kept"] > 120 and found["left"] < 20, found  # of 128 MB
