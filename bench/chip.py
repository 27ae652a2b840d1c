"""What the device can do at most, measured in the same run: the rates of its matrix units and of its memory."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from .cases import Case
from .measure import Stopwatch, matmul_precision

SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices; they and the copied numbers are larger than any cache."""
COPIED = {"cpu": 2**25, "cuda": 2**30}
"""Bytes."""
ROUNDS = 10


def measure_chip(device: torch.device) -> dict[str, Any]:
    """The best of a few large products in each arithmetic, and of copies within memory, bytes read and written counted.

    TF32 is measured on a GPU only.
    """
    clock, kind = Stopwatch(device), device.type
    n = SIZE[kind]
    flops: dict[str, float] = {}
    arithmetics = {"float32": (torch.float32, "highest"), "bfloat16": (torch.bfloat16, "highest")}
    if kind == "cuda":
        arithmetics["tf32"] = (torch.float32, "high")
    for name, (dtype, setting) in arithmetics.items():
        # random numbers: a chip may run faster on zeros
        x, y = torch.randn(2, n, n, device=device).to(dtype)
        out = torch.empty_like(x)
        with matmul_precision(setting):
            torch.mm(x, y, out=out)
            flops[name] = 2 * n**3 / min(clock(lambda x=x, y=y, out=out: torch.mm(x, y, out=out)) for _ in range(ROUNDS))
    source = torch.randn(COPIED[kind] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(clock(lambda: target.copy_(source)) for _ in range(ROUNDS))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "matrix_gflops_per_s": {name: rate / 1e9 for name, rate in flops.items()},
        "matrix_size": n,
        "memory_gb_per_s": 2 * source.nbytes / seconds / 1e9,
    }


def matrix_rate(chip: dict[str, Any] | None, case: dict[str, Any]) -> float | None:
    """GFLOP/s of a large product in a case's arithmetic, or None where it was not measured."""
    arithmetic = Case.arithmetic_of(case["dtype"], case.get("precision", "highest"))
    return None if chip is None else chip["matrix_gflops_per_s"].get(arithmetic)
