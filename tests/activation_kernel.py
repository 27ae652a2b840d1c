"""A Triton kernel that does nothing but an activation, to count what it costs."""

from __future__ import annotations

import triton
import triton.language as tl

from hjepa_fast.backends.triton.kernels.activation import activation

# mypy: ignore-errors


@triton.jit
def activation_kernel(a_ptr, s_ptr, s1_ptr, N: tl.constexpr, ACTIVATION: tl.constexpr, RUN: tl.constexpr):
    """s and s' of N numbers; without RUN the numbers themselves, twice."""
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    s, s1 = a, a
    if RUN:
        s, s1, _ = activation(a, ACTIVATION)
    tl.store(s_ptr + i, s)
    tl.store(s1_ptr + i, s1)
