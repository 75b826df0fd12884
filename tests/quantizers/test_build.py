from __future__ import annotations

import pytest

from lightning_quant.quantizers import FloatQuantizer, LogQuantizer, Scheme, UniformQuantizer, build_quantizer


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int4", UniformQuantizer),
        ("uint8_asym", UniformQuantizer),
        ("fp8_e4m3", FloatQuantizer),
        ("log2_4", LogQuantizer),
        ("logsqrt2_4", LogQuantizer),
    ],
)
def test_the_format_chooses_the_quantizer(text, kind):
    for scheme in (text, Scheme.parse(text)):
        quantizer = build_quantizer(scheme, axis=0)
        assert type(quantizer) is kind
        assert quantizer.axis == 0
        assert not quantizer.calibrated


def test_no_format():
    with pytest.raises(ValueError, match="not a number format"):
        build_quantizer("int")
