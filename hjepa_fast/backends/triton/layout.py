"""Where everything is in the kernels' arrays, and the arrays that are made before a launch."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...activations import Activation
from ...schemes import SubStep
from .. import torch as torch_backend

interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, to test them
KINDS = {"softplus": 0, "tanh": 1, "silu": 2, "gelu": 3, "gelu-tanh": 4, "sin": 5}  # as in `kernels.activation`


class Blocks(NamedTuple):
    """The shape of a program: the samples it owns, the tile of a product's columns and of its inner dimension."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Constants(NamedTuple):
    """What a kernel is compiled for. Offsets (_AT) say where things are in its arrays, by layer from 0."""

    L: int
    WIDTHS: tuple[int, ...]
    N: tuple[int, ...]
    """Widths padded to whole tiles."""
    ROWS: int
    COLUMNS: int
    INNER: int
    W_AT: tuple[int, ...]
    """In `matrices`: W [N[j + 1], N[j]] of the layer after j; T_AT: its transpose."""
    T_AT: tuple[int, ...]
    M_AT: int
    """The first of the matrices drift K - kick K^T, transposed for the forward kernel."""
    B_AT: tuple[int, ...]
    """In `vectors`: the bias of layer j; that of the output is the first number there."""
    OUT_AT: int
    """The output weights."""
    NUMBERS_AT: int
    """What no network has: tolerance, and `Numbers.VALUES`."""
    A_AT: tuple[int, ...]
    """In the tape; G_AT likewise."""
    G_AT: tuple[int, ...]
    TAPE: int
    """Numbers of a sub-step on the tape."""
    WORKS: int
    """Numbers of a sample in `work`."""
    ACTIVATION: tuple[int, float, float, bool] = (0, 1.0, 20.0, False)
    """Kind, beta, threshold, and whether it may be approximated."""
    PRECISION: str = "ieee"
    """Of products, as Triton calls it."""
    IMPLICIT: bool = False
    """Whether sub-steps may be implicit."""
    EVERY_STATE: bool = True
    WITH_ENERGY: bool = True
    # of the forward kernel
    MOVE: bool = True
    """False: only fill the tape."""
    STORE: bool = False
    """Whether the tape has every layer, or only the first, if any."""
    POINT_AT: int = 0
    """In `work`: where the gradient is evaluated."""
    X_AT: tuple[int, ...] = ()
    """In `layers`; S_AT likewise, and in the backward kernel's `work`, where C_AT is too."""
    S_AT: tuple[int, ...] = ()
    LAYERS: int = 0
    # of the backward kernel
    SUMS: bool = False
    """Whether the factors of the weights' gradients are wanted."""
    C_AT: tuple[int, ...] = ()
    SOLVE_AT: int = 0
    Z_AT: tuple[int, ...] = ()
    """In `factors`, where la is first; the next of every layer but the last."""
    ZD_AT: tuple[int, ...] = ()
    E_AT: tuple[int, ...] = ()
    """Of every layer but the first."""
    R_AT: tuple[int, ...] = ()
    STEP_AT: int = 0
    """dt delta."""
    TOP_AT: int = 0
    """The gradient of the output weights."""
    NU_AT: int = 0
    """The cotangent of an implicit point."""
    FACTORS: int = 0


_Known = TypeVar("_Known", "Constants", "Numbers")


@functools.lru_cache(maxsize=512)
def for_triton(known: _Known) -> _Known:
    """As Triton's compiler takes them, which knows a field only by its type; its interpreter takes them as they are."""
    return known if interpreted else type(known)(*map(importlib.import_module("triton.language").constexpr, known))


class Layout(NamedTuple):
    """Constants of a network's two kernels, and how they are launched."""

    blocks: Blocks
    forward: Constants
    backward: Constants

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}


def _offsets(sizes: Sequence[int], start: int = 0) -> tuple[int, ...]:
    """Where each of `sizes` numbers begins, one after the other, and where the last one ends."""
    return tuple(itertools.accumulate(sizes, initial=start))


@functools.lru_cache(maxsize=256)
def layout_of(widths: tuple[int, ...], blocks: Blocks, precision: str, activation: Activation, implicit: bool) -> Layout:
    # not less than what 128 threads share without two of them holding the same number
    largest = max(32, 1 << (max(widths) - 1).bit_length())
    blocks = blocks._replace(columns=min(blocks.columns, largest), inner=min(blocks.inner, largest))
    tile = max(blocks.columns, blocks.inner)
    N = tuple(-(-width // tile) * tile for width in widths)
    n = len(N) - 1
    areas = [x * y for x, y in itertools.pairwise(N)]
    W_AT = _offsets(areas)
    T_AT = _offsets(areas, W_AT[-1])
    values = _offsets([*widths, *widths[:-1]])
    B_AT = _offsets(N)
    in_layers = _offsets([N[0], *N, *N[:-1]])
    common = Constants(
        L=len(N),
        WIDTHS=widths,
        N=N,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        W_AT=W_AT[:-1],
        T_AT=T_AT[:-1],
        M_AT=T_AT[-1],
        B_AT=B_AT,
        OUT_AT=B_AT[-1],
        NUMBERS_AT=B_AT[-1] + N[-1],
        A_AT=values[: n + 1],
        G_AT=values[n + 1 : -1],
        TAPE=values[-1],
        WORKS=(11 if implicit else 3) * N[0],
        ACTIVATION=(KINDS[activation.name], float(activation.beta), float(activation.threshold), precision in ("bf16", "tf32")),
        PRECISION=precision if precision.startswith("tf32") else "ieee",
        IMPLICIT=implicit,
    )
    forward = common._replace(
        POINT_AT=3 * N[0] if implicit else 0,
        X_AT=in_layers[1 : n + 2],
        S_AT=in_layers[n + 2 : -1],
        LAYERS=in_layers[-1],
    )
    bent = N[:-1] or N
    in_work = _offsets([*bent, *bent], 3 * N[0])
    solver = N[:1] if implicit else ()
    in_factors = _offsets([N[0], N[0], N[-1], *N[:-1], *N[:-1], *N[1:], *N[1:], *solver])
    Z, ZD, E, R = (in_factors[3 + k * n : 3 + (k + 1) * n] for k in range(4))
    backward = common._replace(
        S_AT=in_work[: len(bent)],
        C_AT=in_work[len(bent) : -1],
        SOLVE_AT=in_work[-1],
        WORKS=in_work[-1] + (10 * N[0] if implicit else 0),
        Z_AT=Z,
        ZD_AT=ZD,
        E_AT=(0, *E),
        R_AT=(0, *R),
        STEP_AT=in_factors[1],
        TOP_AT=in_factors[2],
        NU_AT=in_factors[3 + 4 * n],
        FACTORS=in_factors[-1],
    )
    return Layout(blocks, forward, backward)


class Numbers(NamedTuple):
    """A scheme, as the packing kernel is compiled for it: nothing of it is kept on the device, where a CUDA graph that was
    captured with it would own it."""

    TILE: int
    """The packing kernel's own."""
    KICKS: tuple[float, ...]
    """Of the distinct matrices drift K - kick K^T, or of their transposes."""
    DRIFTS: tuple[float, ...]
    MATRICES: int
    """How many those are."""
    VALUES: tuple[float, ...]
    """eps and tiny; [6, 5] coefficients that extrapolate moves to implicit points; [sub-steps, 6] kick, drift, those of the
    point itself, and which of the matrices both are."""
    COUNT: int


@functools.lru_cache(maxsize=256)
def numbers_of(scheme: tuple[SubStep, ...], dtype: torch.dtype, tile: int, transposed: bool) -> Numbers:
    moves = [(s.kick, s.drift) for s in scheme]
    points = [(s.implicit_kick, s.implicit_drift) for s in scheme]
    distinct = list(dict.fromkeys([*moves, *(point for s, point in zip(scheme, points, strict=True) if s.implicit)]))
    limits = torch.finfo(dtype)
    values = [limits.eps, limits.tiny]
    for row in torch_backend.EXTRAPOLATION:
        values += [*row, *[0.0] * (5 - len(row))]
    for stage, move, point in zip(scheme, moves, points, strict=True):
        values += [*move, *point, distinct.index(move), distinct.index(point) if stage.implicit else 0]
    # (drift K - kick K^T)^T = -kick K - (-drift) K^T
    matrices = [(-drift, -kick) if transposed else (kick, drift) for kick, drift in distinct]
    kicks, drifts = zip(*matrices, strict=True)
    return Numbers(tile, kicks, drifts, len(distinct), tuple(map(float, values)), len(values))


class Packed(NamedTuple):
    """What the packing kernel fills."""

    matrices: Tensor
    """In the products' dtype."""
    vectors: Tensor
    """In the work dtype."""


def empty(
    C: Constants, K: Tensor, scheme: Sequence[SubStep], dtype: torch.dtype, transposed: bool
) -> tuple[Packed, tuple[int, int], Numbers]:
    """What the packing kernel fills, its programs, and what it is compiled for.

    Parameters
    ----------
    dtype : of products
    transposed : whether the matrices drift K - kick K^T are
    """
    tile = min(C.COLUMNS, C.INNER, 32)
    S = numbers_of(tuple(scheme), K.dtype, tile, transposed)
    packed = Packed(
        torch.empty(C.M_AT + S.MATRICES * C.N[0] ** 2, dtype=dtype, device=K.device),
        torch.empty(C.NUMBERS_AT + 1 + S.COUNT, dtype=K.dtype, device=K.device),
    )
    # as many as the largest piece has
    areas = [x * y // tile**2 for x, y in itertools.pairwise(C.N)]
    tiles = max(-(-C.NUMBERS_AT // 1024), C.N[0] ** 2 // tile**2, *areas)
    return packed, (tiles, C.L + S.MATRICES), S
