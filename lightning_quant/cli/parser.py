"""A parser that says in one line what is wrong."""

from __future__ import annotations

import inspect
import re
import textwrap
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_quant.cli.methods import methods
from lightning_quant.cli.terminal import MISTAKE, print_mistake

_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|ption '|import path string: )([\w.]+)")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, without the hundred lines of usage before what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit code 2."""
        if not self.exit_on_error:  # one of several types is tried, and the next may do
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print_mistake(reason(message) + _hint(message, parser))
        self.exit(MISTAKE)


def reason(message: str) -> str:
    """The one reason in a message of jsonargparse, which tells of every type that was tried.

    >>> print(
    ...     reason('''Parser key "trainer.max_epochs":
    ...   Does not validate against any of the Union subtypes
    ...   Subtypes: [<class 'int'>, <class 'NoneType'>]
    ...   Errors:
    ...     - Expected a <class 'int'>
    ...     - Expected a <class 'NoneType'>
    ...   Given value type: <class 'str'>
    ...   Given value: many''')
    ... )
    trainer.max_epochs: expected a int, found many
    """
    key = re.match(r'Parser key "([^"]+)":', message)
    text = textwrap.dedent(message[key.end() :] if key else message).strip()
    _, tried, errors = text.partition("\nErrors:\n")
    if tried:
        errors, _, value = errors.rpartition("\nGiven value: ")
        items = re.split(r"^- ", textwrap.dedent(errors.rpartition("\nGiven value type:")[0]), flags=re.MULTILINE)[1:]
        text = next((item for item in items if item.startswith("Problem with")), items[0])
        if text.startswith("Expected a <"):
            text = f"{text.strip()}, found {value}"
    if named := re.match(r"Problem with given class_path '([^']+)':\n", text):
        text = f"{named[1]}: {reason(textwrap.dedent(text[named.end() :]))}"
    text = (
        re.sub(r"<class '([\w.]+)'>", r"\1", text)
        .replace("Expected a dot import path string:", "there is no class")
        .strip()
    )
    return f"{key[1]}: {text[0].lower()}{text[1:]}" if key else text


def _hint(message: str, parser: LightningArgumentParser) -> str:
    """What may have been meant."""
    if "arguments are required" in message:
        return "; name it in a config (`lightning-quant --help` shows one)"
    if unknown := _UNKNOWN.search(message):
        options = (option.removeprefix("--") for action in parser._actions for option in action.option_strings)
        known = [*methods(), *_arguments_of_methods(), *options]
        if nearest := get_close_matches(unknown[1], known, n=1, cutoff=0.7):
            return f"; did you mean {nearest[0]}?"
    return ""


def _arguments_of_methods() -> set[str]:
    """A class hands what it does not name itself on to its base."""
    classes = {base for method in methods().values() for base in method.__mro__ if base is not object}
    return {name for found in classes for name in inspect.signature(found).parameters}
