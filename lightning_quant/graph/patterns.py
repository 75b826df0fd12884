"""Names of layers by pattern, as in ``skip=["head"]`` or ``overrides={"blocks.0.*": "int8"}``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches an fnmatch pattern; a leading ``*.`` is implied, and so is a trailing ``.*``.

    >>> matches("net.blocks.0.mlp.fc1", "blocks.0.*"), matches("net.head", "head"), matches("net.head_norm", "head")
    (True, True, False)
    """
    name = name.replace("_orig_mod.", "")  # a submodule compiled by the user
    return any(fnmatchcase(name, form) for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def attention_name(site: str) -> str:
    """The name by which patterns find the attention that a module computes in its own forward.

    >>> matches(attention_name("blocks.0"), "blocks.0.*"), matches(attention_name("blocks.0.attn"), "attn")
    (True, True)
    """
    return f"{site}.attention_quantizers".removeprefix(".")


def matching(names: Iterable[str], pattern: str, argument: str) -> list[str]:
    """The names that match a pattern.

    Raises:
        ValueError: if there is none; the message names the argument and the nearest names.
    """
    names = list(names)
    found = [name for name in names if matches(name, pattern)]
    if not found:
        from difflib import get_close_matches

        near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"{argument}: the pattern {pattern!r} matches no layer that can be quantized; there are {near}"
        )
    return found
