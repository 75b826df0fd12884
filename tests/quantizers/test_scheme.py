from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import Scheme

BASES = (
    [f"int{bits}" for bits in range(2, 17)]
    + [f"uint{bits}" for bits in range(1, 17)]
    + ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "fp6_e3m2", "fp16_e5m10", "fp2_e1m0"]
    + [f"log{base}_{bits}" for base in ("2", "sqrt2") for bits in range(2, 9)]
)


@given(
    base=st.sampled_from(BASES),
    suffixes=st.permutations(["_sym", "_g32", "_dynamic"]),
    keep=st.integers(0, 3),
)
def test_canonical_text_reads_back_and_suffixes_come_in_any_order(base, suffixes, keep):
    chosen = [s for s in suffixes[:keep] if not (base.startswith("log") and s == "_g32")]
    scheme = Scheme.parse(base + "".join(chosen))
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(base + "".join(reversed(chosen))) == scheme
    assert hash(Scheme.parse(str(scheme))) == hash(scheme)


def test_each_part_lands_in_its_field():
    assert Scheme.parse("int4") == Scheme("int", 4)
    assert Scheme.parse("uint8_asym_tensor") == Scheme("int", 8, signed=False, symmetric=False, granularity="tensor")
    assert Scheme.parse("int4_g128") == Scheme("int", 4, granularity="group", group_size=128)
    assert Scheme.parse("fp8_e4m3_channel") == Scheme("float", 8, granularity="channel", exponent=4, mantissa=3)
    assert Scheme.parse("logsqrt2_4") == Scheme("log", 4, base="sqrt2")


def test_a_token_scale_is_dynamic():
    assert Scheme.parse("int8_token") == Scheme.parse("int8_dynamic_token")
    assert Scheme.parse("int8_dynamic").resolve(granularity="token").dynamic


def test_a_scheme_is_its_own_parse_and_survives_copying():
    scheme = Scheme.parse("int4_sym_g32")
    assert Scheme.parse(scheme) is scheme
    assert copy.deepcopy(scheme) == scheme == pickle.loads(pickle.dumps(scheme))


def test_resolve_fills_only_what_is_open():
    assert Scheme.parse("int4").resolve(symmetric=False, granularity="channel") == Scheme.parse("int4_asym_channel")
    for text in ("int4_sym_tensor", "int8_sym_g32"):
        fixed = Scheme.parse(text)
        assert fixed.resolve(symmetric=False, granularity="channel") == fixed
    assert Scheme.parse("fp8_e4m3").resolve(symmetric=False, granularity="channel") == Scheme.parse("fp8_e4m3_channel")
    assert Scheme.parse("log2_4").resolve(symmetric=False, granularity="channel") == Scheme.parse("log2_4")


@pytest.mark.parametrize(
    ("text", "qmin", "qmax"),
    [
        ("int4_sym", -8, 7),
        ("int4_asym", 0, 15),
        ("uint4_sym", 0, 15),
        ("uint4_asym", 0, 15),
        ("int2_sym", -2, 1),
        ("uint1_sym", 0, 1),
        ("int16_sym", -32768, 32767),
    ],
)
def test_integer_grid(text, qmin, qmax):
    scheme = Scheme.parse(text)
    assert (scheme.qmin, scheme.qmax) == (qmin, qmax)


def test_grid_is_unknown_while_symmetry_is_open_and_for_other_kinds():
    for text in ("int4", "fp8_e4m3", "log2_4"):
        with pytest.raises(ValueError, match=text):
            _ = Scheme.parse(text).qmin


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("int1", "signed integers have 2 to 16 bits"),
        ("int17", "signed integers have 2 to 16 bits"),
        ("uint0", "unsigned integers have 1 to 16 bits"),
        ("fp8_e9", "fpN_eXmY"),
        ("fp8_e4m4", "1 sign bit plus exponent plus mantissa"),
        ("fp17_e8m8", "at most 16"),
        ("fp4_e0m3", "1 to 8 exponent bits"),
        ("fp16_e9m6", "1 to 8 exponent bits"),
        ("log2_1", "2 to 8 bits"),
        ("logsqrt2_9", "2 to 8 bits"),
        ("log3_4", "log2_N or logsqrt2_N"),
        ("foo", "starts with none of"),
        ("", "starts with none of"),
        ("INT8", "starts with none of"),
        ("int8_sym_asym", "_sym and _asym"),
        ("int8_channel_token", "two granularities"),
        ("int8_g32_tensor", "two granularities"),
        ("int8_dynamic_dynamic", "twice"),
        ("int8_g0", "at least 1 element"),
        ("int8_foo", "`_foo`"),
        ("int8_", "suffix"),
        ("fp8_e4m3_asym", "no zero point|have a zero point"),
        ("log2_4_channel", "one scale per tensor"),
        (8, "int, not a string"),
    ],
)
def test_wrong_text_is_quoted_with_the_problem_and_examples(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        Scheme.parse(text)
    message = str(caught.value)
    assert message.startswith(f'"{text}" is not a number format')
    assert '"int4_g128"' in message
    assert message.endswith(".")


def test_fields_are_checked_without_a_text_too():
    with pytest.raises(ValueError, match="needs its size"):
        Scheme("int", 8, granularity="group")
    with pytest.raises(ValueError, match="names its exponent"):
        Scheme("float", 8)
