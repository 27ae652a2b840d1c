"""The hidden-space loop of a separable H = T(p) + V(q) as part of the C++ extension: the same functions as
`backends/separable_torch.py`, in one call each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise

import torch
from torch import Tensor

from . import cpp, separable_torch
from .cpp import product
from .separable_torch import Loop, Pieces, Rolled, State, evaluations
from .torch import Gradients, Tail

__all__ = ["backward", "forward", "product"]


def _delegated(loop: Loop, batch: int) -> bool:
    networks = [loop.V] if loop.T is None else [loop.V, loop.T]
    return not (batch and loop.n_steps and all(0 < len(net.weights) <= cpp.MAX_LAYERS for net in networks))


def _arguments(loop: Loop, begin: int, end: int, at: int) -> tuple[object, ...]:
    """Those of both operators for steps begin..end-1; `at` is the step where the evaluations before are counted."""
    work = loop.N.dtype

    def parameters(tail: Tail | None) -> tuple[list[Tensor], list[Tensor]]:
        parts = ([], []) if tail is None else (tail.weights, tail.biases)
        weights, biases = ([x.to(work).contiguous() for x in part] for part in parts)
        return weights, biases

    def activation(tail: Tail) -> tuple[int, float, float]:
        name, beta, threshold = tail.activation
        return cpp.KINDS[name], beta, threshold

    low = loop.V.weights[0].dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
    before = evaluations(loop.moves, at, loop.with_energy, loop.last and at == end == loop.n_steps)
    return (
        loop.N.contiguous(), *parameters(loop.V), *parameters(loop.T), loop.dt.contiguous(),
        torch.tensor([move[:2] for move in loop.moves], dtype=torch.float64),
        begin, end, *before, Pieces.of_loop(loop).of_V, loop.with_energy, loop.last, loop.memory == "store",
        *activation(loop.V), *activation(loop.T or loop.V), work == torch.float32 and low, torch.get_num_threads(), cpp.isa,
    )  # fmt: skip


def _chunks(loop: Loop, batch: int, factor: int) -> Iterator[tuple[int, int]]:
    """Ranges of steps, each about a second's work or one step."""
    h_V, h_T = loop.N.shape
    widths = [loop.V.widths, [] if loop.T is None else loop.T.widths]
    work = 2 * h_V * h_T + sum(2 * m * n for w in widths for m, n in pairwise(w))
    steps = max(1, int(cpp.CHUNK / (factor * batch * len(loop.moves) * work)))
    for begin in range(0, loop.n_steps, steps):
        yield begin, min(begin + steps, loop.n_steps)


def forward(loop: Loop, start: State, every_state: bool, every_aT: bool) -> Rolled:
    """As `backends.separable_torch.forward`; low precision as in `backends.cpp.forward`."""
    cpp.require()
    batch, n_steps = start.aV.shape[0], loop.n_steps
    if _delegated(loop, batch):
        return separable_torch.forward(loop, start, every_state, every_aT)
    # everything is allocated before any work is done
    end = State(*(x.clone(memory_format=torch.contiguous_format) for x in start))
    sps, sqs, aTs = (
        x.new_empty(batch, n_steps if wanted else 0, x.shape[1])
        for x, wanted in ((end.sp, every_state), (end.sq, every_state), (end.aT, every_aT))
    )
    energy = end.aV.new_empty(batch, n_steps + 1 if loop.with_energy else 0)
    tape = end.aV.new_empty(batch, Pieces.of_loop(loop).numbers)
    for first, stop in _chunks(loop, batch, 1):
        torch.ops.hjepa_fast_cpp.separable_forward(*end, sps, sqs, aTs, energy, tape, *_arguments(loop, first, stop, first))
    return Rolled(end, sps, sqs, aTs, energy if loop.last else energy[:, :-1], tape)


def backward(
    loop: Loop,
    end: State,
    sp: Tensor,
    of_states: tuple[Tensor, Tensor] | None,
    of_aT: Tensor | None,
    of_energy: Tensor | None,
    tape: Tensor,
    sums_V: Gradients | None,
    sums_T: Gradients | None,
    gN: Tensor | None,
) -> tuple[State, Tensor]:
    """As `backends.separable_torch.backward`."""
    cpp.require()
    batch = sp.shape[0]
    if _delegated(loop, batch):
        return separable_torch.backward(loop, end, sp, of_states, of_aT, of_energy, tape, sums_V, sums_T, gN)
    none = sp.new_empty(0)
    cotangents = State(*(x.clone(memory_format=torch.contiguous_format) for x in end))
    sp = sp.clone(memory_format=torch.contiguous_format)
    gdt = sp.new_empty(batch, loop.n_steps)
    gsp, gsq = (none, none) if of_states is None else of_states
    given = [none if x is None else x.contiguous() for x in (gsp, gsq, of_aT, of_energy, tape)]
    totals = [
        *([] if part is None else [*part.weights, *part.biases] for part in (sums_V, sums_T)),
        [none if gN is None else gN],
    ]
    sums_of_V, sums_of_T, (sum_of_N,) = sums = [[x.contiguous() for x in part] for part in totals]
    factor = 2 if gN is None else 3
    for first, stop in reversed([*_chunks(loop, batch, factor)]):
        torch.ops.hjepa_fast_cpp.separable_backward(
            *cotangents, sp, gdt, sums_of_V, sums_of_T, sum_of_N, *given, *_arguments(loop, first, stop, stop)
        )
    for total, x in zip(chain(*totals), chain(*sums), strict=True):
        if total is not x:
            total.copy_(x)
    return cotangents, gdt
