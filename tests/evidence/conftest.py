"""The proofs run real models, and take all the cores that the workers beside them leave."""

import os

import pytest
import torch


@pytest.fixture
def own_cores(assets):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    yield
    torch.set_num_threads(threads)
