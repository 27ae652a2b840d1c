"""The hidden-space loop on NVIDIA GPUs: a rollout is one kernel launch, written in Triton (see `triton_kernels.py`).

Triton is imported when a rollout first needs it. What the kernels do not do (implicit and mixed sub-steps, a linear H,
float64, nothing to do) is the PyTorch loop's.

A call can be captured in a CUDA graph once the same call has run before: that compiles the kernels and copies the scheme's
coefficients to the device. Nothing else waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schemes import SubStep
from . import torch as torch_backend
from .torch import Gradients, Rolled, Solver, Tail, tape_width

product = torch_backend.product

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


# By precision, smallest first: the first is taken of which the chip holds as many programs as the batch needs, else the last.
# A program reads every matrix from the L2 cache at each gradient, so that more rows cost little until the products do. The
# tiles fit into 99 KiB of shared memory, what the smallest chips since 2020 have.
SHAPES: dict[str, tuple[Blocks, ...]] = {
    "ieee": (Blocks(16, 128, 32, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(64, 64, 32, 8, 3)),
    "tf32": (Blocks(16, 128, 32, 8, 4), Blocks(64, 128, 32, 8, 3), Blocks(128, 64, 32, 8, 3)),
    "bf16": (Blocks(16, 128, 64, 8, 4), Blocks(64, 128, 64, 8, 3), Blocks(128, 64, 64, 8, 3)),
}
_BOUND = 2**31
"""Bytes of the factors of the weights' gradients, and of restored layer values, that are held at a time."""

# For tests: instead of the tables' choice and of the chip's number of multiprocessors; the bound above.
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
    return empty or double or not 0 < len(tail.weights) <= _MAX_LAYERS or any(stage.mix or stage.implicit for stage in scheme)


def require(a: Tensor) -> None:
    if not available():
        raise RuntimeError(f"hjepa_fast: {why_not()}")
    if not a.is_cuda and not _interpreted:
        raise RuntimeError(f"hjepa_fast: the Triton backend runs on a CUDA device; the tensors are on {a.device}")


def _precision(a: Tensor, tail: Tail) -> str:
    setting = torch.get_float32_matmul_precision()
    if a.dtype != torch.float32:
        return "ieee"
    if tail.weights[0].dtype == torch.bfloat16 or setting == "medium":
        return "bf16"
    return "tf32" if setting == "high" else "ieee"


class Layout(NamedTuple):
    """Where things are in the kernels' arrays, by layer from 0; see the kernels' arguments of these names."""

    widths: tuple[int, ...]
    N: tuple[int, ...]
    blocks: Blocks
    W_AT: tuple[int, ...]
    T_AT: tuple[int, ...]
    M_AT: int
    B_AT: tuple[int, ...]
    OUT_AT: int
    A_AT: tuple[int, ...]
    G_AT: tuple[int, ...]
    TAPE: int

    @property
    def constants(self) -> dict[str, Any]:
        """Of both kernels."""
        return {
            "L": len(self.N),
            "WIDTHS": self.widths,
            "N": self.N,
            "W_AT": self.W_AT,
            "T_AT": self.T_AT,
            "M_AT": self.M_AT,
            "OUT_AT": self.OUT_AT,
            "A_AT": self.A_AT,
            "G_AT": self.G_AT,
            "TAPE": self.TAPE,
            "TILE": tuple(self.blocks[:3]),
        }

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}


def _offsets(sizes: Sequence[int], start: int = 0) -> tuple[int, ...]:
    """Where each of `sizes` numbers begins, one after the other, and where the last one ends."""
    return tuple(itertools.accumulate(sizes, initial=start))


@functools.lru_cache(maxsize=256)
def layout_of(widths: tuple[int, ...], blocks: Blocks) -> Layout:
    # not less than what 128 threads share without two of them holding the same number
    largest = max(32, 1 << (max(widths) - 1).bit_length())
    blocks = blocks._replace(columns=min(blocks.columns, largest), inner=min(blocks.inner, largest))
    tile = max(blocks.columns, blocks.inner)
    N = tuple(-(-width // tile) * tile for width in widths)
    areas = [m * n for m, n in itertools.pairwise(N)]
    W_AT = _offsets(areas)
    T_AT = _offsets(areas, W_AT[-1])
    values = _offsets([*widths, *widths[:-1]])
    B_AT = _offsets(N)
    return Layout(
        widths,
        N,
        blocks,
        W_AT[:-1] or (0,),
        T_AT[:-1] or (0,),
        T_AT[-1],
        B_AT,
        B_AT[-1],
        values[: len(N)],
        values[len(N) : -1] or (0,),
        values[-1],
    )


def forward_constants(layout: Layout) -> dict[str, Any]:
    """Of the forward kernel's scratch in the products' dtype."""
    N = layout.N
    at = _offsets([N[0], *N, *N[:-1]])
    return {"B_AT": layout.B_AT, "X_AT": at[1 : len(N) + 1], "S_AT": at[len(N) + 1 : -1] or (0,), "LAYERS": at[-1]}


def backward_constants(layout: Layout) -> dict[str, Any]:
    """Of the backward kernel's scratch and its factors."""
    N = layout.N
    bent = N[:-1] or N
    work = _offsets([*bent, *bent], 3 * N[0])
    at = _offsets([N[0], N[0], N[-1], *N[:-1], *N[:-1], *N[1:], *N[1:]])
    n = len(N) - 1
    Z, ZD, E, R = (at[3 + k * n : 3 + (k + 1) * n] for k in range(4))
    return {
        "S_AT": work[: len(bent)],
        "C_AT": work[len(bent) : -1],
        "WORKS": work[-1],
        "Z_AT": Z or (0,),
        "ZD_AT": ZD or (0,),
        "E_AT": (0, *E),
        "R_AT": (0, *R),
        "STEP_AT": at[1],
        "TOP_AT": at[2],
        "FACTORS": at[-1],
    }


@functools.lru_cache(maxsize=256)
def _moves(scheme: tuple[SubStep, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Kick and drift of every sub-step; which of the distinct pairs each has; these pairs."""
    pairs = [(stage.kick, stage.drift) for stage in scheme]
    distinct = tuple(dict.fromkeys(pairs))
    which = torch.tensor([distinct.index(pair) for pair in pairs], dtype=torch.int32, device=device)
    return torch.tensor(pairs, dtype=dtype, device=device), which, distinct


def _pack(
    layout: Layout, K: Tensor, tail: Tail, moves: Sequence[tuple[float, float]], dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The matrices in the products' dtype and the vectors in K's, padded with zeros."""
    N, widths = layout.N, layout.widths
    h = widths[0]
    matrices = torch.zeros(layout.M_AT + len(moves) * N[0] ** 2, dtype=dtype, device=K.device)
    vectors = torch.zeros(layout.OUT_AT + N[-1], dtype=K.dtype, device=K.device)
    for j, weight in enumerate(tail.weights[:-1]):
        m, n = N[j + 1], N[j]
        matrices[layout.W_AT[j] :][: m * n].view(m, n)[: widths[j + 1], : widths[j]] = weight
        matrices[layout.T_AT[j] :][: m * n].view(n, m)[: widths[j], : widths[j + 1]] = weight.T
    for i, (kick, drift) in enumerate(moves):
        forwards, back = (K.T, K) if transposed else (K, K.T)
        if not kick or not drift:
            move = forwards * drift if drift else back * -kick
        else:
            move = torch.add(forwards * drift, back, alpha=-kick)
        matrices[layout.M_AT + i * N[0] ** 2 :][: N[0] ** 2].view(N[0], N[0])[:h, :h] = move
    for j, bias in enumerate(tail.biases):
        vectors[layout.B_AT[(j + 1) % len(N)] :][: bias.shape[0]] = bias
    vectors[layout.OUT_AT :][: widths[-1]] = tail.weights[-1][0]
    return matrices, vectors


def _multiprocessors(device: torch.device) -> int:
    if programs:
        return programs
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _choose(precision: str, batch: int, device: torch.device) -> tuple[Blocks, int]:
    """The shape of a program and how many run."""
    n = _multiprocessors(device)
    fitting = (b for b in SHAPES[precision] if b.rows * n >= batch)
    choice = blocks or next(fitting, SHAPES[precision][-1])
    return choice, min(n, -(-batch // choice.rows))


def _problem_constants(a: Tensor, tail: Tail, precision: str) -> dict[str, Any]:
    name, beta, threshold = tail.activation
    return {
        "ACTIVATION": (_KINDS[name], float(beta), float(threshold)),
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


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
    to bfloat16 where it is "medium" or the weights are bfloat16; sums and states are float32 always.
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
    precision = _precision(a, tail)
    moves, which, distinct = _moves(tuple(scheme), a.device, a.dtype)
    choice, n_programs = _choose(precision, batch, a.device)
    layout = layout_of(tuple(tail.widths), choice)
    product_dtype = torch.bfloat16 if precision == "bf16" else a.dtype
    matrices, vectors = _pack(layout, K, tail, distinct, product_dtype, transposed=True)
    _launch_forward(
        layout, n_programs, a.contiguous(), end, sq, sp, energy, tape, matrices, vectors, dt.contiguous(), moves, which,
        EVERY_STATE=every_state, WITH_ENERGY=with_energy, MOVE=True, **_problem_constants(a, tail, precision),
    )  # fmt: skip
    none = a.new_empty(batch, 0)
    return Rolled(end, sq, sp, energy, tape, none, none.int())


def _launch_forward(
    layout: Layout,
    n_programs: int,
    a: Tensor,
    end: Tensor,
    sq: Tensor,
    sp: Tensor,
    energy: Tensor,
    tape: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    dt: Tensor,
    moves: Tensor,
    which: Tensor,
    **constants: Any,
) -> None:
    batch, n_steps, n_sub, width = tape.shape
    scratch = forward_constants(layout)
    work = a.new_empty(n_programs * layout.blocks.rows, 3 * layout.N[0])
    layers = matrices.new_empty(n_programs * layout.blocks.rows, scratch["LAYERS"])
    constants |= layout.constants | scratch | {"TAPE": width, "STORE": width == layout.TAPE and len(layout.N) > 1}
    with torch.cuda.device_of(a):
        _kernels().forward_kernel[(n_programs,)](
            a, end, sq, sp, energy, tape, matrices, vectors, dt, dt.stride(0) if dt.shape[0] > 1 else 0, moves, which, work,
            layers, batch, n_steps, n_sub, **constants, **layout.launch,
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
    batch, precision = la.shape[0], _precision(la, tail)
    moves, which, distinct = _moves(tuple(scheme), la.device, la.dtype)
    choice, most_programs = _choose(precision, batch, la.device)
    layout = layout_of(tuple(tail.widths), choice)
    places = backward_constants(layout)
    product_dtype = torch.bfloat16 if precision == "bf16" else la.dtype
    matrices, vectors = _pack(layout, K, tail, distinct, product_dtype, transposed=False)
    constants = _problem_constants(la, tail, precision) | layout.constants
    step_bytes = n_sub * (
        (places["FACTORS"] * product_dtype.itemsize if sums is not None else 0)
        + (layout.TAPE * la.dtype.itemsize if memory == "recompute" else 0)
    )
    tape, gsq, gsp, dt, gE_ = (x.contiguous() for x in (tape, gsq, gsp, dt, gdt if gE is None else gE))
    for rows, steps in _chunks(batch, n_steps, layout.blocks.rows, step_bytes):
        n, n_chunk = rows.stop - rows.start, steps.stop - steps.start
        n_blocks = -(-n // layout.blocks.rows)
        n_programs = min(n_blocks, most_programs)
        saved = tape[rows]
        if memory == "recompute" and len(layout.widths) > 1:
            saved = _restored(layout, saved[:, steps], matrices, vectors, moves, which, constants)
        work = la.new_empty(n_programs * layout.blocks.rows, places["WORKS"])
        held = n_chunk * n_sub * n_blocks if sums is not None else n_programs
        factors = matrices.new_empty(held * layout.blocks.rows, places["FACTORS"])
        with torch.cuda.device_of(la):
            _kernels().backward_kernel[(n_programs,)](
                la[rows], lsq[rows], lsp[rows], gsq[rows], gsp[rows], gE_[rows], gdt[rows], saved, matrices, vectors,
                dt[rows] if dt.shape[0] > 1 else dt, n_steps if dt.shape[0] > 1 else 0, moves, which, work, factors,
                n, n_steps, saved.shape[1], steps.start, 0 if saved.shape[1] == n_chunk else steps.start, n_chunk, n_sub,
                SUMS=sums is not None, EVERY_STATE=every_state, WITH_ENERGY=gE is not None, **constants, **places,
                **layout.launch,
            )  # fmt: skip
        if sums is not None:
            _add_gradients(sums, factors, layout, places, scheme)
    if sums is not None and gE is not None:
        sums.biases[-1].add_(gE.sum())
    return la, lsq, lsp, gdt, la.new_zeros(batch)


def _restored(
    layout: Layout, a: Tensor, matrices: Tensor, vectors: Tensor, moves: Tensor, which: Tensor, constants: dict[str, Any]
) -> Tensor:
    """Every layer's values [rows, steps, sub-steps, TAPE] from the first one's.

    They depend on nothing else, so all of them are samples of one launch that moves nowhere.
    """
    points = a.reshape(-1, 1, 1, layout.widths[0])
    tape = a.new_empty(points.shape[0], 1, 1, layout.TAPE)
    n_programs = min(-(-points.shape[0] // layout.blocks.rows), _multiprocessors(a.device))
    _launch_forward(
        layout, n_programs, points, points, points, points, points, tape, matrices, vectors, vectors[None, :1], moves, which,
        EVERY_STATE=False, WITH_ENERGY=False, MOVE=False, **constants,
    )  # fmt: skip
    return tape.view(*a.shape[:3], layout.TAPE)


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


def _add_gradients(sums: Gradients, factors: Tensor, layout: Layout, places: dict[str, Any], scheme: Sequence[SubStep]) -> None:
    """Products of what the backward kernel left: dK += drift (dt delta)^T la - kick la^T (dt delta) of every sub-step, and
    dW += e^T zd + r^T z, db += sum r of every layer."""
    widths = layout.widths

    def values(at: int, width: int) -> Tensor:
        return factors[:, at : at + width]

    las, steps = (values(at, widths[0]).chunk(len(scheme)) for at in (0, places["STEP_AT"]))
    for stage, la, step in zip(scheme, las, steps, strict=True):
        if stage.kick:
            _add_product(sums.K, la, step, -stage.kick)
        if stage.drift:
            _add_product(sums.K, step, la, stage.drift)
    for j in range(len(widths) - 1):
        e, r = (values(places[name][j + 1], widths[j + 1]) for name in ("E_AT", "R_AT"))
        zd, z = (values(places[name][j], widths[j]) for name in ("ZD_AT", "Z_AT"))
        _add_product(sums.weights[j], e, zd)
        _add_product(sums.weights[j], r, z)
        sums.biases[j].add_(r.sum(0, dtype=sums.K.dtype))
    sums.weights[-1].add_(values(places["TOP_AT"], widths[-1]).sum(0, dtype=sums.K.dtype))
