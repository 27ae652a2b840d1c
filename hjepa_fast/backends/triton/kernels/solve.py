"""The equations of implicit sub-steps, row by row, as `hidden_space.fixed_point` solves them.

A program goes on until the last of its rows has converged, and those that have stay where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types


EPS, TINY, COEFFICIENTS, MOVES = (tl.constexpr(i) for i in (1, 2, 3, 33))
"""Where they are among the numbers that `pack_kernel` writes, tolerance first."""


@triton.jit
def finite_size(x):
    """|x|, infinite where x is not a number: maxima forget those."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def note(solve, n, x, r, dg, count, C: tl.constexpr):
    """Keep a tile of the residual r = G(x) - x, and of the changes of G and r since the last evaluation, dg and dr.

    Returns the largest |r| and |x| of each row. `solve` is [ROWS, r; dg three times; dr three times]. A barrier parts what was
    read from what is written in its place, here and by the caller, which nothing else orders if their layouts differ.
    """
    N0: tl.constexpr = C.N[0]
    before = tl.load(solve + n)
    tl.debug_barrier()
    if count > 0:
        slot = (count - 1) % 3
        tl.store(solve + (1 + slot) * N0 + n, dg)
        tl.store(solve + (4 + slot) * N0 + n, r - before)
    tl.store(solve + n, r)
    return tl.max(finite_size(r), 1), tl.max(tl.abs(x), 1)


@triton.jit
def anderson(solve, count, eps, tiny, C: tl.constexpr):
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
def next_point(solve, n, x, active, weights, count, C: tl.constexpr):
    """A tile of G(x) corrected by the weighted differences; of rows that have converged, x."""
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    N0: tl.constexpr = C.N[0]
    whole = tl.full((ROWS, COLUMNS), True, tl.int1)
    new = x + tl.load(solve + n)
    for k in tl.static_range(3):
        new -= weights[k][:, None] * tl.load(solve + (1 + k) * N0 + n, mask=whole & (count > k), other=0.0)
    return tl.where(active[:, None], new, x)
