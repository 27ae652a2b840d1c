"""The hidden-space loop's GPU kernels; see `backends/torch.py` for the mathematics and `backends/triton.py` for the caller.

A program owns ROWS samples and takes them through every step and sub-step, so that a rollout is one launch. What one layer
leaves for the next goes through a scratch of the program's own in global memory: tile by tile, with a barrier of the
program's threads between a phase that writes and the phase that reads.

Arrays of the kernels' own are padded with zeros: the widths to whole tiles, the samples to whole programs. The zeros of the
padded matrices keep the padding from reaching anything, so that only what the caller sees needs masks.

Layers are counted from 0 here: layer j has N[j] values padded and WIDTHS[j] real ones, and the first is the hidden space.
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
def _product(
    x_ptr,
    matrix_ptr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x M^T for x [ROWS, K] of row stride STRIDE and the COLUMNS rows of M [., K] at `matrix_ptr`.

    M is read along its rows because that is the only order in which Hopper's matrix units take TF32.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    INNER: tl.constexpr = TILE[2]
    k = tl.arange(0, INNER)
    x_ptrs = x_ptr + tl.arange(0, ROWS)[:, None] * STRIDE + k[None, :]
    matrix_ptrs = matrix_ptr + tl.arange(0, COLUMNS)[None, :] * K + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), WORK)
    for _ in range(0, K, INNER):
        acc = tl.dot(tl.load(x_ptrs), tl.load(matrix_ptrs), acc, input_precision=PRECISION, out_dtype=WORK)
        x_ptrs += INNER
        matrix_ptrs += INNER
    return acc


@triton.jit(do_not_specialize=["dt_row", "n_rows", "n_steps", "n_sub"])
def forward_kernel(
    a_ptr,  # [rows, h]
    a_out_ptr,  # [rows, h]
    sq_ptr,  # [rows, n_steps or 1, h]
    sp_ptr,
    energy_ptr,  # [rows, n_steps]
    tape_ptr,  # [rows, n_steps, n_sub, TAPE]
    matrices_ptr,
    vectors_ptr,
    dt_ptr,
    dt_row,
    moves_ptr,  # [n_sub, 2]: kick, drift
    which_ptr,  # [n_sub]: which of the matrices drift K - kick K^T
    work_ptr,  # [programs, ROWS, 3 N[0]]: a, sq, sp
    layers_ptr,  # [programs, ROWS, LAYERS]: dt delta; of each layer z, then e; s' of every layer but the last
    n_rows,
    n_steps,
    n_sub,
    L: tl.constexpr,
    WIDTHS: tl.constexpr,
    N: tl.constexpr,
    W_AT: tl.constexpr,  # in `matrices`: W [N[j + 1], N[j]] of the layer after j
    T_AT: tl.constexpr,  # its transpose
    M_AT: tl.constexpr,  # (drift K - kick K^T)^T, one after the other
    B_AT: tl.constexpr,  # in `vectors`: the bias of layer j; that of the output is the first number there
    OUT_AT: tl.constexpr,  # the output weights
    X_AT: tl.constexpr,  # in `layers`
    S_AT: tl.constexpr,
    LAYERS: tl.constexpr,
    A_AT: tl.constexpr,  # in the tape
    G_AT: tl.constexpr,
    TAPE: tl.constexpr,
    STORE: tl.constexpr,  # whether the tape has every layer, or only the first, if any
    EVERY_STATE: tl.constexpr,
    WITH_ENERGY: tl.constexpr,
    MOVE: tl.constexpr,  # False: only fill the tape
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Every step of the rollout: `backends.torch.forward` without implicit or mixed sub-steps."""
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    H: tl.constexpr = WIDTHS[0]
    BELOW: tl.constexpr = L - 2 if L > 1 else 0
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    WIDE: tl.constexpr = 3 * N[0]
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    work = work_ptr + program * (ROWS * WIDE) + (lane[:, None] * WIDE + column[None, :])
    layers = layers_ptr + program * (ROWS * LAYERS)
    layer = layers + (lane[:, None] * LAYERS + column[None, :])
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = lane.to(tl.int64) + block * ROWS
        live = rows < n_rows
        tape = tape_ptr + rows[:, None] * n_steps * n_sub * TAPE
        for n in range(0, N[0], COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            a = tl.load(a_ptr + rows[:, None] * H + (n + column)[None, :], mask=inside, other=0.0)
            tl.store(work + n, a)
            tl.store(work + N[0] + n, tl.zeros((ROWS, COLUMNS), WORK))
            tl.store(work + 2 * N[0] + n, tl.zeros((ROWS, COLUMNS), WORK))
            if TAPE > 0:
                tl.store(tape + (n + column)[None, :], a, mask=inside)
            if L > 1:
                z, slope, _ = _activation(a, ACTIVATION)
                tl.store(layer + X_AT[0] + n, z)
                tl.store(layer + S_AT[0] + n, slope)
        tl.debug_barrier()
        for t in range(n_steps):
            dt = tl.load(dt_ptr + rows * dt_row + t, mask=live, other=0.0)
            for i in range(n_sub):
                kick = tl.load(moves_ptr + 2 * i)
                drift = tl.load(moves_ptr + 2 * i + 1)
                energy = tl.zeros((ROWS,), WORK)
                # up: a_{j+1} = z_j W^T + b and z_{j+1}; at the last layer the energy and e
                for j in tl.static_range(L - 1):
                    for n in range(0, N[j + 1], COLUMNS):
                        y = _product(layers + X_AT[j], matrices_ptr + W_AT[j] + n * N[j], LAYERS, N[j], WORK, TILE, PRECISION)
                        y += tl.load(vectors_ptr + B_AT[j + 1] + n + column)[None, :]
                        if STORE:
                            inside = live[:, None] & (n + column < WIDTHS[j + 1])[None, :]
                            tl.store(tape + (A_AT[j + 1] + n + column)[None, :], y, mask=inside)
                        z, slope, _ = _activation(y, ACTIVATION)
                        if j == L - 2:
                            out = tl.load(vectors_ptr + OUT_AT + n + column)[None, :]
                            energy += tl.sum(z * out, 1)
                            tl.store(layer + X_AT[j + 1] + n, out * slope)
                        else:
                            tl.store(layer + X_AT[j + 1] + n, z)
                            tl.store(layer + S_AT[j + 1] + n, slope)
                    tl.debug_barrier()
                # down: g_j = e_{j+1} W and e_j = g_j s'; below the last is delta, which moves sp and sq
                for j in tl.static_range(BELOW, -1, -1):
                    for n in range(0, N[j], COLUMNS):
                        if L > 1:
                            g = _product(
                                layers + X_AT[j + 1],
                                matrices_ptr + T_AT[j] + n * N[j + 1],
                                LAYERS,
                                N[j + 1],
                                WORK,
                                TILE,
                                PRECISION,
                            )
                            if STORE:
                                inside = live[:, None] & (n + column < WIDTHS[j])[None, :]
                                tl.store(tape + (G_AT[j] + n + column)[None, :], g, mask=inside)
                            e = g * tl.load(layer + S_AT[j] + n).to(WORK)
                        else:
                            z, slope, _ = _activation(tl.load(work + n), ACTIVATION)
                            out = tl.load(vectors_ptr + OUT_AT + n + column)[None, :]
                            energy += tl.sum(z * out, 1)
                            e = out * slope
                        if j > 0:
                            tl.store(layer + X_AT[j] + n, e)
                        elif MOVE:
                            step = dt[:, None] * e
                            tl.store(layer + n, step)
                            if drift != 0:
                                tl.store(work + N[0] + n, tl.load(work + N[0] + n) + drift * step)
                            if kick != 0:
                                tl.store(work + 2 * N[0] + n, tl.load(work + 2 * N[0] + n) - kick * step)
                    tl.debug_barrier()
                if WITH_ENERGY:
                    energy += tl.load(vectors_ptr)
                    tl.store(energy_ptr + rows * n_steps + t, energy, mask=live & (i == 0))
                if MOVE:
                    # a <- a + dt delta (drift K - kick K^T), and the first layer's values there
                    tape += TAPE
                    matrix = matrices_ptr + M_AT + tl.load(which_ptr + i).to(tl.int64) * (N[0] * N[0])
                    if EVERY_STATE:
                        shown = i == n_sub - 1
                        seen = rows * n_steps + t
                    else:
                        shown = (i == n_sub - 1) & (t == n_steps - 1)
                        seen = rows
                    more = live & ((t < n_steps - 1) | (i < n_sub - 1))
                    for n in range(0, N[0], COLUMNS):
                        move = _product(layers, matrix + n * N[0], LAYERS, N[0], WORK, TILE, PRECISION)
                        a = tl.load(work + n) + move
                        tl.store(work + n, a)
                        real = (n + column < H)[None, :]
                        if TAPE > 0:
                            tl.store(tape + (n + column)[None, :], a, mask=more[:, None] & real)
                        if L > 1:
                            z, slope, _ = _activation(a, ACTIVATION)
                            tl.store(layer + X_AT[0] + n, z)
                            tl.store(layer + S_AT[0] + n, slope)
                        if shown:
                            at = seen[:, None] * H + (n + column)[None, :]
                            inside = live[:, None] & real
                            tl.store(sq_ptr + at, tl.load(work + N[0] + n), mask=inside)
                            tl.store(sp_ptr + at, tl.load(work + 2 * N[0] + n), mask=inside)
                    tl.debug_barrier()
        if MOVE:
            for n in range(0, N[0], COLUMNS):
                inside = live[:, None] & (n + column < H)[None, :]
                tl.store(a_out_ptr + rows[:, None] * H + (n + column)[None, :], tl.load(work + n), mask=inside)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["dt_row", "n_rows", "total", "tape_total", "start", "tape_start", "n_steps", "n_sub"])
def backward_kernel(
    la_ptr,  # [rows, h], in and out, as the next two
    lsq_ptr,
    lsp_ptr,
    gsq_ptr,  # [rows, total, h]
    gsp_ptr,
    gE_ptr,  # [rows, total]
    gdt_ptr,  # [rows, total]
    tape_ptr,  # [rows, tape_total, n_sub, TAPE], with every layer
    matrices_ptr,
    vectors_ptr,
    dt_ptr,  # [rows, total], or [1, total] with dt_row = 0
    dt_row,
    moves_ptr,
    which_ptr,
    work_ptr,  # [programs, ROWS, WORKS]: la, lsq, lsp; s' and g s'' ad of every layer but the last
    factors_ptr,  # [n_sub, n_steps, blocks ROWS, FACTORS], or [programs, ROWS, FACTORS] without SUMS
    n_rows,
    total,
    tape_total,
    start,  # steps start, ..., start + n_steps - 1 of those in total
    tape_start,
    n_steps,
    n_sub,
    L: tl.constexpr,
    WIDTHS: tl.constexpr,
    N: tl.constexpr,
    W_AT: tl.constexpr,
    T_AT: tl.constexpr,
    M_AT: tl.constexpr,  # drift K - kick K^T, one after the other
    OUT_AT: tl.constexpr,
    S_AT: tl.constexpr,  # in `work`
    C_AT: tl.constexpr,
    WORKS: tl.constexpr,
    Z_AT: tl.constexpr,  # in `factors`, where la is first; the next of every layer but the last
    ZD_AT: tl.constexpr,
    E_AT: tl.constexpr,  # of every layer but the first
    R_AT: tl.constexpr,
    STEP_AT: tl.constexpr,  # dt delta
    TOP_AT: tl.constexpr,  # the gradient of the output weights
    FACTORS: tl.constexpr,
    A_AT: tl.constexpr,
    G_AT: tl.constexpr,
    TAPE: tl.constexpr,
    SUMS: tl.constexpr,
    EVERY_STATE: tl.constexpr,
    WITH_ENERGY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Every step of the adjoint, the last one first: `backends.torch.backward`, but for the products of the factors.

    With M = drift K - kick K^T and gE = 0 but at a step's first sub-step:

        u = drift lsq - kick lsp + la M^T;  v = dt u;  gdt += u . delta
        ad_0 = v;  zd_j = s' ad_j;  ad_{j+1} = zd_j W^T
        r at the last layer = w (s'' ad + gE s');  r_j = (r_{j+1} W) s' + g_j s'' ad_j;  la += r_0
    """
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    H: tl.constexpr = WIDTHS[0]
    BELOW: tl.constexpr = L - 2 if L > 1 else 0
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    work = work_ptr + program * (ROWS * WORKS) + (lane[:, None] * WORKS + column[None, :])
    in_factors = lane[:, None] * FACTORS + column[None, :]
    n_blocks = tl.cdiv(n_rows, ROWS)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        rows = lane.to(tl.int64) + block * ROWS
        live = rows < n_rows
        if SUMS:
            first = factors_ptr + block * tl.full((), ROWS * FACTORS, tl.int64)
            stride = tl.full((), ROWS * FACTORS, tl.int64) * n_blocks
        else:
            first = factors_ptr + program * (ROWS * FACTORS)
            stride = tl.full((), 0, tl.int64)
        last = first + (n_steps * n_sub - 1) * stride
        for n in range(0, N[0], COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            at = rows[:, None] * H + (n + column)[None, :]
            la = tl.load(la_ptr + at, mask=inside, other=0.0)
            tl.store(work + n, la)
            tl.store(last + in_factors + n, la)
            tl.store(work + N[0] + n, tl.load(lsq_ptr + at, mask=inside, other=0.0))
            tl.store(work + 2 * N[0] + n, tl.load(lsp_ptr + at, mask=inside, other=0.0))
        tl.debug_barrier()
        for t_back in range(n_steps):
            t = n_steps - 1 - t_back
            dt = tl.load(dt_ptr + rows * dt_row + start + t, mask=live, other=0.0)
            gdt = tl.zeros((ROWS,), WORK)
            for i_back in range(n_sub):
                i = n_sub - 1 - i_back
                kick = tl.load(moves_ptr + 2 * i)
                drift = tl.load(moves_ptr + 2 * i + 1)
                if WITH_ENERGY:
                    gE = tl.load(gE_ptr + rows * total + start + t, mask=live & (i == 0), other=0.0)[:, None]
                else:
                    gE = tl.zeros((ROWS, 1), WORK)
                tape = tape_ptr + ((rows[:, None] * tape_total + tape_start + t) * n_sub + i) * TAPE
                factors = first + (i * n_steps + t) * stride
                factor = factors + in_factors
                matrix = matrices_ptr + M_AT + tl.load(which_ptr + i).to(tl.int64) * (N[0] * N[0])
                for n in range(0, N[0], COLUMNS):
                    real = (n + column < H)[None, :]
                    inside = live[:, None] & real
                    u = _product(factors, matrix + n * N[0], FACTORS, N[0], WORK, TILE, PRECISION)
                    lsq = tl.load(work + N[0] + n)
                    lsp = tl.load(work + 2 * N[0] + n)
                    if EVERY_STATE:
                        # after the step's last sub-step the caller saw sq and sp
                        seen = inside & (i == n_sub - 1)
                        at = (rows[:, None] * total + start + t) * H + (n + column)[None, :]
                        lsq += tl.load(gsq_ptr + at, mask=seen, other=0.0)
                        lsp += tl.load(gsp_ptr + at, mask=seen, other=0.0)
                        tl.store(work + N[0] + n, lsq)
                        tl.store(work + 2 * N[0] + n, lsp)
                    u += drift * lsq - kick * lsp
                    s, s1, s2 = _activation(tl.load(tape + (n + column)[None, :], mask=inside, other=0.0), ACTIVATION)
                    if L > 1:
                        g = tl.load(tape + (G_AT[0] + n + column)[None, :], mask=inside, other=0.0)
                    else:
                        g = tl.load(vectors_ptr + OUT_AT + n + column)[None, :]
                    delta = g * s1
                    gdt += tl.sum(u * delta, 1)
                    v = dt[:, None] * u
                    if SUMS:
                        tl.store(factor + STEP_AT + n, dt[:, None] * delta)
                    if L > 1:
                        tl.store(factor + ZD_AT[0] + n, s1 * v)
                        tl.store(work + S_AT[0] + n, s1)
                        tl.store(work + C_AT[0] + n, g * s2 * v)
                        if SUMS:
                            tl.store(factor + Z_AT[0] + n, s)
                    else:
                        tl.store(work + C_AT[0] + n, g * (s2 * v + gE * s1))
                        if SUMS:
                            tl.store(factor + TOP_AT + n, s1 * v + gE * s)
                tl.debug_barrier()
                for j in tl.static_range(1, L):
                    for n in range(0, N[j], COLUMNS):
                        inside = live[:, None] & (n + column < WIDTHS[j])[None, :]
                        ad = _product(
                            factors + ZD_AT[j - 1],
                            matrices_ptr + W_AT[j - 1] + n * N[j - 1],
                            FACTORS,
                            N[j - 1],
                            WORK,
                            TILE,
                            PRECISION,
                        )
                        s, s1, s2 = _activation(
                            tl.load(tape + (A_AT[j] + n + column)[None, :], mask=inside, other=0.0), ACTIVATION
                        )
                        if j == L - 1:
                            g = tl.load(vectors_ptr + OUT_AT + n + column)[None, :]
                            tl.store(factor + R_AT[j] + n, g * (s2 * ad + gE * s1))
                            if SUMS:
                                tl.store(factor + TOP_AT + n, s1 * ad + gE * s)
                        else:
                            g = tl.load(tape + (G_AT[j] + n + column)[None, :], mask=inside, other=0.0)
                            tl.store(factor + ZD_AT[j] + n, s1 * ad)
                            tl.store(work + S_AT[j] + n, s1)
                            tl.store(work + C_AT[j] + n, g * s2 * ad)
                            if SUMS:
                                tl.store(factor + Z_AT[j] + n, s)
                        if SUMS:
                            tl.store(factor + E_AT[j] + n, g * s1)
                    tl.debug_barrier()
                for j in tl.static_range(BELOW, -1, -1):
                    for n in range(0, N[j], COLUMNS):
                        r = tl.load(work + C_AT[j] + n)
                        if L > 1:
                            back = _product(
                                factors + R_AT[j + 1],
                                matrices_ptr + T_AT[j] + n * N[j + 1],
                                FACTORS,
                                N[j + 1],
                                WORK,
                                TILE,
                                PRECISION,
                            )
                            r += back * tl.load(work + S_AT[j] + n)
                        if j > 0:
                            tl.store(factor + R_AT[j] + n, r)
                        else:
                            la = tl.load(work + n) + r
                            tl.store(work + n, la)
                            # for the sub-step before this one, if there is any
                            if (i > 0) | (t > 0):
                                before = tl.where(i > 0, (i - 1) * n_steps + t, (n_sub - 1) * n_steps + t - 1)
                                tl.store(first + before * stride + in_factors + n, la)
                    tl.debug_barrier()
            tl.store(gdt_ptr + rows * total + start + t, gdt, mask=live)
        for n in range(0, N[0], COLUMNS):
            inside = live[:, None] & (n + column < H)[None, :]
            at = rows[:, None] * H + (n + column)[None, :]
            tl.store(la_ptr + at, tl.load(work + n), mask=inside)
            tl.store(lsq_ptr + at, tl.load(work + N[0] + n), mask=inside)
            tl.store(lsp_ptr + at, tl.load(work + 2 * N[0] + n), mask=inside)
        tl.debug_barrier()
