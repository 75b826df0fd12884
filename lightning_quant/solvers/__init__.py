"""What decides how weights are rounded, beyond rounding each to the nearest."""

from __future__ import annotations

from lightning_quant.solvers.allocation import Allocation
from lightning_quant.solvers.attention_levels import FittedLevels, fit_attention_levels
from lightning_quant.solvers.bits import SEARCHES, Decision, Point, greedy, integer_program, pareto, trade_off
from lightning_quant.solvers.budgets import Budget
from lightning_quant.solvers.caching import FeaturePairs, by_channel, cheapest_groups, line_of, line_sums
from lightning_quant.solvers.clipping import clipping_error, learn_clips
from lightning_quant.solvers.columns import ColumnSolver, Solved, inverse_factor, output_error, relative_error
from lightning_quant.solvers.fairness import against_differences
from lightning_quant.solvers.fixes import Binarizing, Fix, Masking, OnGrid, Rounding, settle
from lightning_quant.solvers.induction import InducedMask, skewness_init
from lightning_quant.solvers.low_rank import low_rank
from lightning_quant.solvers.masks import Compared, keep_best, wanda_scores
from lightning_quant.solvers.noise import (
    OutputError,
    clip_states,
    denoising_bias,
    mean_states,
    noise_states,
)
from lightning_quant.solvers.null_space import Absorption, absorb_outliers, null_space, row_reach
from lightning_quant.solvers.output_tuning import Statistics, absorb_statistics, learn_biases, measure_statistics
from lightning_quant.solvers.reconstruction import PRESETS, Reconstruction
from lightning_quant.solvers.rounding import (
    ROUNDINGS,
    FreeRounding,
    JointRounding,
    SoftRounding,
    TrainedWeight,
    WeightRounding,
)
from lightning_quant.solvers.sensitivity import PRODUCERS, sensitivities
from lightning_quant.solvers.supervision import Balance, moment_distance, output_distance
from lightning_quant.solvers.twins import align_twin, product_error
from lightning_quant.solvers.watched_feature import WatchedFeature, stale_groups

__all__ = [
    "PRESETS",
    "PRODUCERS",
    "ROUNDINGS",
    "SEARCHES",
    "Absorption",
    "Allocation",
    "Balance",
    "Binarizing",
    "Budget",
    "ColumnSolver",
    "Compared",
    "Decision",
    "FeaturePairs",
    "FittedLevels",
    "Fix",
    "FreeRounding",
    "InducedMask",
    "JointRounding",
    "Masking",
    "OnGrid",
    "OutputError",
    "Point",
    "Reconstruction",
    "Rounding",
    "SoftRounding",
    "Solved",
    "Statistics",
    "TrainedWeight",
    "WatchedFeature",
    "WeightRounding",
    "absorb_outliers",
    "absorb_statistics",
    "against_differences",
    "align_twin",
    "by_channel",
    "cheapest_groups",
    "clip_states",
    "clipping_error",
    "denoising_bias",
    "fit_attention_levels",
    "greedy",
    "integer_program",
    "inverse_factor",
    "keep_best",
    "learn_biases",
    "learn_clips",
    "line_of",
    "line_sums",
    "low_rank",
    "mean_states",
    "measure_statistics",
    "moment_distance",
    "noise_states",
    "null_space",
    "output_distance",
    "output_error",
    "pareto",
    "product_error",
    "relative_error",
    "row_reach",
    "sensitivities",
    "settle",
    "skewness_init",
    "stale_groups",
    "trade_off",
    "wanda_scores",
]
