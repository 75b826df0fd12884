"""The rows of the table of accuracies: which method with how many bits on which model, and with what settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning_quant
from lightning_quant import Reconstruction
from lightning_quant.callbacks import QuantizationCallback
from lightning_quant.solvers import PRESETS

# Sized for a person who waits: minutes a row on one core. The papers take 20,000 steps of 32 out of 1,024 samples, and
# learn slowly; in so few steps a rounding has to be found fast.
STEPS = {
    "DeiT-Tiny": {"iterations": 60, "batch_size": 4, "samples": 32, "learning_rate": 0.1, "scale_learning_rate": 0.01},
    "ResNet-20": {"iterations": 200, "batch_size": 16, "samples": 256},
}


@dataclass(frozen=True)
class Method:
    """A callback by its name, and its arguments beside the bits; a preset of reconstruction takes the model's steps.

    Args:
        callback: its name in lightning_quant.
        arguments: of the callback.
        weights: suffix of the weights' format.
    """

    callback: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


# A method that is to be measured is one line here; a callback that is not there yet has no rows.
METHODS = {
    "min-max": Method("PostTrainingQuantization", {"ranges": "minmax"}),
    "nearest": Method("PostTrainingQuantization"),
    "AdaRound": Method("PostTrainingQuantization", {"reconstruct": "adaround"}),
    "BRECQ": Method("PostTrainingQuantization", {"reconstruct": "brecq"}),
    "QDrop": Method("PostTrainingQuantization", {"reconstruct": "qdrop"}),
    "RepQ-ViT": Method("RepQViT"),
    "RepQuant": Method("RepQuant", {"reconstruct": "qdrop"}),
    "DopQ-ViT": Method("DopQViT"),
    "MGRQ": Method("MGRQ", {"reconstruct": "mgrq"}),
    "NoisyQuant": Method("NoisyQuant"),
    "MPTQ-ViT": Method("MPTQViT"),
}
# Rounding alone: the grid lies between the extremes of each channel, and activations are float.
ROUNDING = {
    "nearest on extremes": Method("PostTrainingQuantization", {"ranges": "minmax"}, "_asym"),
    "BRECQ on extremes": Method("PostTrainingQuantization", {"ranges": "minmax", "reconstruct": "brecq"}, "_asym"),
}
# Methods of language models, on a model of sentences; their own table is in language_rows.py.
SENTENCES = {"GPTQ": Method("GPTQ", {"ranges": "minmax", "attention": False})}
ALL = METHODS | ROUNDING | SENTENCES


class Row(NamedTuple):
    """One figure of the table.

    Args:
        model: name of the subject.
        method: name of the method, or ``"float"``.
        bits: ``W4A4``; 32 bits are float.
        draw: of calibration images.
    """

    model: str
    method: str
    bits: str
    draw: int = 0

    @property
    def name(self) -> str:
        """What ``--only`` matches."""
        return f"{self.method} {self.bits} {self.model}" + (f" draw {self.draw}" if self.draw else "")

    def matches(self, patterns: list[str]) -> bool:
        """Whether the name begins as one of the patterns says; none lets all through."""
        return not patterns or any(fnmatchcase(self.name.lower(), f"{pattern.lower()}*") for pattern in patterns)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments beside the bits."""
        given = ALL[self.method].arguments
        if "reconstruct" not in given:
            return given
        settings = {**PRESETS[given["reconstruct"]], **STEPS[self.model]}
        if self.bits.endswith("A32"):  # float activations have no scales to learn
            settings["phases"] = ["weights"]
        return {**given, "reconstruct": Reconstruction(**settings)}

    @property
    def settings(self) -> str:
        """The callback and its arguments beside the bits, as code."""
        if self.method == "float":
            return ""
        method = ALL[self.method]
        arguments = [f"weights='intN{method.weights}'"] if method.weights else []
        arguments += [f"{name}={_said(value)}" for name, value in self.arguments.items()]
        return f"{method.callback}({', '.join(arguments)})"

    def callbacks(self) -> list[QuantizationCallback]:
        """The method; none for the float model."""
        return [] if (callback := self.callback()) is None else [callback]

    def callback(self) -> QuantizationCallback | None:
        """The method; ``None`` for the float model."""
        if self.method == "float":
            return None
        method, (weights, activations) = ALL[self.method], self.bits[1:].split("A")
        formats = {"weights": f"int{weights}{method.weights}", "activations": f"int{activations}"}
        if activations == "32":
            formats["activations"] = None
        return getattr(lightning_quant, method.callback)(**formats, **self.arguments)


def _said(value: Any) -> str:
    """A value as code; settings of a reconstruction say only what is not the default."""
    if not isinstance(value, Reconstruction):
        return repr(value)
    default = Reconstruction()
    given = {
        f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != getattr(default, f.name)
    }
    return f"Reconstruction({', '.join(f'{name}={x!r}' for name, x in given.items())})"


BITS = ("W4A4", "W3A8", "W4A8", "W6A6", "W8A8")
DRAWS = (0, 1, 2)
DRAWN = ("RepQ-ViT", "RepQuant")


def rows() -> list[Row]:
    """All rows, those first that say most."""
    there = [name for name, method in METHODS.items() if hasattr(lightning_quant, method.callback)]
    found = [Row("DeiT-Tiny", "float", "W32A32"), Row("ResNet-20", "float", "W32A32")]
    found += [Row("DeiT-Tiny", method, "W4A4", draw) for draw in DRAWS for method in DRAWN]
    found += [Row("DeiT-Tiny", method, "W3A32") for method in ROUNDING]
    found += [Row("DeiT-Tiny", method, "W3A8") for method in ("nearest", "BRECQ")]
    found += [Row("ResNet-20", method, "W4A4") for method in ("nearest", "QDrop")]
    found += [Row("DeiT-Tiny", method, "W4A4") for method in there]
    found += [Row("ResNet-20", method, "W4A4") for method in ("min-max", "AdaRound", "BRECQ")]
    found += [Row("MiniLM", method, "W8A8") for method in ("min-max", "nearest")]
    found += [Row("MiniLM", method, bits) for bits in ("W4A32", "W3A32") for method in ("nearest on extremes", "GPTQ")]
    found += [Row("EfficientNet-Lite0", "float", "W32A32")]
    found += [Row("EfficientNet-Lite0", method, "W8A8") for method in ("min-max", "nearest")]
    found += [Row("DeiT-Tiny", method, bits) for bits in BITS[1:] for method in there]
    return list(dict.fromkeys(found))
