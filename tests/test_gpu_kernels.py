"""The benchmark of GPU kernels: what it does without a GPU, and that its lines are what they say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_kernels
from lightning_quant.graph.roofline import Machine
from lightning_quant.kernels.spec import LayerSpec
from tests.kernels.interpreter import interpreted


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_kernels.py", "--out", "kernels.json"])
    gpu_kernels.main()
    assert capsys.readouterr().out == "no CUDA device: nothing measured\n"
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_every_kernel_has_a_line_with_its_error_and_its_roof(monkeypatch):
    """On the CPU, in the interpreter: everything but the clock."""
    of = LayerSpec.of
    monkeypatch.setattr(LayerSpec, "of", lambda layer: replace(of(layer), capability=(9, 0)))
    cuda = "lightning_quant.kernels.cuda"
    with interpreted(f"{cuda}.int8_triton", f"{cuda}.int4_triton", f"{cuda}.tiles"):
        monkeypatch.setattr(gpu_kernels, "OURS", {k: v for k, v in gpu_kernels.OURS.items() if "W4A16" not in k})
        lines = gpu_kernels.compare("tiny", (3, 64, 32), Machine("here", 1e9, 1e9), 1, "cpu")
    found = {line.contender: line for line in lines}
    assert set(found) >= {gpu_kernels.BF16, *gpu_kernels.OURS}
    assert all(0 < found[name].error < 1e-2 for name in gpu_kernels.OURS)  # the answer has 8 bits of precision
    assert found[gpu_kernels.BF16].of_bfloat16 == 1
    assert all(line.roof > 0 for line in lines)


def test_the_roof_is_the_higher_of_memory_and_compute():
    machine = Machine("here", bandwidth=1e9, peak=1e12, peak_int8=2e12)
    # 1 row: 8192 weights of 4 bits and 64 + 128 numbers of 16 bits are 4480 bytes
    bound, share = gpu_kernels.share_of_roof((1, 64, 128), (4, 16), machine, us=8.96)
    assert bound == "memory" and share == pytest.approx(0.5)
    bound, share = gpu_kernels.share_of_roof((10_000, 1000, 1000), (8, 8), replace(machine, bandwidth=1e15), us=20_000)
    assert bound == "compute" and share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA L40", "L40"),
    ],
)
def test_a_device_of_the_table_is_known_by_its_name(device, machine, monkeypatch):
    assert gpu_kernels.machine_of(device) == ("as published", Machine.named(machine))


@pytest.mark.parametrize("device", ["NVIDIA L40S", "NVIDIA H200", "NVIDIA RTX 6000 Ada Generation"])
def test_the_roofs_of_others_are_measured(device, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "measured_bandwidth", lambda: 1.0)
    monkeypatch.setattr(gpu_kernels, "measured_peak", lambda: 2.0)
    assert gpu_kernels.machine_of(device) == ("measured here in bfloat16", Machine(device, 1.0, 2.0))
