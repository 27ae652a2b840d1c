"""The hidden-space loop in plain PyTorch operations: any device, any dtype, nothing to compile.

Row vectors, the batch in rows. H(z) = F(a) with a = z W^T + b, W = [Wq | Wp], and delta(a) = grad_a F. Since
Hq = delta Wq and Hp = delta Wp, with K = Wp Wq^T

    kick   p <- p - c Hq    is    a <- a - c delta K^T,    sp <- sp - c delta
    drift  q <- q + c Hp    is    a <- a + c delta K,      sq <- sq + c delta

and q = q0 + sq Wp, p = p0 + sp Wq at any time: the loop never touches the state. An implicit sub-step evaluates delta at
a point y = a + c delta(y) N with N = id K - ik K^T (see `schemes.py`), a fixed point in R^h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forks  # noqa: F401  (keeps PyTorch's threads usable in a forked child)
from ..activations import Activation
from ..schemes import SubStep


class Tail(NamedTuple):
    """F, everything after the first pre-activation: `weights[i]` is W_{i+2}. Empty for a linear H, where F(a) = a."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: Activation

    @property
    def widths(self) -> list[int]:
        """h_1, ..., h_L, the sizes of the hidden pre-activations."""
        return [weight.shape[1] for weight in self.weights]

    def to(self, dtype: torch.dtype) -> Tail:
        """The same function with its parameters in `dtype`."""
        return Tail([w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases], self.activation)


class Point(NamedTuple):
    """What an evaluation of delta leaves behind, an entry a hidden layer l = 1..L."""

    a: list[Tensor]
    """Pre-activations a_l, [B, h_l]."""
    g: list[Tensor]
    """g_l = dF/dz_l, [B, h_l]; g_L is the output weights, [1, h_L]."""

    def tape(self) -> Tensor:
        """a_1, ..., a_L, g_1, ..., g_{L-1} side by side."""
        return torch.cat((*self.a, *self.g[:-1]), dim=-1)

    @classmethod
    def from_tape(cls, tail: Tail, tape: Tensor) -> Point:
        values = tape.split([*tail.widths, *tail.widths[:-1]], dim=-1)
        n_layers = len(tail.weights)
        return cls(list(values[:n_layers]), [*values[n_layers:], tail.weights[-1]])


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


def tape_width(widths: Sequence[int], memory: str) -> int:
    """Numbers kept a sub-step and sample: none, a_1 ("recompute"), or every a_l and g_l ("store")."""
    if memory == "none":
        return 0
    return widths[0] if memory == "recompute" else 2 * sum(widths) - widths[-1]


def energy(tail: Tail, a: Tensor) -> Tensor:
    """F(a): [..., h] to [...]."""
    for weight, bias in zip(tail.weights, tail.biases, strict=True):
        a = F.linear(tail.activation(a), weight, bias)
    return a.squeeze(-1)


def evaluate(tail: Tail, a: Tensor) -> tuple[Point, Tensor, Tensor]:
    """delta at a [B, h]: the point, delta [B, h], and F(a) [B], which costs nothing more."""
    if not tail.weights:
        return Point([a], [torch.ones_like(a[:1])]), torch.ones_like(a), a.squeeze(-1)
    pre, slopes = [a], []
    for weight, bias in zip(tail.weights, tail.biases, strict=True):
        z, slope, _ = tail.activation.derivatives(pre[-1])
        slopes.append(slope)
        pre.append(F.linear(z, weight, bias))
    H = pre.pop().squeeze(-1)
    g = [tail.weights[-1]]
    for weight, slope in zip(tail.weights[-2::-1], slopes[:0:-1], strict=True):
        g.append((g[-1] * slope) @ weight)
    g.reverse()
    return Point(pre, g), g[0] * slopes[0], H


class Solver(NamedTuple):
    """When the equations of implicit sub-steps count as solved."""

    tolerance: float
    """Largest |G(x) - x| of a sample, relative to its largest |x|, and for points to 1 if that is larger."""
    max_evaluations: int


_T = TypeVar("_T")
_DEPTH = 3
"""Earlier differences that Anderson's method combines."""
EXTRAPOLATION = ((), (1,), (2, -1), (3, -3, 1), (4, -6, 4, -1), (5, -10, 10, -5, 1))
"""Row n: the next value of a polynomial through the last n, the last one first. With all five, a step of a trained network
starts ten times closer to its solution than with two."""


def fixed_point(G: Callable[[Tensor], tuple[Tensor, _T]], x: Tensor, floor: float, solver: Solver) -> tuple[_T, Tensor, Tensor]:
    """Solve x = G(x) for every row of x [B, h] by Anderson's method (Walker and Ni, SIAM J. Numer. Anal. 49, 1715, 2011).

    A row that has converged stays as it is, so that it does not depend on the others, and one that is not finite is left.

    Parameters
    ----------
    G : gives G(x) and whatever else comes of it
    floor : what residuals are relative to at least

    Returns
    -------
    What else G gave at the solution; residual [B], relative; evaluations of G [B], int32
    """
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    evaluations = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    differences: list[tuple[Tensor, Tensor]] = []
    before: tuple[Tensor, Tensor] | None = None
    for n in range(1, solver.max_evaluations + 1):
        y, other = G(x)
        r = y - x
        residual = r.abs().amax(1) / x.abs().amax(1).clamp_min(floor)
        evaluations += active
        active = active & (residual > solver.tolerance) & residual.isfinite()
        if n == solver.max_evaluations or not active.any():
            break
        if before is not None:
            differences = [*differences, (x - before[0], r - before[1])][-_DEPTH:]
        before = x, r
        x = torch.where(active[:, None], _anderson(x, r, differences), x)
    return other, residual, evaluations


def _anderson(x: Tensor, r: Tensor, differences: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """x + r corrected by the combination of earlier differences of x that makes r vanish best, by their differences of r."""
    if not differences:
        return x + r
    dx, dr = (torch.stack(d, dim=2) for d in zip(*differences, strict=True))
    gram = dr.mT @ dr
    tiny = torch.finfo(x.dtype).tiny
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).rsqrt()
    # differences that are almost parallel say nothing new: this keeps them from cancelling each other
    ridge = 10 * torch.finfo(x.dtype).eps * torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    right = (dr.mT @ r[:, :, None]) * scale[:, :, None]
    weights, _ = torch.linalg.solve_ex(scale[:, :, None] * gram * scale[:, None, :] + ridge, right)
    return x + r - ((dx + dr) @ (weights * scale[:, :, None])).squeeze(2)


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
    tail: Tail,
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
    tail: Tail, K: Tensor, a: Tensor, stage: SubStep, dt: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Point, Tensor, Tensor]]:
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


class Gradients(NamedTuple):
    """Sums over samples and sub-steps."""

    K: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def zeros(cls, K: Tensor, tail: Tail) -> Gradients:
        """In K's dtype, whatever the parameters' own."""
        weights, biases = ([torch.zeros_like(p, dtype=K.dtype) for p in part] for part in (tail.weights, tail.biases))
        return cls(torch.zeros_like(K), weights, biases)


def adjoint(tail: Tail, point: Point, v: Tensor, gE: Tensor | None, sums: Gradients | None) -> Tensor:
    """Gradient of v . delta(a) + gE F(a): returns that of a, [B, h], and adds those of W_l, b_l to `sums` if given.

    With gE = 0 the result is the Hessian of F times v: one tangent pass forward, one pass back.

    Parameters
    ----------
    v : Tensor [B, h], held constant
    gE : Tensor [B] or None
    """
    if not tail.weights:
        return torch.zeros_like(v) if gE is None else gE[:, None].expand_as(v)
    ad = v
    z, slope, curve, tangent = [], [], [], []
    for i, a in enumerate(point.a):
        s, s1, s2 = tail.activation.derivatives(a)
        z.append(s)
        slope.append(s1)
        curve.append(s2 * ad)
        tangent.append(s1 * ad)
        if i + 1 < len(point.a):
            ad = tangent[-1] @ tail.weights[i].T
    r = point.g[-1] * curve[-1]
    if sums is not None:
        sums.weights[-1].add_(tangent[-1].sum(0))
    if gE is not None:
        r = r + gE[:, None] * point.g[-1] * slope[-1]
        if sums is not None:
            sums.weights[-1].add_(gE @ z[-1])
            sums.biases[-1].add_(gE.sum())
    for i in range(len(point.a) - 2, -1, -1):
        if sums is not None:
            e = point.g[i + 1] * slope[i + 1]
            sums.weights[i].addmm_(e.T, tangent[i]).addmm_(r.T, z[i])
            sums.biases[i].add_(r.sum(0))
        r = (r @ tail.weights[i]) * slope[i] + point.g[i] * curve[i]
    return r


def backward(
    la: Tensor,
    lsq: Tensor,
    lsp: Tensor,
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    tape: Tensor,
    K: Tensor,
    tail: Tail,
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
        points = [_restore(tail, tape[:, t, i], memory) for i in range(len(scheme))]
        deltas = [_delta(tail, point).expand_as(la) for point in points]
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
    tail: Tail, K: Tensor, w: Tensor, stage: SubStep, point: Point, dt: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """w + c (S x) N^T, and x."""
    nu = adjoint(tail, point, x, None, None)
    moved = w
    if stage.implicit_kick:
        moved = moved - stage.implicit_kick * dt * (nu @ K)
    if stage.implicit_drift:
        moved = moved + stage.implicit_drift * dt * (nu @ K.T)
    return moved, x


def _restore(tail: Tail, saved: Tensor, memory: str) -> Point:
    return evaluate(tail, saved)[0] if memory == "recompute" or not tail.weights else Point.from_tape(tail, saved)


def _delta(tail: Tail, point: Point) -> Tensor:
    return point.g[0] * (tail.activation.derivatives(point.a[0])[1] if tail.weights else 1.0)


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
    tail: Tail,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The adjoint of `gradient`, for cotangents [B, n] and [B] of what it returned.

    Returns
    -------
    That of x [B, n], and if they are needed those of W, W_2, ..., b, b_2, ...
    """
    point = _restore(tail, tape, "store")
    v = torch.zeros_like(point.a[0]) if g_gradient is None else g_gradient @ W.T
    sums = Gradients.zeros(W, tail) if need_weights else None
    nu = adjoint(tail, point, v, g_value, sums)
    if sums is None:
        return nu @ W, []
    of_W = nu.T @ x
    if g_gradient is not None:
        of_W.addmm_(_delta(tail, point).expand_as(v).T, g_gradient)
    return nu @ W, [of_W, *sums.weights, nu.sum(0), *sums.biases]
