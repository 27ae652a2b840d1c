"""How the threads of PyTorch's operations wait for work in the command line's processes: asleep.

OpenMP's threads spin between two operations, so that the next one starts without waking them. Where anything else runs, they
take the cores from it and from each other. GNU's OpenMP reads OMP_WAIT_POLICY once, when torch loads it, so `hjepa_fast`
imports this module before torch. A program that imports the library keeps its own way of waiting: only the command line's own
processes are changed, and not those for which the user has chosen.
"""

from __future__ import annotations

import os
import sys

CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user chooses how threads wait."""


def is_command(argv: list[str], original: list[str]) -> bool:
    """Whether a process runs `hjepa-fast` or `python -m hjepa_fast`, by its `sys.argv` and `sys.orig_argv`."""
    if not argv:
        return False
    if argv[0] == "-m":  # while Python imports the package that it is to run
        return "hjepa_fast" in original[1:] and original[original.index("hjepa_fast") - 1] == "-m"
    return os.path.splitext(os.path.basename(argv[0]))[0] == "hjepa-fast"


if is_command(sys.argv, sys.orig_argv) and not any(name in os.environ for name in CHOSEN):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
