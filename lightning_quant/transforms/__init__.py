"""Function-preserving edits of float weights."""

from lightning_quant.transforms.norm_fold import fold_linear, fold_modulation, fold_norm, fold_pair, unfolded_on_failure
from lightning_quant.transforms.reparameterization import Reparameterization, per_tensor
from lightning_quant.transforms.smoothing import Smoothing, smoothing

__all__ = [
    "Reparameterization",
    "Smoothing",
    "fold_linear",
    "fold_modulation",
    "fold_norm",
    "fold_pair",
    "per_tensor",
    "smoothing",
    "unfolded_on_failure",
]
