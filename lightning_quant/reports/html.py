"""HTML and SVG as nested calls; text is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Markup. Every other string becomes text when it is put into a tag."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as markup.

    >>> text("a < b"), text(Html("<b>"))
    ('a &lt; b', '<b>')
    """
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object], by: str = "") -> Html:
    """Several parts, one after the other; ``None`` is left out."""
    return Html(by.join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; ``class_`` is written ``class``, ``stroke_width`` ``stroke-width``, and ``None`` is left out.

    >>> tag("p", "1 < 2", class_="note", id=None)
    '<p class="note">1 &lt; 2</p>'
    >>> tag("circle", cx=1.234, r=2)
    '<circle cx="1.23" r="2"/>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    content = join(children)
    if not children and name in EMPTY:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{content}</{name}>")


EMPTY = {"circle", "img", "line", "path", "rect", "polyline", "meta", "br"}


def _attribute(value: object) -> str:
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return html.escape(str(value))
