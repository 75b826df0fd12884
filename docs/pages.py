"""The pages that are made from docstrings: one for each callback, one for each room, and the list of both."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import lightning_quant
from lightning_quant.cli.methods import first_sentence, methods

README = Path(__file__).parents[1] / "README.md"


def write(folder: Path) -> None:
    """Write all of them below a folder; those that are gone are removed."""
    pages = {f"methods/{name}.rst": method_page(name) for name in methods()}
    pages |= {"methods/index.rst": methods_index(), "api/index.rst": api_index()}
    pages |= {f"api/{room}.rst": room_page(room) for room in rooms()}
    for old in [*folder.glob("methods/*"), *folder.glob("api/*")]:
        if str(old.relative_to(folder)) not in pages:
            old.unlink()
    for path, text in pages.items():
        (folder / path).parent.mkdir(exist_ok=True)
        if not (folder / path).exists() or (folder / path).read_text() != text:  # unchanged pages are not built anew
            (folder / path).write_text(text)


def rooms() -> dict[str, list[str]]:
    """The packages of lightning_quant with their public names."""
    found = {}
    for package in pkgutil.iter_modules(lightning_quant.__path__):
        names = getattr(importlib.import_module(f"lightning_quant.{package.name}"), "__all__", [])
        if package.ispkg and names and package.name != "cli":
            found[package.name] = list(names)
    return found


def method_page(name: str) -> str:
    """A callback's docstring, its arguments in YAML, and what was measured."""
    arguments = inspect.signature(methods()[name]).parameters.values()
    given = [a for a in arguments if a.kind is not a.VAR_KEYWORD and a.default is not a.empty]
    width = max((len(a.name) for a in given), default=0) + 1
    yaml = [f"       {a.name + ':':{width}} {_yaml(a.default)}" for a in given]
    lines = [*_title(name), f".. autoclass:: lightning_quant.{name}", ""]
    lines += ["When to take it: :doc:`../choose`.", "", "In YAML", "-------", ""]
    lines += ["All of its own arguments, with their defaults:", "", ".. code-block:: yaml", ""]
    lines += ["   trainer:", "     callbacks:", f"       - class_path: {name}"]
    lines += ["         init_args:", *(f"    {line}" for line in yaml)] if yaml else []
    lines += measured(name)
    return "\n".join(lines) + "\n"


def measured(name: str) -> list[str]:
    """The rows about a callback in the README's table of figures, which `make evidence` measures."""
    table = README.read_text().partition("## Methods")[2].partition("\n## ")[0]
    rows, subject = [], ""
    for row in re.findall(r"^\| .*\|$", table, re.MULTILINE):
        callback, _, bits, ours, reference = (cell.strip() for cell in row.strip("|").split("|"))
        subject = callback or subject
        if re.match(rf"`{name}\b", subject):
            settings = callback.strip("`").removeprefix(name)
            rows.append((f"``{name}{settings}``" if settings else "", bits, ours, reference or "–"))
    if not rows:
        return []
    head = [
        "",
        "Measured",
        "--------",
        "",
        "DeiT-Tiny, top-1 on 500 ImageNet images, 32 calibration images, all layers",
    ]
    head += [
        "quantized including the head; the float model has 80.4 %.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
    ]
    rows = [("arguments", "bits", "here", "reference implementation"), *rows]
    return head + [line for row in rows for line in (f"   * - {row[0]}", *(f"     - {cell}" for cell in row[1:]))]


def methods_index() -> str:
    """What `lightning-quant methods` prints."""
    lines = [*_title("Methods"), "Each is a callback: add it to the Trainer.", ""]
    for name, found in methods().items():
        lines += [f":doc:`{name}`", f"   {first_sentence(found)}", ""]
    return "\n".join([*lines, ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in methods()), ""])


def api_index() -> str:
    """What is imported from lightning_quant itself, and the rooms."""
    lines = [*_title("API reference"), "From lightning_quant itself", "---------------------------", ""]
    lines += ["The callbacks have :doc:`pages of their own <../methods/index>`.", ""]
    for name in lightning_quant.__all__:
        if name not in methods():
            lines += [*_entry(f"lightning_quant.{name}", getattr(lightning_quant, name)), ""]
    lines += ["Rooms", "-----", "", "What the methods are made of; :doc:`../how` shows how they stand.", ""]
    return "\n".join([*lines, ".. toctree::", "   :maxdepth: 1", "", *(f"   {room}" for room in rooms()), ""])


def room_page(room: str) -> str:
    """Every public name of a package, apart from those that stand elsewhere."""
    module = f"lightning_quant.{room}"
    elsewhere = [name for name in rooms()[room] if name in lightning_quant.__all__]
    lines = [*_title(f"{module}"), f".. automodule:: {module}"]
    names = [name for name in rooms()[room] if name not in elsewhere]
    if elsewhere:
        links = (
            f":doc:`{n} <../methods/{n}>`" if n in methods() else f":class:`~lightning_quant.{n}`" for n in elsewhere
        )
        lines += ["", f"Imported from ``lightning_quant`` itself, and described there: {', '.join(links)}."]
    for name in names:
        lines += _entry(f"{module}.{name}", getattr(importlib.import_module(module), name))
    return "\n".join(lines) + "\n"


def _entry(name: str, value: object) -> list[str]:
    """What describes a public name: its docstring, or for a constant what it holds."""
    if inspect.isclass(value):
        return ["", f".. autoclass:: {name}", "   :members:"]
    if inspect.isroutine(value):
        return ["", f".. autofunction:: {name}"]
    held = [f"``{key}``" for key in value if isinstance(key, str)] if isinstance(value, (dict, tuple, list)) else []
    module, _, name = name.rpartition(".")
    text = f"A constant: {', '.join(held)}." if held else "A constant."
    return ["", f".. py:data:: {name}", f"   :module: {module}", "", f"   {text}"]


def _title(text: str) -> list[str]:
    return [text, "=" * len(text), ""]


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, (tuple, list)) else str(value)
