"""What the device can do at most, measured in the same run: the rates of its matrix units and of its memory."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case
from .measure import Stopwatch, matmul_precision

SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices; they and the copied numbers are larger than any cache."""
COPIED = {"cpu": 2**25, "cuda": 2**30}
"""Bytes."""
ROUNDS = 10
SECONDS = 1.0
"""After which no further round begins: a product in an arithmetic that the processor lacks takes seconds."""


def measure_chip(device: torch.device) -> dict[str, Any]:
    """The best of a few large products in each arithmetic, and of copies within memory, bytes read and written counted.

    TF32 is measured on a GPU only.
    """
    clock, kind = Stopwatch(device), device.type
    arithmetics = ("float32", "bfloat16", *(["tf32"] if kind == "cuda" else []))
    gflops = {name: product_rate(device, name) for name in arithmetics}
    source = torch.randn(COPIED[kind] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(clock, lambda: target.copy_(source))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "matrix_gflops_per_s": gflops,
        "matrix_size": SIZE[kind],
        "memory_gb_per_s": 2 * source.nbytes / seconds / 1e9,
    }


def product_rate(device: torch.device, arithmetic: str) -> float:
    """GFLOP/s of a large product in "float32", "bfloat16" or "tf32"."""
    clock, n = Stopwatch(device), SIZE[device.type]
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    # random numbers: a chip may run faster on zeros
    x, y = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(x)
    with matmul_precision("high" if arithmetic == "tf32" else "highest"):
        return 2 * n**3 / _best(clock, lambda: torch.mm(x, y, out=out)) / 1e9


def beside_case(chip: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The rates with that of float32 measured once more, if it is better: a processor's changes with what else it does."""
    rates = chip["matrix_gflops_per_s"]
    return {**chip, "matrix_gflops_per_s": {**rates, "float32": max(rates["float32"], product_rate(device, "float32"))}}


def _best(clock: Stopwatch, run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls after a first one; of the first if that alone takes too long."""
    first = clock(run)
    times, used = [], first
    while used < SECONDS and len(times) < ROUNDS:
        times.append(clock(run))
        used += times[-1]
    return min(times, default=first)


def matrix_rate(chip: dict[str, Any] | None, case: dict[str, Any], device: str) -> float | None:
    """GFLOP/s of a large product, or None where it was not measured: on a GPU in the case's arithmetic, on a processor in
    float32 for every case, since it may lack the other."""
    arithmetic = Case.arithmetic_of(case["dtype"], case.get("precision", "highest")) if device == "cuda" else "float32"
    return None if chip is None else chip["matrix_gflops_per_s"].get(arithmetic)
