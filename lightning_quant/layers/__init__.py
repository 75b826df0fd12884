"""The quantized modules that a network is made of."""

from lightning_quant.layers.as_it_was import WeightsAsTheyWere
from lightning_quant.layers.attention import AttentionSchemes, QuantAttention
from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.block_rotation import BlockRotation, multiply_blocks
from lightning_quant.layers.cached import (
    CachedModule,
    KeptFeatures,
    cache_modules,
    caches,
    deep_feature,
    on_trajectory,
    stop_caching,
)
from lightning_quant.layers.conv import QuantConv1d, QuantConv2d
from lightning_quant.layers.denoiser import call_denoiser, given_timesteps, timestep_argument
from lightning_quant.layers.float_twin import as_float, is_altered
from lightning_quant.layers.hadamard import hadamard, has_hadamard
from lightning_quant.layers.learning import (
    has_scale_to_learn,
    learn_scale,
    learn_scales,
    learned_parameters,
    learned_quantizers,
    settle_scale,
    settle_scales,
)
from lightning_quant.layers.linear import QuantEmbedding, QuantLinear
from lightning_quant.layers.low_rank import LowRank
from lightning_quant.layers.multihead import QuantMultiheadAttention
from lightning_quant.layers.patch_bits import PatchBits
from lightning_quant.layers.plan import AttentionPlan, LayerPlan, Plan
from lightning_quant.layers.positions import PositionPlan, decoder_of, takes_positions
from lightning_quant.layers.rotation import Rotation, RotationPlan, SmoothedRotation, any_kind, online_rotation, rotates
from lightning_quant.layers.routing import MATMULS, SOFTMAXES, AttentionSite, softmax_is_last
from lightning_quant.layers.step_correction import StepCorrection, corrected_part
from lightning_quant.layers.steps import StepPlan, require_schedule
from lightning_quant.layers.structure import structure_kept
from lightning_quant.layers.swap import (
    create_bias,
    created_biases,
    drop_bias,
    quantize_attention,
    quantize_layer,
    release,
    restore,
    twin_of,
    weight_rows,
    why_not_swappable,
)

__all__ = [
    "MATMULS",
    "SOFTMAXES",
    "AttentionPlan",
    "AttentionSchemes",
    "AttentionSite",
    "BlockRotation",
    "CachedModule",
    "KeptFeatures",
    "LayerPlan",
    "LowRank",
    "PatchBits",
    "Plan",
    "PositionPlan",
    "QuantAttention",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantizedLayer",
    "Rotation",
    "RotationPlan",
    "SmoothedRotation",
    "StepCorrection",
    "StepPlan",
    "WeightsAsTheyWere",
    "any_kind",
    "as_float",
    "cache_modules",
    "caches",
    "call_denoiser",
    "corrected_part",
    "create_bias",
    "created_biases",
    "decoder_of",
    "deep_feature",
    "drop_bias",
    "given_timesteps",
    "hadamard",
    "has_hadamard",
    "has_scale_to_learn",
    "is_altered",
    "learn_scale",
    "learn_scales",
    "learned_parameters",
    "learned_quantizers",
    "multiply_blocks",
    "on_trajectory",
    "online_rotation",
    "quantize_attention",
    "quantize_layer",
    "release",
    "require_schedule",
    "restore",
    "rotates",
    "settle_scale",
    "settle_scales",
    "softmax_is_last",
    "stop_caching",
    "structure_kept",
    "takes_positions",
    "timestep_argument",
    "twin_of",
    "weight_rows",
    "why_not_swappable",
]
