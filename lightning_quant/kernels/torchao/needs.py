"""Whether torchao is there."""

from __future__ import annotations

from importlib.util import find_spec


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return find_spec("torchao") is not None


def why_no_torchao() -> str | None:
    """Why there is no torchao, or ``None`` if there is."""
    return None if has_torchao() else 'torchao is not installed: pip install "lightning-quant[torchao]"'
