"""Quantization for anyone who has a LightningModule and a Trainer: add one callback.

>>> from lightning_quant import RepQViT
>>> callback = RepQViT(weights="int4", activations="int4")
"""

from lightning_quant.calibration import TokenWindows
from lightning_quant.callbacks import (
    GPTQ,
    HTQ,
    MGRQ,
    OSAQ,
    PMQ,
    RSQ,
    AdaQuant,
    DopQViT,
    FairGPTQ,
    Fidelity,
    KernelSwap,
    LoRC,
    LRPQViT,
    MagnitudePruning,
    MixedPrecision,
    MPTQViT,
    NoisyQuant,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    QuantReport,
    RectifiedSparseAttention,
    RepQuant,
    RepQViT,
    RotatedPTQ,
    SparseGPT,
    SparsityInduction,
    UniformAttention,
    Wanda,
)
from lightning_quant.checkpoint import load_quantized, save_quantized
from lightning_quant.metrics import (
    SQNR,
    CosineFidelity,
    NegativeFlipRate,
    Perplexity,
    PositiveFlipRate,
    PredictionDivergence,
    TopOneAgreement,
)
from lightning_quant.modules import CalibrationMixin, LanguageMixin, LanguageModule, ReconstructionStage
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import Reconstruction

__version__ = "0.1.0"
__all__ = [
    "GPTQ",
    "HTQ",
    "MGRQ",
    "OSAQ",
    "PMQ",
    "RSQ",
    "SQNR",
    "AdaQuant",
    "CalibrationMixin",
    "CosineFidelity",
    "DopQViT",
    "FairGPTQ",
    "Fidelity",
    "KernelSwap",
    "LRPQViT",
    "LanguageMixin",
    "LanguageModule",
    "LoRC",
    "MPTQViT",
    "MagnitudePruning",
    "MixedPrecision",
    "NegativeFlipRate",
    "NoisyQuant",
    "Perplexity",
    "PositiveFlipRate",
    "PostTrainingQuantization",
    "PredictionDivergence",
    "QuantReport",
    "QuantizationAwareTraining",
    "Reconstruction",
    "ReconstructionStage",
    "RectifiedSparseAttention",
    "RepQViT",
    "RepQuant",
    "RotatedPTQ",
    "Scheme",
    "SparseGPT",
    "SparsityInduction",
    "TokenWindows",
    "TopOneAgreement",
    "UniformAttention",
    "Wanda",
    "load_quantized",
    "save_quantized",
]
