"""What the documents tell a reader to write runs, and without a warning."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{index}")
    for file in sorted(DOCS.glob("*.md"))
    for index, block in enumerate(re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_code_runs(block):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, "documents", "exec"), {"__name__": "documents"})


def test_there_are_blocks():
    assert len(BLOCKS) >= 7
