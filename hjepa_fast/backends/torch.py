"""The hidden-space loop in plain PyTorch operations: any device, any dtype, nothing to compile.

Row vectors, the batch in rows. H(z) = F(a) with a = z W^T + b, W = [Wq | Wp], and delta(a) = grad_a F. Since
Hq = delta Wq and Hp = delta Wp, with K = Wp Wq^T

    kick   p <- p - c Hq    is    a <- a - c delta K^T,    sp <- sp - c delta
    drift  q <- q + c Hp    is    a <- a + c delta K,      sq <- sq + c delta

and q = q0 + sq Wp, p = p0 + sp Wq at any time: the loop never touches the state. An implicit sub-step evaluates delta at
a point y = a + c delta(y) N with N = id K - ik K^T (see `schemes.py`), a fixed point in R^h.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forks  # noqa: F401  (keeps PyTorch's threads usable in a forked child)
from ..hidden_space.fixed_point import EXTRAPOLATION, Solver, fixed_point
from ..hidden_space.machine import run, run_back
from ..hidden_space.network import (
    Gradients,
    Network,
    Point,
    Points,
    Tail,
    adjoint,
    delta_at,
    energy,
    evaluate,
    restore,
    tape_width,
)
from ..schemes import SubStep

__all__ = [
    "Gradients", "Rolled", "Solver", "Tail", "adjoint", "backward", "energy", "evaluate", "forward", "gradient",
    "gradient_backward", "product", "run", "run_back", "tape_width",
]  # fmt: skip


def product(x: Tensor, W: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """x W, or base + x W.

    Parameters
    ----------
    x : Tensor [..., k]
    W : Tensor [k, m], of any strides
    out : Tensor [B, n, m], optional, of any strides; x is then [B, n, k]
    base : Tensor [B, m], optional, with `out`
    """
    if out is None:
        return x @ W
    if base is None:
        return torch.matmul(x, W, out=out)
    # a few samples at a time: a product then stays in the cache until it is added to where it belongs
    size = max(1, 1024 // max(x.shape[1], 1)) if x.device.type == "cpu" else max(x.shape[0], 1)
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        torch.add(base[rows, None], x[rows] @ W, out=out[rows])
    return out


class Rolled(NamedTuple):
    """What `forward` returns."""

    a: Tensor
    """[B, h], at the end."""
    sq: Tensor
    """[B, n_steps, h] after each step, or [B, 1, h] at the end; `sp` likewise."""
    sp: Tensor
    energy: Tensor
    """[B, n_steps], F before each step; [B, 0] if not asked for."""
    tape: Tensor
    """[B, n_steps, sub-steps, width]."""
    residual: Tensor
    """[B, n_steps], the largest of each step, and `evaluations` of delta in its implicit sub-steps, int32; [B, 0] if there
    are none."""
    evaluations: Tensor


def forward(
    a: Tensor,
    K: Tensor,
    tail: Network,
    dt: Tensor,
    scheme: Sequence[SubStep],
    n_steps: int,
    every_state: bool,
    with_energy: bool,
    memory: str,
    solver: Solver,
) -> Rolled:
    """Run the loop.

    Parameters
    ----------
    a : Tensor [B, h], the first pre-activation at the start; its dtype is computed in, whatever the parameters' own
    K : Tensor [h, h]
    dt : Tensor [1 or B, n_steps]
    scheme : the sub-steps of a step; the first is explicit where energies are wanted
    memory : "none", "recompute" or "store", what to keep for `backward`
    """
    tail = tail.to(a.dtype)
    sq, sp = torch.zeros_like(a), torch.zeros_like(a)
    sqs, sps, energies, tape, residuals, evaluations = [], [], [], [], [], []
    moves: list[list[Tensor]] = [[] for _ in scheme]  # of each sub-step's point, in the last few steps
    for t in range(n_steps):
        dt_t = dt[:, t, None]
        deltas: list[Tensor] = []
        for i, stage in enumerate(scheme):
            if stage.implicit:
                start = a + sum(c * move for c, move in zip(EXTRAPOLATION[len(moves[i])], moves[i], strict=True))
                follow = partial(_follow, tail, K, a, stage, dt_t)
                (point, delta, move), residual, count = fixed_point(follow, start, 1.0, solver)
                moves[i] = [move, *moves[i]][: len(EXTRAPOLATION) - 1]
                residuals.append(residual)
                evaluations.append(count)
            else:
                point, delta, H = evaluate(tail, a)
                if i == 0:
                    energies.append(H)
            if memory != "none":
                tape.append(point.a[0] if memory == "recompute" else point.tape())
            step = dt_t * _mixed(delta, deltas, stage)
            deltas.append(delta)
            if stage.kick:
                a, sp = a - stage.kick * (step @ K.T), sp - stage.kick * step
            if stage.drift:
                a, sq = a + stage.drift * (step @ K), sq + stage.drift * step
        if every_state or t == n_steps - 1:
            sqs.append(sq)
            sps.append(sp)
    none = a.new_empty(a.shape[0], 0)
    by_step = (n_steps, -1)
    return Rolled(
        a,
        torch.stack(sqs, 1),
        torch.stack(sps, 1),
        torch.stack(energies, 1) if with_energy else none,
        torch.stack(tape, 1).unflatten(1, (n_steps, len(scheme))) if tape else a.new_empty(a.shape[0], n_steps, len(scheme), 0),
        torch.stack(residuals, 1).unflatten(1, by_step).amax(2) if residuals else none,
        torch.stack(evaluations, 1).unflatten(1, by_step).sum(2, dtype=torch.int32) if evaluations else none.int(),
    )


def _follow(
    tail: Network, K: Tensor, a: Tensor, stage: SubStep, dt: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Point | Points, Tensor, Tensor]]:
    """a + c delta(y) N; the point at y, delta there and c delta(y) N."""
    point, delta, _ = evaluate(tail, y)
    step = dt * delta
    move = torch.zeros_like(a)
    if stage.implicit_kick:
        move = move - stage.implicit_kick * (step @ K.T)
    if stage.implicit_drift:
        move = move + stage.implicit_drift * (step @ K)
    return a + move, (point, delta, move)


def _mixed(delta: Tensor, earlier: Sequence[Tensor], stage: SubStep) -> Tensor:
    for weight, other in zip(stage.mix, earlier, strict=False):
        delta = delta + weight * other
    return delta


def backward(
    la: Tensor,
    lsq: Tensor,
    lsp: Tensor,
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    tape: Tensor,
    K: Tensor,
    tail: Network,
    dt: Tensor,
    scheme: Sequence[SubStep],
    memory: str,
    sums: Gradients | None,
    solver: Solver,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of `forward`, from the last sub-step to the first.

    With S the Hessian of F at y, an implicit point's cotangent nu solves nu = S (w + c nu N^T), where w is that of delta from
    the moves made with it; as w' = w + c (S w') N^T that is a fixed point again, and contracts as fast as the point's own.

    Parameters
    ----------
    la, lsq, lsp : Tensor [B, h]
        Cotangents of a, sq, sp after the last step, from whatever comes later.
    gsq, gsp : Tensor [B, n_steps or 1, h]
        Cotangents of what `forward` returned: of every step, or of the last.
    gE : Tensor [B, n_steps] or None
    tape, K, tail, dt, scheme, memory, solver : as given to and returned by `forward`
    sums : Gradients or None
        What the gradients of K and of F's parameters are added to; None if they are not needed.

    Returns
    -------
    la, lsq, lsp : Tensor [B, h], cotangents before the first step
    gdt : Tensor [B, n_steps]
    residual : Tensor [B], the largest of the implicit sub-steps' equations, relative; 0 if there are none
    """
    tail = tail.to(la.dtype)
    n_steps = tape.shape[1]
    gdt = la.new_zeros(la.shape[0], n_steps)
    worst = la.new_zeros(la.shape[0])
    for t in range(n_steps - 1, -1, -1):
        from_end = n_steps - t
        if from_end <= gsq.shape[1]:
            lsq, lsp = lsq + gsq[:, -from_end], lsp + gsp[:, -from_end]
        dt_t = dt[:, t, None]
        points = [restore(tail, tape[:, t, i], memory) for i in range(len(scheme))]
        deltas = [delta_at(tail, point).expand_as(la) for point in points]
        later: list[tuple[SubStep, Tensor]] = []
        for i in range(len(scheme) - 1, -1, -1):
            stage, point, delta = scheme[i], points[i], deltas[i]
            mixed = _mixed(delta, deltas, stage)
            u = torch.zeros_like(la)
            if stage.kick:
                u = u - stage.kick * (lsp + la @ K)
                if sums is not None:
                    sums.K.addmm_(la.T, dt_t * mixed, alpha=-stage.kick)
            if stage.drift:
                u = u + stage.drift * (lsq + la @ K.T)
                if sums is not None:
                    sums.K.addmm_((dt_t * mixed).T, la, alpha=stage.drift)
            gdt[:, t] += (u * mixed).sum(-1)
            w = dt_t * u
            for other, v in later:
                if i < len(other.mix):
                    w = w + other.mix[i] * v
            later.append((stage, dt_t * u))
            if stage.implicit:
                follow = partial(_follow_back, tail, K, w, stage, point, dt_t)
                w, residual, _ = fixed_point(follow, w, torch.finfo(w.dtype).tiny, solver)
                worst = torch.maximum(worst, residual)
            nu = adjoint(tail, point, w, gE[:, t] if gE is not None and i == 0 else None, sums)
            if stage.implicit_kick:
                gdt[:, t] -= stage.implicit_kick * ((nu @ K) * delta).sum(-1)
                if sums is not None:
                    sums.K.addmm_(nu.T, dt_t * delta, alpha=-stage.implicit_kick)
            if stage.implicit_drift:
                gdt[:, t] += stage.implicit_drift * ((nu @ K.T) * delta).sum(-1)
                if sums is not None:
                    sums.K.addmm_((dt_t * delta).T, nu, alpha=stage.implicit_drift)
            la = la + nu
    return la, lsq, lsp, gdt, worst


def _follow_back(
    tail: Network, K: Tensor, w: Tensor, stage: SubStep, point: Point | Points, dt: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """w + c (S x) N^T, and x."""
    nu = adjoint(tail, point, x, None, None)
    moved = w
    if stage.implicit_kick:
        moved = moved - stage.implicit_kick * dt * (nu @ K)
    if stage.implicit_drift:
        moved = moved + stage.implicit_drift * dt * (nu @ K.T)
    return moved, x


def gradient(x: Tensor, W: Tensor, b: Tensor, tail: Tail, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """grad F(x W^T + b) with respect to x [B, n].

    Returns
    -------
    The gradient [B, n], F itself [B], and every layer's values [B, width] for `gradient_backward`, [B, 0] unless `keep`
    """
    point, delta, value = evaluate(tail, F.linear(x, W, b))
    return delta @ W, value, point.tape() if keep else x.new_empty(x.shape[0], 0)


def gradient_backward(
    g_gradient: Tensor | None,
    g_value: Tensor | None,
    tape: Tensor,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    tail: Network,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The adjoint of `gradient`, for cotangents [B, n] and [B] of what it returned.

    Returns
    -------
    That of x [B, n], and if they are needed those of W, W_2, ..., b, b_2, ...
    """
    point = restore(tail, tape, "store")
    v = torch.zeros_like(point.a[0]) if g_gradient is None else g_gradient @ W.T
    sums = Gradients.zeros(W, tail) if need_weights else None
    nu = adjoint(tail, point, v, g_value, sums)
    if sums is None:
        return nu @ W, []
    of_W = nu.T @ x
    if g_gradient is not None:
        of_W.addmm_(delta_at(tail, point).expand_as(v).T, g_gradient)
    return nu @ W, [of_W, *sums.weights, nu.sum(0), *sums.biases]
