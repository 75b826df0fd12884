"""``lightning-quant methods``: the callbacks there are, as they describe themselves."""

from __future__ import annotations

import inspect

from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

import lightning_quant


def methods() -> dict[str, type[Callback]]:
    """The public callbacks by name.

    >>> "RepQViT" in methods()
    True
    """
    public = {name: getattr(lightning_quant, name) for name in lightning_quant.__all__}
    return {name: found for name, found in public.items() if inspect.isclass(found) and issubclass(found, Callback)}


def first_sentence(found: type) -> str:
    """What the first line of a docstring says.

    >>> first_sentence(Callback)
    'Abstract base class used to build new callbacks.'
    """
    return (inspect.getdoc(found) or "").partition("\n")[0]


def print_methods() -> None:
    """Print one line for each callback, and where to read on."""
    table = Table("callback", "what it does", box=None, pad_edge=False, header_style="bold")
    for name, found in methods().items():
        table.add_row(name, first_sentence(found).replace("``", ""))
    console = Console()
    console.print(table)
    console.print("\nIts arguments: lightning-quant validate --trainer.callbacks.help=NAME", highlight=False)
