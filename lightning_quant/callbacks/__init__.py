"""One file per method."""

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.repq_vit import RepQViT

__all__ = ["PostTrainingQuantization", "QuantizationCallback", "RepQViT"]
