"""What came of the models of the zoo, as a table in the terminal and as a page of the documentation."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.zoo_models import ZOO, Specimen
from benchmarks.zoo_noise import Source

GOOD_SHARE, GOOD_SQNR = 0.9, 20.0


@dataclass
class Result:
    """What came of one model.

    Args:
        name: in the zoo.
        error: type, message and place of an exception, if there was one.
        layers: how many layers are quantized.
        sites: how many attention sites are.
        layer_macs: of all linear and convolution layers in one forward of the float model, and how many of these
            multiply quantized numbers in the quantized model.
        attention_macs: the same for the products of attention.
        sqnr: of the output, in decibels.
        noise: where it comes from, if the output is below 20 decibels.
        others: the output's SQNR with other arguments then.
        spread: how many times larger the output is for one sample of the batch than for another.
        float_layers: MACs of the layers that multiply float numbers, by name.
        skipped: what the callback says that it left float, and why.
        seconds: that ``validate`` took.
    """

    name: str
    error: str = ""
    layers: int = 0
    sites: int = 0
    layer_macs: tuple[int, int] = (0, 0)
    attention_macs: tuple[int, int] = (0, 0)
    sqnr: float = float("nan")
    noise: list[Source] = field(default_factory=list)
    others: dict[str, float] = field(default_factory=dict)
    spread: float = 1.0
    float_layers: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of the layers' MACs that is quantized."""
        return self.layer_macs[1] / max(self.layer_macs[0], 1)

    def remark(self) -> str:
        """The error, or what was left float and why; layers that differ only by a number are told together."""
        if self.error:
            return self.error
        groups: dict[tuple[str, str], list[str]] = {}
        for name in dict.fromkeys([*self.float_layers, *self.skipped]):
            why = self.skipped.get(name, "the callback does not mention it")
            groups.setdefault((re.sub(r"\d+", "*", name), why), []).append(name)
        remarks: dict[str, list[str]] = {}
        for (pattern, why), names in groups.items():
            share = 100 * sum(self.float_layers.get(name, 0) for name in names) / max(self.layer_macs[0], 1)
            who = f"`{names[0] if len(names) == 1 else pattern}`"
            remarks.setdefault(why, []).append(f"{who} ({share:.2f} %)" if share else who)
        return "; ".join(f"{', '.join(who)}: {why}" for why, who in remarks.items())


HEADER = ("model", "library", "weights", "layers", "linear + conv MACs", "attention sites", "attention MACs", "SQNR")


def row(result: Result, specimen: Specimen) -> tuple[str, ...]:
    """The cells of one line."""
    cells = (result.name, specimen.library, specimen.weights)
    if result.error:
        return *cells, *(["-"] * 5)
    return (
        *cells,
        str(result.layers),
        percent(result.layer_macs),
        str(result.sites),
        percent(result.attention_macs),
        f"{result.sqnr:.1f} dB",
    )


def percent(macs: tuple[int, int]) -> str:
    """How much of it is quantized, rounded down so that 100 % means all."""
    return f"{int(1000 * macs[1] / macs[0]) / 10:.1f} %" if macs[0] else "-"


def show(results: list[Result], console: Console) -> None:
    """Print the table, and below it what was left float."""
    table = Table(*HEADER, "s", title="W8A8 by one callback")
    for result in results:
        table.add_row(*row(result, ZOO[result.name]), f"{result.seconds:.1f}")
    console.print(table)
    for result in results:
        if remark := result.remark():
            console.print(f"[bold]{result.name}[/bold]: {escape(remark)}")


def page(results: list[Result]) -> str:
    """The table as Markdown."""
    versions = {name: version(name) for name in ("torch", "lightning", "timm", "transformers", "diffusers")}
    versions = {"Python": platform.python_version(), **versions}
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row(result, ZOO[result.name])) + " |" for result in results]
    remarks = [f"- **{result.name}**: {remark}" for result in results if (remark := result.remark())]
    good = sum(not r.error and r.share >= GOOD_SHARE and r.sqnr >= GOOD_SQNR for r in results)
    return INTRODUCTION.format(
        models=len(results),
        good=good,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        table="\n".join(lines),
        remarks="\n".join(remarks),
        noise="\n\n".join(noise_table(result) for result in results if result.noise) or "None is.",
    )


def noise_table(result: Result, most: int = 6) -> str:
    """The noisiest tensors of one model as Markdown."""
    lines = [
        f"**{result.name}**: {result.sqnr:.1f} dB, from {len(result.noise)} quantizers; "
        + ", ".join(f"with {label} {found:.1f} dB" for label, found in result.others.items())
        + f". The largest float output of a sample is {result.spread:.1f} times the smallest.",
        "",
        "| quantizer | share of the noise | alone | its tensor | peak / std | range / tensor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{s.name}` | {100 * s.share:.0f} % | {s.alone:.1f} dB | {s.own:.1f} dB | {s.peak:.0f} | {s.reach:.1f} |"
        for s in result.noise[:most]
    ]
    return "\n".join(lines)


INTRODUCTION = """# Models

{models} models, each a LightningModule as one writes it without quantization in mind, quantized to 8-bit weights and
8-bit activations by the same callback, with no argument for any of them:

```python
trainer = L.Trainer(callbacks=[PostTrainingQuantization(weights="int8", activations="int8")])
trainer.validate(model, datamodule=data)
```

In {good} of {models}, at least 90 % of the multiplications in linear and convolution layers run on 8-bit numbers, and
the output keeps at least 20 dB. For three of these, EfficientNet-Lite0 and the two MobileNetV4, the 20 dB hang on how
the random batch norms were set, see below the table.

{table}

- *weights*: `random` is a small configuration of the real class with seeded weights; `trained` are weights at hand.
- *linear + conv MACs*: multiplications whose two operands are 8-bit numbers in the quantized model, as a share of those
  in the float model. They are counted where torch executes them and judged by the numbers themselves, not by asking
  the package. *attention MACs* are the products of queries and keys, and of probabilities and values.
- *SQNR*: of the first tensor of the output against the float model, on 8 samples that did not calibrate. All inputs are
  synthetic, those of the trained models too.

## How the random nets were made, and what hangs on it

A random net has no right SQNR: it follows from the initialisation. Two choices were made here, both after seeing
results; the figures in this section were measured once, beside the table.

- **Batch norms** get a mean of 0 and one variance per layer. Three ways were tried and this one kept. With the other
  two the float nets themselves multiply noise: 40 dB of it behind the first layer leave 13 or 14 dB of EfficientNet-B0
  instead of 33 dB. The SQNR of W8A8 in dB depends on the choice:

  | statistics | EfficientNet-B0 | EfficientNet-Lite0 | MobileNetV4 | MobileNetV4 hybrid | ResNet |
  |---|---:|---:|---:|---:|---:|
  | mean 0, one variance (the table) | 5.0 | 26.7 | 26.7 | 24.6 | 33.2 |
  | mean and variance per channel, as in training | 3.7 | 8.3 | 9.9 | 7.6 | 20.7 |
  | mean 0, variance per channel | 5.4 | 7.3 | -11.0 | 7.5 | 27.0 |

  So these rows show that the layers are found and quantized, not how well such nets keep their accuracy. The one
  trained net of the kind that was measured, EfficientNet-Lite0 on 24 ImageNet images, keeps 20.1 dB. That and its lower
  two figures were found while its five convolutions with TensorFlow's padding were still left float.
- **Weights** with a gain below 0.24 are drawn anew with gain 1; layer scales and norms are made uneven, biases random.
  With a threshold of 0.5 T5 falls from 30.8 to 18.5 dB, since its attention is not scaled and grows sharp; all other
  random nets without batch norm stay above 23 dB. As the libraries initialise them, all are between 24 and 57 dB.

DeiT with its trained weights keeps 15.6 dB on 16 ImageNet images, less than on the synthetic ones of the table.

## What was left float, and why

Shares are of the multiplications in linear and convolution layers.

{remarks}

## Below 20 dB, tensor by tensor

Each quantizer is run alone in an otherwise float model. *Alone* is the output's SQNR then, *its tensor* the SQNR of
what it rounds. A tensor with a high *peak / std* wastes its 256 levels on few values; a low *range / tensor* says that
the range search cut off the largest ones.

{noise}

---

Made by `python -m benchmarks.zoo --write` with {versions}.
"""
