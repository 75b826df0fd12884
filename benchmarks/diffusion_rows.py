"""The rows of the table of diffusion models: which callback at which bits on which denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning as L

import lightning_quant
from lightning_quant import Reconstruction
from lightning_quant.solvers import PRESETS

BITS = ("W8A8", "W4A8", "W4A4")
NETS = ("unet_mnist", "dit_mnist", "ddpm_mnist")
# Sized for a minute or two of one core: the papers take 20,000 steps a block, and learn slowly.
STEPS = {"iterations": 60, "batch_size": 16, "samples": 256}
MORE = {"ddpm_mnist": 400}  # iterations of a net that is so small
BRECQ = {"phases": ["weights"], "learning_rate": 0.03}


@dataclass(frozen=True)
class Sampler:
    """A callback by its name, and its arguments beside the bits; a preset of reconstruction takes few steps.

    Args:
        callback: its name in lightning_quant.
        arguments: of the callback.
        nets: the denoisers that it is for.
        weights: their format, up to the bits; the same grid for all that have one.
        activations: theirs.
        own: more arguments for one of the denoisers.
        bits: those it is measured at.
        part_of: the method that this is a part of.
    """

    callback: str
    arguments: dict[str, Any] = field(default_factory=dict)
    nets: tuple[str, ...] = NETS
    weights: str = "int{}_asym"
    activations: str = "int{}"
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    bits: tuple[str, ...] = BITS
    part_of: str | None = None


_MOMENTS = {"calibration_samples": 256}  # of 32 trajectories of the float model, 8 of each
_PLAIN = "PostTrainingQuantization"
# A method that is to be measured is one line here; a callback that is not there yet has no rows.
SAMPLERS: dict[str, Sampler] = {
    "min-max": Sampler(_PLAIN, {"ranges": "minmax", **_MOMENTS}),
    "nearest": Sampler(_PLAIN, _MOMENTS),
    "nearest, per step": Sampler(_PLAIN, {"per_step": True, **_MOMENTS}),
    "nearest, per token": Sampler(  # what LRQ-DiT has to beat: its ranges, and attention in float
        _PLAIN, {"attention": False, **_MOMENTS}, nets=("dit_mnist",), activations="int{}_sym_token_dynamic"
    ),
    "BRECQ": Sampler(_PLAIN, {"reconstruct": "brecq", **_MOMENTS}),
    "Q-Diffusion": Sampler("QDiffusion", {"reconstruct": "brecq"}),
    "TFMQ-DM": Sampler("TFMQDM", {"reconstruct": "brecq"}),
    "EDA-DM": Sampler(
        "EDADM",
        {"moments": 4, "reconstruct": "edadm"},
        own={"ddpm_mnist": {"feature": "denoiser.blocks.1.net"}},  # which has neither a middle nor equal blocks
    ),
    "DilateQuant": Sampler("DilateQuant", {"reconstruct": "dilatequant", **_MOMENTS}),
    "LRQ-DiT": Sampler("LRQDiT", _MOMENTS, nets=("dit_mnist",), weights="twinlog_{}"),
    "PTQ4ARVG": Sampler("PTQ4ARVG", nets=("dit_mnist",)),
}
# What each part of a method does: the method without it, on the net that it is for.
WITHOUT: dict[str, dict[str, dict[str, Any]]] = {
    "Q-Diffusion": {"one scale for what is joined": {"split": False}, "not fitted": {"reconstruct": None}},
    "TFMQ-DM": {
        "temporal layers not fitted by themselves": {"tiar": False},
        "one range for all steps": {"finite_set": False},
    },
    "EDA-DM": {"steps not chosen": {"diversity": None}, "not fitted": {"reconstruct": None}},
    "DilateQuant": {
        "not dilated": {"dilate": False},
        "one range for all steps": {"per_step": False},
        "not fitted": {"reconstruct": None},
    },
    "LRQ-DiT": {"not rotated": {"rotation": None, "smooth": None}, "uniform levels": {"weights": Sampler.weights}},
}


def without() -> dict[str, Sampler]:
    """The methods that lack a part, each on one net."""
    found = {}
    for name, parts in WITHOUT.items():
        whole = SAMPLERS[name]
        for part, changed in parts.items():
            arguments = {**whole.arguments, **changed}
            weights = arguments.pop("weights", whole.weights)
            found[f"{name}, {part}"] = replace(
                whole, arguments=arguments, nets=whole.nets[:1], weights=weights, bits=("W4A8",), part_of=name
            )
    return found


SAMPLERS |= without()


class DiffusionRow(NamedTuple):
    """One figure of the table of diffusion models.

    Args:
        model: name of the denoiser.
        method: name of the method, or ``"float"``.
        bits: ``W4A8``; 32 bits are float.
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
    def arguments(self) -> dict[str, Any]:
        """The arguments beside the bits; as in the papers, the first and the last layer have 8 bits in all rows."""
        sampler = SAMPLERS[self.method]
        given = {**sampler.arguments, **sampler.own.get(self.model, {}), "first_last": "int8"}
        return {**given, "reconstruct": Reconstruction(**self.steps)} if given.get("reconstruct") else given

    @property
    def steps(self) -> dict[str, Any]:
        """How the method reconstructs, if it does."""
        preset = SAMPLERS[self.method].arguments.get("reconstruct") or ""
        more = {"iterations": MORE[self.model]} if self.model in MORE else {}
        return {**PRESETS.get(preset, {}), **STEPS, **more, **(BRECQ if preset == "brecq" else {})}

    @property
    def settings(self) -> str:
        """The callback and its arguments beside the bits, as code."""
        if self.method == "float":
            return ""
        sampler = SAMPLERS[self.method]
        steps = ", ".join(f"{name}={value!r}" for name, value in self.steps.items())
        told = {"reconstruct": f"Reconstruction({steps})" if sampler.arguments.get("reconstruct") else "None"}
        arguments = [f"{name}={told.get(name, repr(value))}" for name, value in self.arguments.items()]
        formats = [f"weights={sampler.weights.format('N')!r}"]
        if sampler.activations != Sampler.activations:
            formats.append(f"activations={sampler.activations.format('N')!r}")
        return f"{sampler.callback}({', '.join([*formats, *arguments])})"

    def callbacks(self) -> list[L.Callback]:
        """The callback; none for the float model."""
        if self.method == "float":
            return []
        weights, activations = self.bits[1:].split("A")
        sampler = SAMPLERS[self.method]
        formats = {
            "weights": sampler.weights.format(weights),
            "activations": sampler.activations.format(activations),
        }
        return [getattr(lightning_quant, sampler.callback)(**formats, **self.arguments)]


def diffusion_rows() -> list[DiffusionRow]:
    """All rows; a callback that is not there yet has none."""
    there = {name: method for name, method in SAMPLERS.items() if hasattr(lightning_quant, method.callback)}
    found = [DiffusionRow(net, "float", "W32A32") for net in NETS]
    return found + [
        DiffusionRow(net, name, bits)
        for net in NETS
        for bits in BITS
        for name, method in there.items()
        if net in method.nets and bits in method.bits
    ]
