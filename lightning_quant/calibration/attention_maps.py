"""See what attention multiplies: the probabilities, and the values behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from lightning_quant.layers import QuantAttention
from lightning_quant.layers.base import through
from lightning_quant.quantizers import Quantizer


@contextmanager
def seen_maps(calls: Iterable[QuantAttention], see: Callable[[QuantAttention, Tensor, Tensor], None]) -> Iterator[None]:
    """Show the first map of each call of attention, before it is rounded, and the values that it is multiplied with.

    The stream stays quantized meanwhile.

    Args:
        calls: whose probabilities and values are quantized.
        see: gets the call, its map (..., queries, keys) and its values (..., keys, width).

    Example:
        >>> import torch
        >>> from lightning_quant.layers import AttentionSchemes
        >>> from lightning_quant.quantizers import Scheme
        >>> call = QuantAttention(AttentionSchemes(*[Scheme.parse("uint8_asym")] * 4))
        >>> with seen_maps([call], lambda call, maps, values: print(maps.shape, values.shape)):
        ...     _ = call(torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 3))
        torch.Size([2, 5, 6]) torch.Size([2, 6, 3])
    """
    watched: list[Quantizer] = []

    def watch(call: QuantAttention) -> None:
        probabilities, values = call.probabilities_quantizer, call.value_quantizer
        assert probabilities is not None and values is not None

        def keep(maps: Tensor) -> Tensor:
            probabilities.observer, values.observer = None, lambda x: show(maps, x)
            return through(probabilities, maps)

        def show(maps: Tensor, x: Tensor) -> Tensor:
            values.observer = None
            see(call, maps, x)
            return through(values, x)

        probabilities.observer = keep
        watched.extend((probabilities, values))

    try:
        for call in calls:
            watch(call)
        yield
    finally:
        for quantizer in watched:
            quantizer.observer = None
