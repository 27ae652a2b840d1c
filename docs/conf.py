"""The site of the documents and of the public docstrings: `make docs`."""

import re
from typing import Any

from sphinx.ext.napoleon import Config, NumpyDocstring

import hjepa_fast

project = "hjepa_fast"
author = "The hjepa_fast authors"
version = release = hjepa_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"hjepa_fast {version}"
html_copy_source = False
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # as on the pages of a repository: a heading's words in lower case, joined by hyphens
smartquotes = False  # names in quotes are to be copied
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes


def _of_docstring(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings have NumPy's sections and are plain text else: |p| is no substitution, a star is a star."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    for n, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("|", r"\|").replace("*", r"\*").replace("_ ", r"\_ ") for part in parts[::2]]
        parts[2::2] = [rf"\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]  # `nn.Linear`s
        lines[n] = "`".join(parts)
    if what not in ("attribute", "property"):  # whose first words before a colon would be taken for a type
        lines[:] = NumpyDocstring(lines, Config(napoleon_use_rtype=False), app, what, name, item, options).lines()


def _outside(app: Any, page: str, source: list[str]) -> None:
    """Files of the repository that are no pages here are there to be downloaded."""
    source[0] = re.sub(r"(?<!!)(\[[^\]]*\])\((\.\./[^)]+)\)", r"\1(path:\2)", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", _outside)
    app.connect("autodoc-process-docstring", _of_docstring)
