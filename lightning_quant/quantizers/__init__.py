"""Number formats: what a float becomes, and how the range it covers is found."""

from __future__ import annotations

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.build import build_quantizer
from lightning_quant.quantizers.cross import CrossQuantizer, kernel_share
from lightning_quant.quantizers.floating import FloatQuantizer, float_grid, float_max, float_quantize
from lightning_quant.quantizers.groups import in_groups, out_of_groups
from lightning_quant.quantizers.histogram import Histogram
from lightning_quant.quantizers.learned import LearnedQuantizer, scale_gradient
from lightning_quant.quantizers.levels import from_steps, levels, to_steps
from lightning_quant.quantizers.logarithmic import (
    LogQuantizer,
    log_dequantize,
    log_dequantize_by_parity,
    log_fake_quantize,
    log_quantize,
)
from lightning_quant.quantizers.noisy import NoisyQuantizer
from lightning_quant.quantizers.observers import Observer, refuse_nonfinite
from lightning_quant.quantizers.own_precision import OwnPrecision
from lightning_quant.quantizers.positions import PositionObserver, PositionQuantizer, Positions
from lightning_quant.quantizers.quantiles import quantile
from lightning_quant.quantizers.ranges import Distribution, RangeRule, search
from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.sparse import Mask, Pattern
from lightning_quant.quantizers.steps import StepObserver, StepQuantizer, Steps
from lightning_quant.quantizers.tangent import ArctangentQuantizer, TangentQuantizer, bend, unbend
from lightning_quant.quantizers.twin import TwinQuantizer, UnsignedTwinQuantizer
from lightning_quant.quantizers.twin_log import TwinLogQuantizer, one_sided_steps
from lightning_quant.quantizers.uniform import UniformQuantizer, dequantize, fake_quantize, quantize, uniform_state

__all__ = [
    "ArctangentQuantizer",
    "CrossQuantizer",
    "Distribution",
    "FloatQuantizer",
    "Histogram",
    "LearnedQuantizer",
    "LogQuantizer",
    "Mask",
    "NoisyQuantizer",
    "Observer",
    "OwnPrecision",
    "Pattern",
    "PositionObserver",
    "PositionQuantizer",
    "Positions",
    "Quantizer",
    "RangeRule",
    "Scheme",
    "StepObserver",
    "StepQuantizer",
    "Steps",
    "TangentQuantizer",
    "TwinLogQuantizer",
    "TwinQuantizer",
    "UniformQuantizer",
    "UnsignedTwinQuantizer",
    "bend",
    "build_quantizer",
    "dequantize",
    "fake_quantize",
    "float_grid",
    "float_max",
    "float_quantize",
    "from_steps",
    "in_groups",
    "kernel_share",
    "levels",
    "log_dequantize",
    "log_dequantize_by_parity",
    "log_fake_quantize",
    "log_quantize",
    "one_sided_steps",
    "out_of_groups",
    "quantile",
    "quantize",
    "refuse_nonfinite",
    "scale_gradient",
    "search",
    "straight_through",
    "to_steps",
    "unbend",
    "uniform_state",
]
