"""One file per method."""

from lightning_quant.callbacks.adaquant import AdaQuant
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.cachequant import CacheQuant
from lightning_quant.callbacks.calibration_sensitivity import CalibrationSensitivity
from lightning_quant.callbacks.crossquant import CrossQuant
from lightning_quant.callbacks.dopq_vit import DopQViT
from lightning_quant.callbacks.fair_gptq import FairGPTQ
from lightning_quant.callbacks.feature_cache import FeatureCache
from lightning_quant.callbacks.fidelity import Fidelity
from lightning_quant.callbacks.gptq import GPTQ
from lightning_quant.callbacks.htq import HTQ
from lightning_quant.callbacks.kernel_swap import KernelSwap
from lightning_quant.callbacks.llm_fp4 import LLMFP4
from lightning_quant.callbacks.lorc import LoRC
from lightning_quant.callbacks.lrp_qvit import LRPQViT
from lightning_quant.callbacks.lrq_dit import LRQDiT
from lightning_quant.callbacks.magnitude_pruning import MagnitudePruning
from lightning_quant.callbacks.mgrq import MGRQ
from lightning_quant.callbacks.mixed_precision import MixedPrecision
from lightning_quant.callbacks.mptq_vit import MPTQViT
from lightning_quant.callbacks.noisyquant import NoisyQuant
from lightning_quant.callbacks.osaq import OSAQ
from lightning_quant.callbacks.pmq import PMQ
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.ptq4arvg import PTQ4ARVG
from lightning_quant.callbacks.quant_report import QuantReport
from lightning_quant.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_quant.callbacks.rectified_sparse_attention import RectifiedSparseAttention
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.callbacks.repquant import RepQuant
from lightning_quant.callbacks.roofline import Roofline
from lightning_quant.callbacks.rotated_ptq import RotatedPTQ
from lightning_quant.callbacks.rsq import RSQ
from lightning_quant.callbacks.smooth_quant import SmoothQuant
from lightning_quant.callbacks.sparsegpt import SparseGPT
from lightning_quant.callbacks.sparsity_induction import SparsityInduction
from lightning_quant.callbacks.uniform_attention import UniformAttention
from lightning_quant.callbacks.wanda import Wanda

__all__ = [
    "GPTQ",
    "HTQ",
    "LLMFP4",
    "MGRQ",
    "OSAQ",
    "PMQ",
    "PTQ4ARVG",
    "RSQ",
    "AdaQuant",
    "CacheQuant",
    "CalibrationSensitivity",
    "CrossQuant",
    "DopQViT",
    "FairGPTQ",
    "FeatureCache",
    "Fidelity",
    "KernelSwap",
    "LRPQViT",
    "LRQDiT",
    "LoRC",
    "MPTQViT",
    "MagnitudePruning",
    "MixedPrecision",
    "NoisyQuant",
    "PostTrainingQuantization",
    "QuantReport",
    "QuantizationAwareTraining",
    "QuantizationCallback",
    "RectifiedSparseAttention",
    "RepQViT",
    "RepQuant",
    "Roofline",
    "RotatedPTQ",
    "SmoothQuant",
    "SparseGPT",
    "SparsityInduction",
    "UniformAttention",
    "Wanda",
]
