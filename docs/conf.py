"""The site: the pages of this folder, and pages of docs/api from the docstrings. ``make docs``."""

import re

from tritonaff import __version__

project = "tritonaff"
author = "the authors of tritonaff"
version = release = __version__
html_title = f"tritonaff {version}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_theme_options = {
    "source_repository": "https://github.com/tritonaff/tritonaff",
    "source_branch": "main",
    "source_directory": "docs/",
}

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["results"]
myst_heading_anchors = 3  # links to headings, as on GitHub
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Shapes", "notes_style"), ("Paper", "notes_style")]


def give_papers_a_section(app, what, name, obj, options, lines):
    """A paragraph "Paper: ..." becomes a section of its own, which napoleon reads."""
    text = "\n".join(lines)
    text = re.sub(r"(?m)^Paper: ((?:.+\n?)+)", _section, text)
    lines[:] = text.split("\n")


def _section(match):
    paragraph = match[1].rstrip("\n")
    return "Paper:\n" + "\n".join(f"    {line}" for line in paragraph.split("\n")) + "\n"


def setup(app):
    # Before napoleon, which listens with the default priority of 500.
    app.connect("autodoc-process-docstring", give_papers_a_section, priority=400)
