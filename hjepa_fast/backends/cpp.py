"""The hidden-space loop as a C++ extension for CPUs: the same functions as `backends/torch.py`, in one call each.

The extension is optional; `available()` and `why_not()` tell whether it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..hidden_space.machine import Job, Run, Sums
from ..hidden_space.program import Program
from ..schemes import SubStep
from . import torch as torch_backend
from .torch import Gradients, Rolled, Solver, Tail, tape_width

# as in csrc/cpu/problem.h
KINDS = {"softplus": 0, "tanh": 1, "silu": 2, "gelu": 3, "gelu-tanh": 4, "sin": 5, "sigmoid": 6, "elu": 7, "quadratic": 8}
MAX_LAYERS = 32

# Between two calls of the extension Python looks for Ctrl-C: multiplications in a call, about a second's worth.
CHUNK = 5e10

# Products of fewer rows, or of fewer but for which W must be packed first, and those of a longer inner dimension than the
# cache holds are the library's.
_SOME_ROWS, _MANY_ROWS, _MOST_INNER = 4, 64, 4096

# Of weights of so many numbers the extension sums up the gradients itself, a tile at a time, which took 0.78 to 0.95 of the
# time for 2-200-200-1 to 512-256-256-1; of more it gives the factors of a chunk of rows, which the library multiplies.
_SMALL_WEIGHTS, _CHUNK_ROWS = 2**18, 1024

_FEW_COLUMNS = 32

# Rows that a call without a tape takes at least.
_FEWEST_ROWS = 64

# For tests: the instruction set (0 baseline, 1 AVX2, 2 AVX-512, 3 with bfloat16, -1 the best there is) and the loop
# (0 by batch size; threads share 1 the rows, 2 the features, 3 the columns of products of all rows).
isa = -1
path = 0


def _load() -> str:
    """Load the extension: "" or what went wrong."""
    file = Path(__file__).parent.parent / "_C.abi3.so"
    if not file.exists():
        return f"{file.name} was not built"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return str(error)
    return ""


_problem = _load()  # once, at import: torch.compile cannot look at files while it traces


def available() -> bool:
    """Whether the extension is there and loads."""
    return not _problem


def why_not() -> str:
    """Why `available()` is false and how to get the extension, or ""."""
    return _problem and (
        f"the C++ backend is missing: {_problem}. Install hjepa_fast from source with a C++20 compiler: "
        "HJEPA_FAST_BUILD=1 pip install --no-build-isolation <source folder>"
    )


def require() -> None:
    if not available():
        raise RuntimeError(f"hjepa_fast: {why_not()}")


def _delegated(a: Tensor, tail: Tail, scheme: Sequence[SubStep], n_steps: int) -> bool:
    empty = not n_steps or not a.shape[0] or 0 in tail.widths
    return empty or not 0 < len(tail.weights) <= MAX_LAYERS or any(stage.mix for stage in scheme)


def _options(weight: Tensor, work: torch.dtype) -> int:
    """What is no number of the problem, in bits: see `Options` in csrc/cpu/ops.cpp."""
    low = work is torch.float32 and (weight.dtype is torch.bfloat16 or torch.get_float32_matmul_precision() == "medium")
    return torch.get_num_threads() | (isa + 1) << 16 | path << 24 | low << 32


def _numbers_of(tail: Tail) -> list[float]:
    """Of the activation of each hidden layer."""
    each = [tail.activation.at(layer) for layer in range(len(tail.weights))]
    return [x for name, beta, threshold in each for x in (KINDS[name], beta, threshold)]


@functools.lru_cache(maxsize=256)
def _as_tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _operands(
    a: Tensor, K: Tensor, tail: Tail, dt: Tensor, scheme: Sequence[SubStep], solver: Solver
) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Parameters, dt, numbers and options of both operators."""
    parameters = [K.contiguous(), *[x.to(a.dtype).contiguous() for x in (*tail.weights, *tail.biases)]]
    numbers = _as_tensor(*_numbers_of(tail), *solver, *[x for stage in scheme for x in stage[:4]])
    return parameters, dt.contiguous(), numbers, _options(tail.weights[0], a.dtype)


def _chunks(
    batch: int, widths: Sequence[int], scheme: Sequence[SubStep], n_steps: int, factor: int
) -> Iterator[tuple[int, int]]:
    """Ranges of steps, each about a second's work or one step."""
    products = widths[0] ** 2 + sum(2 * m * n for m, n in pairwise(widths))
    steps = max(1, int(CHUNK / (factor * batch * len(scheme) * products)))
    if any(stage.implicit for stage in scheme):
        steps = max(steps, 16)  # every call starts without the steps before it to extrapolate from
    for begin in range(0, n_steps, steps):
        yield begin, min(begin + steps, n_steps)


def product(x: Tensor, W: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """As `backends.torch.product`; with the loop's own kernels where there are many rows.

    On an AMD processor they took half the time of the library behind PyTorch for the states of 1024 rollouts.
    """
    inner = x.shape[-1]
    n_rows = x.numel() // max(inner, 1)
    by_rows = W.stride(1) == 1
    enough = n_rows >= (_SOME_ROWS if by_rows else _MANY_ROWS)
    if not enough or not 0 < inner <= _MOST_INNER or not W.numel() or not available():
        return torch_backend.product(x, W, out, base)
    y = x.new_empty(*x.shape[:-1], W.shape[1]) if out is None else out
    transposed = not by_rows and W.stride(0) == 1
    torch.ops.hjepa_fast_cpp.product(
        y if y.ndim == 3 else y[:, None],
        x.reshape(n_rows, inner).contiguous(),
        W.T if transposed else W if by_rows else W.contiguous(),
        transposed,
        x.new_empty(0) if base is None else base if base.stride(1) == 1 else base.contiguous(),
        _options(W, W.dtype),
    )
    return y


def forward(
    a: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    n_steps: int,
    every_state: bool,
    with_energy: bool,
    memory: str,
    solver: Solver,
) -> Rolled:
    """As `backends.torch.forward`; `tail.weights` may be bfloat16 where a and K are float32.

    Products are rounded to bfloat16 and summed in float32 if the weights are bfloat16 or
    `torch.get_float32_matmul_precision()` is "medium", where many rows are multiplied and the processor's bfloat16 dot products
    are not slower than its float32 ones (AVX512_BF16, but not Intel's).
    """
    require()
    if _delegated(a, tail, scheme, n_steps):
        tail = tail._replace(weights=[w.to(a.dtype) for w in tail.weights], biases=[b.to(a.dtype) for b in tail.biases])
        return torch_backend.forward(a, K, tail, dt, scheme, n_steps, every_state, with_energy, memory, solver)
    batch, h = a.shape
    # everything is allocated before any work is done
    sq = a.new_empty(batch, n_steps if every_state else 1, h)
    sp = torch.empty_like(sq)
    energy = a.new_empty(batch, n_steps if with_energy else 0)
    tape = a.new_empty(batch, n_steps, len(scheme), tape_width(tail.widths, memory))
    solved = n_steps if any(stage.implicit for stage in scheme) else 0
    residual, evaluations = a.new_empty(batch, solved), a.new_empty(batch, solved, dtype=torch.int32)
    a = a.clone(memory_format=torch.contiguous_format)
    *operands, options = _operands(a, K, tail, dt, scheme, solver)
    for begin, end in _chunks(batch, tail.widths, scheme, n_steps, 1):
        torch.ops.hjepa_fast_cpp.forward(a, sq, sp, energy, tape, residual, evaluations, *operands, begin, end, options)
    return Rolled(a, sq, sp, energy, tape, residual, evaluations)


def backward(
    la: Tensor,
    lsq: Tensor,
    lsp: Tensor,
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    tape: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    memory: str,
    sums: Gradients | None,
    solver: Solver,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `backends.torch.backward`; `sums` is in la's dtype."""
    require()
    batch, n_steps = la.shape[0], tape.shape[1]
    if _delegated(la, tail, scheme, n_steps):
        tail = tail._replace(weights=[w.to(la.dtype) for w in tail.weights], biases=[b.to(la.dtype) for b in tail.biases])
        return torch_backend.backward(la, lsq, lsp, gsq, gsp, gE, tape, K, tail, dt, scheme, memory, sums, solver)
    la, lsq, lsp = (x.clone(memory_format=torch.contiguous_format) for x in (la, lsq, lsp))
    gdt, residual = la.new_empty(batch, n_steps), la.new_zeros(batch)
    totals = [] if sums is None else [sums.K, *sums.weights, *sums.biases]
    contiguous = [x.contiguous() for x in totals]
    given = [gsq.contiguous(), gsp.contiguous(), la.new_empty(0) if gE is None else gE.contiguous()]
    tape = tape.contiguous()
    *operands, options = _operands(la, K, tail, dt, scheme, solver)
    for begin, end in reversed([*_chunks(batch, tail.widths, scheme, n_steps, 2 if sums is None else 3)]):
        torch.ops.hjepa_fast_cpp.backward(la, lsq, lsp, gdt, residual, contiguous, given, tape, *operands, begin, end, options)
    for total, x in zip(totals, contiguous, strict=True):
        if total is not x:
            total.copy_(x)
    return la, lsq, lsp, gdt, residual


MAX_NETWORKS, MAX_REGISTERS, MAX_MATRICES, MAX_ITEMS = 8, 64, 32, 24


class _Written(NamedTuple):
    """A program as the extension reads it."""

    program: Program
    numbers: Tensor
    multiplications: int
    """Of one row in one step."""
    starts: bool
    """Whether the extension knows every register's start."""
    delegated: bool
    """Whether it does not know such a program."""


_written: dict[tuple[int, tuple[int, ...], int], _Written] = {}


def _as_written(job: Job) -> _Written:
    # a program lives for as long as it is remembered here, so that its number is nobody else's
    key = id(job.program), job.widths, job.z0.shape[1]
    found = _written.get(key)
    if found is None or found.program is not job.program:
        found = _written[key] = _write(job)
    return found


def _write(job: Job) -> _Written:
    program, widths, networks, d = job.program, job.widths, job.networks, job.z0.shape[1] // 2
    codes = (
        program.start, program.first, program.later, program.end, program.back_end, program.back_later, program.back_first,
    )  # fmt: skip
    numbers: list[float] = [
        len(program.registers), len(program.state), len(program.known), len(program.path), len(program.matrices),
        len(program.networks), len(program.items), *widths, *program.state, *program.known, *program.path,
        len(program.tracked), *program.tracked,
    ]  # fmt: skip
    place = {k: n for n, k in enumerate(program.networks)}
    for key in program.matrices:
        half = key[0] == "W"
        n = place[int(key[1])] if half else -1
        numbers += [n, d if half and program.reads[n] == "z" and key[2] == "p" else 0]
    for i in program.state:
        name, *rest = program.registers[i]
        if name == "A":
            n = place[int(rest[0])]
            numbers += [2, d if program.reads[n] == "p" else 0, n]
        elif name in ("Z", "C"):
            second = rest[0] == "p"
            numbers += [1 if name == "Z" else 3, second * (d if name == "Z" else 1), 0]
        else:
            numbers += [0 if name == "S" else 4, 0, 0]
    for k, F in zip(program.networks, networks, strict=True):
        numbers += [program.number("A", k), program.number("D", k), len(F.weights) + 1, *_numbers_of(F)]
    for item in program.items:
        numbers += [item.register, item.network, item.first, item.later, item.end]
    numbers += [len(code) for code in codes]
    for code in codes:
        for x in code:
            numbers += [
                x.op, x.x, x.y, x.c, x.scaled, x.matrix, x.transposed, x.item, x.slot, x.energy, x.meet,
            ]  # fmt: skip
    return _Written(
        program,
        torch.tensor(numbers, dtype=torch.float64, device="cpu"),
        job.multiplications,
        not any(program.registers[i][0] in ("U", "B") for i in program.state),
        not program.networks
        or any(not 0 < len(F.weights) <= MAX_LAYERS or 0 in F.widths for F in networks)
        or len(program.networks) > MAX_NETWORKS
        or len(program.registers) > MAX_REGISTERS
        or len(program.matrices) > MAX_MATRICES
        or len(program.items) > MAX_ITEMS
        or len(program.state) + len(program.known) + len(job.externals) > MAX_REGISTERS
        or len(job.externals) > MAX_ITEMS,
    )


def _starts(job: Job, written: _Written) -> bool:
    """Whether the extension makes the start: it knows the registers, and one bias for all samples."""
    return written.starts and all([b.ndim == 1 for _, b in job.firsts])


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in this dtype."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _by_rows(x: Tensor) -> Tensor:
    """With rows of neighbouring numbers."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _program_arguments(job: Job, written: _Written) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Parameters, dt, program and options of both operators."""
    work = job.dt.dtype
    parameters = [M if M.stride(-1) == 1 or M.ndim == 1 else M.contiguous() for M in job.given]
    for (W, b), F in zip(job.firsts, job.networks, strict=True):
        b = b if b.ndim == 1 else W.new_zeros(len(W))  # a bias for each sample is in the registers' start
        parameters += [_own(W, work), *[_own(w, work) for w in F.weights], _own(b, work), *[_own(w, work) for w in F.biases]]
    parameters += [_own(e, work) for e in job.externals]
    options = _options(job.networks[0].weights[0], work) | (job.memory != "recompute") << 33 | job.every_state << 34
    return parameters, job.dt.contiguous(), written.numbers, options


def _program_chunks(written: _Written, batch: int, n_steps: int, factor: int) -> list[tuple[int, int]]:
    """Ranges of steps, each about a second's work or one step."""
    steps = max(1, int(CHUNK / (factor * batch * written.multiplications)))
    return [(begin, min(begin + steps, n_steps)) for begin in range(0, n_steps, steps)]


def run(
    job: Job, start: Sequence[Tensor] | None = None, states: Tensor | None = None, want_end: bool = True, want_path: bool = True
) -> Run:
    """As `hidden_space.machine.run`; low precision as in `forward`."""
    require()
    batch, written = job.z0.shape[0], _as_written(job)
    if written.delegated or not batch or not job.n_steps:
        return torch_backend.run(job, start, states, want_end, want_path)
    # everything is allocated before any work is done
    program, like, n_steps = job.program, job.z0, job.n_steps
    path: list[Tensor] = []
    if states is not None:
        path = [states]
    elif want_path:
        path = [like.new_empty(batch, n_steps if job.every_state else 1, job.widths[i]) for i in program.path]
    energy = like.new_zeros(batch, n_steps + 1) if job.with_energy else like.new_empty(batch, 0)
    tape = like.new_empty(batch, job.tape_size if job.memory != "none" else 0)
    chunks = _program_chunks(written, batch, n_steps, 1)
    end = [like.new_empty(batch, job.widths[i]) for i in program.state] if want_end or len(chunks) > 1 else []
    parameters, dt, numbers, options = _program_arguments(job, written)
    if start is None and not _starts(job, written):
        start = job.start()
    starts = [] if start is None else [_by_rows(x) for x in start]
    z0 = _by_rows(like)
    for begin, stop in chunks:
        torch.ops.hjepa_fast_cpp.program_forward(
            end, path, energy, z0, starts, tape, parameters, dt, numbers, begin, stop, options
        )
        starts = end
    return Run(end, path if states is None else [], energy, tape)


def run_back(
    job: Job,
    cotangents: Sequence[Tensor],
    values: Sequence[Tensor],
    g_path: Sequence[Tensor] | None,
    g_energy: Tensor | None,
    tape: Tensor,
    sums: Sums | None,
) -> tuple[list[Tensor], Tensor]:
    """As `hidden_space.machine.run_back`."""
    require()
    batch, program, written = cotangents[0].shape[0], job.program, _as_written(job)
    if written.delegated or not batch or not job.n_steps or not (tape.shape[1] or _starts(job, written)):
        return torch_backend.run_back(job, cotangents, values, g_path, g_energy, tape, sums)
    like = cotangents[0]
    own = [_by_rows(x) for x in cotangents]
    own += [like.new_zeros(batch, job.widths[i]) for i in program.known]
    own += job.of_externals
    read = bool(program.tracked) or not _starts(job, written)
    followed = [x.clone(memory_format=torch.contiguous_format) for x in values] if read else []
    gdt = like.new_empty(batch, job.n_steps)
    totals = [] if sums is None else sums.tensors
    fresh = (sums is not None and sums.fresh) << 35
    made = [_by_rows(x) for x in totals]
    given = [_by_rows(x) for x in g_path or ()]
    gE = like.new_empty(0) if g_energy is None else g_energy.contiguous()
    parameters, dt, numbers, options = _program_arguments(job, written)
    factor = 2 if sums is None else 3
    if tape.shape[1]:
        for begin, stop in reversed(_program_chunks(written, batch, job.n_steps, factor)):
            torch.ops.hjepa_fast_cpp.program_backward(
                own, followed, gdt, made, given, gE, like[:0], tape, parameters, dt, numbers, begin, stop, options | fresh
            )
            fresh = 0
    else:
        rows = max(_FEWEST_ROWS, int(CHUNK / ((factor + 1) * job.n_steps * written.multiplications)))
        z0 = _by_rows(job.z0)
        for first in range(0, batch, rows):
            some = slice(first, first + rows)
            torch.ops.hjepa_fast_cpp.program_backward(
                [x[some] for x in own], [x[some] for x in followed], gdt[some], made, [x[some] for x in given], gE[some],
                z0[some], tape, parameters, dt[some] if len(dt) > 1 else dt, numbers, 0, job.n_steps,
                options | fresh,
            )  # fmt: skip
            fresh = 0
    for total, x in zip(totals, made, strict=True):
        if total is not x:
            total.copy_(x)
    return own[: len(cotangents)], gdt


def _gradient_delegated(x: Tensor, W: Tensor, tail: Tail) -> bool:
    return not x.numel() or 0 in W.shape or not 0 < len(tail.weights) < MAX_LAYERS


def _gradient_operands(x: Tensor, W: Tensor, b: Tensor, tail: Tail) -> tuple[Tensor, list[Tensor], Tensor, int]:
    parameters = [y.contiguous() for y in (W, *tail.weights, b, *tail.biases)]
    return x.contiguous(), parameters, _as_tensor(*_numbers_of(tail)), _options(W, x.dtype)


def gradient(x: Tensor, W: Tensor, b: Tensor, tail: Tail, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `backends.torch.gradient`."""
    require()
    if _gradient_delegated(x, W, tail):
        return torch_backend.gradient(x, W, b, tail, keep)
    found, value = x.new_empty(x.shape), x.new_empty(x.shape[0])
    tape = x.new_empty(x.shape[0], tape_width(tail.widths, "store") if keep else 0)
    torch.ops.hjepa_fast_cpp.gradient(found, value, tape, *_gradient_operands(x, W, b, tail))
    return found, value, tape


def gradient_backward(
    g_gradient: Tensor | None,
    g_value: Tensor | None,
    tape: Tensor,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    tail: Tail,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As `backends.torch.gradient_backward`."""
    require()
    if _gradient_delegated(x, W, tail):
        return torch_backend.gradient_backward(g_gradient, g_value, tape, x, W, b, tail, need_weights)
    x, parameters, numbers, options = _gradient_operands(x, W, b, tail)
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    g_x = x.new_empty(x.shape)
    sums = [torch.empty_like(p) for p in (*biases, weights[-1])] if need_weights else []
    products = [torch.empty_like(w) for w in weights[:-1]] if need_weights else []
    given, of_value, saved = (x.new_empty(0) if t is None else t.contiguous() for t in (g_gradient, g_value, tape))

    def run(rows: slice, sums: list[Tensor], factors: list[Tensor]) -> None:
        torch.ops.hjepa_fast_cpp.gradient_backward(
            g_x[rows], sums, factors, [given[rows], of_value[rows]], saved[rows], x[rows], parameters, numbers, options
        )

    if not need_weights or sum(p.numel() for p in products) <= _SMALL_WEIGHTS:
        run(slice(None), [*sums, *products], [])
    else:
        _multiply_factors(run, x, given, tail.widths, sums, products)
    *of_biases, of_output = sums or [x]
    return g_x, [*products, of_output, *of_biases] if need_weights else []


def _multiply_factors(
    run: Callable[[slice, list[Tensor], list[Tensor]], None],
    x: Tensor,
    given: Tensor,
    widths: Sequence[int],
    sums: list[Tensor],
    products: list[Tensor],
) -> None:
    """A chunk of rows at a time, the factors of weights' gradients from `run`, and their products by the library."""
    for start in range(0, len(x), _CHUNK_ROWS):
        rows = slice(start, min(start + _CHUNK_ROWS, len(x)))
        n, own = rows.stop - start, [torch.empty_like(s) for s in sums] if start else sums
        sizes = [(n, widths[0])] * 2
        for k, m in pairwise(widths):
            sizes += [(2 * n, m), (2 * n, k)]
        delta, nu, *rest = factors = [x.new_empty(size) for size in sizes]
        run(rows, own, factors)
        if start:
            for total, part in zip(sums, own, strict=True):
                total += part
        _add_product(products[0], nu, x[rows], keep=start > 0)
        if len(given):
            _add_product(products[0], delta, given[rows], keep=True)
        for total, left, right in zip(products[1:], rest[::2], rest[1::2], strict=True):
            _add_product(total, left, right, keep=start > 0)


def _add_product(total: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """total <- left^T right, or that added. Few columns come second seven times slower than first."""
    if right.shape[1] < _FEW_COLUMNS:
        total, left, right = total.T, right, left
    if keep:
        total.addmm_(left.T, right)
    else:
        torch.mm(left.T, right, out=total)
