"""PyTorch's threads across a fork of the process.

A fork copies only the thread that calls it. GNU's OpenMP, which lends PyTorch's operations on the CPU their threads, does not
notice: in the child it waits for the others for ever. So they are ended just before the fork. Parent and child each start new
ones when PyTorch next has work for them, which takes some 0.1 ms.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_HARD = 2  # omp_pause_hard in omp.h


def _register() -> None:
    """Nothing where OpenMP is another maker's, LLVM's or Intel's, which is in order after a fork."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return
    torch_cpu = ctypes.CDLL(str(library))  # finds the functions of the libraries that PyTorch was linked to as well
    if hasattr(torch_cpu, "omp_pause_resource_all") and not hasattr(torch_cpu, "__kmpc_fork_call"):
        os.register_at_fork(before=lambda: torch_cpu.omp_pause_resource_all(_HARD))


_register()
