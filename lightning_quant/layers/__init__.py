"""The quantized modules that a network is made of."""

from lightning_quant.layers.as_it_was import WeightsAsTheyWere
from lightning_quant.layers.attention import AttentionSchemes, QuantAttention
from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.conv import QuantConv1d, QuantConv2d
from lightning_quant.layers.float_twin import as_float
from lightning_quant.layers.hadamard import hadamard, has_hadamard
from lightning_quant.layers.learning import (
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
from lightning_quant.layers.rotation import Rotation, RotationPlan, any_kind, rotates
from lightning_quant.layers.routing import MATMULS, SOFTMAXES, AttentionSite, softmax_is_last
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
    "LayerPlan",
    "LowRank",
    "PatchBits",
    "Plan",
    "QuantAttention",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantizedLayer",
    "Rotation",
    "RotationPlan",
    "WeightsAsTheyWere",
    "any_kind",
    "as_float",
    "create_bias",
    "created_biases",
    "drop_bias",
    "hadamard",
    "has_hadamard",
    "learn_scale",
    "learn_scales",
    "learned_parameters",
    "learned_quantizers",
    "quantize_attention",
    "quantize_layer",
    "release",
    "restore",
    "rotates",
    "settle_scale",
    "settle_scales",
    "softmax_is_last",
    "structure_kept",
    "twin_of",
    "weight_rows",
    "why_not_swappable",
]
