"""What launches the kernels, and what is done around them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...schemes import SubStep
from .. import torch as torch_backend
from ..torch import Gradients, Rolled, Solver, Tail, tape_width
from . import layout, tune
from .layout import Blocks, Constants, Layout, Packed, for_triton, interpreted

_MAX_LAYERS = 8

float32 = os.environ.get("HJEPA_FAST_FLOAT32", "tf32x3")
"""Products of float32 at full precision: "tf32x3" or "ieee"."""
if float32 not in ("tf32x3", "ieee"):
    raise ValueError(f'HJEPA_FAST_FLOAT32 must be "tf32x3" or "ieee", found "{float32}"')

# once, at import: torch.compile cannot look at files while it traces
_installed = importlib.util.find_spec("triton") is not None


_BOUND = 2**31
"""Bytes of the factors of the weights' gradients, and of restored layer values, that are held at a time."""

bound = _BOUND


def available() -> bool:
    """Whether Triton is installed and there is a GPU, or Triton's interpreter is switched on."""
    return _installed and (interpreted or torch.cuda.is_available())


def why_not() -> str:
    """Why `available()` is false, or ""."""
    if available():
        return ""
    if not _installed:
        return "the Triton backend is missing: the package triton is not installed. PyTorch for CUDA on Linux brings it along"
    return "the Triton backend needs a CUDA device, and PyTorch finds none"


def _kernels() -> ModuleType:
    from . import kernels

    return kernels


def _start(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: int) -> None:
    """Launch it; or only have it compiled, where several are compiled at a time."""
    if tune.compiling.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def _delegated(a: Tensor, tail: Tail, scheme: Sequence[SubStep], n_steps: int) -> bool:
    empty = not n_steps or not scheme or not a.shape[0] or 0 in tail.widths
    double = a.dtype == torch.float64 and not interpreted
    unknown = any(own.name not in layout.KINDS for own in tail.activation.layers) or len(tail.activation.layers) > 1
    return empty or double or unknown or not 0 < len(tail.weights) <= _MAX_LAYERS or any(stage.mix for stage in scheme)


def require(a: Tensor) -> None:
    if not available():
        raise RuntimeError(f"hjepa_fast: {why_not()}")
    if not a.is_cuda and not interpreted:
        raise RuntimeError(f"hjepa_fast: the Triton backend runs on a CUDA device; the tensors are on {a.device}")


def _precision(a: Tensor, tail: Tail, scheme: Sequence[SubStep]) -> str:
    """What products are computed in, as Triton calls it, or "bf16".

    Full precision is three TF32 products, of the leading and of the trailing halves of both factors. Their sums over each tile
    are added up in float32, so that their error is that of multiplications in float32, or less. The equations of implicit
    sub-steps are solved to the last digits of float32, and take it whatever others take.
    """
    setting = torch.get_float32_matmul_precision()
    narrow = tail.weights[0].dtype == torch.bfloat16
    if a.dtype != torch.float32:
        return "ieee"
    if (setting == "highest" and not narrow) or any(stage.implicit for stage in scheme):
        # TF32 came with capability 8
        return float32 if not a.is_cuda or torch.cuda.get_device_capability(a.device) >= (8, 0) else "ieee"
    return "bf16" if narrow or setting == "medium" else "tf32"


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

    Products of float32 are three of TF32 each, as exact as IEEE float32; one where `torch.get_float32_matmul_precision()` is
    "high"; and of numbers rounded to bfloat16 where it is "medium" or the weights are bfloat16, but with implicit
    sub-steps three always. Sums and states are float32. HJEPA_FAST_FLOAT32=ieee in the environment multiplies in float32 itself
    instead of three times in TF32. Activations of rounded products are approximated (see `kernels.activation`).
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
    product_dtype = torch.bfloat16 if precision == "bf16" else a.dtype

    def prepare(choice: Blocks) -> Callable[[], None]:
        plan = layout.layout_of(tuple(tail.widths), choice, precision, tail.activation.layers[0], implicit)
        C = plan.forward._replace(EVERY_STATE=every_state, WITH_ENERGY=with_energy)
        packed = _pack(plan.forward, K, tail, scheme, solver, product_dtype, transposed=True)
        return partial(
            _launch_forward, C, plan.launch, tune.n_programs(choice, batch, a.device), a.contiguous(), rolled, packed,
            dt.contiguous(), solver.max_evaluations,
        )  # fmt: skip

    choice = tune.choose("forward", precision, tail.widths, a, prepare)
    own = tail.activation.layers[0]
    first = (tuple(scheme), choice, precision, tuple(tail.widths), own, every_state, with_energy, memory, a.device)
    if first not in _begun and not tune.compiling.get() and not tune.capturing(a.device):
        _begun.add(first)
        jobs: list[tuple[Blocks, Callable[[], object]]] = [(choice, lambda: prepare(choice)())]
        if memory != "none" and not tune.tune:
            jobs.append((choice, partial(_expect_backward, a, K, tail, scheme, every_state, memory, solver)))
        tune.compile_at_once(jobs, ignore_errors=True)
    prepare(choice)()
    return rolled


_begun: set[tuple[object, ...]] = set()
"""What the kernels have been compiled for."""


def _expect_backward(
    a: Tensor,
    K: Tensor,
    tail: Tail,
    scheme: Sequence[SubStep],
    every_state: bool,
    memory: str,
    solver: Solver,
) -> None:
    """Have the backward pass that most likely follows compiled: one of all parameters. Sizes do not matter to the compiler."""
    n_steps = 1 if every_state else 2
    la, gsq, tape = a[:1], a[:1, None], a.new_empty(1, n_steps, len(scheme), tape_width(tail.widths, memory))
    backward(
        la, la, la, gsq, gsq, a.new_empty(1, n_steps), tape, K, tail, a.new_empty(1, n_steps), scheme, memory,
        Gradients.zeros(K, tail), solver,
    )  # fmt: skip


def _pack(
    C: Constants, K: Tensor, tail: Tail, scheme: Sequence[SubStep], solver: Solver, dtype: torch.dtype, transposed: bool
) -> Packed:
    """The matrices and vectors that the kernels read: one launch. Weights may be bfloat16 where K is float32."""
    packed, grid, S = layout.empty(C, K, scheme, dtype, transposed)
    weights, biases = (tuple(x.contiguous() for x in tensors) for tensors in (tail.weights, tail.biases))
    with torch.cuda.device_of(K):
        arguments = [*packed, K.contiguous(), weights, biases, solver.tolerance]
        _start(_kernels().pack_kernel, grid, *arguments, for_triton(C), for_triton(S))
    return packed


def _launch_forward(
    C: Constants,
    launch: dict[str, int],
    n_programs: int,
    a: Tensor,
    out: Rolled,
    packed: Packed,
    dt: Tensor,
    max_evaluations: int,
) -> None:
    batch, n_steps, n_sub, width = out.tape.shape
    rows = n_programs * C.ROWS
    work, layers = a.new_empty(rows, C.WORKS), packed.matrices.new_empty(rows, C.LAYERS)
    history = a.new_empty(rows if C.IMPLICIT else 0, n_sub, len(torch_backend.EXTRAPOLATION) - 1, C.N[0])
    C = C._replace(TAPE=width, STORE=width == C.TAPE and C.L > 1)
    with torch.cuda.device_of(a):
        _start(
            _kernels().forward_kernel, (n_programs,), a, *out, *packed, dt, dt.stride(0) if dt.shape[0] > 1 else 0, work,
            layers, history, batch, n_steps, n_sub, max_evaluations, for_triton(C), **launch,
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
    given = [x.contiguous() for x in (la, lsq, lsp)]
    batch, precision = la.shape[0], _precision(la, tail, scheme)
    implicit = any(stage.implicit for stage in scheme)
    product_dtype = torch.bfloat16 if precision == "bf16" else la.dtype
    tape, gsq, gsp, dt = (x.contiguous() for x in (tape, gsq, gsp, dt))

    def prepare(choice: Blocks) -> Callable[[Sequence[Tensor]], Iterator[tuple[Constants, Tensor]]]:
        """A sweep over all steps that fills what `backward` returns, and yields every chunk's factors."""
        plan = layout.layout_of(tuple(tail.widths), choice, precision, tail.activation.layers[0], implicit)
        C = plan.backward._replace(SUMS=sums is not None, EVERY_STATE=every_state)
        packed = _pack(plan.backward, K, tail, scheme, solver, product_dtype, transposed=False)
        step_bytes = n_sub * (
            (C.FACTORS * product_dtype.itemsize if sums is not None else 0)
            + (C.TAPE * la.dtype.itemsize if memory == "recompute" else 0)
        )

        def sweep(out: Sequence[Tensor]) -> Iterator[tuple[Constants, Tensor]]:
            gE_ = out[3] if gE is None else gE.contiguous()
            for rows, steps in _chunks(batch, n_steps, C.ROWS, step_bytes):
                n, n_chunk = rows.stop - rows.start, steps.stop - steps.start
                n_programs = tune.n_programs(choice, n, la.device)
                saved = tape[rows]
                if memory == "recompute" and C.L > 1:
                    saved = _restored(plan, saved[:, steps], packed)
                work = la.new_empty(n_programs * C.ROWS, C.WORKS)
                held = n_chunk * n_sub * -(-n // C.ROWS) if sums is not None else n_programs
                factors = packed.matrices.new_empty(held * C.ROWS, C.FACTORS)
                # the last steps begin from what was given, those before them from what the last ones left
                begin = given if steps.stop == n_steps else out[:3]
                with torch.cuda.device_of(la):
                    by_row = [x[rows] for x in (*begin, *out[:3], gsq, gsp, gE_, *out[3:])]
                    _start(
                        _kernels().backward_kernel, (n_programs,), *by_row, saved, *packed,
                        dt[rows] if dt.shape[0] > 1 else dt, n_steps if dt.shape[0] > 1 else 0, work, factors, n, n_steps,
                        saved.shape[1], steps.start, 0 if saved.shape[1] == n_chunk else steps.start, n_chunk, n_sub,
                        solver.max_evaluations, int(gE is not None), for_triton(C), **plan.launch,
                    )  # fmt: skip
                yield C, factors

        return sweep

    def empty() -> list[Tensor]:
        return [*[torch.empty_like(x) for x in given], la.new_empty(batch, n_steps), la.new_zeros(batch)]

    def first_chunk(choice: Blocks) -> Callable[[], object]:
        sweep = prepare(choice)
        return lambda: next(sweep(empty()))

    sweep, found = prepare(tune.choose("backward", precision, tail.widths, la, first_chunk)), empty()
    for C, factors in sweep(found):
        if sums is not None and not tune.compiling.get():
            _add_gradients(sums, factors, C, scheme)
    if sums is not None and gE is not None and not tune.compiling.get():
        sums.biases[-1].add_(gE.sum())
    la, lsq, lsp, gdt, residual = found
    return la, lsq, lsp, gdt, residual


def _restored(plan: Layout, a: Tensor, packed: Packed) -> Tensor:
    """Every layer's values [rows, steps, sub-steps, TAPE] from the first one's.

    They depend on nothing else, so all of them are samples of one launch that moves nowhere.
    """
    C = plan.forward._replace(
        WORKS=3 * plan.forward.N[0], POINT_AT=0, IMPLICIT=False, EVERY_STATE=False, WITH_ENERGY=False, MOVE=False
    )
    points = a.reshape(-1, 1, 1, C.WIDTHS[0])
    tape = a.new_empty(points.shape[0], 1, 1, C.TAPE)
    n_programs = tune.n_programs(plan.blocks, points.shape[0], a.device)
    # an array of the kernel's own for all that is not written, so that no other alignment is compiled for
    out = Rolled(tape, tape, tape, tape, tape, tape, tape)
    _launch_forward(C, plan.launch, n_programs, points, out, packed, packed.vectors[None, :1], 0)
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
