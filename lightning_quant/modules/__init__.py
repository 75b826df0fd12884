"""LightningModules and mixins."""

from lightning_quant.modules.language import LanguageMixin, LanguageModule
from lightning_quant.modules.mixin import CalibrationMixin
from lightning_quant.modules.reconstruction_stage import ReconstructionStage

__all__ = ["CalibrationMixin", "LanguageMixin", "LanguageModule", "ReconstructionStage"]
