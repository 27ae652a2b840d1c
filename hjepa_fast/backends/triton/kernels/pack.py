"""What a rollout's kernels read: the network's matrices and vectors, padded, and the numbers of the scheme.

One launch. A program takes a tile of a piece: of a layer's weights, or of one of the matrices drift K - kick K^T; or a part of
the vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types

VECTOR = tl.constexpr(1024)
"""Numbers of the vectors that a program writes."""


@triton.jit
def _pack_layer(matrices_ptr, weight_ptr, tile, j: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr):
    """A tile of W and of its transpose, [N[j + 1], N[j]] and [N[j], N[j + 1]]."""
    across: tl.constexpr = C.N[j] // TILE
    if tile < across * (C.N[j + 1] // TILE):
        row = (tile // across) * TILE + tl.arange(0, TILE)
        column = (tile % across) * TILE + tl.arange(0, TILE)
        inside = (row < C.WIDTHS[j + 1])[:, None] & (column < C.WIDTHS[j])[None, :]
        weight = tl.load(weight_ptr + row[:, None] * C.WIDTHS[j] + column[None, :], mask=inside, other=0.0)
        weight = weight.to(matrices_ptr.dtype.element_ty)
        tl.store(matrices_ptr + C.W_AT[j] + row[:, None] * C.N[j] + column[None, :], weight)
        tl.store(matrices_ptr + C.T_AT[j] + column[None, :] * C.N[j + 1] + row[:, None], weight)


@triton.jit
def _pack_move(matrices_ptr, K_ptr, tile, i, kick, drift, TILE: tl.constexpr, C: tl.constexpr):
    """A tile of drift K - kick K^T."""
    H: tl.constexpr = C.WIDTHS[0]
    across: tl.constexpr = C.N[0] // TILE
    if tile < across * across:
        row = (tile // across) * TILE + tl.arange(0, TILE)[:, None]
        column = (tile % across) * TILE + tl.arange(0, TILE)[None, :]
        inside = (row < H) & (column < H)
        K = tl.load(K_ptr + row * H + column, mask=inside, other=0.0)
        back = tl.load(K_ptr + column * H + row, mask=inside, other=0.0)
        move = drift * K - kick * back
        at = C.M_AT + i.to(tl.int64) * (C.N[0] * C.N[0])
        tl.store(matrices_ptr + at + row * C.N[0] + column, move.to(matrices_ptr.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["K_ptr"])
def pack_kernel(
    matrices_ptr,
    vectors_ptr,
    K_ptr,  # [h, h]
    weights,  # pointers to W of every layer but the first, the output's last
    biases,
    tolerance,
    C: tl.constexpr,
    S: tl.constexpr,  # a `layout.Numbers`
):
    WORK: tl.constexpr = vectors_ptr.dtype.element_ty
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    for j in tl.static_range(C.L - 1):
        if piece == j:
            _pack_layer(matrices_ptr, weights[j], tile, j, S.TILE, C)
    if piece == C.L - 1:
        n = tile * VECTOR + tl.arange(0, VECTOR)
        values = tl.zeros((VECTOR,), WORK)
        for j in tl.static_range(C.L):
            unit = n - (C.B_AT[j + 1] if j < C.L - 1 else 0)
            inside = (unit >= 0) & (unit < (C.WIDTHS[j + 1] if j < C.L - 1 else 1))
            values += tl.load(biases[j] + unit, mask=inside, other=0.0).to(WORK)
        top = n - C.OUT_AT
        values += tl.load(weights[C.L - 1] + top, mask=(top >= 0) & (top < C.WIDTHS[C.L - 1]), other=0.0).to(WORK)
        tl.store(vectors_ptr + n, values, mask=n < C.NUMBERS_AT)
        if tile == 0:
            tl.store(vectors_ptr + C.NUMBERS_AT, tolerance)
            for k in tl.static_range(S.COUNT):
                tl.store(vectors_ptr + C.NUMBERS_AT + 1 + k, tl.full((), S.VALUES[k], WORK))
    if piece >= C.L:
        kick = tl.full((), 0.0, WORK)
        drift = tl.full((), 0.0, WORK)
        for i in tl.static_range(S.MATRICES):
            kick = tl.where(piece == C.L + i, tl.full((), S.KICKS[i], WORK), kick)
            drift = tl.where(piece == C.L + i, tl.full((), S.DRIFTS[i], WORK), drift)
        _pack_move(matrices_ptr, K_ptr, tile, piece - C.L, kick, drift, S.TILE, C)
