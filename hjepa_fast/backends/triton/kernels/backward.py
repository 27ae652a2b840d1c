"""The backward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activation
from .product import product
from .solve import EPS, MOVES, TINY, anderson, next_point, note

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types


@triton.jit
def _first_layer(tape, vectors_ptr, inside, n, C: tl.constexpr):
    """A tile of g, s, s', s'' of the first layer."""
    column = tl.arange(0, C.COLUMNS)
    s, s1, s2 = activation(tl.load(tape + (n + column)[None, :], mask=inside, other=0.0), C.ACTIVATION)
    if C.L > 1:
        g = tl.load(tape + (C.G_AT[0] + n + column)[None, :], mask=inside, other=0.0)
    else:
        g = tl.load(vectors_ptr + C.OUT_AT + n + column)[None, :]
    return g, s, s1, s2


@triton.jit
def _tangent(v, g, s, s1, s2, gE, work, factor, n, C: tl.constexpr):
    """A tile of what `_hessian` starts from, v in the first layer."""
    if C.L > 1:
        tl.store(factor + C.ZD_AT[0] + n, s1 * v)
        tl.store(work + C.S_AT[0] + n, s1)
        tl.store(work + C.C_AT[0] + n, g * s2 * v)
        if C.SUMS:
            tl.store(factor + C.Z_AT[0] + n, s)
    else:
        tl.store(work + C.C_AT[0] + n, g * (s2 * v + gE * s1))
        if C.SUMS:
            tl.store(factor + C.TOP_AT + n, s1 * v + gE * s)


@triton.jit
def _hessian(work, factors, factor, before, keep, tape, matrices_ptr, vectors_ptr, live, gE, C: tl.constexpr):
    """r_0, the Hessian of F times what `_tangent` was given, and the factors of the layers' gradients on the way.

    It is added to la, or kept as nu where a point may be implicit.
    """
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    BELOW: tl.constexpr = C.L - 2 if C.L > 1 else 0
    column = tl.arange(0, C.COLUMNS)
    for j in tl.static_range(1, C.L):
        for n in range(0, C.N[j], C.COLUMNS):
            inside = live[:, None] & (n + column < C.WIDTHS[j])[None, :]
            above = matrices_ptr + C.W_AT[j - 1] + n * C.N[j - 1]
            ad = product(factors + C.ZD_AT[j - 1], above, C.FACTORS, C.N[j - 1], WORK, C)
            a = tl.load(tape + (C.A_AT[j] + n + column)[None, :], mask=inside, other=0.0)
            s, s1, s2 = activation(a, C.ACTIVATION)
            if j == C.L - 1:
                g = tl.load(vectors_ptr + C.OUT_AT + n + column)[None, :]
                tl.store(factor + C.R_AT[j] + n, g * (s2 * ad + gE * s1))
                if C.SUMS:
                    tl.store(factor + C.TOP_AT + n, s1 * ad + gE * s)
            else:
                g = tl.load(tape + (C.G_AT[j] + n + column)[None, :], mask=inside, other=0.0)
                tl.store(factor + C.ZD_AT[j] + n, s1 * ad)
                tl.store(work + C.S_AT[j] + n, s1)
                tl.store(work + C.C_AT[j] + n, g * s2 * ad)
                if C.SUMS:
                    tl.store(factor + C.Z_AT[j] + n, s)
            if C.SUMS:
                tl.store(factor + C.E_AT[j] + n, g * s1)
        tl.debug_barrier()
    for j in tl.static_range(BELOW, -1, -1):
        for n in range(0, C.N[j], C.COLUMNS):
            r = tl.load(work + C.C_AT[j] + n)
            if C.L > 1:
                below = matrices_ptr + C.T_AT[j] + n * C.N[j + 1]
                back = product(factors + C.R_AT[j + 1], below, C.FACTORS, C.N[j + 1], WORK, C)
                r += back * tl.load(work + C.S_AT[j] + n)
            if j > 0:
                tl.store(factor + C.R_AT[j] + n, r)
            elif C.IMPLICIT:
                tl.store(factor + C.NU_AT + n, r)
            else:
                _add_to_la(work, before, keep, r, n)
        tl.debug_barrier()


@triton.jit
def _add_to_la(work, before, keep, nu, n):
    """`before`: la among the factors of the sub-step before this one, if there is any."""
    la = tl.load(work + n) + nu
    tl.store(work + n, la)
    if keep:
        tl.store(before + n, la)


@triton.jit(
    do_not_specialize=[
        "dt_row",
        "n_rows",
        "total",
        "tape_total",
        "start",
        "tape_start",
        "n_steps",
        "n_sub",
        "most",
        "energies",
    ],
    # parts of other tensors, which begin anywhere
    do_not_specialize_on_alignment=["la_in_ptr", "lsq_in_ptr", "lsp_in_ptr", "gsq_ptr", "gsp_ptr", "gE_ptr", "dt_ptr"],
)
def backward_kernel(
    la_in_ptr,  # [rows, h]
    lsq_in_ptr,
    lsp_in_ptr,
    la_ptr,  # what comes out, maybe in the same place
    lsq_ptr,
    lsp_ptr,
    gsq_ptr,  # [rows, total, h]
    gsp_ptr,
    gE_ptr,  # [rows, total], read if `energies` is not 0
    gdt_ptr,  # [rows, total]
    residual_ptr,  # [rows], in and out
    tape_ptr,  # [rows, tape_total, n_sub, TAPE], with every layer
    matrices_ptr,
    vectors_ptr,
    dt_ptr,  # [rows, total], or [1, total] with dt_row = 0
    dt_row,
    work_ptr,  # [programs, ROWS, WORKS]: la, lsq, lsp; s' and g s'' ad of layers; with implicit sub-steps w, x, q and `note`'s
    factors_ptr,  # [n_sub, n_steps, blocks ROWS, FACTORS], or [programs, ROWS, FACTORS] without SUMS
    n_rows,
    total,
    tape_total,
    start,  # steps start, ..., start + n_steps - 1 of those in total
    tape_start,
    n_steps,
    n_sub,
    most,
    energies,
    C: tl.constexpr,
):
    """Every step of the adjoint, the last one first: `backends.torch.backward`, but for the products of the factors.

    With M = drift K - kick K^T, N the same of an implicit point's own moves, and gE = 0 but at a step's first sub-step:

        u = drift lsq - kick lsp + la M^T;  v = dt u;  gdt += u . delta
        ad_0 = v;  zd_j = s' ad_j;  ad_{j+1} = zd_j W^T
        r at the last layer = w (s'' ad + gE s');  r_j = (r_{j+1} W) s' + g_j s'' ad_j;  nu = r_0;  la += nu
        an implicit point:  v = dt (u + q) with q = nu N^T instead, and gdt += q . delta
    """
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    H: tl.constexpr = C.WIDTHS[0]
    N0: tl.constexpr = C.N[0]
    W_AT: tl.constexpr = C.SOLVE_AT
    X_AT: tl.constexpr = C.SOLVE_AT + N0
    Q_AT: tl.constexpr = C.SOLVE_AT + 2 * N0
    numbers = vectors_ptr + C.NUMBERS_AT
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    work = work_ptr + program * (ROWS * C.WORKS) + (lane[:, None] * C.WORKS + column[None, :])
    solve = work + C.SOLVE_AT + 3 * N0
    in_factors = lane[:, None] * C.FACTORS + column[None, :]
    n_blocks = tl.cdiv(n_rows, ROWS)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        rows = lane.to(tl.int64) + block * ROWS
        live = rows < n_rows
        if C.SUMS:
            first = factors_ptr + block * tl.full((), ROWS * C.FACTORS, tl.int64)
            stride = tl.full((), ROWS * C.FACTORS, tl.int64) * n_blocks
        else:
            first = factors_ptr + program * (ROWS * C.FACTORS)
            stride = tl.full((), 0, tl.int64)
        last = first + (n_steps * n_sub - 1) * stride
        for n in range(0, N0, COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            at = rows[:, None] * H + (n + column)[None, :]
            la = tl.load(la_in_ptr + at, mask=inside, other=0.0)
            tl.store(work + n, la)
            tl.store(last + in_factors + n, la)
            tl.store(work + N0 + n, tl.load(lsq_in_ptr + at, mask=inside, other=0.0))
            tl.store(work + 2 * N0 + n, tl.load(lsp_in_ptr + at, mask=inside, other=0.0))
        worst = tl.load(residual_ptr + rows, mask=live, other=0.0)
        tl.debug_barrier()
        for t_back in range(n_steps):
            t = n_steps - 1 - t_back
            dt = tl.load(dt_ptr + rows * dt_row + start + t, mask=live, other=0.0)
            gdt = tl.zeros((ROWS,), WORK)
            for i_back in range(n_sub):
                i = n_sub - 1 - i_back
                stage = numbers + MOVES + 6 * i
                kick = tl.load(stage)
                drift = tl.load(stage + 1)
                gE = tl.load(gE_ptr + rows * total + start + t, mask=live & (i == 0) & (energies != 0), other=0.0)[:, None]
                tape = tape_ptr + ((rows[:, None] * tape_total + tape_start + t) * n_sub + i) * C.TAPE
                factors = first + (i * n_steps + t) * stride
                factor = factors + in_factors
                # where la goes for the sub-step before this one
                keep = (i > 0) | (t > 0)
                before = first + in_factors + tl.where(i > 0, (i - 1) * n_steps + t, (n_sub - 1) * n_steps + t - 1) * stride
                matrix = matrices_ptr + C.M_AT + tl.load(stage + 4).to(tl.int64) * (N0 * N0)
                for n in range(0, N0, COLUMNS):
                    inside = live[:, None] & (n + column < H)[None, :]
                    u = product(factors, matrix + n * N0, C.FACTORS, N0, WORK, C)
                    lsq = tl.load(work + N0 + n)
                    lsp = tl.load(work + 2 * N0 + n)
                    if C.EVERY_STATE:
                        # after the step's last sub-step the caller saw sq and sp
                        seen = inside & (i == n_sub - 1)
                        at = (rows[:, None] * total + start + t) * H + (n + column)[None, :]
                        lsq += tl.load(gsq_ptr + at, mask=seen, other=0.0)
                        lsp += tl.load(gsp_ptr + at, mask=seen, other=0.0)
                        tl.store(work + N0 + n, lsq)
                        tl.store(work + 2 * N0 + n, lsp)
                    u += drift * lsq - kick * lsp
                    g, s, s1, s2 = _first_layer(tape, vectors_ptr, inside, n, C)
                    delta = g * s1
                    gdt += tl.sum(u * delta, 1)
                    v = dt[:, None] * u
                    if C.SUMS:
                        tl.store(factor + C.STEP_AT + n, dt[:, None] * delta)
                    if C.IMPLICIT:
                        tl.store(work + W_AT + n, v)
                        tl.store(work + X_AT + n, v)
                    _tangent(v, g, s, s1, s2, gE, work, factor, n, C)
                tl.debug_barrier()
                if C.IMPLICIT:
                    implicit = (tl.load(stage + 2) != 0) | (tl.load(stage + 3) != 0)
                    matrix = matrices_ptr + C.M_AT + tl.load(stage + 5).to(tl.int64) * (N0 * N0)
                    residual = tl.zeros((ROWS,), WORK)
                    active = live
                    count = 0
                    searching = n_sub > 0
                    while searching:
                        _hessian(work, factors, factor, before, keep, tape, matrices_ptr, vectors_ptr, live, gE, C)
                        searching = n_sub < 0
                        if implicit:
                            error = tl.zeros((ROWS,), WORK)
                            size = tl.full((ROWS,), 0.0, WORK) + tl.load(numbers + TINY)
                            for n in range(0, N0, COLUMNS):
                                q = product(factors + C.NU_AT, matrix + n * N0, C.FACTORS, N0, WORK, C)
                                x = tl.load(work + X_AT + n)
                                r = tl.load(work + W_AT + n) + dt[:, None] * q - x
                                change = dt[:, None] * (q - tl.load(work + Q_AT + n))
                                largest_r, largest_x = note(solve, n, x, r, change, count, C)
                                tl.store(work + Q_AT + n, q)
                                error = tl.maximum(error, largest_r)
                                size = tl.maximum(size, largest_x)
                            tl.debug_barrier()
                            residual = error / size
                            active = active & (residual > tl.load(numbers)) & (residual < float("inf"))
                            searching = (tl.max(active.to(tl.int32), 0) > 0) & (count + 1 < most)
                            if searching:
                                weights = anderson(solve, count, tl.load(numbers + EPS), tl.load(numbers + TINY), C)
                                for n in range(0, N0, COLUMNS):
                                    x = next_point(solve, n, tl.load(work + X_AT + n), active, weights, count, C)
                                    tl.store(work + X_AT + n, x)
                                    inside = live[:, None] & (n + column < H)[None, :]
                                    g, s, s1, s2 = _first_layer(tape, vectors_ptr, inside, n, C)
                                    _tangent(x, g, s, s1, s2, gE, work, factor, n, C)
                                tl.debug_barrier()
                            count += 1
                    worst = tl.maximum(worst, tl.where(residual == residual, residual, float("inf")))
                    for n in range(0, N0, COLUMNS):
                        g, _, s1, _ = _first_layer(tape, vectors_ptr, live[:, None] & (n + column < H)[None, :], n, C)
                        q = tl.where(implicit, tl.load(work + Q_AT + n), 0.0)
                        gdt += tl.sum(q * (g * s1), 1)
                        _add_to_la(work, before, keep, tl.load(factor + C.NU_AT + n), n)
                    tl.debug_barrier()
                else:
                    _hessian(work, factors, factor, before, keep, tape, matrices_ptr, vectors_ptr, live, gE, C)
            tl.store(gdt_ptr + rows * total + start + t, gdt, mask=live)
        for n in range(0, N0, COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            at = rows[:, None] * H + (n + column)[None, :]
            tl.store(la_ptr + at, tl.load(work + n), mask=inside)
            tl.store(lsq_ptr + at, tl.load(work + N0 + n), mask=inside)
            tl.store(lsp_ptr + at, tl.load(work + 2 * N0 + n), mask=inside)
        tl.store(residual_ptr + rows, worst, mask=live)
        tl.debug_barrier()
