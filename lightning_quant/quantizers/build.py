"""From a format to the quantizer that implements it."""

from __future__ import annotations

from lightning_quant.quantizers.base import Quantizer
from lightning_quant.quantizers.floating import FloatQuantizer
from lightning_quant.quantizers.logarithmic import LogQuantizer
from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.tangent import ArctangentQuantizer, TangentQuantizer
from lightning_quant.quantizers.twin import TwinQuantizer, UnsignedTwinQuantizer
from lightning_quant.quantizers.twin_log import TwinLogQuantizer
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["build_quantizer"]

QUANTIZERS: dict[str, type[Quantizer]] = {
    quantizer.kind: quantizer
    for quantizer in (
        *(UniformQuantizer, FloatQuantizer, LogQuantizer, TangentQuantizer, ArctangentQuantizer),
        *(TwinQuantizer, UnsignedTwinQuantizer, TwinLogQuantizer),
    )
}


def build_quantizer(scheme: Scheme | str, axis: int | None = None) -> Quantizer:
    """Returns an uncalibrated quantizer for a number format.

    Args:
        scheme: The format, as a :class:`Scheme` or a string.
        axis: The channel axis by role: 0 for a weight, -1 or 1 for an activation.

    Raises:
        ValueError: If the string is no format or the format needs an axis that is not given.

    Example:
        >>> build_quantizer("int4_asym_channel", axis=0)
        UniformQuantizer(int4_asym_channel, axis=0, uncalibrated)
    """
    scheme = Scheme.parse(scheme)
    return QUANTIZERS[scheme.kind](scheme, axis)
