"""How fast a quantized model predicts, beside its float self and other libraries: `make bench`.

Every contender answers the same batch in turn, round after round, so that a busy moment slows all of them; printed are
medians, and ratios to float32 eager and to the best other library. `--out FOLDER` writes `latency.json` and
`latency.png`. A library that is not installed has no row.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from latency_models import MODELS
from latency_peers import PEERS

from lightning_quant.kernels.cpu import integer_instructions

Run = Callable[[], Any]
PACKAGES = ("torch", "lightning", "openvino", "nncf", "onnxruntime", "torchao")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": integer_instructions(),
        "threads": arguments.threads,
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "python": platform.python_version(),
    }
    print(
        f"{facts['cpu']}; {arguments.threads} threads; " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    )
    results = []
    for name in arguments.models:
        for batch in MODELS[name].batches:
            medians = compare(name, batch, arguments)
            results.append({"model": name, "batch": batch, "milliseconds": medians})
            print_table(name, batch, medians)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "latency.json").write_text(json.dumps({**facts, "results": results}, indent=1))
        draw(results, arguments.out / "latency.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contenders", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compare(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of every contender, in interleaved rounds."""
    runs: dict[str, Run] = {}
    for contender in arguments.contenders:
        try:
            model, inputs = MODELS[name].build(), MODELS[name].inputs(batch)
            run = PEERS[contender](model, inputs, arguments.threads)
            for _ in range(2):
                run()
            runs[contender] = run
        except Exception as error:  # a peer that cannot take a model is told, and does not end the table
            print(
                f"  {contender} does not run {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True
            )
    seconds: dict[str, list[float]] = {contender: [] for contender in runs}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for contender, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[contender].append(time.perf_counter() - began)
    return {contender: 1000 * statistics.median(times) for contender, times in seconds.items()}


def print_table(name: str, batch: int, medians: dict[str, float]) -> None:
    eager = medians.get("float32 eager")
    others = [
        median
        for contender, median in medians.items()
        if not contender.startswith(("lightning", "float32", "bfloat16"))
    ]
    print(f"\n{name}, batch {batch}")
    print(f"  {'':34} {'ms':>8} {'of eager':>9} {'of best peer':>13}")
    for contender, median in sorted(medians.items(), key=lambda pair: pair[1]):
        speed = f"{eager / median:8.2f}x" if eager else ""
        peer = f"{min(others) / median:12.2f}x" if others else ""
        print(f"  {contender:34} {median:8.1f} {speed:>9} {peer:>13}")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(8, 1 + 2.4 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        pairs = sorted(result["milliseconds"].items(), key=lambda pair: -pair[1])
        colors = ["#d55e00" if name.startswith("lightning") else "#999999" for name, _ in pairs]
        bars = axis.barh([name for name, _ in pairs], [median for _, median in pairs], color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_title(f"{result['model']}, batch {result['batch']}: milliseconds", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
