"""The hidden-space loop of a separable H = T(p) + V(q) in plain PyTorch operations: any device, any dtype.

Row vectors, the batch in rows. V(q) = F_V(aV) with aV = q WV^T + bV and deltaV = grad F_V, T(p) likewise. With N = WV WT^T

    kick   p <- p - c grad V    is    aT <- aT - c deltaV N,      sp <- sp - c deltaV
    drift  q <- q + c grad T    is    aV <- aV + c deltaT N^T,    sq <- sq + c deltaT

and p = p0 + sp WV, q = q0 + sq WT at any time. A kinetic term without network, T = (s p) . p / 2, takes aT = (s p) WV^T and
N = (WV s) WV^T instead: the kick is the same, and

    drift  q <- q + c s p       is    aV <- aV + c aT,            sq <- sq + c sp

so that q = q0 + s (tau p0 + sq WV) with tau the sum of all c. A gradient, and its product with N, is evaluated once for as long
as its argument stays: the last kick of a step and the first of the next one share deltaV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..schemes import SubStep
from .torch import Gradients, Point, Tail, adjoint, evaluate, product, tape_width

__all__ = ["Loop", "Pieces", "Rolled", "State", "backward", "forward", "product"]


class Loop(NamedTuple):
    """What stays the same throughout a rollout."""

    V: Tail
    T: Tail | None
    """None for a kinetic term without network."""
    N: Tensor
    """[hV, hT], in the dtype that is computed in, whatever the parameters' own; hT is hV if there is no T."""
    dt: Tensor
    """[1 or B, n_steps]."""
    moves: Sequence[SubStep]
    with_energy: bool
    """Whether V is wanted before each step, and after the last one too if `last`."""
    last: bool
    memory: str
    """"none", "recompute" or "store", what to keep for `backward`."""

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    def to_work_dtype(self) -> Loop:
        """With every parameter in the dtype that is computed in."""
        T = None if self.T is None else self.T.to(self.N.dtype)
        return self._replace(V=self.V.to(self.N.dtype), T=T)


class State(NamedTuple):
    """Where a rollout is: aV [B, hV], aT [B, hT], and the sums sp [B, hV], sq [B, hT]; or the cotangents of these."""

    aV: Tensor
    aT: Tensor
    sp: Tensor
    sq: Tensor


class Rolled(NamedTuple):
    """What `forward` returns."""

    end: State
    sp: Tensor
    """[B, n_steps, hV] after each step; [B, 0, hV] if not asked for. `sq` and `aT` likewise, [B, n_steps, hT]."""
    sq: Tensor
    aT: Tensor
    energy: Tensor
    """[B, n_steps + 1], V before each step and after the last; [B, 0] if not asked for."""
    tape: Tensor
    """[B, *], what each evaluation of V, then what each one of T leaves for `backward`."""


class Pieces(NamedTuple):
    """How the tape is divided: evaluations of each term, and the numbers that one leaves."""

    of_V: int
    width_V: int
    of_T: int
    width_T: int

    @classmethod
    def of(
        cls,
        widths_V: Sequence[int],
        widths_T: Sequence[int],
        moves: Sequence[SubStep],
        n_steps: int,
        with_energy: bool,
        last: bool,
        memory: str,
    ) -> Pieces:
        of_V, of_T, *_ = evaluations(moves, n_steps, with_energy, last)
        return cls(of_V, tape_width(widths_V, memory), of_T, tape_width(widths_T, memory))

    @classmethod
    def of_loop(cls, loop: Loop) -> Pieces:
        h_V, h_T = loop.N.shape
        widths_T = [h_T] if loop.T is None or not loop.T.weights else loop.T.widths
        return cls.of(loop.V.widths or [h_V], widths_T, loop.moves, loop.n_steps, loop.with_energy, loop.last, loop.memory)

    @property
    def numbers(self) -> int:
        return self.of_V * self.width_V + self.of_T * self.width_T

    def split(self, tape: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each evaluation of V, [B, width_V], and of T."""
        V, T = tape.split((self.of_V * self.width_V, self.of_T * self.width_T), dim=1)
        return list(V.split(self.width_V, dim=1)), list(T.split(self.width_T, dim=1))


class Evaluations(NamedTuple):
    """How often V and T are evaluated, and whether the last of each is of where the rollout then is."""

    of_V: int
    of_T: int
    known_V: bool
    known_T: bool


def evaluations(moves: Sequence[SubStep], n_steps: int, with_energy: bool, last: bool) -> Evaluations:
    """What n_steps steps of `forward` take."""
    counts, known = [0, 0], [False, False]

    def need(side: int) -> None:
        counts[side] += not known[side]
        known[side] = True

    def step() -> tuple[int, int]:
        before = tuple(counts)
        if with_energy:
            need(0)
        for kick, drift, *_ in moves:
            if kick:
                need(0)
            if drift:
                need(1)
            known[:] = known[0] and not drift, known[1] and not kick
        return counts[0] - before[0], counts[1] - before[1]

    if n_steps:
        step()
    if n_steps > 1:
        more_V, more_T = step()  # every later step is like the second
        counts[0] += (n_steps - 2) * more_V
        counts[1] += (n_steps - 2) * more_T
    if with_energy and last:
        need(0)
    return Evaluations(counts[0], counts[1], known[0], known[1])


class _Look(NamedTuple):
    """A gradient, as what it adds to a sum and to the other term's first pre-activation, and the term's value."""

    delta: Tensor
    carried: Tensor
    value: Tensor | None = None


def forward(loop: Loop, start: State, every_state: bool, every_aT: bool) -> Rolled:
    """Run the loop; sp and sq, and aT are returned after each step if asked for."""
    loop = loop.to_work_dtype()
    aV, aT, sp, sq = start
    sps, sqs, aTs, energies = [], [], [], []
    tapes: tuple[list[Tensor], list[Tensor]] = ([], [])

    def look(tape: list[Tensor], tail: Tail, a: Tensor, N: Tensor) -> _Look:
        point, delta, value = evaluate(tail, a)
        if loop.memory != "none":
            tape.append(point.a[0] if loop.memory == "recompute" else point.tape())
        return _Look(delta, delta @ N, value)

    def look_at_V() -> _Look:
        return look(tapes[0], loop.V, aV, loop.N)

    def look_at_T() -> _Look:
        if loop.T is not None:
            return look(tapes[1], loop.T, aT, loop.N.T)
        if loop.memory != "none":
            tapes[1].append(aT)
        return _Look(sp, aT)

    at_q: _Look | None = None
    at_p: _Look | None = None
    for t in range(loop.n_steps):
        dt_t = loop.dt[:, t, None]
        if loop.with_energy:
            at_q = at_q or look_at_V()
            energies.append(at_q.value)
        for kick, drift, *_ in loop.moves:
            if kick and at_q is None:
                at_q = look_at_V()
            if drift and at_p is None:
                at_p = look_at_T()
            push, move = at_q, at_p
            if kick and push is not None:
                aT, sp, at_p = aT - kick * dt_t * push.carried, sp - kick * dt_t * push.delta, None
            if drift and move is not None:
                aV, sq, at_q = aV + drift * dt_t * move.carried, sq + drift * dt_t * move.delta, None
        if every_state:
            sps.append(sp)
            sqs.append(sq)
        if every_aT:
            aTs.append(aT)
    if loop.with_energy and loop.last:
        energies.append((at_q or look_at_V()).value)

    def stacked(path: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(path, 1) if path else like.new_empty(like.shape[0], 0, *like.shape[1:])

    tape = [*tapes[0], *tapes[1]]
    return Rolled(
        State(aV, aT, sp, sq),
        stacked(sps, sp),
        stacked(sqs, sq),
        stacked(aTs, aT),
        stacked([value for value in energies if value is not None], aV[:, 0]),
        torch.cat(tape, 1) if tape else aV.new_empty(aV.shape[0], 0),
    )


class _Side:
    """A term on the way back: the cotangent of its first pre-activation, and what is pending on its gradient.

    `N` takes this side's cotangent to that of the other one's delta, and gN is what its gradient is added to.
    """

    def __init__(
        self,
        tail: Tail | None,
        memory: str,
        tape: list[Tensor],
        cotangent: Tensor,
        N: Tensor,
        sums: Gradients | None,
        gN: Tensor | None,
    ) -> None:
        self.tail, self.memory, self.tape, self.N, self.sums, self.gN = tail, memory, tape, N, sums, gN
        self.l = cotangent
        self._lN: Tensor | None = None
        self.loaded = False

    @property
    def lN(self) -> Tensor:
        if self._lN is None:
            self._lN = self.l @ self.N
        return self._lN

    def add(self, x: Tensor) -> None:
        self.l, self._lN = self.l + x, None

    def arrive(self) -> None:
        """The last evaluation not passed yet, unless that is the present one."""
        if self.loaded:
            return
        saved = self.tape.pop()
        self.loaded, self.used = True, False
        self.gE: Tensor | None = None
        if self.tail is None:
            self.a = saved
            return
        keeps_all = self.memory == "store" and bool(self.tail.weights)
        self.point = Point.from_tape(self.tail, saved) if keeps_all else evaluate(self.tail, saved)[0]
        slope = (
            self.tail.activation.derivatives(saved[:, : self.N.shape[0]])[1] if self.tail.weights else torch.ones_like(saved)
        )
        self.delta = self.point.g[0] * slope
        self.v, self.carried = torch.zeros_like(self.delta), self.l.new_zeros(())

    def use(self, u: Tensor, carried: Tensor, dt: Tensor, gdt: Tensor) -> None:
        """dt times the gradient was added: u is the cotangent of dt delta, `carried` that of dt delta N."""
        gdt.add_((u * self.delta).sum(-1))
        self.v, self.carried, self.used = self.v + dt * u, self.carried + dt * carried, True

    def leave(self) -> None:
        """Add what is pending: one Hessian-vector product for all that shared this gradient."""
        if self.loaded and self.tail is not None and (self.used or self.gE is not None):
            self.add(adjoint(self.tail, self.point, self.v, self.gE, self.sums))
            if self.gN is not None and self.used:
                self.gN.addmm_(self.delta.T, self.carried)
        self.loaded = False


def backward(
    loop: Loop,
    end: State,
    sp: Tensor,
    of_states: tuple[Tensor, Tensor] | None,
    of_aT: Tensor | None,
    of_energy: Tensor | None,
    tape: Tensor,
    sums_V: Gradients | None,
    sums_T: Gradients | None,
    gN: Tensor | None,
) -> tuple[State, Tensor]:
    """The adjoint of `forward`, from the last move to the first.

    Parameters
    ----------
    loop : as given to `forward`
    end : State, cotangents of where the rollout ended
    sp : Tensor [B, hV], its value there
    of_states : cotangents of sp [B, n_steps, hV] and sq [B, n_steps, hT] after each step, or None
    of_aT : Tensor [B, n_steps, hT] or None, likewise
    of_energy : Tensor [B, n_steps + 1] or None; the last column counts only if `loop.last`
    tape : what `forward` returned
    sums_V, sums_T : what the gradients of the tails' parameters are added to (their K is not used), or None
    gN : Tensor [hV, hT], what the gradient of N is added to, or None

    Returns
    -------
    State, cotangents of the start; gdt [B, n_steps]
    """
    tape_V, tape_T = Pieces.of_loop(loop).split(tape)
    loop = loop.to_work_dtype()
    q = _Side(loop.V, loop.memory, tape_V, end.aV, loop.N, sums_V, gN)
    p = _Side(loop.T, loop.memory, tape_T, end.aT, loop.N.T, sums_T, None if gN is None else gN.T)
    lsp, lsq = end.sp, end.sq
    gdt = lsp.new_zeros(lsp.shape[0], loop.n_steps)

    def energy_at(t: int) -> None:
        if loop.with_energy:
            q.arrive()
            q.gE = None if of_energy is None else of_energy[:, t]

    if loop.last:
        energy_at(loop.n_steps)
    for t in range(loop.n_steps - 1, -1, -1):
        dt_t = loop.dt[:, t, None]
        if of_states is not None:
            lsp, lsq = lsp + of_states[0][:, t], lsq + of_states[1][:, t]
        if of_aT is not None:
            p.add(of_aT[:, t])
        for kick, drift, *_ in reversed(loop.moves):
            # each changed what the other reads; its cotangent must be complete before it is passed on
            if drift:
                q.leave()
            if kick:
                p.leave()
            lV, lT = q.l, p.l
            if kick:
                u = -kick * (lsp + p.lN)
            if drift:
                p.arrive()
                if loop.T is not None:
                    p.use(drift * (lsq + q.lN), drift * lV, dt_t, gdt[:, t])
            if kick:
                q.arrive()
                q.use(u, -kick * lT, dt_t, gdt[:, t])
                sp = sp + kick * dt_t * q.delta
            if drift and loop.T is None:
                gdt[:, t] += drift * ((lV * p.a).sum(-1) + (lsq * sp).sum(-1))
                p.add(drift * dt_t * lV)
                lsp = lsp + drift * dt_t * lsq
        energy_at(t)
    q.leave()
    p.leave()
    return State(q.l, p.l, lsp, lsq), gdt
