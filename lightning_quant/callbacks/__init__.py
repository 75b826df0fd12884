"""One file per method."""

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.fidelity import Fidelity
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_quant.callbacks.repq_vit import RepQViT

__all__ = ["Fidelity", "PostTrainingQuantization", "QuantizationAwareTraining", "QuantizationCallback", "RepQViT"]
