"""The site of the documents and of the public docstrings: `make docs`."""

import re
from typing import Any

import hjepa_fast

project = "hjepa_fast"
author = "The hjepa_fast authors"
version = release = hjepa_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"hjepa_fast {version}"
html_copy_source = False
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # as on the pages of a repository: a heading's words in lower case, joined by hyphens
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
napoleon_google_docstring = False
napoleon_use_rtype = False


def _as_text(app: Any, what: str, name: str, what_for: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |p| is no substitution, and a star is a star."""
    for n, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("|", r"\|").replace("*", r"\*").replace("_ ", r"\_ ") for part in parts[::2]]
        parts[2::2] = [rf"\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]  # `nn.Linear`s
        lines[n] = "`".join(parts)


def _outside(app: Any, page: str, source: list[str]) -> None:
    """Files of the repository that are no pages here are there to be downloaded."""
    source[0] = re.sub(r"(?<!!)(\[[^\]]*\])\((\.\./[^)]+)\)", r"\1(path:\2)", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", _outside)
    app.connect("autodoc-process-docstring", _as_text, priority=100)
