"""Activations and their derivatives in a kernel.

Where products are of rounded numbers (bfloat16, or one TF32 product), activations need not be exact to the last digit. They are
then made of the few functions that the chip has in hardware, whose bounds NVIDIA gives in the PTX ISA. Values are good to 2^-16
of themselves, small ones too, and derivatives to 2^-18 absolutely, where TF32 rounds what is multiplied by 2^-11.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import interpreted

# mypy: ignore-errors
# Triton is not typed, and what is annotated in its functions are not Python's types

SOFTPLUS, TANH, SILU, GELU, GELU_TANH, SIN = (tl.constexpr(i) for i in range(6))
INTERPRETED = tl.constexpr(interpreted)
"""The interpreter has no inline assembly, and takes the exact function."""
LOG2_E = tl.constexpr(1.4426950408889634)


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
def _exact(a, ACTIVATION: tl.constexpr):
    """As `activation`."""
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
def _exp2(x):
    """2^x, to a relative 2^-22."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _reciprocal(x):
    """1 / x, to a unit in the last place."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _sin(x):
    """sin(x) for x from -pi to pi, to an absolute 2^-20; `_cos` likewise."""
    if INTERPRETED:
        y = tl.sin(x)
    else:
        y = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _cos(x):
    if INTERPRETED:
        y = tl.cos(x)
    else:
        y = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _logistic(x):
    """sigma(x) = 1 / (1 + exp(-x)), and its derivative, which no difference of almost equal numbers spoils."""
    u = _exp2(tl.abs(x) * -LOG2_E)
    large = _reciprocal(1.0 + u)
    small = u * large
    return tl.where(x < 0.0, small, large), small * large


@triton.jit
def _fast(a, KIND: tl.constexpr, BETA: tl.constexpr, THRESHOLD: tl.constexpr):
    """As `activation`. The polynomials are of least relative error, by Lawson's method."""
    if KIND == SOFTPLUS:
        x = BETA * a
        u = _exp2(tl.abs(x) * -LOG2_E)
        # log(1 + u) / u for u from 0 to 1, to 2^-16.8
        p = -0.0238691248 * u + 0.101222217
        p = p * u - 0.210048631
        p = p * u + 0.325206659
        p = p * u - 0.499361362
        p = p * u + 0.999991598
        s = (tl.maximum(x, 0.0) + p * u) * (1.0 / BETA)
        large = _reciprocal(1.0 + u)
        small = u * large
        s1 = tl.where(x < 0.0, small, large)
        s2 = BETA * small * large
        # softplus is x to rounding by then
        if THRESHOLD < 16.0:
            linear = x > THRESHOLD
            s = tl.where(linear, a, s)
            s1 = tl.where(linear, 1.0, s1)
            s2 = tl.where(linear, 0.0, s2)
    elif KIND == TANH:
        u = _exp2(tl.abs(a) * (-2.0 * LOG2_E))
        t = (1.0 - u) * _reciprocal(1.0 + u)
        # the difference cancels where a is small
        s = tl.where(tl.abs(a) < 0.0625, a * (1.0 - a * a * 0.33333333333), tl.where(a < 0.0, -t, t))
        s1 = 1.0 - s * s
        s2 = -2.0 * s * s1
    elif KIND == SILU:
        sigma, slope = _logistic(a)
        s = a * sigma
        s1 = sigma + a * slope
        s2 = slope * (2.0 + a * (1.0 - 2.0 * sigma))
    elif KIND == GELU:
        e = _exp2(a * a * (-0.5 * LOG2_E))
        # Phi(-|a|) exp(a^2 / 2) / t, to 2^-17.7
        t = _reciprocal(1.0 + 0.31 * tl.abs(a))
        p = -0.0739291545 * t + 0.180450377
        p = p * t + 0.0157446887
        p = p * t + 0.133429787
        p = p * t + 0.120441278
        p = p * t + 0.123860702
        tail = e * (t * p)
        cdf = tl.where(a < 0.0, tail, 1.0 - tail)
        pdf = e * 0.3989422804014327
        s = a * cdf
        s1 = cdf + a * pdf
        s2 = pdf * (2.0 - a * a)
    elif KIND == GELU_TANH:
        # 1 + tanh(y) is twice the logistic function of 2 y
        square = a * a
        y = a * (0.7978845608028654 + 0.035677408136300125 * square)
        y1 = 0.7978845608028654 + 0.10703222440890037 * square
        sigma, slope = _logistic(2.0 * y)
        s = a * sigma
        s1 = sigma + 2.0 * a * slope * y1
        s2 = slope * (4.0 * y1 + 2.0 * a * (0.21406444881780076 * a - 2.0 * (2.0 * sigma - 1.0) * y1 * y1))
    else:
        # 2 pi in two parts, of which the first times a whole number is exact
        turns = tl.floor(a * 0.15915494309189535 + 0.5)
        r = (a - turns * 6.28125) - turns * 0.0019353071795864769
        s = tl.where(tl.abs(r) < 0.125, r * (1.0 - r * r * 0.16666666667), _sin(r))
        s1 = _cos(r)
        s2 = -s
    return s, s1, s2


@triton.jit
def activation(a, ACTIVATION: tl.constexpr):
    """s(a), s'(a), s''(a), the formulas of `activations.py`.

    ACTIVATION is its kind, beta and threshold, and whether hardware's approximations will do.
    """
    if ACTIVATION[3]:
        s, s1, s2 = _fast(a, ACTIVATION[0], ACTIVATION[1], ACTIVATION[2])
    else:
        s, s1, s2 = _exact(a, ACTIVATION)
    return s, s1, s2
