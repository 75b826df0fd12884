"""What quantization did to a model, for people to look at."""

from lightning_quant.reports.bars import Bars, bars
from lightning_quant.reports.errors import LayerError, ModelErrors, TensorError
from lightning_quant.reports.findings import Findings, circumstances
from lightning_quant.reports.float_metrics import float_metrics, own_metrics
from lightning_quant.reports.html import Html, join, tag
from lightning_quant.reports.loggers import log_sections
from lightning_quant.reports.page import render, write
from lightning_quant.reports.samples import sample_sections
from lightning_quant.reports.section import Contributor, Section, contributed
from lightning_quant.reports.sections import standard_sections, title_of
from lightning_quant.reports.sizes import Sizes, model_sizes

__all__ = [
    "Bars",
    "Contributor",
    "Findings",
    "Html",
    "LayerError",
    "ModelErrors",
    "Section",
    "Sizes",
    "TensorError",
    "bars",
    "circumstances",
    "contributed",
    "float_metrics",
    "join",
    "log_sections",
    "model_sizes",
    "own_metrics",
    "render",
    "sample_sections",
    "standard_sections",
    "tag",
    "title_of",
    "write",
]
