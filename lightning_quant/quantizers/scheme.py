"""A number format written as a short string: ``"int4"``, ``"uint8_asym_channel"``, ``"fp8_e4m3"``, ``"log2_4"``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["int", "float", "log", "tan", "atan", "twin", "utwin", "twinlog"]
Granularity: TypeAlias = Literal["tensor", "channel", "token", "group"]

EXAMPLES = (
    '"int8", "int4_asym_channel", "uint8", "int4_g128", "int8_token", "fp8_e4m3", "fp4_e2m1", "log2_4", "logsqrt2_4"'
)

_INTEGER = re.compile(r"(u?)int(\d+)")
_FLOAT = re.compile(r"fp(\d+)_e(\d+)m(\d+)")
_LOG = re.compile(r"log(2|sqrt2)_(\d+)")
_OTHER = re.compile(r"(a?tan|u?twin|twinlog)_(\d+)")
_GROUP = re.compile(r"g(\d+)")


@dataclass(frozen=True)
class Scheme:
    r"""What a number is stored as: kind and number of bits, and how the scale is shared.

    ``None`` in ``symmetric`` or ``granularity`` means that the method chooses; :meth:`resolve` fills in the choice.

    Args:
        kind: ``"int"`` (uniform grid), ``"float"`` (sign, exponent, mantissa), ``"log"`` (powers of a base), ``"tan"``
            or ``"atan"`` (a grid bent by a tangent, fine near 0 or near the largest level), ``"twin"`` or ``"utwin"``
            (two uniform grids, for the numbers below and above 0 or for the small and the large ones), ``"twinlog"``
            (two logarithmic ones, for the weights below and above 0).
        bits: Number of bits of one code.
        signed: ``False`` for ``uintN``: a symmetric unsigned grid starts at 0.
        symmetric: Whether the zero point is 0. Always ``True`` for all but integers.
        granularity: What shares one scale: the whole tensor, a channel, a token (every index but the last axis) or a
            group of ``group_size`` consecutive elements.
        group_size: Elements in a group, only with granularity ``"group"``; the last group of a row may have fewer.
        dynamic: Whether the range is taken from each tensor as it arrives. Implied by ``"token"``, as the range of a
            token cannot be known before the token.
        exponent: Exponent bits of a float.
        mantissa: Mantissa bits of a float.
        base: Base of a logarithm.

    Raises:
        ValueError: If the fields describe no number format.

    Example:
        >>> scheme = Scheme.parse("int4_channel")
        >>> scheme.bits, scheme.granularity, scheme.symmetric
        (4, 'channel', None)
        >>> str(scheme.resolve(symmetric=False, granularity="tensor"))
        'int4_asym_channel'
    """

    kind: Kind
    bits: int
    signed: bool = True
    symmetric: bool | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    dynamic: bool = False
    exponent: int | None = None
    mantissa: int | None = None
    base: Literal["2", "sqrt2"] | None = None

    def __post_init__(self) -> None:
        # Only integers have a zero point, and a companded grid has one scale: normalised here, so that equal formats
        # are equal objects however they were written.
        if self.kind != "int":
            if self.symmetric is False:
                raise _InvalidScheme(str(self), "only integers have a zero point, so `_asym` does not apply")
            object.__setattr__(self, "symmetric", True)
        if self.companded or self.kind == "twin":
            if self.granularity not in (None, "tensor"):
                raise _InvalidScheme(str(self), f"a {self.family} format has one scale per tensor")
            object.__setattr__(self, "granularity", "tensor")
            object.__setattr__(self, "signed", not self.companded)
        if self.granularity == "token":
            object.__setattr__(self, "dynamic", True)
        if (self.granularity == "group") != (self.group_size is not None):
            raise _InvalidScheme(str(self), "a group needs its size and a size needs groups (`_g128`)")
        problem = self._problem()
        if problem is not None:
            raise _InvalidScheme(str(self), problem)

    def _problem(self) -> str | None:
        if self.group_size is not None and self.group_size < 1:
            return "a group has at least 1 element"
        if self.kind == "int":
            lowest = 2 if self.signed else 1
            if not lowest <= self.bits <= 16:
                return f"{'signed' if self.signed else 'unsigned'} integers have {lowest} to 16 bits"
        elif self.kind == "log":
            if self.base is None or not 2 <= self.bits <= 8:
                return "logarithmic formats have base 2 or sqrt2 and 2 to 8 bits"
        elif self.kind != "float":
            if not 2 <= self.bits <= 8:
                return f"{self.family} formats have 2 to 8 bits"
        elif self.exponent is None or self.mantissa is None:
            return "a float format names its exponent and mantissa bits"
        elif not 1 <= self.exponent <= 8 or self.mantissa < 0:
            return "a float format has 1 to 8 exponent bits and 0 or more mantissa bits"
        elif self.bits != 1 + self.exponent + self.mantissa or self.bits > 16:
            return "the bits of a float format are 1 sign bit plus exponent plus mantissa, at most 16"
        return None

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Reads a format string.

        A format is ``int2`` to ``int16``, ``uint1`` to ``uint16``, ``fpN_eXmY``, ``log2_N``, ``logsqrt2_N``, ``tan_N``,
        ``atan_N``, ``twin_N``, ``utwin_N`` or ``twinlog_N``, followed by any of ``_sym _asym _tensor _channel _token
        _dynamic _gN`` in any order.

        Args:
            text: The format string; a :class:`Scheme` is returned as it is.

        Raises:
            ValueError: If the text is not a format, or says two contradicting things.

        Example:
            >>> Scheme.parse("fp8_e4m3").mantissa
            3
            >>> Scheme.parse("int1")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: "int1" is not a number format: signed integers have 2 to 16 bits; valid examples: "int8", ...
        """
        if isinstance(text, Scheme):
            return text
        try:
            base, suffixes = _split_base(text)
            return cls(**base, **_parse_suffixes(suffixes))  # type: ignore[arg-type]
        except _InvalidScheme as error:
            # Quotes what the user wrote, where the inner error quotes the part it saw.
            raise ValueError(_message(text, error.problem)) from None

    def resolve(self, symmetric: bool | None = None, granularity: Granularity | None = None) -> Scheme:
        """Fills in the choices that the format string left to the method.

        Args:
            symmetric: Used where the scheme says neither ``_sym`` nor ``_asym``.
            granularity: Used where the scheme names no granularity; a group cannot be filled in, as it needs a size.

        Example:
            >>> str(Scheme.parse("int8_sym").resolve(symmetric=False, granularity="channel"))
            'int8_sym_channel'
        """
        return replace(
            self,
            symmetric=symmetric if self.symmetric is None else self.symmetric,
            granularity=granularity if self.granularity is None else self.granularity,
        )

    @property
    def companded(self) -> bool:
        """Whether the levels are an uneven grid from 0 to one largest level, for what is never negative."""
        return self.kind in ("log", "tan", "atan", "utwin")

    @property
    def family(self) -> str:
        """What formats of this kind are called."""
        names = {"int": "integer", "log": "logarithmic", "tan": "tangent", "atan": "tangent", "utwin": "twin"}
        names["twinlog"] = "twin-log"
        return names.get(self.kind, self.kind)

    @property
    def qmin(self) -> int:
        """Lowest integer of the grid: negative only if the format is signed and symmetric."""
        return -(1 << self.bits - 1) if self._two_sided else 0

    @property
    def qmax(self) -> int:
        """Highest integer of the grid."""
        return (1 << self.bits - 1) - 1 if self._two_sided else (1 << self.bits) - 1

    @property
    def _two_sided(self) -> bool:
        if self.kind != "int":
            raise ValueError(f'"{self}" has no integer grid; qmin and qmax are known for intN and uintN only.')
        if self.symmetric is None:
            raise ValueError(f'"{self}" leaves symmetric or not to the method; call resolve(symmetric=...) first.')
        return self.signed and self.symmetric

    def __str__(self) -> str:
        if self.kind == "int":
            text = f"{'' if self.signed else 'u'}int{self.bits}"
            if self.symmetric is not None:
                text += "_sym" if self.symmetric else "_asym"
        elif self.kind == "float":
            text = f"fp{self.bits}_e{self.exponent}m{self.mantissa}"
        else:
            text = f"{self.kind}{self.base or ''}_{self.bits}"
        if self.granularity == "group":
            text += f"_g{self.group_size}"
        elif self.granularity is not None and self.kind in ("int", "float", "twinlog"):
            text += f"_{self.granularity}"
        return text + ("_dynamic" if self.dynamic else "")


class _InvalidScheme(ValueError):
    """Keeps the problem apart from the quoted text, so that ``parse`` can quote all of what the user wrote."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(_message(text, problem))
        self.problem = problem


def _message(text: str, problem: str) -> str:
    return f'"{text}" is not a number format: {problem}; valid examples: {EXAMPLES}.'


def _split_base(text: str) -> tuple[dict[str, object], list[str]]:
    """Splits ``"fp8_e4m3_channel"`` into the fields of ``fp8_e4m3`` and the list ``["channel"]``."""
    if not isinstance(text, str):
        raise _InvalidScheme(str(text), f"it is a {type(text).__name__}, not a string")
    words = text.split("_")
    if match := _INTEGER.fullmatch(words[0]):
        return {"kind": "int", "bits": int(match[2]), "signed": not match[1]}, words[1:]
    base = "_".join(words[:2])
    if match := _FLOAT.fullmatch(base):
        bits, exponent, mantissa = (int(number) for number in match.groups())
        return {"kind": "float", "bits": bits, "exponent": exponent, "mantissa": mantissa}, words[2:]
    if match := _LOG.fullmatch(base):
        return {"kind": "log", "bits": int(match[2]), "base": match[1]}, words[2:]
    if match := _OTHER.fullmatch(base):
        return {"kind": match[1], "bits": int(match[2])}, words[2:]
    if words[0].startswith("fp"):
        raise _InvalidScheme(text, "a float format is written fpN_eXmY with N = 1 + X + Y")
    if words[0].startswith("log"):
        raise _InvalidScheme(text, "a logarithmic format is written log2_N or logsqrt2_N")
    raise _InvalidScheme(
        text, "it starts with none of intN, uintN, fpN_eXmY, log2_N, logsqrt2_N, tan_N, atan_N, twin_N, twinlog_N"
    )


def _parse_suffixes(words: list[str]) -> dict[str, object]:
    fields: dict[str, object] = {}

    def put(name: str, value: object, word: str) -> None:
        if name in fields:
            what = {"symmetric": "_sym and _asym", "granularity": "two granularities"}.get(
                name, "the same suffix twice"
            )
            raise _InvalidScheme(word, f"`_{word}` makes it say {what}")
        fields[name] = value

    for word in words:
        if word in ("sym", "asym"):
            put("symmetric", word == "sym", word)
        elif word in ("tensor", "channel", "token"):
            put("granularity", word, word)
        elif match := _GROUP.fullmatch(word):
            put("granularity", "group", word)
            fields["group_size"] = int(match[1])
        elif word == "dynamic":
            put("dynamic", True, word)
        else:
            raise _InvalidScheme(
                word, f"the suffix `_{word}` is none of _sym _asym _tensor _channel _token _dynamic _gN"
            )
    return fields
