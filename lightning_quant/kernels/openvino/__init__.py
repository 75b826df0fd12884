"""Predict on OpenVINO's int8 runtime: the optional extra ``openvino``."""

from lightning_quant.kernels.openvino.backend import LoweredModules, has_openvino
from lightning_quant.kernels.openvino.trial import Trial

__all__ = ["LoweredModules", "Trial", "has_openvino"]
