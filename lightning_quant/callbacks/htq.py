"""HTQ: mixed precision as a trade-off of loss, size and bit operations (2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.mixed_precision import MixedPrecision


class HTQ(MixedPrecision):
    r"""Grows the choices of bits layer by layer on the fronts of size and of bit operations, and takes the knee.

    The *perturbation* of a tensor by b bits is how much its connections matter times how far they are moved,

    .. math:: P(b) = \text{mean} |x \odot g| \cdot \|Q_b(x) - x\|_2

    as in SNIP, for weights and for inputs. Layer by layer each choice so far is continued by each pair of bits; those
    go on that have little perturbation for their size, or for their bit operations, with a slack of a twentieth of the
    list. In the end the three are normalised to [0, 1], and the point nearest to the origin is chosen. A ``budget``
    bounds the points, but is not needed.

    Deviations from the published code: pretrained weights, gradients of the model's own output instead of a loss of
    random weights, activations with their own perturbation rather than that of the weights, the formats of the method
    (the code has asymmetric min-max per tensor), and a cap on the length of the lists. The rule of the knee, which the
    code leaves out, is reconstructed.

    Reference: Li et al., *HTQ: Exploring the High-Dimensional Trade-Off of mixed-precision quantization*, Pattern
    Recognition 156, 2024.

    Args:
        budget: what it may cost at most, ``None`` for the knee alone; see :class:`MixedPrecision`.
        method: ``"ptq"``, ``"repq"``, or a callback that calibrates.
        weight_bits: the numbers of bits that weights may have.
        activation_bits: the same for activations.
        sensitivity: who says what is lost.
        search: who chooses.
        arguments: see :class:`MixedPrecision`.

    >>> callback = HTQ()
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: str | Sequence[str] | None = None,
        method: str | QuantizationCallback = "ptq",
        weight_bits: Sequence[int] = (2, 4, 8),
        activation_bits: Sequence[int] = (4, 8),
        sensitivity: str = "snip",
        search: str = "trade_off",
        **arguments: Any,
    ) -> None:
        super().__init__(budget, method, sensitivity, search, weight_bits, activation_bits, **arguments)
