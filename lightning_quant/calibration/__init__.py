"""Where calibration batches come from and how they are fed forward without disturbing the run."""

from __future__ import annotations

from lightning_quant.calibration.alignment import AlignedTrajectory, density, diversity, shared_out, step_shares
from lightning_quant.calibration.attention_maps import seen_maps
from lightning_quant.calibration.batches import CalibrationBatches, draw_training_batches_from
from lightning_quant.calibration.cache import SampleCache
from lightning_quant.calibration.extremes import channel_extremes
from lightning_quant.calibration.feed import check_feedable, feed, feeder_name
from lightning_quant.calibration.fluctuation import fluctuations, sampled_inputs
from lightning_quant.calibration.guided_mix import chosen_samples, conditional_share, mahalanobis
from lightning_quant.calibration.hessians import Hessian, input_rows
from lightning_quant.calibration.moments import Moments
from lightning_quant.calibration.observing import fitted_in_stream, observed, reached
from lightning_quant.calibration.outputs import sample_output
from lightning_quant.calibration.progress import progress_bar
from lightning_quant.calibration.ranks import (
    from_other_ranks,
    mean_across_ranks,
    merge_across_ranks,
    sum_across_ranks,
)
from lightning_quant.calibration.recording import Call, Signature, hooked_outputs, record, same_constants, signature
from lightning_quant.calibration.samples import first_samples, merge_batches, reordered, sample_count
from lightning_quant.calibration.token_weights import attention_received, column_sums, token_weights
from lightning_quant.calibration.tokens import TokenWindows
from lightning_quant.calibration.trajectory import (
    Moment,
    Sampler,
    Trajectory,
    WholeTrajectories,
    at_intervals,
    evenly,
    trajectory_seeds,
)
from lightning_quant.calibration.undisturbed import undisturbed

__all__ = [
    "AlignedTrajectory",
    "CalibrationBatches",
    "Call",
    "Hessian",
    "Moment",
    "Moments",
    "SampleCache",
    "Sampler",
    "Signature",
    "TokenWindows",
    "Trajectory",
    "WholeTrajectories",
    "at_intervals",
    "attention_received",
    "channel_extremes",
    "check_feedable",
    "chosen_samples",
    "column_sums",
    "conditional_share",
    "density",
    "diversity",
    "draw_training_batches_from",
    "evenly",
    "feed",
    "feeder_name",
    "first_samples",
    "fitted_in_stream",
    "fluctuations",
    "from_other_ranks",
    "hooked_outputs",
    "input_rows",
    "mahalanobis",
    "mean_across_ranks",
    "merge_across_ranks",
    "merge_batches",
    "observed",
    "progress_bar",
    "reached",
    "record",
    "reordered",
    "same_constants",
    "sample_count",
    "sample_output",
    "sampled_inputs",
    "seen_maps",
    "shared_out",
    "signature",
    "step_shares",
    "sum_across_ranks",
    "token_weights",
    "trajectory_seeds",
    "undisturbed",
]
