"""A quantized model as its own float twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_quant.layers.cached import caches
from lightning_quant.layers.low_rank import LowRank
from lightning_quant.layers.multihead import QuantMultiheadAttention
from lightning_quant.layers.routing import AttentionSite
from lightning_quant.quantizers import Mask, Quantizer


@contextmanager
def as_float(model: nn.Module, cached: bool = False) -> Iterator[None]:
    """Let a quantized model compute in floats for a while: its float twin, without a second copy of the weights.

    Inside, every quantizer hands on the floats it is given, nothing is taken from a cache of features, and attention is
    again the call that the model's own code makes. Where the method left the weights alone this is the float model bit
    for bit; where it folded scales into them, up to rounding. The state dict is the same inside as outside.

    Afterwards, also after an exception, everything computes as it did before; the context may be nested.

    Args:
        model: a quantized model, or a part of one; nothing happens to a float one.
        cached: go on taking features from a cache.

    Example:
        >>> import torch
        >>> from lightning_quant.layers import quantize_layer
        >>> from lightning_quant.quantizers import Scheme
        >>> layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        >>> exact = layer(x)
        >>> _ = quantize_layer(layer, Scheme.parse("int2_sym_channel"), None)
        >>> layer.weight_quantizer.fit(layer.weight)
        >>> with as_float(layer):
        ...     torch.equal(layer(x), exact)
        True
        >>> torch.equal(layer(x), exact)
        False
    """
    paused = {features: features.paused for features in caches(model)}
    observers = {
        module: module.observer for module in model.modules() if isinstance(module, (Quantizer, Mask, LowRank))
    }
    # These answer attention calls with a formula of ours, which differs from torch's fused kernel by rounding.
    routing = {
        module: type(module)
        for module in model.modules()
        if isinstance(module, (AttentionSite, QuantMultiheadAttention))
    }
    try:
        for features in paused:
            features.paused = features.paused or not cached
        for quantizer in observers:
            quantizer.observer = _hand_on
        for module in routing:
            module.__class__ = module.float_class  # type: ignore[assignment]
        yield
    finally:
        for features, before in paused.items():
            features.paused = before
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        for module, quantized_class in routing.items():
            module.__class__ = quantized_class


def is_altered(model: nn.Module) -> bool:
    """Whether a model computes otherwise than its float twin: with a quantizer, a mask, or cached features.

    >>> is_altered(nn.Linear(2, 2))
    False
    """
    quantized = any(isinstance(module, (Mask, Quantizer)) and module.calibrated for module in model.modules())
    return quantized or any(not features.paused for features in caches(model))


def _hand_on(x: Tensor) -> Tensor:
    return x
