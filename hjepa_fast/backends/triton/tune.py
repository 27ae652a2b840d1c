"""The shape of a program: from a table, or the fastest of a few."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from .layout import Blocks, interpreted

# By precision, smallest first. The first is taken of which the chip holds as many programs as the batch needs, else the last;
# or all are timed. A program reads every matrix from the L2 cache at each gradient, so that more rows cost little until the
# products do. Of 128 rows, narrower tiles than these read what is between layers twice as often, and cannot win by counting.
# The tiles fit into 99 KiB of shared memory, what the smallest chips since 2020 have.
SHAPES: dict[str, tuple[Blocks, ...]] = {
    "ieee": (Blocks(16, 128, 32, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(64, 64, 32, 8, 3)),
    "tf32": (Blocks(16, 128, 32, 8, 4), Blocks(64, 64, 32, 8, 3), Blocks(128, 64, 32, 8, 3)),
    "bf16": (Blocks(16, 128, 64, 8, 4), Blocks(64, 64, 64, 8, 3), Blocks(128, 64, 64, 8, 3)),
    "tf32x3": (Blocks(16, 128, 32, 8, 3), Blocks(64, 64, 32, 8, 3)),
}
tune = os.environ.get("HJEPA_FAST_TUNE") == "1" and not interpreted
"""Whether the fastest shape is found by timing, which compiles all of them. What it gains has not been measured."""

compiling: ContextVar[Blocks | None] = ContextVar("compiling", default=None)
"""The shape of a program, where what is launched shall only be compiled."""

# For tests: instead of any choice, and of the chip's number of multiprocessors.
blocks: Blocks | None = None
programs = 0


def _multiprocessors(device: torch.device) -> int:
    if programs:
        return programs
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _of_table(precision: str, batch: int, device: torch.device) -> Blocks:
    n = _multiprocessors(device)
    return next((b for b in SHAPES[precision] if b.rows * n >= batch), SHAPES[precision][-1])


def n_programs(choice: Blocks, batch: int, device: torch.device) -> int:
    return min(_multiprocessors(device), -(-batch // choice.rows))


def _launch(prepare: Callable[[Blocks], Callable[[], object]], choice: Blocks) -> None:
    prepare(choice)()


def _seconds(launch: Callable[[], object]) -> float:
    """Of a launch, by events: the shortest of three, or of fewer if they are long, after one that loads the kernel."""
    launch()
    times: list[float] = []
    while len(times) < 3 and sum(times) < 0.1:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times)


def compile_at_once(jobs: Sequence[tuple[Blocks, Callable[[], object]]], ignore_errors: bool = False) -> None:
    """What these launch with this shape, on all processors: most of a compilation is outside of Python."""
    if interpreted:
        return
    from triton import AsyncCompileMode  # type: ignore[import-untyped]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, AsyncCompileMode(threads, ignore_errors=ignore_errors):
        for shape, launch in jobs:
            token = compiling.set(shape)
            try:
                launch()
            finally:
                compiling.reset(token)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is, which may only hold what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_fastest: dict[tuple[object, ...], Blocks] = {}


def choose(
    direction: str, precision: str, widths: Sequence[int], like: Tensor, prepare: Callable[[Blocks], Callable[[], object]]
) -> Blocks:
    """The shape of a program for a batch like this [B, *]; `prepare` gives a launch with a shape, which may be repeated.

    Not `triton.autotune`: how the arrays are laid out depends on the shape, and nothing may be timed while a graph is captured.
    """
    batch, device = like.shape[0], like.device
    if fixed := compiling.get() or blocks:
        return fixed
    key = (direction, precision, tuple(widths), device, (batch - 1).bit_length())
    if key in _fastest:
        return _fastest[key]
    if not tune or capturing(device):
        return _of_table(precision, batch, device)
    smallest, *others = SHAPES[precision]
    candidates = [smallest, *(b for b in others if b.rows < 2 * batch)]
    if len(candidates) > 1:
        compile_at_once([(candidate, partial(_launch, prepare, candidate)) for candidate in candidates])
        with torch.cuda.device_of(like):  # where events are recorded, too
            times = {candidate: _seconds(prepare(candidate)) for candidate in candidates}
        _fastest[key] = min(candidates, key=times.__getitem__)
    else:
        _fastest[key] = smallest
    return _fastest[key]
