"""Quantized models in checkpoints and files."""

from lightning_quant.checkpoint.files import load_quantized, save_quantized
from lightning_quant.checkpoint.manifest import Record, attach_record, detach_record, make_float, read_plans, record_of

__all__ = [
    "Record",
    "attach_record",
    "detach_record",
    "load_quantized",
    "make_float",
    "read_plans",
    "record_of",
    "save_quantized",
]
