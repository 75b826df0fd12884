"""``lightning-quant``: the command line, which is LightningCLI with the callbacks at hand."""

from lightning_quant.cli.main import main

__all__ = ["main"]
