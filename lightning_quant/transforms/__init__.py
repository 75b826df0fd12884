"""Function-preserving edits of float weights."""

from lightning_quant.transforms.gain import Gain, gain_factors, gain_projection, symmetric_shift
from lightning_quant.transforms.greedy_rotation import fit_block_rotation, greedy_blocks, spreading, zigzag
from lightning_quant.transforms.norm_fold import (
    fold_linear,
    fold_modulation,
    fold_norm,
    fold_pair,
    fold_scale,
    unfolded_on_failure,
)
from lightning_quant.transforms.preserved import require_same
from lightning_quant.transforms.reparameterization import Reparameterization, per_tensor
from lightning_quant.transforms.rotation import (
    fold_affine,
    fold_smoothed,
    head_rotations,
    input_rotation,
    residual_rotation,
    rotate,
    rotate_back,
)
from lightning_quant.transforms.smoothing import Smoothing, smoothing

__all__ = [
    "Gain",
    "Reparameterization",
    "Smoothing",
    "fit_block_rotation",
    "fold_affine",
    "fold_linear",
    "fold_modulation",
    "fold_norm",
    "fold_pair",
    "fold_scale",
    "fold_smoothed",
    "gain_factors",
    "gain_projection",
    "greedy_blocks",
    "head_rotations",
    "input_rotation",
    "per_tensor",
    "require_same",
    "residual_rotation",
    "rotate",
    "rotate_back",
    "smoothing",
    "spreading",
    "symmetric_shift",
    "unfolded_on_failure",
    "zigzag",
]
