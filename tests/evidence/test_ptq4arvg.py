"""PTQ4ARVG on a trained painter of digits, at six bits."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = [pytest.mark.evidence, pytest.mark.long, pytest.mark.usefixtures("own_cores")]


def test_six_bits_cost_less_than_with_plain_rounding(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "autoregressive_digits.py"
    spec = importlib.util.spec_from_file_location("painting", path)
    painting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(painting)
    found = painting.main(picture=str(tmp_path / "painted.png"))
    with capsys.disabled():
        print(f"\n  autoregressive digits, W6A6: {found}")
    assert found["PTQ4ARVG dB"] > found["plain dB"] + 1
    assert abs(found["PTQ4ARVG nats"] - found["float nats"]) <= abs(found["plain nats"] - found["float nats"]) + 0.002
