"""LightningCLI with a dry run, and with saving and loading of quantized models."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from lightning_quant.callbacks import QuantizationCallback
from lightning_quant.checkpoint import load_quantized, save_quantized
from lightning_quant.cli.parser import Parser

# One batch, nothing logged, nothing saved; a model cannot be traced in inference mode.
DRY_RUN = {"fast_dev_run": True, "inference_mode": False, "logger": False}


class ShowPlans(Callback):
    """Prints the plan of each callback for the first batch that the Trainer brings."""

    def __init__(self, callbacks: list[QuantizationCallback]) -> None:
        self.callbacks = callbacks

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *rest: Any) -> None:
        """The batch has been moved and converted as validation has it."""
        if trainer.is_global_zero:
            console = Console(width=None if sys.stdout.isatty() else 140)
            for callback in self.callbacks:
                console.print(callback.plan(pl_module, batch).table())
            console.print("Nothing was changed; `validate` with the same config does it.")


class PlanningTrainer(Trainer):
    """A Trainer with one more verb."""

    def plan(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, ckpt_path: str | None = None
    ) -> None:
        """Show what would be quantized, to which size, and what not and why.

        Runs one validation batch through the float model, and no callback.

        Args:
            model: the float model.
            datamodule: brings the batch, unless the model does.
            ckpt_path: a checkpoint of the float model.
        """
        quantizing = [callback for callback in self.callbacks if isinstance(callback, QuantizationCallback)]
        if not quantizing:
            raise ValueError("trainer.callbacks names no quantization callback: `lightning-quant methods` lists them")
        self.callbacks: list[Callback] = [ShowPlans(quantizing)]
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)


class Command(LightningCLI):
    """Parses the words of a command line and runs its verb.

    Args:
        args: the words; ``None``: those of the command line.
    """

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(
            args=args,
            trainer_class=PlanningTrainer,
            parser_class=Parser,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, and the dry run."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where quantized models come from and go to."""
        parser.add_argument(
            "--save_quantized", type=str | None, default=None, help="Folder to write the quantized model to at the end."
        )
        parser.add_argument(
            "--load_quantized", type=str | None, default=None, help="Folder of a quantized model to start from."
        )

    def before_instantiate_classes(self) -> None:
        """Mind what can be minded before anything is built."""
        chosen = self.config[self.subcommand]
        if chosen.trainer.logger is False:  # without a log folder it would go beside the config, or over it
            self.save_config_callback = None
        path = chosen.get("ckpt_path")
        if path and not _named_for_lightning(path) and not Path(path).exists():
            self._parser(self.subcommand).error(f"--ckpt_path: there is no {path}")
        if self.subcommand == "plan":
            for name, value in DRY_RUN.items():
                chosen.trainer[name] = value

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer; two callbacks that would do the same are a mistake in the config."""
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            found = re.search("`(.*?)`", str(error))
            name = "a callback" if found is None else found[1]
            raise ValueError(f"trainer.callbacks: {name} is listed twice; give each a target= of its own") from error

    def after_instantiate_classes(self) -> None:
        """Start from a quantized model."""
        folder = self._get(self.config, "load_quantized")
        if folder:
            load_quantized(self.model, folder)

    def after_validate(self) -> None:
        """Keep the quantized model."""
        folder = self._get(self.config, "save_quantized")
        if folder and self.trainer.is_global_zero:
            save_quantized(self.model, folder)
            print(f"The quantized model is in {folder}")

    after_fit = after_test = after_predict = after_validate


def _named_for_lightning(path: str) -> bool:
    """Whether the Trainer finds it by other means than a path."""
    return "://" in path or path.partition(":")[0] in ("best", "last", "hpc", "registry")
