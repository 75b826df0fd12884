"""``lightning-quant fit|validate|test|predict --config file.yaml``: LightningCLI with our callbacks at hand."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_quant  # noqa: F401  (makes ``class_path: RepQViT`` work by its bare name)


def main(args: ArgsType = None) -> None:
    """Run LightningCLI; ``class_path: my_model.Net`` finds modules in the working directory.

    Args:
        args: command line or config, ``sys.argv`` by default.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    LightningCLI(args=args, save_config_kwargs={"overwrite": True})
