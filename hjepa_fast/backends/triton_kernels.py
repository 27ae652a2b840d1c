"""The hidden-space loop's GPU kernels; see `backends/torch.py` for the mathematics and `backends/triton.py` for the caller.

A program owns ROWS samples and takes them through every step and sub-step, so that a rollout is one launch. What one layer
leaves for the next goes through a scratch of the program's own in global memory: tile by tile, with a barrier of the
program's threads between a phase that writes and the phase that reads.

The equations of implicit sub-steps are solved row by row, as `backends.torch.fixed_point` does; a program goes on until the
last of its rows has converged, and those that have stay where they are.

Arrays of the kernels' own are padded with zeros: the widths to whole tiles, the samples to whole programs. The zeros of the
padded matrices keep the padding from reaching anything, so that only what the caller sees needs masks.

Layers are counted from 0 here: layer j has N[j] values padded and WIDTHS[j] real ones, and the first is the hidden space.
What is known when a kernel is compiled is the last argument, C: a `backends.triton.Constants`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types

SOFTPLUS, TANH, SILU, GELU, GELU_TANH, SIN = (tl.constexpr(i) for i in range(6))


@triton.jit
def _log1p(u):
    """log(1 + u), exact for small u too (Kahan): log(w) u / (w - 1) with w = 1 + u as it was rounded."""
    w = 1.0 + u
    exact = w == 1.0
    return tl.where(exact, u, tl.log(w) * (u / tl.where(exact, 1.0, w - 1.0)))


@triton.jit
def _tanh(x):
    """-m / (2 + m) with m = exp(-2 |x|) - 1, which is (w - 1) u / log(w) with w = exp(u) as it was rounded."""
    u = -2.0 * tl.abs(x)
    w = tl.exp(u)
    plain = (w == 1.0) | (w < 0.5)
    m = tl.where(w == 1.0, u, tl.where(plain, w - 1.0, (w - 1.0) * (u / tl.log(tl.where(plain, 0.75, w)))))
    t = -m / (2.0 + m)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _activation(a, ACTIVATION: tl.constexpr):
    """s(a), s'(a), s''(a), the formulas of `activations.py`; ACTIVATION is its kind, beta and threshold."""
    KIND: tl.constexpr = ACTIVATION[0]
    BETA: tl.constexpr = ACTIVATION[1]
    THRESHOLD: tl.constexpr = ACTIVATION[2]
    if KIND == SOFTPLUS:
        x = BETA * a
        u = tl.exp(-tl.abs(x))
        small = u / (1.0 + u)
        large = 1.0 / (1.0 + u)
        linear = x > THRESHOLD
        s = tl.where(linear, a, (tl.maximum(x, 0.0) + _log1p(u)) / BETA)
        s1 = tl.where(linear, 1.0, tl.where(x < 0.0, small, large))
        s2 = tl.where(linear, 0.0, BETA * small * large)
    elif KIND == TANH:
        s = _tanh(a)
        s1 = 1.0 - s * s
        s2 = -2.0 * s * s1
    elif KIND == SILU:
        u = tl.exp(-tl.abs(a))
        sigma = tl.where(a < 0.0, u, 1.0) / (1.0 + u)
        slope = u / ((1.0 + u) * (1.0 + u))
        s = a * sigma
        s1 = sigma + a * slope
        s2 = slope * (2.0 + a * (1.0 - 2.0 * sigma))
    elif KIND == GELU:
        cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        pdf = tl.exp(-0.5 * a * a) * 0.3989422804014327
        s = a * cdf
        s1 = cdf + a * pdf
        s2 = pdf * (2.0 - a * a)
    elif KIND == GELU_TANH:
        t = _tanh(0.7978845608028654 * (a + 0.044715 * a * a * a))
        u1 = 0.7978845608028654 * (1.0 + 0.134145 * a * a)
        u2 = 0.21406444881780076 * a
        slope = 1.0 - t * t
        s = 0.5 * a * (1.0 + t)
        s1 = 0.5 * (1.0 + t) + 0.5 * a * slope * u1
        s2 = slope * u1 + 0.5 * a * slope * (u2 - 2.0 * t * u1 * u1)
    else:
        s = tl.sin(a)
        s1 = tl.cos(a)
        s2 = -s
    return s, s1, s2


@triton.jit
def _product(x_ptr, matrix_ptr, STRIDE: tl.constexpr, K: tl.constexpr, WORK: tl.constexpr, C: tl.constexpr):
    """x M^T for x [ROWS, K] of row stride STRIDE and the COLUMNS rows of M [., K] at `matrix_ptr`.

    M is read along its rows because that is the only order in which Hopper's matrix units take TF32.
    """
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    k = tl.arange(0, C.INNER)
    x_ptrs = x_ptr + tl.arange(0, ROWS)[:, None] * STRIDE + k[None, :]
    matrix_ptrs = matrix_ptr + tl.arange(0, COLUMNS)[None, :] * K + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), WORK)
    for _ in range(0, K, C.INNER):
        acc = tl.dot(tl.load(x_ptrs), tl.load(matrix_ptrs), acc, input_precision=C.PRECISION, out_dtype=WORK)
        x_ptrs += C.INNER
        matrix_ptrs += C.INNER
    return acc


@triton.jit
def _finite_size(x):
    """|x|, infinite where x is not a number: maxima forget those."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _note(solve, n, x, r, dg, count, C: tl.constexpr):
    """Keep a tile of the residual r = G(x) - x, and of the changes of G and r since the last evaluation, dg and dr.

    Returns the largest |r| and |x| of each row. `solve` is [ROWS, r; dg three times; dr three times].
    """
    N0: tl.constexpr = C.N[0]
    if count > 0:
        slot = (count - 1) % 3
        tl.store(solve + (1 + slot) * N0 + n, dg)
        tl.store(solve + (4 + slot) * N0 + n, r - tl.load(solve + n))
    tl.store(solve + n, r)
    return tl.max(_finite_size(r), 1), tl.max(tl.abs(x), 1)


@triton.jit
def _anderson(solve, count, eps, tiny, C: tl.constexpr):
    """Weights of the last three dg in the next x: those with which the dr come closest to r (`backends.torch._anderson`)."""
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    WORK: tl.constexpr = solve.dtype.element_ty
    N0: tl.constexpr = C.N[0]
    zero = tl.zeros((ROWS,), WORK)
    aa, ab, ac, bb, bc, cc, ar, br, cr = zero, zero, zero, zero, zero, zero, zero, zero, zero
    whole = tl.full((ROWS, COLUMNS), True, tl.int1)
    for n in range(0, N0, COLUMNS):
        r = tl.load(solve + n)
        a = tl.load(solve + 4 * N0 + n, mask=whole & (count > 0), other=0.0)
        b = tl.load(solve + 5 * N0 + n, mask=whole & (count > 1), other=0.0)
        c = tl.load(solve + 6 * N0 + n, mask=whole & (count > 2), other=0.0)
        aa += tl.sum(a * a, 1)
        ab += tl.sum(a * b, 1)
        ac += tl.sum(a * c, 1)
        bb += tl.sum(b * b, 1)
        bc += tl.sum(b * c, 1)
        cc += tl.sum(c * c, 1)
        ar += tl.sum(a * r, 1)
        br += tl.sum(b * r, 1)
        cr += tl.sum(c * r, 1)
    # scaled to a unit diagonal; the ridge keeps differences that are almost parallel from cancelling each other
    sa = 1.0 / tl.sqrt(tl.maximum(aa, tiny))
    sb = 1.0 / tl.sqrt(tl.maximum(bb, tiny))
    sc = 1.0 / tl.sqrt(tl.maximum(cc, tiny))
    ab, ac, bc = ab * sa * sb, ac * sa * sc, bc * sb * sc
    ar, br, cr = ar * sa, br * sb, cr * sc
    ridge = 10.0 * eps
    # L D L^T
    da = aa * sa * sa + ridge
    lb, lc = ab / da, ac / da
    db = tl.maximum(bb * sb * sb + ridge - lb * ab, eps)
    lbc = (bc - lc * ab) / db
    dc = tl.maximum(cc * sc * sc + ridge - lc * ac - lbc * lbc * db, eps)
    br -= lb * ar
    cr -= lc * ar + lbc * br
    wc = cr / dc
    wb = br / db - lbc * wc
    wa = ar / da - lb * wb - lc * wc
    return wa * sa, wb * sb, wc * sc


@triton.jit
def _next_point(solve, n, x, active, weights, count, C: tl.constexpr):
    """A tile of G(x) corrected by the weighted differences; of rows that have converged, x."""
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    N0: tl.constexpr = C.N[0]
    whole = tl.full((ROWS, COLUMNS), True, tl.int1)
    new = x + tl.load(solve + n)
    for k in tl.static_range(3):
        new -= weights[k][:, None] * tl.load(solve + (1 + k) * N0 + n, mask=whole & (count > k), other=0.0)
    return tl.where(active[:, None], new, x)


@triton.jit
def _look(a, layer, tape, keep, n, C: tl.constexpr):
    """A tile of the point where the next gradient is evaluated."""
    if C.TAPE > 0:
        tl.store(tape + (n + tl.arange(0, C.COLUMNS))[None, :], a, mask=keep)
    if C.L > 1:
        z, slope, _ = _activation(a, C.ACTIVATION)
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
            y = _product(layers + C.X_AT[j], matrices_ptr + C.W_AT[j] + n * C.N[j], C.LAYERS, C.N[j], WORK, C)
            y += tl.load(vectors_ptr + C.B_AT[j + 1] + n + column)[None, :]
            if C.STORE:
                inside = live[:, None] & (n + column < C.WIDTHS[j + 1])[None, :]
                tl.store(tape + (C.A_AT[j + 1] + n + column)[None, :], y, mask=inside)
            z, slope, _ = _activation(y, C.ACTIVATION)
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
                g = _product(layers + C.X_AT[j + 1], below, C.LAYERS, C.N[j + 1], WORK, C)
                if C.STORE:
                    inside = live[:, None] & (n + column < C.WIDTHS[j])[None, :]
                    tl.store(tape + (C.G_AT[j] + n + column)[None, :], g, mask=inside)
                e = g * tl.load(layer + C.S_AT[j] + n).to(WORK)
            else:
                z, slope, _ = _activation(tl.load(work + C.POINT_AT + n), C.ACTIVATION)
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


@triton.jit(do_not_specialize=["dt_row", "n_rows", "n_steps", "n_sub", "most"])
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
    moves_ptr,  # [n_sub, 4]: kick, drift, implicit kick, implicit drift
    which_ptr,  # [n_sub, 2]: which of the matrices drift K - kick K^T, and of the point's own
    solver_ptr,  # tolerance, eps, tiny; [6, 5]: coefficients of the last moves in the next one, by how many there are
    work_ptr,  # [programs, ROWS, WORKS]: a, sq, sp; with implicit sub-steps the point and `_note`'s
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
                kick = tl.load(moves_ptr + 4 * i)
                drift = tl.load(moves_ptr + 4 * i + 1)
                if C.IMPLICIT:
                    implicit = (tl.load(moves_ptr + 4 * i + 2) != 0) | (tl.load(moves_ptr + 4 * i + 3) != 0)
                    matrix = matrices_ptr + C.M_AT + tl.load(which_ptr + 2 * i + 1).to(tl.int64) * (N0 * N0)
                    history = history_ptr + (program * n_sub + i) * (5 * ROWS * N0) + lane[:, None] * N0 + column[None, :]
                    now = history + (t % 5) * (ROWS * N0)
                    known = tl.where(implicit, tl.minimum(t, 5), 0)
                    for n in range(0, N0, COLUMNS):
                        y = tl.load(work + n)
                        for k in range(known):
                            before = tl.load(history + ((t - 1 - k) % 5) * (ROWS * N0) + n)
                            y += tl.load(solver_ptr + 3 + 5 * known + k) * before
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
                                move = _product(layers, matrix + n * N0, C.LAYERS, N0, WORK, C)
                                y = tl.load(work + C.POINT_AT + n)
                                r = tl.load(work + n) + move - y
                                largest_r, largest_y = _note(solve, n, y, r, move - tl.load(now + n), count, C)
                                tl.store(now + n, move)
                                error = tl.maximum(error, largest_r)
                                size = tl.maximum(size, largest_y)
                            tl.debug_barrier()
                            residual = error / size
                            evaluations += active.to(tl.int32)
                            active = active & (residual > tl.load(solver_ptr)) & (residual < float("inf"))
                            searching = (tl.max(active.to(tl.int32), 0) > 0) & (count + 1 < most)
                            if searching:
                                weights = _anderson(solve, count, tl.load(solver_ptr + 1), tl.load(solver_ptr + 2), C)
                                for n in range(0, N0, COLUMNS):
                                    y = _next_point(solve, n, tl.load(work + C.POINT_AT + n), active, weights, count, C)
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
                    matrix = matrices_ptr + C.M_AT + tl.load(which_ptr + 2 * i).to(tl.int64) * (N0 * N0)
                    if C.EVERY_STATE:
                        shown = i == n_sub - 1
                        seen = rows * n_steps + t
                    else:
                        shown = (i == n_sub - 1) & (t == n_steps - 1)
                        seen = rows
                    more = live & ((t < n_steps - 1) | (i < n_sub - 1))
                    for n in range(0, N0, COLUMNS):
                        move = _product(layers, matrix + n * N0, C.LAYERS, N0, WORK, C)
                        a = tl.load(work + n) + move
                        tl.store(work + n, a)
                        real = (n + column < H)[None, :]
                        if C.IMPLICIT:
                            _advance(work, n, tl.load(layer + n), kick, drift, C)
                        else:
                            _look(a, layer, tape, more[:, None] & real, n, C)
                        if shown:
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


@triton.jit
def _first_layer(tape, vectors_ptr, inside, n, C: tl.constexpr):
    """A tile of g, s, s', s'' of the first layer."""
    column = tl.arange(0, C.COLUMNS)
    s, s1, s2 = _activation(tl.load(tape + (n + column)[None, :], mask=inside, other=0.0), C.ACTIVATION)
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
            ad = _product(factors + C.ZD_AT[j - 1], above, C.FACTORS, C.N[j - 1], WORK, C)
            a = tl.load(tape + (C.A_AT[j] + n + column)[None, :], mask=inside, other=0.0)
            s, s1, s2 = _activation(a, C.ACTIVATION)
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
                back = _product(factors + C.R_AT[j + 1], below, C.FACTORS, C.N[j + 1], WORK, C)
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


@triton.jit(do_not_specialize=["dt_row", "n_rows", "total", "tape_total", "start", "tape_start", "n_steps", "n_sub", "most"])
def backward_kernel(
    la_ptr,  # [rows, h], in and out, as the next two
    lsq_ptr,
    lsp_ptr,
    gsq_ptr,  # [rows, total, h]
    gsp_ptr,
    gE_ptr,  # [rows, total]
    gdt_ptr,  # [rows, total]
    residual_ptr,  # [rows], in and out
    tape_ptr,  # [rows, tape_total, n_sub, TAPE], with every layer
    matrices_ptr,
    vectors_ptr,
    dt_ptr,  # [rows, total], or [1, total] with dt_row = 0
    dt_row,
    moves_ptr,
    which_ptr,
    solver_ptr,
    work_ptr,  # [programs, ROWS, WORKS]: la, lsq, lsp; s' and g s'' ad of layers; with implicit sub-steps w, x, q and `_note`'s
    factors_ptr,  # [n_sub, n_steps, blocks ROWS, FACTORS], or [programs, ROWS, FACTORS] without SUMS
    n_rows,
    total,
    tape_total,
    start,  # steps start, ..., start + n_steps - 1 of those in total
    tape_start,
    n_steps,
    n_sub,
    most,
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
            la = tl.load(la_ptr + at, mask=inside, other=0.0)
            tl.store(work + n, la)
            tl.store(last + in_factors + n, la)
            tl.store(work + N0 + n, tl.load(lsq_ptr + at, mask=inside, other=0.0))
            tl.store(work + 2 * N0 + n, tl.load(lsp_ptr + at, mask=inside, other=0.0))
        worst = tl.load(residual_ptr + rows, mask=live, other=0.0)
        tl.debug_barrier()
        for t_back in range(n_steps):
            t = n_steps - 1 - t_back
            dt = tl.load(dt_ptr + rows * dt_row + start + t, mask=live, other=0.0)
            gdt = tl.zeros((ROWS,), WORK)
            for i_back in range(n_sub):
                i = n_sub - 1 - i_back
                kick = tl.load(moves_ptr + 4 * i)
                drift = tl.load(moves_ptr + 4 * i + 1)
                if C.WITH_ENERGY:
                    gE = tl.load(gE_ptr + rows * total + start + t, mask=live & (i == 0), other=0.0)[:, None]
                else:
                    gE = tl.zeros((ROWS, 1), WORK)
                tape = tape_ptr + ((rows[:, None] * tape_total + tape_start + t) * n_sub + i) * C.TAPE
                factors = first + (i * n_steps + t) * stride
                factor = factors + in_factors
                # where la goes for the sub-step before this one
                keep = (i > 0) | (t > 0)
                before = first + in_factors + tl.where(i > 0, (i - 1) * n_steps + t, (n_sub - 1) * n_steps + t - 1) * stride
                matrix = matrices_ptr + C.M_AT + tl.load(which_ptr + 2 * i).to(tl.int64) * (N0 * N0)
                for n in range(0, N0, COLUMNS):
                    inside = live[:, None] & (n + column < H)[None, :]
                    u = _product(factors, matrix + n * N0, C.FACTORS, N0, WORK, C)
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
                    implicit = (tl.load(moves_ptr + 4 * i + 2) != 0) | (tl.load(moves_ptr + 4 * i + 3) != 0)
                    matrix = matrices_ptr + C.M_AT + tl.load(which_ptr + 2 * i + 1).to(tl.int64) * (N0 * N0)
                    residual = tl.zeros((ROWS,), WORK)
                    active = live
                    count = 0
                    searching = n_sub > 0
                    while searching:
                        _hessian(work, factors, factor, before, keep, tape, matrices_ptr, vectors_ptr, live, gE, C)
                        searching = n_sub < 0
                        if implicit:
                            error = tl.zeros((ROWS,), WORK)
                            size = tl.full((ROWS,), 0.0, WORK) + tl.load(solver_ptr + 2)
                            for n in range(0, N0, COLUMNS):
                                q = _product(factors + C.NU_AT, matrix + n * N0, C.FACTORS, N0, WORK, C)
                                x = tl.load(work + X_AT + n)
                                r = tl.load(work + W_AT + n) + dt[:, None] * q - x
                                change = dt[:, None] * (q - tl.load(work + Q_AT + n))
                                largest_r, largest_x = _note(solve, n, x, r, change, count, C)
                                tl.store(work + Q_AT + n, q)
                                error = tl.maximum(error, largest_r)
                                size = tl.maximum(size, largest_x)
                            tl.debug_barrier()
                            residual = error / size
                            active = active & (residual > tl.load(solver_ptr)) & (residual < float("inf"))
                            searching = (tl.max(active.to(tl.int32), 0) > 0) & (count + 1 < most)
                            if searching:
                                weights = _anderson(solve, count, tl.load(solver_ptr + 1), tl.load(solver_ptr + 2), C)
                                for n in range(0, N0, COLUMNS):
                                    x = _next_point(solve, n, tl.load(work + X_AT + n), active, weights, count, C)
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
