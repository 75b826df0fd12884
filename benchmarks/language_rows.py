"""The rows of the table of language models: which callbacks, one or several, at which bits or in which pattern."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning as L

import lightning_quant

# Columns: weights alone, weights and inputs; and patterns of pruning. SmolLM2's weights were on a grid of four bits
# when they were published, so that four bits alone say little.
BITS = {
    "stories260K": ("W4A32", "W3A32", "W2A32", "W8A8", "W4A8", "W4A4"),
    "SmolLM2-135M": ("W3A32", "W2A32", "W8A8", "W4A4"),
}
PATTERNS = ("50%", "2:4", "4:8")
# The layers of stories260K are too small for groups of 128.
FORMATS = {"stories260K": "_asym", "SmolLM2-135M": "_asym_g128"}
# 12 windows of 512 tokens are four for each input of SmolLM2's widest layer, below which OSAQ refuses.
SAMPLES = {"stories260K": 32, "SmolLM2-135M": 12}


@dataclass(frozen=True)
class Step:
    """One callback of a method: its name, what it quantizes, and its arguments beside that.

    Args:
        callback: its name in lightning_quant.
        arguments: of the callback.
        weights: whether it is given the format of the weights.
        activations: whether it is given the format of the activations.
        pattern: whether it is given the pattern of pruning.
    """

    callback: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: bool = True
    activations: bool = True
    pattern: bool = False


_SKIP = {"skip": ["*lm_head"]}  # GPTQ and its kin leave the head float by themselves
_SEARCHED = {"ranges": "lp"}  # one way for all
LANGUAGE: dict[str, list[Step]] = {
    "nearest on extremes": [Step("PostTrainingQuantization", {"ranges": "minmax", **_SKIP, "attention": False})],
    "GPTQ on extremes": [Step("GPTQ", {"ranges": "minmax", "attention": False})],
    "nearest": [Step("PostTrainingQuantization", {**_SEARCHED, **_SKIP, "attention": False})],
    "GPTQ": [Step("GPTQ", {**_SEARCHED, "attention": False})],
    "OSAQ + nearest": [Step("OSAQ", {"solver": "nearest", **_SEARCHED, "attention": False})],
    "OSAQ + GPTQ": [Step("OSAQ", {"solver": "gptq", **_SEARCHED, "attention": False})],
    "RSQ": [Step("RSQ", {**_SEARCHED, "attention": False})],
    "LoRC": [Step("LoRC", {**_SEARCHED, "attention": False})],
    "rotated": [Step("RotatedPTQ", {**_SEARCHED, **_SKIP})],
    "rotated + GPTQ": [Step("RotatedPTQ", {"solver": "gptq", **_SEARCHED, **_SKIP})],
    "SmoothQuant": [Step("SmoothQuant", {**_SEARCHED, **_SKIP})],
}
PRUNING: dict[str, list[Step]] = {
    "magnitude": [Step("MagnitudePruning", _SKIP, pattern=True)],
    "Wanda": [Step("Wanda", pattern=True)],
    "SparseGPT": [Step("SparseGPT", pattern=True)],
    **{
        f"{name} + SI": [Step("SparsityInduction", {"host": name.lower()}, pattern=True)]
        for name in ("magnitude", "Wanda", "SparseGPT")
    },
}
ALL_LANGUAGE = LANGUAGE | PRUNING


class LanguageRow(NamedTuple):
    """One figure of the table of language models.

    Args:
        model: name of the subject.
        method: name of the method, or ``"float"``.
        bits: ``W4A32`` or a pattern; 32 bits are float.
        draw: there is but one.
    """

    model: str
    method: str
    bits: str
    draw: int = 0

    @property
    def name(self) -> str:
        """What ``--only`` matches."""
        return f"{self.method} {self.bits} {self.model}"

    def matches(self, patterns: list[str]) -> bool:
        """Whether the name begins as one of the patterns says; none lets all through."""
        return not patterns or any(fnmatchcase(self.name.lower(), f"{pattern.lower()}*") for pattern in patterns)

    @property
    def settings(self) -> str:
        """The callbacks and their arguments beside the bits, as code."""
        return " + ".join(
            f"{step.callback}({', '.join(f'{name}={value!r}' for name, value in self._arguments(step).items())})"
            for step in self._steps
        )

    def callbacks(self) -> list[L.Callback]:
        """The callbacks; none for the float model."""
        return [
            getattr(lightning_quant, step.callback)(**self._formats(step), **self._arguments(step))
            for step in self._steps
        ]

    @property
    def _steps(self) -> list[Step]:
        return [] if self.method == "float" else ALL_LANGUAGE[self.method]

    def _arguments(self, step: Step) -> dict[str, Any]:
        found = step.arguments | {"calibration_samples": SAMPLES[self.model]}
        if self.bits == "4:8" and self.model == "stories260K":  # rows of 172 weights are no groups of 8
            found["skip"] = [*found.get("skip", []), "*down_proj"]
        return found

    def _formats(self, step: Step) -> dict[str, Any]:
        if step.pattern:
            return {"pattern": 0.5 if self.bits == "50%" else self.bits}
        weights, activations = self.bits[1:].split("A")
        weight = f"int{weights}{FORMATS[self.model]}"
        given = {"weights": weight if step.weights else None}
        given["activations"] = f"int{activations}_token_dynamic" if step.activations and activations != "32" else None
        return given


def language_rows() -> list[LanguageRow]:
    """All rows, those of the small model first; a callback that is not there yet has none."""

    def there(methods: dict[str, list[Step]]) -> list[str]:
        return [name for name, steps in methods.items() if all(hasattr(lightning_quant, s.callback) for s in steps)]

    found = [LanguageRow(model, "float", "W32A32") for model in FORMATS]
    for model in FORMATS:
        found += [LanguageRow(model, method, bits) for bits in BITS[model] for method in there(LANGUAGE)]
        found += [LanguageRow(model, method, pattern) for pattern in PATTERNS for method in there(PRUNING)]
    # smoothing without inputs that are quantized changes little, and is not what it is for
    return [row for row in found if row.method != "SmoothQuant" or not row.bits.endswith("A32")]
