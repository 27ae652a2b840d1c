"""The hidden-space loop on NVIDIA GPUs: a rollout is one kernel launch, written in Triton (see `triton_kernels.py`).

Triton is imported when a rollout first needs it. What the kernels do not do (mixed sub-steps, a linear H, float64, nothing
to do) is the PyTorch loop's.

A call can be captured in a CUDA graph once the same call has run before: that compiles the kernels and copies the scheme's
coefficients to the device. Nothing else here waits for the device (`hidden_space` does where it checks that implicit steps
have converged), but for the first call of a size, which times a few shapes of the kernel's program. HJEPA_FAST_TUNE=0 in the
environment takes the shape from a table instead: then another process on the same chip finds the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import Activation
from ..schemes import SubStep
from . import torch as torch_backend
from .torch import Gradients, Rolled, Solver, Tail, tape_width

product = torch_backend.product
# programs are PyTorch's
run, run_back = torch_backend.run, torch_backend.run_back

_KINDS = {"softplus": 0, "tanh": 1, "silu": 2, "gelu": 3, "gelu-tanh": 4, "sin": 5}  # as in `triton_kernels`
_MAX_LAYERS = 8

# once, at import: torch.compile cannot look at files while it traces
_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, to test them


class Blocks(NamedTuple):
    """The shape of a program: the samples it owns, the tile of a product's columns and of its inner dimension."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By precision, smallest first: what is timed. Without timing the first is taken of which the chip holds as many programs as the
# batch needs, else the last. A program reads every matrix from the L2 cache at each gradient, so that more rows cost little
# until the products do. Of 128 rows, narrow tiles leave enough registers, wide ones read what is between layers half as often.
# The tiles fit into 99 KiB of shared memory, what the smallest chips since 2020 have.
SHAPES: dict[str, tuple[Blocks, ...]] = {
    "ieee": (Blocks(16, 128, 32, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(64, 64, 32, 8, 3)),
    "tf32": (Blocks(16, 128, 32, 8, 4), Blocks(64, 64, 32, 8, 3), Blocks(128, 32, 32, 8, 3), Blocks(128, 64, 32, 8, 3)),
    "bf16": (Blocks(16, 128, 64, 8, 4), Blocks(64, 64, 64, 8, 3), Blocks(128, 32, 64, 8, 3), Blocks(128, 64, 64, 8, 3)),
    "tf32x3": (Blocks(16, 128, 32, 8, 3), Blocks(64, 64, 32, 8, 3)),
}
_BOUND = 2**31
"""Bytes of the factors of the weights' gradients, and of restored layer values, that are held at a time."""

tune = os.environ.get("HJEPA_FAST_TUNE", "1") != "0" and not _interpreted
"""Whether the fastest shape is found by timing."""

# For tests: instead of any choice, and of the chip's number of multiprocessors; the bound above.
blocks: Blocks | None = None
programs = 0
bound = _BOUND


def available() -> bool:
    """Whether Triton is installed and there is a GPU, or Triton's interpreter is switched on."""
    return _installed and (_interpreted or torch.cuda.is_available())


def why_not() -> str:
    """Why `available()` is false, or ""."""
    if available():
        return ""
    if not _installed:
        return "the Triton backend is missing: the package triton is not installed. PyTorch for CUDA on Linux brings it along"
    return "the Triton backend needs a CUDA device, and PyTorch finds none"


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _delegated(a: Tensor, tail: Tail, scheme: Sequence[SubStep], n_steps: int) -> bool:
    empty = not n_steps or not scheme or not a.shape[0] or 0 in tail.widths
    double = a.dtype == torch.float64 and not _interpreted
    unknown = any(own.name not in _KINDS for own in tail.activation.layers) or len(tail.activation.layers) > 1
    return empty or double or unknown or not 0 < len(tail.weights) <= _MAX_LAYERS or any(stage.mix for stage in scheme)


def require(a: Tensor) -> None:
    if not available():
        raise RuntimeError(f"hjepa_fast: {why_not()}")
    if not a.is_cuda and not _interpreted:
        raise RuntimeError(f"hjepa_fast: the Triton backend runs on a CUDA device; the tensors are on {a.device}")


def _precision(a: Tensor, tail: Tail, scheme: Sequence[SubStep]) -> str:
    """What products are computed in. The equations of implicit sub-steps are solved to the last digits of float32, which
    rounded factors do not have: they take three TF32 products where others take one."""
    setting = torch.get_float32_matmul_precision()
    narrow = tail.weights[0].dtype == torch.bfloat16
    if a.dtype != torch.float32 or (setting == "highest" and not narrow):
        return "ieee"
    if any(stage.implicit for stage in scheme):
        return "tf32x3"
    return "bf16" if narrow or setting == "medium" else "tf32"


class Constants(NamedTuple):
    """What a kernel is compiled for. Offsets (_AT) say where things are in its arrays, by layer from 0."""

    L: int
    WIDTHS: tuple[int, ...]
    N: tuple[int, ...]
    """Widths padded to whole tiles."""
    ROWS: int
    COLUMNS: int
    INNER: int
    W_AT: tuple[int, ...]
    """In `matrices`: W [N[j + 1], N[j]] of the layer after j; T_AT: its transpose."""
    T_AT: tuple[int, ...]
    M_AT: int
    """The first of the matrices drift K - kick K^T, transposed for the forward kernel."""
    B_AT: tuple[int, ...]
    """In `vectors`: the bias of layer j; that of the output is the first number there."""
    OUT_AT: int
    """The output weights."""
    A_AT: tuple[int, ...]
    """In the tape; G_AT likewise."""
    G_AT: tuple[int, ...]
    TAPE: int
    """Numbers of a sub-step on the tape."""
    WORKS: int
    """Numbers of a sample in `work`."""
    ACTIVATION: tuple[int, float, float] = (0, 1.0, 20.0)
    """Kind, beta, threshold."""
    PRECISION: str = "ieee"
    """Of products, as Triton calls it."""
    IMPLICIT: bool = False
    """Whether sub-steps may be implicit."""
    EVERY_STATE: bool = True
    WITH_ENERGY: bool = True
    # of the forward kernel
    MOVE: bool = True
    """False: only fill the tape."""
    STORE: bool = False
    """Whether the tape has every layer, or only the first, if any."""
    POINT_AT: int = 0
    """In `work`: where the gradient is evaluated."""
    X_AT: tuple[int, ...] = ()
    """In `layers`; S_AT likewise, and in the backward kernel's `work`, where C_AT is too."""
    S_AT: tuple[int, ...] = ()
    LAYERS: int = 0
    # of the backward kernel
    SUMS: bool = False
    """Whether the factors of the weights' gradients are wanted."""
    C_AT: tuple[int, ...] = ()
    SOLVE_AT: int = 0
    Z_AT: tuple[int, ...] = ()
    """In `factors`, where la is first; the next of every layer but the last."""
    ZD_AT: tuple[int, ...] = ()
    E_AT: tuple[int, ...] = ()
    """Of every layer but the first."""
    R_AT: tuple[int, ...] = ()
    STEP_AT: int = 0
    """dt delta."""
    TOP_AT: int = 0
    """The gradient of the output weights."""
    NU_AT: int = 0
    """The cotangent of an implicit point."""
    FACTORS: int = 0


@functools.lru_cache(maxsize=256)
def for_triton(C: Constants) -> Constants:
    """As Triton's compiler takes them, which knows a field only by its type; its interpreter takes them as they are."""
    return C if _interpreted else Constants(*map(_kernels().tl.constexpr, C))


class Layout(NamedTuple):
    """Constants of a network's two kernels, and how they are launched."""

    blocks: Blocks
    forward: Constants
    backward: Constants

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}


def _offsets(sizes: Sequence[int], start: int = 0) -> tuple[int, ...]:
    """Where each of `sizes` numbers begins, one after the other, and where the last one ends."""
    return tuple(itertools.accumulate(sizes, initial=start))


@functools.lru_cache(maxsize=256)
def layout_of(widths: tuple[int, ...], blocks: Blocks, precision: str, activation: Activation, implicit: bool) -> Layout:
    # not less than what 128 threads share without two of them holding the same number
    largest = max(32, 1 << (max(widths) - 1).bit_length())
    blocks = blocks._replace(columns=min(blocks.columns, largest), inner=min(blocks.inner, largest))
    tile = max(blocks.columns, blocks.inner)
    N = tuple(-(-width // tile) * tile for width in widths)
    n = len(N) - 1
    areas = [x * y for x, y in itertools.pairwise(N)]
    W_AT = _offsets(areas)
    T_AT = _offsets(areas, W_AT[-1])
    values = _offsets([*widths, *widths[:-1]])
    B_AT = _offsets(N)
    in_layers = _offsets([N[0], *N, *N[:-1]])
    common = Constants(
        L=len(N),
        WIDTHS=widths,
        N=N,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        W_AT=W_AT[:-1],
        T_AT=T_AT[:-1],
        M_AT=T_AT[-1],
        B_AT=B_AT,
        OUT_AT=B_AT[-1],
        A_AT=values[: n + 1],
        G_AT=values[n + 1 : -1],
        TAPE=values[-1],
        WORKS=(11 if implicit else 3) * N[0],
        ACTIVATION=(_KINDS[activation.name], float(activation.beta), float(activation.threshold)),
        PRECISION=precision if precision.startswith("tf32") else "ieee",
        IMPLICIT=implicit,
    )
    forward = common._replace(
        POINT_AT=3 * N[0] if implicit else 0,
        X_AT=in_layers[1 : n + 2],
        S_AT=in_layers[n + 2 : -1],
        LAYERS=in_layers[-1],
    )
    bent = N[:-1] or N
    in_work = _offsets([*bent, *bent], 3 * N[0])
    solver = N[:1] if implicit else ()
    in_factors = _offsets([N[0], N[0], N[-1], *N[:-1], *N[:-1], *N[1:], *N[1:], *solver])
    Z, ZD, E, R = (in_factors[3 + k * n : 3 + (k + 1) * n] for k in range(4))
    backward = common._replace(
        S_AT=in_work[: len(bent)],
        C_AT=in_work[len(bent) : -1],
        SOLVE_AT=in_work[-1],
        WORKS=in_work[-1] + (10 * N[0] if implicit else 0),
        Z_AT=Z,
        ZD_AT=ZD,
        E_AT=(0, *E),
        R_AT=(0, *R),
        STEP_AT=in_factors[1],
        TOP_AT=in_factors[2],
        NU_AT=in_factors[3 + 4 * n],
        FACTORS=in_factors[-1],
    )
    return Layout(blocks, forward, backward)


Move = tuple[float, float]


class Moves(NamedTuple):
    """A scheme on the device."""

    steps: Tensor
    """[sub-steps, 4]: kick, drift, and those of the point itself."""
    which: Tensor
    """[sub-steps, 2], int32: which of the distinct pairs both are."""
    solver: Tensor
    """Tolerance, eps and tiny; [6, 5] coefficients that extrapolate the moves to implicit points."""
    distinct: tuple[Move, ...]


@functools.lru_cache(maxsize=256)
def _moves(scheme: tuple[SubStep, ...], tolerance: float, device: torch.device, dtype: torch.dtype) -> Moves:
    pairs: list[tuple[Move, Move]] = [((s.kick, s.drift), (s.implicit_kick, s.implicit_drift)) for s in scheme]
    distinct = tuple(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    which = torch.tensor([[distinct.index(move) for move in pair] for pair in pairs], dtype=torch.int32, device=device)
    steps = torch.tensor([[*state, *point] for state, point in pairs], dtype=dtype, device=device)
    limits = torch.finfo(dtype)
    coefficients = [x for row in torch_backend.EXTRAPOLATION for x in (*row, *[0] * (5 - len(row)))]
    solver = torch.tensor([tolerance, limits.eps, limits.tiny, *coefficients], dtype=dtype, device=device)
    return Moves(steps, which, solver, distinct)


def _pack(
    C: Constants, K: Tensor, tail: Tail, moves: Sequence[Move], dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The matrices in the products' dtype and the vectors in K's, padded with zeros."""
    N, widths = C.N, C.WIDTHS
    h = widths[0]
    matrices = torch.zeros(C.M_AT + len(moves) * N[0] ** 2, dtype=dtype, device=K.device)
    vectors = torch.zeros(C.OUT_AT + N[-1], dtype=K.dtype, device=K.device)
    for j, weight in enumerate(tail.weights[:-1]):
        m, n = N[j + 1], N[j]
        matrices[C.W_AT[j] :][: m * n].view(m, n)[: widths[j + 1], : widths[j]] = weight
        matrices[C.T_AT[j] :][: m * n].view(n, m)[: widths[j], : widths[j + 1]] = weight.T
    for i, (kick, drift) in enumerate(moves):
        forwards, back = (K.T, K) if transposed else (K, K.T)
        if not kick or not drift:
            move = forwards * drift if drift else back * -kick
        else:
            move = torch.add(forwards * drift, back, alpha=-kick)
        matrices[C.M_AT + i * N[0] ** 2 :][: N[0] ** 2].view(N[0], N[0])[:h, :h] = move
    for j, bias in enumerate(tail.biases):
        vectors[C.B_AT[(j + 1) % len(N)] :][: bias.shape[0]] = bias
    vectors[C.OUT_AT :][: widths[-1]] = tail.weights[-1][0]
    return matrices, vectors


def _multiprocessors(device: torch.device) -> int:
    if programs:
        return programs
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _of_table(precision: str, batch: int, device: torch.device) -> Blocks:
    n = _multiprocessors(device)
    return next((b for b in SHAPES[precision] if b.rows * n >= batch), SHAPES[precision][-1])


def _n_programs(choice: Blocks, batch: int, device: torch.device) -> int:
    return min(_multiprocessors(device), -(-batch // choice.rows))


def _seconds(launch: Callable[[], object]) -> float:
    """Of a launch, by events: the shortest of three, or of fewer if they are long, after one that compiles."""
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


_fastest: dict[tuple[object, ...], Blocks] = {}


def _choose(
    direction: str, precision: str, widths: Sequence[int], like: Tensor, prepare: Callable[[Blocks], Callable[[], object]]
) -> Blocks:
    """The shape of a program for a batch like this [B, *]; `prepare` gives a launch with a shape, which may be repeated.

    Not `triton.autotune`: how the arrays are laid out depends on the shape, and nothing may be timed while a graph is captured.
    """
    batch, device = like.shape[0], like.device
    if blocks:
        return blocks
    key = (direction, precision, tuple(widths), device, (batch - 1).bit_length())
    if key in _fastest:
        return _fastest[key]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not tune or capturing:
        return _of_table(precision, batch, device)
    smallest, *others = SHAPES[precision]
    candidates = [smallest, *(b for b in others if b.rows < 2 * batch)]
    if len(candidates) > 1:
        times = {candidate: _seconds(prepare(candidate)) for candidate in candidates}
        _fastest[key] = min(candidates, key=times.__getitem__)
    else:
        _fastest[key] = smallest
    return _fastest[key]


def _in_work_dtype(tail: Tail, a: Tensor) -> Tail:
    """For the PyTorch loop, whose caller has kept bfloat16 weights as they are."""
    return tail._replace(weights=[w.to(a.dtype) for w in tail.weights], biases=[b.to(a.dtype) for b in tail.biases])


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

    Products of float32 are IEEE float32, TF32 where `torch.get_float32_matmul_precision()` is "high", and of numbers rounded
    to bfloat16 where it is "medium" or the weights are bfloat16; sums and states are float32 always. With implicit sub-steps
    they are IEEE, or three TF32 products each where they would be rounded.
    """
    require(a)
    if _delegated(a, tail, scheme, n_steps):
        tail = _in_work_dtype(tail, a)
        return torch_backend.forward(a, K, tail, dt, scheme, n_steps, every_state, with_energy, memory, solver)
    batch, h = a.shape
    sq = a.new_empty(batch, n_steps if every_state else 1, h)
    sp, end = torch.empty_like(sq), torch.empty(batch, h, dtype=a.dtype, device=a.device)
    energy = a.new_empty(batch, n_steps if with_energy else 0)
    tape = a.new_empty(batch, n_steps, len(scheme), tape_width(tail.widths, memory))
    implicit = any(stage.implicit for stage in scheme)
    residual = a.new_empty(batch, n_steps if implicit else 0)
    rolled = Rolled(end, sq, sp, energy, tape, residual, torch.empty_like(residual, dtype=torch.int32))
    precision = _precision(a, tail, scheme)
    moves = _moves(tuple(scheme), solver.tolerance, a.device, a.dtype)
    product_dtype = torch.bfloat16 if precision == "bf16" else a.dtype

    def prepare(choice: Blocks) -> Callable[[], None]:
        layout = layout_of(tuple(tail.widths), choice, precision, tail.activation.layers[0], implicit)
        C = layout.forward._replace(EVERY_STATE=every_state, WITH_ENERGY=with_energy)
        matrices, vectors = _pack(C, K, tail, moves.distinct, product_dtype, transposed=True)
        return partial(
            _launch_forward, C, layout.launch, _n_programs(choice, batch, a.device), a.contiguous(), rolled, matrices, vectors,
            dt.contiguous(), moves, solver.max_evaluations,
        )  # fmt: skip

    prepare(_choose("forward", precision, tail.widths, a, prepare))()
    return rolled


def _launch_forward(
    C: Constants,
    launch: dict[str, int],
    n_programs: int,
    a: Tensor,
    out: Rolled,
    matrices: Tensor,
    vectors: Tensor,
    dt: Tensor,
    moves: Moves,
    max_evaluations: int,
) -> None:
    batch, n_steps, n_sub, width = out.tape.shape
    rows = n_programs * C.ROWS
    work, layers = a.new_empty(rows, C.WORKS), matrices.new_empty(rows, C.LAYERS)
    history = a.new_empty(rows if C.IMPLICIT else 0, n_sub, len(torch_backend.EXTRAPOLATION) - 1, C.N[0])
    C = C._replace(TAPE=width, STORE=width == C.TAPE and C.L > 1)
    with torch.cuda.device_of(a):
        _kernels().forward_kernel[(n_programs,)](
            a, *out, matrices, vectors, dt, dt.stride(0) if dt.shape[0] > 1 else 0, moves.steps, moves.which, moves.solver,
            work, layers, history, batch, n_steps, n_sub, max_evaluations, for_triton(C), **launch,
        )  # fmt: skip


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
    require(la)
    n_steps, n_sub = tape.shape[1], len(scheme)
    if _delegated(la, tail, scheme, n_steps):
        tail = _in_work_dtype(tail, la)
        return torch_backend.backward(la, lsq, lsp, gsq, gsp, gE, tape, K, tail, dt, scheme, memory, sums, solver)
    every_state = gsq.shape[1] == n_steps
    if not every_state:
        lsq, lsp = lsq + gsq[:, -1], lsp + gsp[:, -1]
    la, lsq, lsp = (x.clone(memory_format=torch.contiguous_format) for x in (la, lsq, lsp))
    gdt = la.new_empty(la.shape[0], n_steps)
    batch, precision = la.shape[0], _precision(la, tail, scheme)
    residual = la.new_zeros(batch)
    moves = _moves(tuple(scheme), solver.tolerance, la.device, la.dtype)
    implicit = any(stage.implicit for stage in scheme)
    product_dtype = torch.bfloat16 if precision == "bf16" else la.dtype
    tape, gsq, gsp, dt, gE_ = (x.contiguous() for x in (tape, gsq, gsp, dt, gdt if gE is None else gE))

    def prepare(choice: Blocks) -> Callable[..., Iterator[tuple[Constants, Tensor]]]:
        """A sweep over all steps that yields every chunk's factors, given la, lsq and lsp, which it takes along."""
        layout = layout_of(tuple(tail.widths), choice, precision, tail.activation.layers[0], implicit)
        C = layout.backward._replace(SUMS=sums is not None, EVERY_STATE=every_state, WITH_ENERGY=gE is not None)
        matrices, vectors = _pack(C, K, tail, moves.distinct, product_dtype, transposed=False)
        step_bytes = n_sub * (
            (C.FACTORS * product_dtype.itemsize if sums is not None else 0)
            + (C.TAPE * la.dtype.itemsize if memory == "recompute" else 0)
        )

        def sweep(la: Tensor, lsq: Tensor, lsp: Tensor) -> Iterator[tuple[Constants, Tensor]]:
            for rows, steps in _chunks(batch, n_steps, C.ROWS, step_bytes):
                n, n_chunk = rows.stop - rows.start, steps.stop - steps.start
                n_programs = _n_programs(choice, n, la.device)
                saved = tape[rows]
                if memory == "recompute" and C.L > 1:
                    saved = _restored(layout, saved[:, steps], matrices, vectors, moves)
                work = la.new_empty(n_programs * C.ROWS, C.WORKS)
                held = n_chunk * n_sub * -(-n // C.ROWS) if sums is not None else n_programs
                factors = matrices.new_empty(held * C.ROWS, C.FACTORS)
                with torch.cuda.device_of(la):
                    _kernels().backward_kernel[(n_programs,)](
                        la[rows], lsq[rows], lsp[rows], gsq[rows], gsp[rows], gE_[rows], gdt[rows], residual[rows], saved,
                        matrices, vectors, dt[rows] if dt.shape[0] > 1 else dt, n_steps if dt.shape[0] > 1 else 0, moves.steps,
                        moves.which, moves.solver, work, factors, n, n_steps, saved.shape[1], steps.start,
                        0 if saved.shape[1] == n_chunk else steps.start, n_chunk, n_sub, solver.max_evaluations, for_triton(C),
                        **layout.launch,
                    )  # fmt: skip
                yield C, factors

        return sweep

    def first_chunk(choice: Blocks) -> Callable[[], object]:
        sweep = prepare(choice)
        return lambda: next(sweep(la.clone(), lsq.clone(), lsp.clone()))

    choice = _choose("backward", precision, tail.widths, la, first_chunk)
    residual.zero_()  # what was timed has left its own
    for C, factors in prepare(choice)(la, lsq, lsp):
        if sums is not None:
            _add_gradients(sums, factors, C, scheme)
    if sums is not None and gE is not None:
        sums.biases[-1].add_(gE.sum())
    return la, lsq, lsp, gdt, residual


def _restored(layout: Layout, a: Tensor, matrices: Tensor, vectors: Tensor, moves: Moves) -> Tensor:
    """Every layer's values [rows, steps, sub-steps, TAPE] from the first one's.

    They depend on nothing else, so all of them are samples of one launch that moves nowhere.
    """
    C = layout.forward._replace(
        WORKS=3 * layout.forward.N[0], POINT_AT=0, IMPLICIT=False, EVERY_STATE=False, WITH_ENERGY=False, MOVE=False
    )
    points = a.reshape(-1, 1, 1, C.WIDTHS[0])
    tape = a.new_empty(points.shape[0], 1, 1, C.TAPE)
    n_programs = _n_programs(layout.blocks, points.shape[0], a.device)
    out = Rolled(points, points, points, points, tape, points, points)
    _launch_forward(C, layout.launch, n_programs, points, out, matrices, vectors, vectors[None, :1], moves, 0)
    return tape.view(*a.shape[:3], C.TAPE)


def _chunks(batch: int, n_steps: int, rows: int, step_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Samples and steps of which no more than the bound is held at a time, for each sample the last step first.

    All samples and a few steps, as long as that can be: more samples keep more of the chip busy.
    """
    most_rows = max(1, min(bound // max(step_bytes * rows, 1), -(-batch // rows))) * rows
    most_steps = max(1, min(bound // max(step_bytes * most_rows, 1), n_steps))
    for row in range(0, batch, most_rows):
        for stop in range(n_steps, 0, -most_steps):
            yield slice(row, min(row + most_rows, batch)), slice(max(stop - most_steps, 0), stop)


def _add_product(total: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
    """total += factor x^T y; x and y may be bfloat16 where the sum is float32."""
    if x.dtype == total.dtype:
        total.addmm_(x.T, y, alpha=factor)
    else:
        total.add_(torch.mm(x.T, y, out_dtype=total.dtype), alpha=factor)


def _add_gradients(sums: Gradients, factors: Tensor, C: Constants, scheme: Sequence[SubStep]) -> None:
    """Products of what the backward kernel left. Of every sub-step

        dK += (dt delta)^T (drift la + id nu) - (kick la + ik nu)^T (dt delta)

    and of every layer dW += e^T zd + r^T z, db += sum r.
    """

    def values(at: int, j: int) -> Tensor:
        return factors[:, at : at + C.WIDTHS[j]]

    las, steps, nus = (values(at, 0).chunk(len(scheme)) for at in (0, C.STEP_AT, C.NU_AT if C.IMPLICIT else 0))
    for stage, la, step, nu in zip(scheme, las, steps, nus, strict=True):
        if stage.implicit:
            _add_product(sums.K, stage.kick * la + stage.implicit_kick * nu, step, -1.0)
            _add_product(sums.K, step, stage.drift * la + stage.implicit_drift * nu)
            continue
        if stage.kick:
            _add_product(sums.K, la, step, -stage.kick)
        if stage.drift:
            _add_product(sums.K, step, la, stage.drift)
    for j in range(C.L - 1):
        e, r, zd, z = values(C.E_AT[j + 1], j + 1), values(C.R_AT[j + 1], j + 1), values(C.ZD_AT[j], j), values(C.Z_AT[j], j)
        _add_product(sums.weights[j], e, zd)
        _add_product(sums.weights[j], r, z)
        sums.biases[j].add_(r.sum(0, dtype=sums.K.dtype))
    sums.weights[-1].add_(values(C.TOP_AT, C.L - 1).sum(0, dtype=sums.K.dtype))
