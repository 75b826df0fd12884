"""``lightning-quant VERB``: what each verb does, and what reaches the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_quant.cli.methods import print_methods
from lightning_quant.cli.terminal import MISTAKE, mistakes_in_one_line, print_mistake, quiet

USAGE = """\
usage: lightning-quant VERB --config FILE [--OPTION VALUE ...]

Quantize a LightningModule by naming a callback in the Trainer's YAML.

verbs:
  methods     list the callbacks
  plan        show what would be quantized, to which size, and what not and why; changes nothing
  validate    calibrate, then print the quantized model's metrics
  fit         train; QuantizationAwareTraining trains the quantized model
  test        print the metrics of a model that has been quantized before
  predict     run a model that has been quantized before

a config:
  model: my_model.Net               # a class in my_model.py, in this folder
  data: my_model.Data               # not needed if the model brings its own loaders
  trainer:
    callbacks:
      - class_path: RepQViT
        init_args: {weights: int4, activations: int4}

more:
  lightning-quant validate --config FILE --save_quantized FOLDER    keep the quantized model
  lightning-quant predict --config FILE --load_quantized FOLDER     use it
  lightning-quant validate --trainer.callbacks.help=RepQViT         the arguments of a callback
  lightning-quant VERB --help                                       every option
  lightning-quant --version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb. A mistake in a config or an argument ends in one line on stderr and exit code 2.

    ``class_path: my_model.Net`` finds modules in the working directory.

    Args:
        args: the words after ``lightning-quant``; by default those of the command line.

    >>> main(["methods"])  # doctest: +ELLIPSIS
    callback ...
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif words[0] == "--version":
        print(*(f"{name} {version(name)}" for name in ("lightning-quant", "lightning", "torch")), sep=", ")
    elif words == ["methods"]:
        print_methods()
    else:
        _run(args)


def _run(args: Sequence[str] | None) -> None:
    """The verbs that need a Trainer."""
    try:
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError:
        print_mistake("the command line needs jsonargparse: pip install 'lightning-quant[cli]'")
        sys.exit(MISTAKE)
    from lightning_quant.cli.command import Command

    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with quiet(), mistakes_in_one_line():
        Command(None if args is None else list(args))
