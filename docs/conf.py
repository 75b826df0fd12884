"""How Sphinx builds this documentation: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import pages

import lightning_quant

project = "lightning_quant"
author = "the authors of lightning_quant"
release = lightning_quant.__version__
html_title = f"{project} {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # `x` in a docstring is code, as in Markdown
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it in words; the signatures stay short
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
napoleon_use_ivar = True

# Nothing is loaded from elsewhere: the theme brings its files, fonts are the reader's own, formulas are MathML.
html_theme = "furo"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e99", "color-brand-content": "#0b6e99"},
    "dark_css_variables": {"color-brand-primary": "#58b9e0", "color-brand-content": "#58b9e0"},
}
html_static_path = ["style"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    """Write the pages that come from docstrings, and say how formulas and references are rendered."""
    pages.write(Path(__file__).parent)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("missing-reference", by_last_name)


def visit_math(translator: nodes.NodeVisitor, node: nodes.Element) -> None:
    r"""LaTeX as MathML, which browsers draw by themselves; what follows an accent is not to slip under its letter."""
    source = re.sub(r"(\\(?:tilde|hat|bar) *(?:\\[a-zA-Z]+|\w))_", r"\1{}_", node.astext())
    translator.body.append(tex2mathml(source, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def by_last_name(app: Sphinx, env: object, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """Docstrings may name a class by the file it stands in; its page has it by its public name."""
    domain = env.get_domain("py")
    name = node.get("reftarget", "").rpartition(".")[2]
    found = sorted((full for full in domain.objects if full.rpartition(".")[2] == name), key=len)
    if node.get("refdomain") != "py" or not name or not found:
        return None
    entry = domain.objects[found[0]]
    link = nodes.reference("", "", internal=True)
    link["refuri"] = f"{app.builder.get_relative_uri(node['refdoc'], entry.docname)}#{entry.node_id}"
    link += content
    return link
