"""LightningModules and mixins."""

from lightning_quant.modules.mixin import CalibrationMixin

__all__ = ["CalibrationMixin"]
