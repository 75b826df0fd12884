"""LightningModules and mixins."""

from lightning_quant.modules.diffusion import DiffusionMixin, DiffusionModule
from lightning_quant.modules.language import LanguageMixin, LanguageModule
from lightning_quant.modules.mixin import CalibrationMixin
from lightning_quant.modules.reconstruction_stage import ReconstructionStage
from lightning_quant.modules.temporal_block import TemporalBlock, every_step

__all__ = [
    "CalibrationMixin",
    "DiffusionMixin",
    "DiffusionModule",
    "LanguageMixin",
    "LanguageModule",
    "ReconstructionStage",
    "TemporalBlock",
    "every_step",
]
