"""The code blocks of a Markdown page, and how each is run.

A Python or YAML block whose first line is a comment with a file name is saved under that name; other Python blocks run
one after the other, in one namespace for the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        language: what stands behind the fence.
        text: what stands inside.
        line: where it begins in its page.
    """

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that it shows."""
        named = _NAME.match(self.text.partition("\n")[0])
        return named[1] if named and self.language in ("python", "yaml") else None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        indent, language, inside = fence.groups()
        lines = [line.removeprefix(indent) for line in inside.splitlines(keepends=True)]
        found.append(Block(language, "".join(lines), text.count("\n", 0, fence.start()) + 2))
    return found


def save_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows."""
    for block in blocks(page):
        if block.file and not block.file.startswith("tests/"):
            (folder / block.file).write_text(block.text)
