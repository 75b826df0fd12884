"""The documentation builds without a warning, asks for nothing from elsewhere, and leaves out no public name."""

import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import lightning_quant
from tests.docs.blocks import REPOSITORY

pytest.importorskip("sphinx")
sys.path.insert(0, str(REPOSITORY / "docs"))
import pages

sys.path.remove(str(REPOSITORY / "docs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "doctrees", REPOSITORY / "docs", folder / "html"]  # fmt: skip  # noqa: E501
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


def public():
    """Every public name by its full path: of lightning_quant itself, and of each room."""
    for module in ["lightning_quant", *(f"lightning_quant.{room}" for room in pages.rooms())]:
        for name in importlib.import_module(module).__all__:
            yield module, name


@pytest.mark.parametrize(("module", "name"), list(public()), ids=lambda part: part)
def test_a_public_name_says_what_it_is(module, name):
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isroutine(value):
        said = inspect.getdoc(value) if inspect.isroutine(value) else value.__dict__.get("__doc__")
        assert said and not said.startswith(f"{name}("), f"{module}.{name} has no docstring"


def test_every_public_name_is_on_a_page(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    described = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for module, name in public():
        top = f"lightning_quant.{name}"
        assert f"{module}.{name}" in described or (name in lightning_quant.__all__ and top in described), name


class Requests(HTMLParser):
    """What a browser fetches for a page, without a click of the reader."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "embed"):
            self.found += [attrs.get("src"), attrs.get("srcset")]
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch"):
            self.found.append(attrs.get("href"))


def test_no_page_asks_for_anything_from_elsewhere(site):
    files = list(site.rglob("*.html"))
    assert len(files) > 20
    for file in files:
        requests = Requests()
        requests.feed(file.read_text())
        for address in filter(None, requests.found):
            assert "//" not in address, f"{file.name} asks for {address}"
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)[\"' ]*(?:https?:)?//", file.read_text()), file.name


def test_formulas_are_drawn_by_the_browser(site):
    page = (site / "methods" / "RepQViT.html").read_text()
    assert page.count("<math") > 10 and "\\tilde" not in page


def test_links_between_pages_lead_somewhere(site):
    for file in site.glob("*.html"):
        for link in re.findall(r'href="([^"#:?]+)[^":]*"', file.read_text()):
            assert (file.parent / link).exists(), f"{file.name} links to {link}"


def test_every_callback_has_a_page_with_its_arguments(site):
    for name in pages.methods():
        page = (site / "methods" / f"{name}.html").read_text()
        for argument in inspect.signature(getattr(lightning_quant, name)).parameters.values():
            assert argument.kind is argument.VAR_KEYWORD or f"<strong>{argument.name}</strong>" in page, argument


def test_measured_figures_come_from_the_readme():
    text = "\n".join(pages.measured("RepQViT"))
    assert "63.5 %" in text and "78.9 %" in text and pages.measured("Fidelity") == []


def test_the_readme_links_to_files_that_exist():
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (REPOSITORY / link).exists(), f"{page.name} links to {link}"
