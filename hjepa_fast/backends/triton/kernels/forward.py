"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activation
from .product import product
from .solve import COEFFICIENTS, EPS, MOVES, TINY, anderson, next_point, note

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types


@triton.jit
def _look(a, layer, tape, keep, n, C: tl.constexpr):
    """A tile of the point where the next gradient is evaluated."""
    if C.TAPE > 0:
        tl.store(tape + (n + tl.arange(0, C.COLUMNS))[None, :], a, mask=keep)
    if C.L > 1:
        z, slope, _ = activation(a, C.ACTIVATION)
        tl.store(layer + C.X_AT[0] + n, z)
        tl.store(layer + C.S_AT[0] + n, slope)


@triton.jit
def _advance(work, n, step, kick, drift, C: tl.constexpr):
    """A tile of sq <- sq + drift dt delta and sp <- sp - kick dt delta."""
    if drift != 0:
        tl.store(work + C.N[0] + n, tl.load(work + C.N[0] + n) + drift * step)
    if kick != 0:
        tl.store(work + 2 * C.N[0] + n, tl.load(work + 2 * C.N[0] + n) - kick * step)


@triton.jit
def _gradient(work, layers, layer, tape, matrices_ptr, vectors_ptr, live, dt, kick, drift, C: tl.constexpr):
    """dt delta at the point that `_look` was given, which moves sq and sp unless the point may be implicit; returns F there
    without the output bias.

    Up: a_{j+1} = z_j W^T + b and z_{j+1}; at the last layer the energy and e. Down: g_j = e_{j+1} W and e_j = g_j s', which
    below the last is delta.
    """
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    BELOW: tl.constexpr = C.L - 2 if C.L > 1 else 0
    column = tl.arange(0, COLUMNS)
    energy = tl.zeros((ROWS,), WORK)
    for j in tl.static_range(C.L - 1):
        for n in range(0, C.N[j + 1], COLUMNS):
            y = product(layers + C.X_AT[j], matrices_ptr + C.W_AT[j] + n * C.N[j], C.LAYERS, C.N[j], WORK, C)
            y += tl.load(vectors_ptr + C.B_AT[j + 1] + n + column)[None, :]
            if C.STORE:
                inside = live[:, None] & (n + column < C.WIDTHS[j + 1])[None, :]
                tl.store(tape + (C.A_AT[j + 1] + n + column)[None, :], y, mask=inside)
            z, slope, _ = activation(y, C.ACTIVATION)
            if j == C.L - 2:
                out = tl.load(vectors_ptr + C.OUT_AT + n + column)[None, :]
                energy += tl.sum(z * out, 1)
                tl.store(layer + C.X_AT[j + 1] + n, out * slope)
            else:
                tl.store(layer + C.X_AT[j + 1] + n, z)
                tl.store(layer + C.S_AT[j + 1] + n, slope)
        tl.debug_barrier()
    for j in tl.static_range(BELOW, -1, -1):
        for n in range(0, C.N[j], COLUMNS):
            if C.L > 1:
                below = matrices_ptr + C.T_AT[j] + n * C.N[j + 1]
                g = product(layers + C.X_AT[j + 1], below, C.LAYERS, C.N[j + 1], WORK, C)
                if C.STORE:
                    inside = live[:, None] & (n + column < C.WIDTHS[j])[None, :]
                    tl.store(tape + (C.G_AT[j] + n + column)[None, :], g, mask=inside)
                e = g * tl.load(layer + C.S_AT[j] + n).to(WORK)
            else:
                z, slope, _ = activation(tl.load(work + C.POINT_AT + n), C.ACTIVATION)
                out = tl.load(vectors_ptr + C.OUT_AT + n + column)[None, :]
                energy += tl.sum(z * out, 1)
                e = out * slope
            if j > 0:
                tl.store(layer + C.X_AT[j] + n, e)
            elif C.MOVE:
                step = dt[:, None] * e
                tl.store(layer + n, step)
                if not C.IMPLICIT:
                    _advance(work, n, step, kick, drift, C)
        tl.debug_barrier()
    return energy


@triton.jit(
    do_not_specialize=["dt_row", "n_rows", "n_steps", "n_sub", "most"],
    # parts of other tensors, which begin anywhere
    do_not_specialize_on_alignment=["a_ptr", "dt_ptr"],
)
def forward_kernel(
    a_ptr,  # [rows, h]
    a_out_ptr,  # [rows, h]
    sq_ptr,  # [rows, n_steps or 1, h]
    sp_ptr,
    energy_ptr,  # [rows, n_steps]
    tape_ptr,  # [rows, n_steps, n_sub, TAPE]
    residual_ptr,  # [rows, n_steps], and the evaluations, int32
    evaluations_ptr,
    matrices_ptr,
    vectors_ptr,
    dt_ptr,
    dt_row,
    work_ptr,  # [programs, ROWS, WORKS]: a, sq, sp; with implicit sub-steps the point and `note`'s
    layers_ptr,  # [programs, ROWS, LAYERS]: dt delta; of each layer z, then e; s' of every layer but the last
    history_ptr,  # [programs, n_sub, 5, ROWS, N[0]]: how far points were from the state, in the last steps
    n_rows,
    n_steps,
    n_sub,
    most,  # evaluations
    C: tl.constexpr,
):
    """Every step of the rollout: `backends.torch.forward` without mixed sub-steps."""
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    H: tl.constexpr = C.WIDTHS[0]
    N0: tl.constexpr = C.N[0]
    numbers = vectors_ptr + C.NUMBERS_AT
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    work = work_ptr + program * (ROWS * C.WORKS) + (lane[:, None] * C.WORKS + column[None, :])
    layers = layers_ptr + program * (ROWS * C.LAYERS)
    layer = layers + (lane[:, None] * C.LAYERS + column[None, :])
    solve = work + 4 * N0
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = lane.to(tl.int64) + block * ROWS
        live = rows < n_rows
        tape = tape_ptr + rows[:, None] * n_steps * n_sub * C.TAPE
        for n in range(0, N0, COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            a = tl.load(a_ptr + rows[:, None] * H + (n + column)[None, :], mask=inside, other=0.0)
            tl.store(work + n, a)
            tl.store(work + N0 + n, tl.zeros((ROWS, COLUMNS), WORK))
            tl.store(work + 2 * N0 + n, tl.zeros((ROWS, COLUMNS), WORK))
            if not C.IMPLICIT:
                _look(a, layer, tape, inside, n, C)
        tl.debug_barrier()
        for t in range(n_steps):
            dt = tl.load(dt_ptr + rows * dt_row + t, mask=live, other=0.0)
            worst = tl.zeros((ROWS,), WORK)
            evaluations = tl.zeros((ROWS,), tl.int32)
            for i in range(n_sub):
                stage = numbers + MOVES + 6 * i
                kick = tl.load(stage)
                drift = tl.load(stage + 1)
                if C.IMPLICIT:
                    implicit = (tl.load(stage + 2) != 0) | (tl.load(stage + 3) != 0)
                    matrix = matrices_ptr + C.M_AT + tl.load(stage + 5).to(tl.int64) * (N0 * N0)
                    history = history_ptr + (program * n_sub + i) * (5 * ROWS * N0) + lane[:, None] * N0 + column[None, :]
                    now = history + (t % 5) * (ROWS * N0)
                    known = tl.where(implicit, tl.minimum(t, 5), 0)
                    for n in range(0, N0, COLUMNS):
                        y = tl.load(work + n)
                        for k in range(known):
                            before = tl.load(history + ((t - 1 - k) % 5) * (ROWS * N0) + n)
                            y += tl.load(numbers + COEFFICIENTS + 5 * known + k) * before
                        tl.store(work + C.POINT_AT + n, y)
                        _look(y, layer, tape, live[:, None] & (n + column < H)[None, :], n, C)
                    tl.debug_barrier()
                    energy = tl.zeros((ROWS,), WORK)
                    residual = tl.zeros((ROWS,), WORK)
                    active = live
                    count = 0
                    searching = n_sub > 0
                    while searching:
                        energy = _gradient(work, layers, layer, tape, matrices_ptr, vectors_ptr, live, dt, kick, drift, C)
                        searching = n_sub < 0
                        if implicit:
                            error = tl.zeros((ROWS,), WORK)
                            size = tl.full((ROWS,), 1.0, WORK)
                            for n in range(0, N0, COLUMNS):
                                move = product(layers, matrix + n * N0, C.LAYERS, N0, WORK, C)
                                y = tl.load(work + C.POINT_AT + n)
                                r = tl.load(work + n) + move - y
                                change = move - tl.load(now + n)
                                largest_r, largest_y = note(solve, n, y, r, change, count, C)
                                tl.store(now + n, move)
                                error = tl.maximum(error, largest_r)
                                size = tl.maximum(size, largest_y)
                            tl.debug_barrier()
                            residual = error / size
                            evaluations += active.to(tl.int32)
                            active = active & (residual > tl.load(numbers)) & (residual < float("inf"))
                            searching = (tl.max(active.to(tl.int32), 0) > 0) & (count + 1 < most)
                            if searching:
                                weights = anderson(solve, count, tl.load(numbers + EPS), tl.load(numbers + TINY), C)
                                for n in range(0, N0, COLUMNS):
                                    y = next_point(solve, n, tl.load(work + C.POINT_AT + n), active, weights, count, C)
                                    tl.store(work + C.POINT_AT + n, y)
                                    _look(y, layer, tape, live[:, None] & (n + column < H)[None, :], n, C)
                                tl.debug_barrier()
                            count += 1
                    worst = tl.maximum(worst, tl.where(residual == residual, residual, float("inf")))
                else:
                    energy = _gradient(work, layers, layer, tape, matrices_ptr, vectors_ptr, live, dt, kick, drift, C)
                if C.WITH_ENERGY:
                    energy += tl.load(vectors_ptr)
                    tl.store(energy_ptr + rows * n_steps + t, energy, mask=live & (i == 0))
                if C.MOVE:
                    # a <- a + dt delta (drift K - kick K^T), and without implicit sub-steps the next point there
                    tape += C.TAPE
                    matrix = matrices_ptr + C.M_AT + tl.load(stage + 4).to(tl.int64) * (N0 * N0)
                    if C.EVERY_STATE:
                        shown = i == n_sub - 1
                        seen = rows * n_steps + t
                    else:
                        shown = (i == n_sub - 1) & (t == n_steps - 1)
                        seen = rows
                    more = live & ((t < n_steps - 1) | (i < n_sub - 1))
                    for n in range(0, N0, COLUMNS):
                        move = product(layers, matrix + n * N0, C.LAYERS, N0, WORK, C)
                        a = tl.load(work + n) + move
                        tl.store(work + n, a)
                        real = (n + column < H)[None, :]
                        if C.IMPLICIT:
                            _advance(work, n, tl.load(layer + n), kick, drift, C)
                        else:
                            _look(a, layer, tape, more[:, None] & real, n, C)
                        if shown:
                            if C.IMPLICIT:
                                tl.debug_barrier()  # `_advance` has just written what is read here
                            at = seen[:, None] * H + (n + column)[None, :]
                            inside = live[:, None] & real
                            tl.store(sq_ptr + at, tl.load(work + N0 + n), mask=inside)
                            tl.store(sp_ptr + at, tl.load(work + 2 * N0 + n), mask=inside)
                    tl.debug_barrier()
            if C.IMPLICIT:
                tl.store(residual_ptr + rows * n_steps + t, worst, mask=live)
                tl.store(evaluations_ptr + rows * n_steps + t, evaluations, mask=live)
        if C.MOVE:
            for n in range(0, N0, COLUMNS):
                inside = live[:, None] & (n + column < H)[None, :]
                tl.store(a_out_ptr + rows[:, None] * H + (n + column)[None, :], tl.load(work + n), mask=inside)
        tl.debug_barrier()
