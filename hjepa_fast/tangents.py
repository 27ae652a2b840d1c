"""Directional derivatives of gradients and rollouts, written out: what forward mode and second derivatives come from.

Each value goes with its tangent, the derivative in one direction, through one pass of plain PyTorch operations on the states
themselves. Nothing is written in place, so torch.func can map over it and differentiate it, any number of times. With J the
Jacobian of a function, g a cotangent and c a tangent, the second derivatives that a backward pass J^T g needs are

    d(J^T g) . c  =  J^T (dg . c)  +  the gradient of g . (J c)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms
from .activations import Activations
from .errors import ConvergenceError
from .hidden_space.machine import half_of
from .hidden_space.program import Drive, Form
from .schemes import SubStep

_MOST_ITERATIONS = 500


class Dual:
    """A value and its tangent, or None where that is zero."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor | None = None) -> None:
        self.value, self.tangent = value, tangent

    def __add__(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, _sum(self.tangent, other.tangent))

    def __mul__(self, other: Dual) -> Dual:
        return Dual(
            self.value * other.value,
            _sum(
                None if self.tangent is None else self.tangent * other.value,
                None if other.tangent is None else self.value * other.tangent,
            ),
        )

    def __matmul__(self, other: Dual) -> Dual:
        return Dual(
            self.value @ other.value,
            _sum(
                None if self.tangent is None else self.tangent @ other.value,
                None if other.tangent is None else self.value @ other.tangent,
            ),
        )

    def __rmul__(self, c: float) -> Dual:
        return Dual(c * self.value, None if self.tangent is None else c * self.tangent)

    @property
    def T(self) -> Dual:
        return Dual(self.value.T, None if self.tangent is None else self.tangent.T)

    def half(self, side: str) -> Dual:
        """q or p of states, or of the weights that they are read by."""
        return Dual(half_of(self.value, side), None if self.tangent is None else half_of(self.tangent, side))

    def to(self, dtype: torch.dtype) -> Dual:
        return Dual(self.value.to(dtype), None if self.tangent is None else self.tangent.to(dtype))

    def sum(self) -> Dual:
        return Dual(self.value.sum(-1), None if self.tangent is None else self.tangent.sum(-1))

    def cos_sin(self) -> tuple[Dual, Dual]:
        cos, sin, t = self.value.cos(), self.value.sin(), self.tangent
        return (Dual(cos), Dual(sin)) if t is None else (Dual(cos, -sin * t), Dual(sin, cos * t))

    def tangent_or_zeros(self) -> Tensor:
        return torch.zeros_like(self.value) if self.tangent is None else self.tangent


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _joined(q: Dual, p: Dual) -> Dual:
    """z = (q, p)."""
    value = torch.cat((q.value, p.value), dim=-1)
    if q.tangent is None and p.tangent is None:
        return Dual(value)
    return Dual(value, torch.cat((q.tangent_or_zeros(), p.tangent_or_zeros()), dim=-1))


class DualTerm(NamedTuple):
    """A term of H with the tangents of its parameters, see `hamiltonian.Term`."""

    reads: str
    weights: list[Dual]
    biases: list[Dual]
    activation: Activations | None
    stiffness: Dual | None

    @classmethod
    def of(cls, form: Form, parameters: Iterator[Dual]) -> DualTerm:
        """A term of this form, of the next of the parameters."""
        if form.quadratic:
            return cls(form.reads, [], [], None, next(parameters))
        weights, biases = ([next(parameters) for _ in range(form.n_layers)] for _ in range(2))
        return cls(form.reads, weights, biases, form.activation, None)

    def delta(self, x: Dual) -> tuple[Dual, Dual]:
        """The gradient of a network with respect to its first pre-activation [B, h], and its value [B], at x [B, n]."""
        assert self.activation is not None
        a = x @ self.weights[0].T + self.biases[0]
        slopes = []
        for layer, (weight, bias) in enumerate(zip(self.weights[1:], self.biases[1:], strict=True)):
            s, slope, curve = self.activation.at(layer).derivatives(a.value)
            t = a.tangent
            slopes.append(Dual(slope, None if t is None else curve * t))
            a = Dual(s, None if t is None else slope * t) @ weight.T + bias
        value = a.sum()  # of one number
        if not slopes:
            return Dual(torch.ones_like(a.value)), value
        g = self.weights[-1]
        for weight, of_layer in zip(self.weights[-2:0:-1], slopes[:0:-1], strict=True):
            g = (g * of_layer) @ weight
        return g * slopes[0], value

    def value(self, z: Dual) -> Dual:
        """Of states [B, 2d]."""
        x = z.half(self.reads)
        return 0.5 * (self.stiffness * x * x).sum() if self.stiffness is not None else self.delta(x)[1]


class _Gradient:
    """grad H; a network is evaluated once where both halves are wanted at one point."""

    def __init__(self, terms: Sequence[DualTerm]) -> None:
        self.terms = terms
        self.last: dict[int, tuple[Sequence[Dual], Dual]] = {}

    def __call__(self, side: str, q: Dual, p: Dual) -> Dual:
        """Hq or Hp at (q, p)."""
        return _total([self.of_term(k, side, q, p) for k, t in enumerate(self.terms) if t.reads in (side, "z")], q)

    def of_term(self, k: int, side: str, q: Dual, p: Dual) -> Dual:
        term, read = self.terms[k], {"q": (q,), "p": (p,), "z": (q, p)}[self.terms[k].reads]
        if term.stiffness is not None:
            return term.stiffness * read[0]
        points, delta = self.last.get(k, ((), q))
        if len(points) != len(read) or any(x is not y for x, y in zip(points, read, strict=True)):
            delta = term.delta(read[0] if len(read) == 1 else _joined(q, p))[0]
            self.last[k] = read, delta
        W = term.weights[0]
        return delta @ (W.half(side) if term.reads == "z" else W)


class Driven(NamedTuple):
    """What moves the state beside H: see `program.Drive`."""

    drive: Drive
    externals: list[Dual]

    def at(self, i: int, t: int) -> Dual:
        """Of step t: [1 or B, width]."""
        e = self.externals[i]
        t = min(t, e.value.shape[1] - 1)
        return Dual(e.value[:, t], None if e.tangent is None else e.tangent[:, t])

    def changed(self, terms: Sequence[DualTerm], t: int) -> Sequence[DualTerm]:
        """The terms under the control of step t, from those under that of the step before."""
        first = len(self.externals) - len(self.drive.control)
        found = list(terms)
        for i, k in enumerate(self.drive.control):
            first_bias, *others = found[k].biases
            found[k] = found[k]._replace(biases=[first_bias + self.at(first + i, t), *others])
        return found

    def half(self, H: _Gradient, q: Dual, p: Dual, h: Dual, t: int, before: bool) -> Dual:
        """Half of the friction and of the force, before or after the integrator's step; unless they stand in its kicks."""
        if self.drive.in_kicks:
            return p
        for what in ("friction", "force") if before else ("force", "friction"):
            if what == "force" and self.drive.force:
                p = p + 0.5 * (h * self.at(int(bool(self.drive.friction)), t))
            elif what == "friction" and self.drive.friction == "conformal":
                p = p + self.at(0, t) * p
            elif what == "friction" and self.drive.friction:
                p = p + -1 * (self.at(0, t) * H("p", q, p))
        return p

    def in_kick(self, H: _Gradient, q: Dual, p: Dual, h: Dual, t: int, c: float) -> Dual | None:
        """What friction and force add to p in a kick c."""
        if not self.drive.in_kicks:
            return None
        parts: list[Dual] = []
        if self.drive.friction:
            parts.append(-c * (self.at(0, t) * (p if self.drive.friction == "conformal" else H("p", q, p))))
        if self.drive.force:
            parts.append(c * (h * self.at(int(bool(self.drive.friction)), t)))
        return functools.reduce(operator.add, parts) if parts else None


def gradient(term: DualTerm, x: Dual) -> tuple[Tensor, Tensor]:
    """Tangents of a network's gradient [B, n] and value [B] at what it reads, x [B, n]."""
    delta, value = term.delta(x)
    return (delta @ term.weights[0]).tangent_or_zeros(), value.tangent_or_zeros()


def rollout(
    terms: Sequence[DualTerm],
    z0: Dual,
    dt: Dual,
    n_steps: int,
    stages: Sequence[SubStep],
    omega: float,
    every_state: bool,
    with_energy: bool,
    driven: Driven,
) -> tuple[Tensor, Tensor]:
    """Tangents of states [B, n_steps + 1 or 1, 2d] and energies [B, n_steps + 1 or 0].

    Parameters
    ----------
    z0 : of [B, 2d]
    dt : of [1 or B, 1 or n_steps]
    stages : the integrator's sub-steps, none for Tao's method

    Raises
    ------
    ConvergenceError
        Plain iteration does not solve an implicit sub-step.
    """
    H = _Gradient(terms)
    q, p = z0.half("q"), z0.half("p")
    copies = q, p
    states = [z0]
    for t in range(n_steps):
        column = slice(min(t, dt.value.shape[1] - 1), min(t, dt.value.shape[1] - 1) + 1)
        h = Dual(dt.value[:, column], None if dt.tangent is None else dt.tangent[:, column])
        if driven.drive.control:
            terms = driven.changed(terms, t)
            H = _Gradient(terms)
        if stages:
            p = driven.half(H, q, p, h, t, before=True)
            q, p = _step(H, q, p, h, stages, driven, t)
            p = driven.half(H, q, p, h, t, before=False)
            states.append(_joined(q, p))
        else:
            q, p, copies = _tao_step(H, q, p, copies, h, omega)
            states.append(_joined(0.5 * (q + copies[0]), 0.5 * (p + copies[1])))
    wanted = states if every_state else states[-1:]
    none = z0.value.new_zeros(z0.value.shape[0], 0)
    energy = none
    if with_energy:
        values = [_total([term.value(z) for term in terms], z) for z in states]
        energy = torch.stack([value.tangent_or_zeros() for value in values], dim=1)
    return torch.stack([z.tangent_or_zeros() for z in wanted], dim=1), energy


def _total(parts: Sequence[Dual], like: Dual) -> Dual:
    return functools.reduce(operator.add, parts) if parts else Dual(torch.zeros_like(like.value))


def _step(H: _Gradient, q: Dual, p: Dual, h: Dual, stages: Sequence[SubStep], driven: Driven, t: int) -> tuple[Dual, Dual]:
    earlier: list[tuple[Dual, Dual]] = []
    mixes = any(s.mix for s in stages)
    for s in stages:
        at = _point(H, q, p, h, s) if s.implicit else (q, p)
        if mixes:
            found = H("q", *at), H("p", *at)
            earlier.append(found)
            for weight, (Gq, Gp) in zip(s.mix, earlier, strict=False):
                found = found[0] + weight * Gq, found[1] + weight * Gp
            q, p = q + s.drift * (h * found[1]), p + -s.kick * (h * found[0])
            continue
        q_next = q + s.drift * (h * H("p", *at)) if s.drift else q
        more = driven.in_kick(H, *at, h, t, s.kick) if s.kick else None
        p = p + -s.kick * (h * H("q", *at)) if s.kick else p
        p = p if more is None else p + more
        q = q_next
    return q, p


def _point(H: _Gradient, q: Dual, p: Dual, h: Dual, s: SubStep) -> tuple[Dual, Dual]:
    """The point y = z + c N grad H(y) of an implicit sub-step, by plain iteration until rounding.

    As many iterations again as were needed are made from the solution on, with tangents, and recorded where they are to be
    differentiated: so what is derived from them has converged as well.
    """

    def follow(H: _Gradient, q: Dual, p: Dual, h: Dual, y: tuple[Dual, Dual]) -> tuple[Dual, Dual]:
        return (
            q + s.implicit_drift * (h * H("p", *y)) if s.implicit_drift else q,
            p + -s.implicit_kick * (h * H("q", *y)) if s.implicit_kick else p,
        )

    with torch.no_grad():
        fixed = _Gradient([_value_of(term) for term in H.terms])
        q0, p0, h0 = (Dual(x.value.detach()) for x in (q, p, h))
        finite = q0.value.isfinite().all(-1) & p0.value.isfinite().all(-1)
        y, n = (q0, p0), 0
        while True:
            n, y, before = n + 1, follow(fixed, q0, p0, h0, y), y
            now, last = (torch.cat((x[0].value, x[1].value), dim=-1) for x in (y, before))
            change = (now - last).abs().amax(-1) / now.abs().amax(-1).clamp_min(1)
            # whatever is mapped over iterates together, and rows that start out not finite are left
            failed = transforms.bare(~(change <= 4 * torch.finfo(now.dtype).eps) & finite)
            if not failed.any():
                break
            if n == _MOST_ITERATIONS or not transforms.bare(change.isfinite() | ~finite).all():
                raise ConvergenceError(
                    f"{n} plain iterations did not solve an implicit step, as derivatives by forward mode and second "
                    f"derivatives take: {int(failed.sum())} of {failed.numel()} points have not converged; dt is too large for "
                    "the curvature of H"
                )
    for _ in range(n):
        y = follow(H, q, p, h, y)
    return y


def _value_of(term: DualTerm) -> DualTerm:
    weights, biases = ([Dual(x.value) for x in part] for part in (term.weights, term.biases))
    return term._replace(
        weights=weights, biases=biases, stiffness=None if term.stiffness is None else Dual(term.stiffness.value)
    )


def _tao_step(
    H: _Gradient, q: Dual, p: Dual, copies: tuple[Dual, Dual], h: Dual, omega: float
) -> tuple[Dual, Dual, tuple[Dual, Dual]]:
    """Tao's method, see `hidden_space/tao.py`: half a step of H(q, y), of H(x, p), the turn, and back."""
    x, y = copies
    half = 0.5 * h
    p, x = p + -1 * (half * H("q", q, y)), x + half * H("p", q, y)
    q, y = q + half * H("p", x, p), y + -1 * (half * H("q", x, p))
    cos, sin = (2 * omega * h).cos_sin()
    sum_q, sum_p, dq, dp = q + x, p + y, q + -1 * x, p + -1 * y
    dq, dp = cos * dq + sin * dp, cos * dp + -1 * (sin * dq)
    q, p, x, y = 0.5 * (sum_q + dq), 0.5 * (sum_p + dp), 0.5 * (sum_q + -1 * dq), 0.5 * (sum_p + -1 * dp)
    q, y = q + half * H("p", x, p), y + -1 * (half * H("q", x, p))
    p, x = p + -1 * (half * H("q", q, y)), x + half * H("p", q, y)
    return q, p, (x, y)
