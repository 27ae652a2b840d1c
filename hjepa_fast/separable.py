"""Rollouts of a separable H(q, p) = T(p) + V(q) on its states, and their adjoint.

This serves an H that does not close in the hidden space, V having a quadratic term beside its network; for every other see
`separable_hidden_space.py`.

Kicks need only grad V at q and drifts only grad T at p, so a gradient is evaluated once for as long as its argument stays:
two a leapfrog step, since the last kick of a step and the first of the next one share q. The leapfrog method is then
Stormer-Verlet: symplectic, reversible, order 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.torch import Gradients, Point, Tail, adjoint, evaluate
from .hamiltonian import Term
from .schemes import SubStep


class Evaluation(NamedTuple):
    """A term's gradient [B, d] and value [B] at x [B, d], and what its adjoint needs."""

    x: Tensor
    gradient: Tensor
    value: Tensor
    point: Point | None
    delta: Tensor | None


class TermGradients:
    """Sums of the gradients of a term's parameters."""

    def __init__(self, term: Term) -> None:
        self.weights = [torch.zeros_like(w) for w in term.weights]
        self.biases = [torch.zeros_like(b) for b in term.biases]
        self.stiffness = None if term.stiffness is None else torch.zeros_like(term.stiffness)

    def tail(self) -> Gradients:
        return Gradients(torch.empty(0), self.weights[1:], self.biases[1:])


def _tail(term: Term) -> Tail:
    return Tail(term.weights[1:], term.biases[1:], term.activation)


def evaluate_term(term: Term, x: Tensor) -> Evaluation:
    """Gradient and value of a term at x [B, d]."""
    gradient, value = torch.zeros_like(x), x.new_zeros(x.shape[0])
    point = delta = None
    if term.weights:
        point, delta, value = evaluate(_tail(term), torch.addmm(term.biases[0], x, term.weights[0].T))
        gradient = delta @ term.weights[0]
    if term.stiffness is not None:
        gradient = gradient + term.stiffness * x
        value = value + 0.5 * (term.stiffness * x * x).sum(-1)
    return Evaluation(x, gradient, value, point, delta)


def term_adjoint(term: Term, at: Evaluation, v: Tensor, gE: Tensor | None, sums: TermGradients) -> Tensor:
    """Gradient of v . grad(x) + gE value(x): returns that of x, [B, d], and adds those of the parameters to `sums`."""
    lx = torch.zeros_like(at.x)
    if term.weights:
        W = term.weights[0]
        assert at.point is not None
        assert at.delta is not None
        r = adjoint(_tail(term), at.point, v @ W.T, gE, sums.tail())
        lx = r @ W
        sums.weights[0].addmm_(r.T, at.x).addmm_(at.delta.T, v)
        sums.biases[0].add_(r.sum(0))
    if term.stiffness is not None:
        assert sums.stiffness is not None
        lx = lx + term.stiffness * (v if gE is None else v + gE[:, None] * at.x)
        g = v * at.x if gE is None else v * at.x + 0.5 * gE[:, None] * at.x * at.x
        sums.stiffness.add_(g.sum_to_size(sums.stiffness.shape))
    return lx


def forward(
    V: Term, T: Term, z0: Tensor, dt: Tensor, scheme: Sequence[SubStep], with_energy: bool, path: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Roll z0 [B, 2d] forward.

    Parameters
    ----------
    V, T : Term, of q and of p
    dt : Tensor [1 or B, n_steps]
    path : list, optional, gets the state before each sub-step, [B, 2d]

    Returns
    -------
    states : Tensor [B, n_steps + 1, 2d]
    energy : Tensor [B, n_steps + 1], [B, 0] if not asked for
    """
    q, p = z0.chunk(2, dim=1)
    states, energies = [z0], []
    at_q: Evaluation | None = None
    at_p: Evaluation | None = None
    for t in range(dt.shape[1]):
        dt_t = dt[:, t, None]
        for i, (kick, drift, *_) in enumerate(scheme):
            if path is not None:
                path.append(torch.cat((q, p), dim=1))
            if kick and at_q is None:
                at_q = evaluate_term(V, q)
            if drift and at_p is None:
                at_p = evaluate_term(T, p)
            if i == 0 and with_energy:
                energies.append((at_q or evaluate_term(V, q)).value + (at_p or evaluate_term(T, p)).value)
            push, move = at_q, at_p
            if kick and push is not None:
                p, at_p = p - kick * dt_t * push.gradient, None
            if drift and move is not None:
                q, at_q = q + drift * dt_t * move.gradient, None
        states.append(torch.cat((q, p), dim=1))
    if with_energy:
        energies.append((at_q or evaluate_term(V, q)).value + (at_p or evaluate_term(T, p)).value)
    energy = torch.stack(energies, dim=1) if with_energy else z0.new_empty(z0.shape[0], 0)
    return torch.stack(states, dim=1), energy


class _Side:
    """The cotangent of q (or p) on the way back, with what is pending on the gradient at its present value."""

    def __init__(self, term: Term, x: Tensor) -> None:
        self.term, self.sums = term, TermGradients(term)
        self.l = torch.zeros_like(x)
        self.move_to(x)

    def move_to(self, x: Tensor) -> None:
        self.x, self.v = x, torch.zeros_like(x)
        self.gE: Tensor | None = None
        self._at: Evaluation | None = None
        self.used = False

    @property
    def at(self) -> Evaluation:
        if self._at is None:
            self._at = evaluate_term(self.term, self.x)
        return self._at

    def flush(self) -> None:
        """Add what is pending: one Hessian-vector product for all kicks (drifts) that shared this gradient."""
        if self.used or self.gE is not None:
            self.l = self.l + term_adjoint(self.term, self.at, self.v, self.gE, self.sums)
        self.v, self.gE, self.used = torch.zeros_like(self.v), None, False


def backward(
    V: Term,
    T: Term,
    g_states: Tensor | None,
    g_energy: Tensor | None,
    states: Tensor,
    dt: Tensor,
    scheme: Sequence[SubStep],
) -> tuple[Tensor, TermGradients, TermGradients, Tensor]:
    """The adjoint of `forward`: gradients of z0 [B, 2d], of the parameters of V and of T, and of dt [B, n_steps].

    `states` is what `forward` returned; nothing else is kept, each step's inside is computed again from its start.
    """
    n_steps = dt.shape[1]
    q_side, p_side = (_Side(term, x) for term, x in zip((V, T), states[:, -1].chunk(2, dim=1), strict=True))
    gdt = states.new_zeros(states.shape[0], n_steps)
    for t in range(n_steps, -1, -1):
        if g_states is not None:
            for side, g in zip((q_side, p_side), g_states[:, t].chunk(2, dim=1), strict=True):
                side.l = side.l + g
        if g_energy is not None:
            for side in (q_side, p_side):
                side.gE = g_energy[:, t]
        if t == 0:
            break
        dt_t = dt[:, t - 1, None]
        path: list[Tensor] = []
        forward(V, T, states[:, t - 1], dt[:, t - 1 : t], scheme, False, path)
        for (kick, drift, *_), before in zip(scheme[::-1], path[::-1], strict=True):
            q, p = before.chunk(2, dim=1)
            # each changed what the other reads; its cotangent must be complete before it is passed on
            if drift:
                q_side.flush()
                q_side.move_to(q)
            if kick:
                p_side.flush()
                p_side.move_to(p)
            lq, lp = q_side.l, p_side.l
            if drift:
                _pass_back(p_side, drift * lq, dt_t, gdt[:, t - 1])
            if kick:
                _pass_back(q_side, -kick * lp, dt_t, gdt[:, t - 1])
    q_side.flush()
    p_side.flush()
    return torch.cat((q_side.l, p_side.l), dim=1), q_side.sums, p_side.sums, gdt


def _pass_back(side: _Side, u: Tensor, dt_t: Tensor, gdt: Tensor) -> None:
    """The gradient at this side's value was scaled by dt and added to the other's, whose cotangent gives u."""
    gdt.add_((u * side.at.gradient).sum(-1))
    side.v = side.v + dt_t * u
    side.used = True
