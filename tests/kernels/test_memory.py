"""What is freed is kept for what is asked for next, and handed back in the end."""

import resource
import sys

import psutil
import pytest
import torch

from lightning_quant.kernels.memory import give_freed_memory_back, keep_freed_memory


def page_faults(blocks: int = 16) -> int:
    """How many pages the system has to hand out while several large tensors come and go together, ten times."""

    def come_and_go():
        tensors = [torch.ones(2**21) for _ in range(blocks)]  # 8 MB each
        return len(tensors)

    come_and_go()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        come_and_go()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no mallopt")
def test_memory_is_kept_and_given_back():
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    kept = page_faults()
    held = psutil.Process().memory_info().rss
    give_freed_memory_back()
    assert page_faults() > 5 * kept + 10_000
    assert psutil.Process().memory_info().rss < held - 2**25
