"""LightningModules and mixins."""

from lightning_quant.modules.language import LanguageMixin, LanguageModule
from lightning_quant.modules.mixin import CalibrationMixin
from lightning_quant.modules.reconstruction_stage import ReconstructionStage

__all__ = ["CalibrationMixin", "LanguageMixin", "LanguageModule", "ReconstructionStage"]
from lightning_quant.modules.diffusion import DiffusionMixin, DiffusionModule

__all__ = ["CalibrationMixin", "DiffusionMixin", "DiffusionModule", "ReconstructionStage"]
