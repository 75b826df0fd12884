"""One file per method."""

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.fidelity import Fidelity
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.quant_report import QuantReport
from lightning_quant.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_quant.callbacks.rectified_sparse_attention import RectifiedSparseAttention
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.callbacks.repquant import RepQuant
from lightning_quant.callbacks.uniform_attention import UniformAttention

__all__ = [
    "Fidelity",
    "PostTrainingQuantization",
    "QuantReport",
    "QuantizationAwareTraining",
    "QuantizationCallback",
    "RectifiedSparseAttention",
    "RepQViT",
    "RepQuant",
    "UniformAttention",
]
