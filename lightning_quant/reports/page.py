"""The report as files: one page that asks for nothing from elsewhere, and its facts as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_quant.reports.html import Html, join, tag
from lightning_quant.reports.numbers import plain
from lightning_quant.reports.section import Section

PAGE, FACTS = "report.html", "report.json"


def render(title: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: of the document.
        sections: in the order in which they are read; the first stands above the others as their summary.
    """
    files = resources.files("lightning_quant.reports")
    style, script = ((files / name).read_text("utf-8") for name in ("page.css", "page.js"))
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Html(style)),
        ]
    )
    body = join(
        tag("section", tag("h2", section.title) if section.title else None, section.body, id=_key(section.key))
        for section in sections
        if section.body
    )
    page = tag("html", tag("head", head), tag("body", tag("main", body), tag("script", Html(script))), lang="en")
    return f"<!doctype html>\n{page}\n"


def facts(title: str, sections: Sequence[Section]) -> dict[str, Any]:
    """What ``report.json`` holds: the facts of each section under its key."""
    found: dict[str, Any] = {"format": 1, "title": title}
    for section in sections:
        key, again = section.key, 2
        while key in found:  # two callbacks of one class may each have something to tell
            key, again = f"{section.key}_{again}", again + 1
        found[key] = plain(section.facts)
    return found


def write(folder: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> Path:
    """Write both files, or none of them, and return the path of the page.

    Args:
        folder: is made if it does not exist.
        title: of the document.
        sections: see :func:`render`.
    """
    contents = {PAGE: render(title, sections), FACTS: json.dumps(facts(title, sections), allow_nan=False, indent=1)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f"{name}.partial" for name in contents}
    try:
        for name, path in beside.items():
            path.write_text(contents[name], "utf-8")
        for name, path in beside.items():
            path.replace(folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    return folder / PAGE


def _key(key: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in key)
