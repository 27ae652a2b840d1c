"""Activations and their derivatives in a kernel."""

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
def activation(a, ACTIVATION: tl.constexpr):
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
