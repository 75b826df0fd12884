"""What decides how weights are rounded, beyond rounding each to the nearest."""

from __future__ import annotations

from lightning_quant.solvers.clipping import clipping_error, learn_clips
from lightning_quant.solvers.reconstruction import PRESETS, Reconstruction
from lightning_quant.solvers.rounding import ROUNDINGS, JointRounding, SoftRounding, TrainedWeight, WeightRounding

__all__ = [
    "PRESETS",
    "ROUNDINGS",
    "JointRounding",
    "Reconstruction",
    "SoftRounding",
    "TrainedWeight",
    "WeightRounding",
    "clipping_error",
    "learn_clips",
]
