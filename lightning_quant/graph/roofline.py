"""How long operators take at best on a machine that computes and moves at once: the roofline."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, NamedTuple

from lightning_quant.graph.operators import Operator

Stage = Literal["prefill", "decode", "forward"]


@dataclass(frozen=True)
class Machine:
    """Peaks of a machine.

    Args:
        name: of the machine.
        bandwidth: bytes a second.
        peak: operations a second in 16 bits.
        peak_int8: the same where weights and activations have 8 bits at most; ``None``: as in 16 bits.
    """

    name: str
    bandwidth: float
    peak: float
    peak_int8: float | None = None

    @classmethod
    def named(cls, name: str) -> Machine:
        """A machine of the table ``hardware.csv``.

        Raises:
            ValueError: if it is not there, listing those that are.

        >>> Machine.named("A6000").bandwidth
        768000000000.0
        """
        machines = machine_table()
        if name not in machines:
            raise ValueError(f"hardware={name!r} is none of {', '.join(machines)}; or give a Machine(...)")
        return machines[name]

    def attainable(self, intensity: float, low_bits: bool) -> float:
        """Operations a second at so many operations a byte."""
        return min(intensity * self.bandwidth, self.peak_at(low_bits))

    def peak_at(self, low_bits: bool) -> float:
        """Operations a second that are computed at best."""
        return self.peak_int8 if low_bits and self.peak_int8 is not None else self.peak


def machine_table() -> dict[str, Machine]:
    """The machines that are known, by name.

    >>> sorted(machine_table())[:3]
    ['A100-40G', 'A100-80G', 'A40']
    """
    with (files("lightning_quant.graph") / "hardware.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    return {
        row["name"]: Machine(
            row["name"],
            float(row["bandwidth_GB_s"]) * 1e9,
            float(row["fp16_TOPS"]) * 1e12,
            float(row["int8_TOPS"]) * 1e12 if row["int8_TOPS"] else None,
        )
        for row in rows
    }


class Bits(NamedTuple):
    """Bits of the numbers that an operator moves; weights may have a fraction, for the scales of groups."""

    weights: float = 16
    activations: float = 16
    kv: float = 16


class Work(NamedTuple):
    """What one operator does in one stage, and how long it takes at best.

    Args:
        name: of the operator.
        kind: of the operator.
        ops: operations.
        bytes: moved from and to memory.
        seconds: the larger of the time to compute and the time to move.
        bound: ``"memory"`` or ``"compute"``.
    """

    name: str
    kind: str
    ops: float
    bytes: float
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.bytes if self.bytes else 0.0


def work(
    operators: Sequence[Operator],
    machine: Machine,
    stage: Stage,
    batch: int,
    tokens: int,
    bits: Mapping[str, Bits] | None = None,
    fused_attention: bool = False,
) -> list[Work]:
    r"""What every operator does in a stage.

    .. math:: t = \max(\text{OPs} / P, \text{bytes} / BW)

    Attention is three operators: :math:`2 n T e h B` operations for the scores and for the values each, and
    :math:`5 n T h B` for the softmax, for n new tokens over T in all; it loads :math:`2 T e g B` numbers of keys and
    values. With ``fused_attention`` scores and probabilities never reach memory.

    Args:
        operators: what was traced, per token.
        machine: its peaks.
        stage: ``"prefill"``: all tokens at once, ``"decode"``: one more after so many, ``"forward"``: all tokens, of
            which all need the head.
        batch: samples.
        tokens: of the prompt.
        bits: of each operator, by its name; default: 16.
        fused_attention: whether scores and probabilities stay on the chip.

    >>> linear = Operator("q", "linear", ops=2 * 4096 * 4096, weights=4096 * 4096, reads=4096, writes=4096)
    >>> (done,) = work([linear], Machine.named("A6000"), "prefill", 1, 2048)
    >>> round(done.ops / 1e9, 1), round(done.bytes / 1e6), done.intensity, done.bound
    (68.7, 67, 1024.0, 'compute')
    """
    bits, new = bits or {}, 1 if stage == "decode" else tokens
    done = []
    for operator in operators:
        b = bits.get(operator.name, Bits())
        low = operator.kind in ("linear", "attention") and max(b) <= 8
        if operator.kind == "attention":
            done += _attention(operator, machine, batch, new, tokens, b, low, fused_attention)
            continue
        rows = batch * (1 if operator.last_only and stage == "prefill" else new)
        moved = operator.weights * b.weights + rows * (operator.reads + operator.writes) * b.activations
        done.append(_timed(operator.name, operator.kind, rows * operator.ops, moved / 8, machine, low))
    return done


def kv_bytes(operators: Sequence[Operator], batch: int, tokens: int, bits: float = 16) -> float:
    """Memory of the keys and values of so many tokens.

    >>> layer = Operator("a", "attention", heads=32, kv_heads=32, head_size=128)
    >>> round(kv_bytes([layer] * 32, 1, 2048) / 1e9, 2)
    1.07
    """
    return sum(2 * batch * tokens * o.head_size * o.kv_heads * bits / 8 for o in operators if o.kind == "attention")


def _attention(
    o: Operator, machine: Machine, batch: int, new: int, total: int, b: Bits, low: bool, fused: bool
) -> list[Work]:
    product = 2 * new * total * o.head_size * o.heads * batch
    scores = new * total * o.heads * batch
    operand = new * o.head_size * o.heads * batch * b.activations / 8  # of the queries, and of the result
    cache = total * o.head_size * o.kv_heads * batch * b.kv / 8
    stored = scores * b.activations / 8
    if fused:
        ops = 2 * product + 5 * scores
        return [_timed(o.name, "attention", ops, 2 * operand + 2 * cache, machine, low)]
    return [
        _timed(o.name, "qk", product, operand + stored + cache, machine, low),
        _timed(o.name, "softmax", 5 * scores, 2 * stored, machine, False),
        _timed(o.name, "sv", product, stored + operand + cache, machine, low),
    ]


def _timed(name: str, kind: str, ops: float, moved: float, machine: Machine, low: bool) -> Work:
    computing, moving = ops / machine.peak_at(low), moved / machine.bandwidth
    return Work(name, kind, ops, moved, max(computing, moving), "memory" if moving >= computing else "compute")
