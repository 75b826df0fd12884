"""How much a model suffers from fewer bits in one place: what is measured, apart from what is then decided.

A producer gives a table: for every slot and every number of bits, what is lost. Losses of one producer can be added and
compared with each other, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_quant.calibration import first_samples, reordered, sample_count
from lightning_quant.quantizers import Quantizer, RangeRule, build_quantizer
from lightning_quant.solvers.products import Slot
from lightning_quant.solvers.relevance import relevance_rules

__all__ = ["PRODUCERS", "Table", "as_others", "narrowed", "sensitivities"]

Table = dict[Slot, dict[int, float]]
Narrowed = dict[Slot, dict[int, list[Quantizer]]]
FEW = 2**15  # elements from which the range of a whole tensor is found
MICRO_BATCH = 4  # samples whose activations are kept for one backward; a weight has one random gradient for each


# ---------------------------------------------------------------- the maths: what an error costs


def curvature(x: Tensor, error: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`\sum_n (\sum_i g_{ni} \, \delta_{ni})^2` over samples n, or rows n of a weight: all of H within each."""
    return (gradient * error).flatten(1).sum(1).square().sum()


def diagonal_curvature(x: Tensor, error: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`\sum_i g_i^2 \, \delta_i^2`: the same by the diagonal of H, as if errors were independent."""
    return (gradient * error).square().sum()


def connection(x: Tensor, error: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`\text{mean} |x g| \cdot \|\delta\|_2`: how much a connection matters, times how far it is moved."""
    return (x * gradient).abs().mean() * error.square().sum().sqrt()


def noise_to_signal(x: Tensor, error: Tensor, gradient: Tensor) -> Tensor:
    r""":math:`\sum \delta^2 / \sum x^2`, the inverse of the signal-to-noise ratio."""
    return error.square().sum() / x.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Producer:
    """How losses come about.

    Args:
        score: of a tensor, the error of rounding it, and its gradient (or relevance).
        backward: ``"gradient"`` of random signs times the output, ``"relevance"``, or ``None`` for no backward.
    """

    score: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: str | None = "gradient"


PRODUCERS: dict[str, Producer] = {
    "hessian": Producer(curvature),
    "patch": Producer(diagonal_curvature),
    "snip": Producer(connection),
    "snr": Producer(noise_to_signal, None),
    "lrp": Producer(lambda x, error, relevance: relevance.abs().sum(), "relevance"),
}


# ---------------------------------------------------------------- narrower quantizers


def narrowed(
    quantizers: Mapping[Slot, Sequence[Quantizer]],
    bits: Mapping[Slot, Sequence[int]],
    rule: RangeRule,
    run: Callable[[], Any],
) -> tuple[Narrowed, dict[Slot, list[tuple[int, ...]]]]:
    """A quantizer with each number of bits for every one there is, fitted to what it meets, and the shapes it meets.

    Slots that the forward does not reach are left out.

    Args:
        quantizers: by slot.
        bits: what is asked for, by slot.
        rule: how ranges are found.
        run: one forward of the model.
    """
    fitted: dict[int, dict[int, Quantizer]] = {}
    shapes: dict[int, tuple[int, ...]] = {}

    def fit(slot: Slot, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        def observer(x: Tensor) -> Tensor:
            if id(quantizer) not in fitted:
                sample = _thinned(x, quantizer)
                tried = {n: build_quantizer(replace(quantizer.scheme, bits=n), quantizer.axis) for n in bits[slot]}
                for other in tried.values():
                    other.to(x.device).eval().fit(sample, rule)
                fitted[id(quantizer)], shapes[id(quantizer)] = tried, tuple(x.shape)
            return x

        return observer

    with observing(quantizers, fit), torch.no_grad():
        run()
    reached = {slot: some for slot, some in quantizers.items() if all(id(q) in fitted for q in some)}
    found = {slot: {n: [fitted[id(q)][n] for q in some] for n in bits[slot]} for slot, some in reached.items()}
    return found, {slot: [shapes[id(q)] for q in some] for slot, some in reached.items()}


def _thinned(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Enough of a tensor to find its range."""
    x = x.detach()
    if quantizer.scheme.granularity != "tensor" or x.numel() <= FEW:
        return x
    flat = x.flatten()
    return torch.cat([flat[:: -(-x.numel() // FEW)], flat.amin()[None], flat.amax()[None]])


@contextmanager
def observing(
    quantizers: Mapping[Slot, Sequence[Quantizer]], observer: Callable[[Slot, Quantizer], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Let somebody see, and answer, what quantizers are given."""
    try:
        for slot, some in quantizers.items():
            for quantizer in some:
                quantizer.observer = observer(slot, quantizer)
        yield
    finally:
        for some in quantizers.values():
            for quantizer in some:
                quantizer.observer = None


@contextmanager
def as_others(quantizers: Sequence[Quantizer], others: Sequence[Quantizer]) -> Iterator[None]:
    """Let quantizers compute as others do."""
    try:
        for quantizer, other in zip(quantizers, others, strict=True):
            quantizer.observer = other
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


# ---------------------------------------------------------------- tables


def sensitivities(
    producer: str,
    quantizers: Mapping[Slot, Sequence[Quantizer]],
    others: Narrowed,
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    seed: int = 0,
) -> Table:
    r"""What a producer says of every slot and number of bits; means over the samples.

    Gradients are those of :math:`\langle v, f(x) \rangle` for the model's output and random signs v, so no labels and
    no loss are needed, and the expected squares are those of the Gauss-Newton matrix of the squared error.

    Args:
        producer: a name in :data:`PRODUCERS`.
        quantizers: of the model, whose structure stands; they hand on floats meanwhile.
        others: what is tried in their place, from :func:`narrowed`.
        batches: calibration batches.
        run: feeds one batch forward.
        seed: of the signs.
    """
    how = PRODUCERS[producer]
    table: Table = {slot: dict.fromkeys(by_bits, 0.0) for slot, by_bits in others.items()}
    numbers = {id(q): i for slot in others for i, q in enumerate(quantizers[slot])}
    samples = 0
    random = torch.Generator().manual_seed(seed)

    def score(slot: Slot, quantizer: Quantizer, x: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            for bits, tried in others[slot].items():
                error = tried[numbers[id(quantizer)]](x) - x
                table[slot][bits] += float(how.score(x, error, gradient))

    def watch(slot: Slot, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        def observer(x: Tensor) -> Tensor:
            if how.backward is None:
                score(slot, quantizer, x, x)
                return x
            if how.backward == "relevance" and slot.is_weight:
                return x
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            seen.register_hook(lambda gradient: score(slot, quantizer, x.detach(), gradient))
            return seen

        return observer

    watched = {slot: quantizers[slot] for slot in others}
    rules = relevance_rules() if how.backward == "relevance" else nullcontext()
    with observing(watched, watch), torch.set_grad_enabled(how.backward is not None):
        for batch in micro_batches(batches):
            samples += sample_count(batch)
            with rules:
                leaves = tree_leaves(run(batch))
            output = next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), None)
            if how.backward is not None:
                if output is None or not output.requires_grad:
                    raise ValueError(
                        f"sensitivity={producer!r} needs gradients, and the model's output has none: define "
                        f"calibration_step(self, batch) that returns what the model computes, before argmax and the "
                        f"like, or take sensitivity='snr'"
                    )
                output.backward(_start(output, how.backward, random))
    table = {slot: {bits: loss / max(1, samples) for bits, loss in by_bits.items()} for slot, by_bits in table.items()}
    if how.backward == "relevance":
        return _noise_power(table)
    return table


def _noise_power(table: Table) -> Table:
    r""":math:`C \, 4^{-b}` for the relevance C of a tensor; weights have that of the inputs that they meet."""
    found: Table = {}
    for slot, by_bits in table.items():
        source = table.get(slot._replace(part="inputs") if slot.is_weight else slot)
        if source is None:
            raise ValueError(f"sensitivity='lrp' follows activations, and the inputs of `{slot.owner}` are float")
        relevance = max(source.values())
        found[slot] = {bits: relevance * 4.0**-bits for bits in by_bits}
    return found


def micro_batches(batches: Sequence[Any]) -> Iterator[Any]:
    """The same samples in batches of a few."""
    for batch in batches:
        try:
            count = sample_count(batch)
        except ValueError:
            count = 0
        if count <= MICRO_BATCH:
            yield batch
            continue
        for start in range(0, count, MICRO_BATCH):
            some = list(range(start, min(start + MICRO_BATCH, count)))
            yield first_samples(reordered(batch, [*some, *(i for i in range(count) if i not in some)]), len(some))


def _start(output: Tensor, backward: str, random: torch.Generator) -> Tensor:
    """Where the backward begins: random signs, or all relevance at the largest output."""
    if backward == "relevance":
        return torch.zeros_like(output).scatter_(-1, output.argmax(-1, keepdim=True), 1.0)
    signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
    return signs.to(output.device, output.dtype)
