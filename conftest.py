"""Every test and every docstring example starts from the same state and leaves none behind."""

from __future__ import annotations

import os
import random

# Read when torch and the libraries below it are first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from importlib.util import find_spec

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed

# Docstring examples are looked for in every file, and these cannot be imported without their library.
_WITH_TRITON = (
    "cuda/int4_triton.py",
    "cuda/int8_triton.py",
    "cuda/tiles.py",
    "sparse_attention/block_sparse_triton.py",
    "sparse_attention/pooling_triton.py",
)
collect_ignore = [] if find_spec("triton") else [f"lightning_quant/kernels/{name}" for name in _WITH_TRITON]

# No deadline: a shared machine is slow now and then. In CI the same examples every time, elsewhere new ones.
hypothesis.settings.register_profile("lightning_quant", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lightning_quant")


@pytest.fixture(autouse=True)
def same_start(tmp_path, monkeypatch, doctest_namespace):
    """Seeds, one thread and an empty working directory, where logs and checkpoints can land; examples know torch."""
    doctest_namespace["torch"] = torch
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_left_behind(same_start):
    """Puts back what a Trainer may change on purpose and fails a test that loses what must never change."""
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    matmul_precision = torch.get_float32_matmul_precision()
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(matmul_precision)

    found = {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
    }
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    assert found == {"default dtype": torch.float32, "gradients enabled": True, "inference mode": False}
