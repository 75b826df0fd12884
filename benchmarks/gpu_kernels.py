"""Linear layers on low-bit kernels of a GPU beside bfloat16 and torchao: `python benchmarks/gpu_kernels.py`.

Every contender answers the same rows in turn, round after round, with the cache emptied before each; printed are
medians, and ratios to torch's bfloat16 layer in the same rounds. Columns: microseconds; how much faster than bfloat16;
how far the answer is from the simulated layer's; which share of the memory or compute roof that is. The roofs are those
of `lightning_quant/graph/hardware.csv`; of a device that is not there, the bandwidth of a copy and the speed of a large
bfloat16 product are measured and stand in, so that 8-bit products can be above 100 %. `--out FILE` writes JSON.
Without a CUDA device nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.graph.roofline import Machine
from lightning_quant.kernels.cuda.fp8 import Fp8Linear
from lightning_quant.kernels.cuda.int4 import TritonInt4Weights
from lightning_quant.kernels.cuda.int8 import TritonInt8Linear
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.layer_door import run_on
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.layers import QuantizedLayer, quantize_layer
from lightning_quant.quantizers import Scheme

Run = Callable[[], Tensor]
BF16 = "torch bfloat16"
PACKAGES = ("torch", "triton", "torchao")
# rows, inputs, outputs
SHAPES = {
    "LLaMA-7B up, 1 token": (1, 4096, 11008),
    "LLaMA-7B up, 16 tokens": (16, 4096, 11008),
    "LLaMA-7B down, 1 token": (1, 11008, 4096),
    "LLaMA-7B up, 2048 tokens": (2048, 4096, 11008),
    "ViT-B fc1, 8 images": (8 * 197, 768, 3072),
    "ViT-B fc2, 8 images": (8 * 197, 3072, 768),
}
# formats of weights and inputs, and the kernel for them
OURS: dict[str, tuple[str, str | None, type[Kernel]]] = {
    "W8A8 static (Triton)": ("int8_sym_channel", "int8_asym_tensor", TritonInt8Linear),
    "W8A8 per token (Triton)": ("int8_sym_channel", "int8_sym_token", TritonInt8Linear),
    "W4A16 groups of 128 (Triton)": ("int4_asym_g128", None, TritonInt4Weights),
    "W4A16 groups of 32 (Triton)": ("int4_asym_g32", None, TritonInt4Weights),
    "fp8 static (torch)": ("fp8_e4m3_tensor", "fp8_e4m3_tensor", Fp8Linear),
    "fp8 per token (torch)": ("fp8_e4m3_channel", "fp8_e4m3_token", Fp8Linear),
}
# configurations of torchao.quantization, what they are given, and the bits of weights and inputs
TORCHAO: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "torchao int4 weights, groups of 128": ("Int4WeightOnlyConfig", {"group_size": 128}, (4, 16)),
    "torchao W8A8 per token": ("Int8DynamicActivationInt8WeightConfig", {}, (8, 8)),
    "torchao fp8": ("Float8DynamicActivationFloat8WeightConfig", {}, (8, 8)),
}
# What names of devices look like, and the machine of the table.
MACHINES = {
    r"V100": "V100",
    r"RTX A6000": "A6000",
    r"A100.*40GB": "A100-40G",
    r"A100.*80GB": "A100-80G",
    r"\bA40\b": "A40",
    r"H100.*HBM3": "H100-SXM",
    r"H100.*PCIe": "H100-PCIe",
    r"\bL40\b": "L40",
}


@dataclass(frozen=True)
class Line:
    """One contender at one shape."""

    shape: str
    contender: str
    microseconds: float
    of_bfloat16: float
    error: float | None
    bound: str
    roof: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    roofs, machine = machine_of(torch.cuda.get_device_name())
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "versions": {name: installed(name) for name in PACKAGES},
        "roofs": f"{machine.bandwidth / 1e9:.0f} GB/s, {machine.peak / 1e12:.0f} TFLOP/s ({roofs})",
    }
    print("; ".join(f"{name}: {fact}" for name, fact in facts.items()))
    lines: list[Line] = []
    with torch.inference_mode():
        for name in arguments.shapes:
            print(f"\n{name}: rows, inputs, outputs {SHAPES[name]}")
            found = compare(name, SHAPES[name], machine, arguments.rounds, "cuda")
            print("\n".join(map(written, found)), flush=True)
            lines += found
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, "lines": [asdict(line) for line in lines]}, indent=1))


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def written(line: Line) -> str:
    error = "" if line.error is None else f"{line.error:.1e}"
    return (
        f"  {line.contender:36} {line.microseconds:9.1f} us {line.of_bfloat16:7.2f}x {error:>9} "
        f"{line.roof:5.0%} of {line.bound}"
    )


# ---------------------------------------------------------------- the roofs


def machine_of(device: str) -> tuple[str, Machine]:
    """Where the roofs are from, and the roofs."""
    for pattern, name in MACHINES.items():
        if re.search(pattern, device):
            return "as published", Machine.named(name)
    return "measured here in bfloat16", Machine(device, measured_bandwidth(), measured_peak())


def measured_bandwidth(size: int = 2**30) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (medians({"copy": lambda: target.copy_(source)}, 20, "cuda")["copy"] * 1e-6)


def measured_peak(size: int = 8192) -> float:
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return float(2 * size**3 / (medians({"product": lambda: left @ right}, 20, "cuda")["product"] * 1e-6))


def share_of_roof(shape: tuple[int, int, int], bits: tuple[float, float], machine: Machine, us: float) -> tuple:
    """Whether memory or computing is the roof at this shape, and which share of it is reached."""
    rows, inputs, outputs = shape
    moved = (outputs * inputs * bits[0] + rows * (inputs + outputs) * 16) / 8
    seconds = {
        "memory": moved / machine.bandwidth,
        "compute": 2 * rows * inputs * outputs / machine.peak_at(low_bits=max(bits) <= 8),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return bound, seconds[bound] / (us * 1e-6)


# ---------------------------------------------------------------- the contenders


def compare(name: str, shape: tuple[int, int, int], machine: Machine, rounds: int, device: str) -> list[Line]:
    """All contenders at one shape; one that does not run is told, and does not end the table."""
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
    layer = nn.Linear(inputs, outputs, dtype=torch.bfloat16, device=device)
    runs: dict[str, Run] = {BF16: lambda: layer(x)}
    bits: dict[str, tuple[float, float]] = {BF16: (16, 16)}
    errors: dict[str, float] = {}
    for contender, (weights, activations, kernel) in OURS.items():
        try:
            ours = calibrated(layer, weights, activations, x)
            if reason := kernel.why_not(LayerSpec.of(ours)):
                raise ValueError(reason)
            simulated = ours(x).float()
            run_on(ours, kernel.of(ours))
            errors[contender] = float((ours(x).float() - simulated).norm() / simulated.norm())
        except Exception as error:
            print(f"  {contender} does not run: {type(error).__name__}: {error}")
            continue
        runs[contender], bits[contender] = (lambda ours=ours: ours(x)), bits_of(LayerSpec.of(ours))
    for contender, (config, options, of) in TORCHAO.items():
        try:
            runs[contender], bits[contender] = torchao(layer, config, options, x), of
        except Exception as error:
            print(f"  {contender} does not run: {type(error).__name__}: {str(error).splitlines()[:1]}")
    found = medians(runs, rounds, device)
    return [
        Line(
            *(name, contender, us, found[BF16] / us, errors.get(contender)),
            *share_of_roof(shape, bits[contender], machine, us),
        )
        for contender, us in found.items()
    ]


def calibrated(layer: nn.Linear, weights: str, activations: str | None, x: Tensor) -> QuantizedLayer:
    twin = nn.Linear(layer.in_features, layer.out_features, dtype=x.dtype, device=x.device)
    twin.load_state_dict(layer.state_dict())
    quantized = quantize_layer(twin, Scheme.parse(weights), Scheme.parse(activations) if activations else None)
    assert quantized.weight_quantizer is not None
    quantized.weight_quantizer.fit(quantized.weight_rows())
    if quantized.input_quantizer is not None:
        quantized.input_quantizer.fit(x)
    return quantized.eval()


def bits_of(spec: LayerSpec) -> tuple[float, float]:
    """Bits of a weight, with its share of a scale and a zero point, and of an input."""
    assert spec.weights is not None
    scale = 40 / spec.weights.group_size if spec.weights.group_size else 0
    return spec.weights.bits + scale, 16 if spec.inputs is None else spec.inputs.bits


def torchao(layer: nn.Linear, config: str, options: dict[str, Any], x: Tensor) -> Run:
    """The layer as torchao quantizes it, compiled."""
    api = import_module("torchao.quantization")
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, dtype=x.dtype, device=x.device))
    model[0].load_state_dict(layer.state_dict())
    api.quantize_(model, getattr(api, config)(**options))
    compiled = torch.compile(model)
    compiled(x)
    return lambda: compiled(x)


# ---------------------------------------------------------------- the clock


def medians(runs: dict[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Median microseconds of each, in interleaved rounds; the first ones warm up and tune, and do not count."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    warm_up = max(1, rounds // 5)
    for turn in range(warm_up + rounds):
        for name, run in runs.items():
            seconds = timed(run, device)
            if turn >= warm_up:
                took[name].append(seconds * 1e6)
    return {name: statistics.median(times) for name, times in took.items()}


def timed(run: Run, device: str) -> float:
    """Seconds of one call; on a GPU between events, while the processor is already done with asking for it."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    # Larger than any cache; and while it is written, the launches behind it queue up.
    torch.empty(2**30, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


if __name__ == "__main__":
    main()
