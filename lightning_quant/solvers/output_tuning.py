"""Cheap repairs of a quantized model by its output alone: BatchNorm statistics measured again, and biases learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.calibration import mean_across_ranks, sample_output, undisturbed
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.solvers.supervision import output_distance

__all__ = ["Statistics", "absorb_statistics", "learn_biases", "measure_statistics"]


class Statistics(NamedTuple):
    """Mean and variance of every channel."""

    mean: Tensor
    variance: Tensor


def measure_statistics(norms: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Statistics]:
    """What comes into BatchNorms, each behind others that normalise by what they measure.

    Args:
        norms: BatchNorms by name; afterwards they are as they were.
        run: runs the model over the calibration samples.
    """
    kept = {
        norm: (norm.momentum, norm.training, {key: value.clone() for key, value in norm.named_buffers()})
        for norm in norms.values()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None
    }
    try:
        for norm in kept:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        run()
        return {
            name: Statistics(*mean_across_ranks([norm.get_buffer("running_mean"), norm.get_buffer("running_var")]))
            for name, norm in norms.items()
            if norm in kept
        }
    finally:
        for norm, (momentum, training, buffers) in kept.items():
            norm.momentum, norm.training = momentum, training
            for key, value in buffers.items():
                getattr(norm, key).copy_(value)


@torch.no_grad()
def absorb_statistics(layer: QuantizedLayer, norm: nn.Module, found: Statistics, share: float) -> None:
    r"""Let a layer give what its BatchNorm would make of it with other statistics; the norm stays what it is.

    .. math:: y' = r \, y + \mu - r \, \mu', \qquad r = \sigma / \sigma'

    where :math:`\mu', \sigma'` are ``share`` of the way from the norm's own to what was found. :math:`r` goes into the
    scale of the weight, whose codes stay, and the rest into the bias.

    Args:
        layer: a layer with a bias of its own, see :meth:`~lightning_quant.layers.QuantizedLayer.settle_bias`.
        norm: the BatchNorm that alone reads it.
        found: what comes into the norm.
        share: how far to go.

    Raises:
        ValueError: if the weight has one scale for all channels.

    >>> from lightning_quant.layers import quantize_layer
    >>> from lightning_quant.quantizers import Scheme
    >>> norm = nn.BatchNorm1d(2).eval()
    >>> layer = quantize_layer(nn.Linear(4, 2), Scheme.parse("int8_sym_channel"), None)
    >>> layer.weight_quantizer.fit(layer.weight)
    >>> layer.set_quantizer("bias_quantizer", Scheme.parse("int16_sym_tensor"), axis=0)
    >>> x, found = torch.randn(8, 4), Statistics(torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25]))
    >>> wanted = nn.functional.batch_norm(layer(x), found.mean, found.variance, eps=norm.eps)
    >>> absorb_statistics(layer, norm, found, share=1.0)
    >>> torch.testing.assert_close(norm(layer.eval()(x)), wanted, rtol=1e-3, atol=1e-3)
    """
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    mean = torch.lerp(norm.running_mean, found.mean, share)
    variance = torch.lerp(norm.running_var, found.variance, share)
    factor = ((norm.running_var + norm.eps) / (variance + norm.eps)).sqrt()
    quantizer = layer.weight_quantizers()["weight"]
    if quantizer.scale.dim() == 0:
        raise ValueError(f"{quantizer!r} has one scale for all channels, and a BatchNorm one for each: use '_channel'")
    if quantizer.codes is None:
        quantizer.solve(quantizer.encode(layer.weight_rows().detach()))
    quantizer.scale = quantizer.scale * factor.view(-1, *[1] * (quantizer.scale.dim() - 1))  # (out,) or (out, groups)
    bias = layer.full_bias()
    layer.settle_bias(factor * (0 if bias is None else bias) + norm.running_mean - factor * mean)


def learn_biases(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    steps: int,
    learning_rate: float,
    metric: str = "kl",
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[float, float]:
    """Train the biases of layers, and nothing else, to bring the model's output near to that of its float twin.

    Args:
        model: the quantized model.
        layers: those whose biases learn.
        batches: the calibration batches; a step takes one of them.
        run: feeds one batch through the model.
        steps: of plain gradient descent.
        learning_rate: of it.
        metric: ``"kl"`` or ``"mse"``; see :func:`output_distance`.
        advance: is told of every step.

    Returns:
        The distance before, and after; if it has grown, the biases are those of before.
    """
    with torch.no_grad(), as_float(model):
        exact = [sample_output(model, batch, run, "set bias_steps=0") for batch in batches]

    def distance(number: int) -> Tensor:
        return output_distance(sample_output(model, batches[number], run), exact[number], metric)

    def mean_distance() -> float:
        with torch.no_grad():
            return float(
                mean_across_ranks([torch.stack([distance(number) for number in range(len(batches))])])[0].mean()
            )

    before = mean_distance()
    with undisturbed(model, grad=True), _learned(layers.values()) as biases:
        optimizer = torch.optim.SGD(biases, lr=learning_rate)
        for number in islice(cycle(range(len(batches))), steps):
            gradients = torch.autograd.grad(distance(number), biases)
            for bias, gradient in zip(biases, mean_across_ranks(gradients), strict=True):
                bias.grad = gradient
            optimizer.step()
            advance(1)
    own = [_bias(layer) for layer in layers.values()]
    for layer, learned in zip(layers.values(), biases, strict=True):
        layer.settle_bias(learned)
    after = mean_distance()
    if after < before:
        return before, after
    for layer, earlier in zip(layers.values(), own, strict=True):
        layer.settle_bias(earlier)
    return before, before


@contextmanager
def _learned(layers: Iterable[QuantizedLayer]) -> Iterator[list[nn.Parameter]]:
    """Parameters that stand in for the biases meanwhile."""
    biases: list[nn.Parameter] = []
    with ExitStack() as stack:
        for layer in layers:
            bias = nn.Parameter(_bias(layer).detach().clone())
            stack.enter_context(layer.with_bias(bias))
            biases.append(bias)
        yield biases


def _bias(layer: QuantizedLayer) -> Tensor:
    bias = layer.full_bias()
    assert bias is not None
    return bias
