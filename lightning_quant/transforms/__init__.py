"""Function-preserving edits of float weights."""

from lightning_quant.transforms.norm_fold import fold_linear, fold_modulation, fold_norm, fold_pair, unfolded_on_failure
from lightning_quant.transforms.reparameterization import Reparameterization, per_tensor

__all__ = [
    "Reparameterization",
    "fold_linear",
    "fold_modulation",
    "fold_norm",
    "fold_pair",
    "per_tensor",
    "unfolded_on_failure",
]
