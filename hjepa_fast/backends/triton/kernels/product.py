"""Products with the packed matrices."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types


@triton.jit
def product(x_ptr, matrix_ptr, STRIDE: tl.constexpr, K: tl.constexpr, WORK: tl.constexpr, C: tl.constexpr):
    """x M^T for x [ROWS, K] of row stride STRIDE and the COLUMNS rows of M [., K] at `matrix_ptr`.

    M is read along its rows because that is the only order in which Hopper's matrix units take TF32. Of "tf32x3" the three
    products of a tile start from zero, and Triton adds them to `acc` in float32: the units cut off what they add up.
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
