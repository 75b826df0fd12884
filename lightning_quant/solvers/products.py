"""What a quantized model multiplies: the pairs of tensors whose bits are decided together, and what they cost.

A :class:`Slot` is one format in a plan: the weights of a layer, its inputs, one operand of an attention site. A
:class:`Product` multiplies what is in two groups of slots. Layers that read one tensor, as q, k and v behind a norm do,
are one product, so that they agree on its format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as combinations
from math import prod
from typing import NamedTuple, Protocol, cast

from torch import nn

from lightning_quant.graph import ModelGraph
from lightning_quant.layers import AttentionPlan, AttentionSite, LayerPlan, Plan, QuantAttention, QuantizedLayer
from lightning_quant.quantizers import Quantizer, Scheme

__all__ = [
    "Latency",
    "Option",
    "Product",
    "Shapes",
    "Slot",
    "bits_of",
    "cost_table",
    "formats_of",
    "options_of",
    "products",
    "quantizers_of",
    "set_bits",
]

FLOAT_BITS = 32


class Slot(NamedTuple):
    """One format in a plan.

    Args:
        owner: name of the layer or attention site.
        part: ``"weights"``, ``"inputs"``, ``"query"``, ``"key"``, ``"value"`` or ``"probabilities"``.
    """

    owner: str
    part: str

    @property
    def is_weight(self) -> bool:
        """Whether it is stored, rather than computed for each sample."""
        return self.part == "weights"

    @property
    def is_operand(self) -> bool:
        """Whether it belongs to an attention site."""
        return self.part in QuantAttention.OPERANDS

    def __str__(self) -> str:
        return f"{self.owner} {self.part}".strip()


class Option(NamedTuple):
    """The bits of the two factors of a product; ``None`` is float."""

    left: int | None
    right: int | None


@dataclass(frozen=True)
class Product:
    """Two tensors, or groups of tensors, that are multiplied.

    Args:
        name: of the layer or the attention site.
        left: weights, the query, or the attention probabilities.
        right: the inputs, the key, or the value.
        macs: multiply-accumulates for one sample.
    """

    name: str
    left: tuple[Slot, ...]
    right: tuple[Slot, ...]
    macs: float


class Latency(Protocol):
    """Measures what a product takes on the kernels that would run it."""

    def __call__(self, product: Product, option: Option) -> float:
        """Milliseconds for one sample."""


# ---------------------------------------------------------------- slots


def formats_of(plan: Plan) -> dict[Slot, str]:
    """The formats of a plan that are not float.

    >>> formats_of(Plan("Demo", {}, layers={"fc": LayerPlan("int8_sym_channel", None)}))
    {Slot(owner='fc', part='weights'): 'int8_sym_channel'}
    """
    parts: dict[str, tuple[str, ...]] = {"layers": ("weights", "inputs"), "attention": QuantAttention.OPERANDS}
    return {
        Slot(owner, part): text
        for kind, names in parts.items()
        for owner, entry in getattr(plan, kind).items()
        for part in names
        if (text := getattr(entry, part)) is not None
    }


def set_bits(plan: Plan, bits: Mapping[Slot, int]) -> None:
    """Give slots of a plan other numbers of bits; everything else about their formats stays.

    >>> plan = Plan("Demo", {}, layers={"fc": LayerPlan("int8_sym_channel", None)})
    >>> set_bits(plan, {Slot("fc", "weights"): 3})
    >>> plan.layers["fc"].weights
    'int3_sym_channel'
    """
    formats = formats_of(plan)
    for slot, number in bits.items():
        entries: Mapping[str, LayerPlan | AttentionPlan] = plan.attention if slot.is_operand else plan.layers
        setattr(entries[slot.owner], slot.part, str(replace(Scheme.parse(formats[slot]), bits=number)))


def quantizers_of(plan: Plan, model: nn.Module) -> dict[Slot, list[Quantizer]]:
    """The quantizers in the slots of a plan, in a model whose quantized structure stands."""
    found: dict[Slot, list[Quantizer | None]] = {}
    for name, module in plan.modules(model).items():
        if name in plan.layers:
            layer = cast(QuantizedLayer, module)
            found[Slot(name, "weights")] = list(layer.weight_quantizers().values())
            found[Slot(name, "inputs")] = [getattr(layer, child) for child in layer.input_quantizers]
        if name in plan.attention:
            several = isinstance(module, AttentionSite)
            sites = list(cast(AttentionSite, module).attention_quantizers) if several else [module.attention_quantizers]
            for operand in QuantAttention.OPERANDS:
                found[Slot(name, operand)] = [getattr(site, f"{operand}_quantizer") for site in sites]
    kept = {slot: [q for q in quantizers if q is not None] for slot, quantizers in found.items()}
    return {slot: quantizers for slot, quantizers in kept.items() if quantizers}


# ---------------------------------------------------------------- products


class Shapes(NamedTuple):
    """The tensors in the slots of a plan, as they were in one forward.

    Args:
        of: by slot, the shape at each of its quantizers.
        samples: how many samples the forward had.
    """

    of: Mapping[Slot, Sequence[tuple[int, ...]]]
    samples: int

    def elements(self, slot: Slot) -> float:
        """How many numbers are in a slot: all that are stored, or those of one sample."""
        return sum(map(prod, self.of[slot])) / (1 if slot.is_weight else self.samples)


def products(plan: Plan, graph: ModelGraph, shapes: Shapes) -> list[Product]:
    """What a planned model multiplies, in the order in which it runs.

    Args:
        plan: what is quantized.
        graph: what one forward told.
        shapes: what was in the slots in a forward of as many samples.
    """
    found: list[tuple[str, list[tuple[Slot, ...]], float]] = []
    together = {name: pair.linears for pair in graph.pairs for name in pair.linears if name in plan.layers}
    ran = {name: position for position, name in enumerate(graph.order)}
    for name in sorted({**plan.layers, **plan.attention}, key=lambda name: ran.get(name, len(ran))):
        readers = [reader for reader in together.get(name, (name,)) if reader in plan.layers]
        if name in plan.layers and readers[0] == name:
            macs = sum(graph.costs[reader].macs for reader in readers if reader in graph.costs)
            sides = [tuple(Slot(owner, part) for owner in readers) for part in ("weights", "inputs")]
            found.append((name, sides, macs))
        operands = [Slot(name, operand) for operand in QuantAttention.OPERANDS]
        if all(slot in shapes.of for slot in operands):
            queries, _, values, maps = (shapes.of[slot] for slot in operands)
            query, key, value, probabilities = ((slot,) for slot in operands)
            scores = sum(prod(q) * p[-1] for q, p in zip(queries, maps, strict=True))
            mixing = sum(prod(p) * v[-1] for p, v in zip(maps, values, strict=True))
            found.append((f"{name} scores".strip(), [query, key], scores))
            found.append((f"{name} mixing".strip(), [probabilities, value], mixing))
    present = [
        Product(name, _known(left, shapes), _known(right, shapes), macs / shapes.samples)
        for name, (left, right), macs in found
    ]
    return [product for product in present if product.left or product.right]


def _known(side: Sequence[Slot], shapes: Shapes) -> tuple[Slot, ...]:
    return tuple(slot for slot in side if slot in shapes.of)


def options_of(product: Product, bits: Mapping[Slot, Sequence[int]]) -> list[Option]:
    """All pairs of bits that a product can have: what every slot of a side allows, the narrowest first."""
    sides: list[list[int | None]] = []
    for slots in (product.left, product.right):
        allowed = sorted(set.intersection(*(set(bits[slot]) for slot in slots))) if slots else [None]
        sides.append([*allowed] or [max(bits[slots[0]])])
    return [Option(*pair) for pair in combinations(*sides)]


def bits_of(product: Product, option: Option) -> dict[Slot, int]:
    """The bits of each slot."""
    sides = ((product.left, option.left), (product.right, option.right))
    return {slot: number for slots, number in sides if number is not None for slot in slots}


# ---------------------------------------------------------------- costs


def cost_table(
    found: Sequence[Product], options: Sequence[Sequence[Option]], shapes: Shapes, latency: Latency | None = None
) -> list[dict[str, list[float]]]:
    """What every option of every product costs.

    - ``weight bits``: its part in the mean bits of all weights
    - ``activation bits``: its part in the mean bits of all activations, each element counted once
    - ``bytes``: of the codes of its weights
    - ``BitOps``: multiply-accumulates times bits times bits, for one sample
    - ``milliseconds``: for one sample, if somebody measures them

    Args:
        found: the products.
        options: of each product.
        shapes: what was in the slots.
        latency: measures milliseconds.
    """
    slots = {slot for product in found for slot in (*product.left, *product.right)}
    totals = {kind: sum(shapes.elements(slot) for slot in slots if slot.is_weight == kind) for kind in (True, False)}
    tables = []
    for product, choices in zip(found, options, strict=True):
        table: dict[str, list[float]] = {}
        for option in choices:
            held = {True: 0.0, False: 0.0}
            for slot, number in bits_of(product, option).items():
                held[slot.is_weight] += shapes.elements(slot) * number
            row = {
                "weight bits": held[True] / max(1, totals[True]),
                "activation bits": held[False] / max(1, totals[False]),
                "bytes": held[True] / 8,
                "BitOps": product.macs * (option.left or FLOAT_BITS) * (option.right or FLOAT_BITS),
            }
            if latency is not None:
                row["milliseconds"] = latency(product, option)
            for name, value in row.items():
                table.setdefault(name, []).append(value)
        tables.append(table)
    return tables
