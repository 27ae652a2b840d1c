"""From states to the hidden space of a separable H = T(p) + V(q) and back: what surrounds a backend's loop.

A backend supplies `forward` and `backward` on aV and aT (see `backends/separable_torch.py` for the mathematics). Here are the
products with the first layers' weights that lead there, the energy of T, and their share of the gradients. As in
`hidden_space.py` this is the only place where the latent size counts.

A quadratic term in V, beside its network, does not close in the hidden space: such an H runs on its states (`separable.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import torch as torch_backend
from .backends.separable_torch import Loop, Pieces, Rolled, State
from .backends.torch import Gradients, Tail
from .hamiltonian import Term
from .hidden_space import remembered, segment_length
from .schemes import SubStep


def covers(V_stiffness: Tensor | None, T_weights: Sequence[Tensor], T_stiffness: Tensor | None) -> bool:
    """Whether the hidden space closes: V a network, T a network or a quadratic form."""
    return V_stiffness is None and (T_stiffness is None) == bool(T_weights)


def _every_sp(every_state: bool, with_energy: bool, kinetic: bool) -> bool:
    """Whether sp is wanted after each step: the energy of a kinetic term is that of sp and aT together."""
    return every_state or (with_energy and kinetic)


class Problem(NamedTuple):
    """One rollout, checked and flattened; z0, dt, the first layers and T's stiffness in the work dtype."""

    z0: Tensor
    """[B, 2d]."""
    V: Term
    T: Term
    dt: Tensor
    """[1 or B, n_steps]."""
    moves: Sequence[SubStep]
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute" or "checkpoint"."""

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    @property
    def kinetic(self) -> Tensor | None:
        """s of T = (s p) . p / 2, [d] or [1]; None if T is a network."""
        return self.T.stiffness

    @property
    def every_sp(self) -> bool:
        return _every_sp(self.every_state, self.with_energy, self.kinetic is not None)

    @property
    def weights_of_q(self) -> Tensor:
        """What takes sq to q, [hT, d], before the scale `kinetic`."""
        return self.V.weights[0] if self.kinetic is not None else self.T.weights[0]

    @property
    def taus(self) -> Tensor:
        """The sum of all drifts' c up to each step's end, [1 or B, n_steps]."""
        return sum(move.drift for move in self.moves) * self.dt.cumsum(1)

    def start(self) -> State:
        q0, p0 = self.z0.chunk(2, dim=1)
        aV = torch.addmm(self.V.biases[0], q0, self.V.weights[0].T)
        if self.kinetic is None:
            aT = torch.addmm(self.T.biases[0], p0, self.T.weights[0].T)
        else:
            aT = (self.kinetic * p0) @ self.V.weights[0].T
        return State(aV, aT, torch.zeros_like(aV), torch.zeros_like(aT))

    def coupling(self, backend: ModuleType) -> Tensor:
        """N, [hV, hT]."""
        WV, s = self.V.weights[0], self.kinetic
        factors = (WV, self.T.weights[0]) if s is None else (WV, s)

        def product(W: Tensor, other: Tensor) -> Tensor:
            N: Tensor = backend.product(W, other.T) if s is None else backend.product(W * other, W.T)
            return N

        return remembered(product, *factors) if self.memory == "none" else product(*factors)

    def loop(self, N: Tensor, begin: int, end: int, memory: str) -> Loop:
        T = None if self.kinetic is not None else _tail(self.T)
        last = end == self.n_steps
        return Loop(_tail(self.V), T, N, self.dt[:, begin:end], self.moves, self.with_energy, last, memory)


def _tail(term: Term) -> Tail:
    return Tail(term.weights[1:], term.biases[1:], term.activation)


def kept_as(memory: str, n_steps: int) -> str:
    """What `memory` comes to here: reversal is not there, and no steps need no checkpoints."""
    if memory == "reversible":
        memory = "checkpoint"
    return "store" if memory == "checkpoint" and not n_steps else memory


def saved_shapes(
    widths_V: Sequence[int],
    widths_T: Sequence[int] | None,
    moves: Sequence[SubStep],
    n_steps: int,
    every_state: bool,
    with_energy: bool,
    memory: str,
) -> tuple[tuple[int, ...], ...]:
    """Shapes a sample of tape, sp, sq and aT, see `Result`; `widths_T` is None if T is no network."""
    h_V, h_T = widths_V[0], (widths_T or widths_V)[0]
    memory = kept_as(memory, n_steps)
    if memory in ("none", "checkpoint"):
        n_kept = -(-n_steps // segment_length(n_steps, memory)) if memory == "checkpoint" else 0
        return (2 * (h_V + h_T) * n_kept,), (0, h_V), (0, h_T), (0, h_T)
    numbers = Pieces.of(widths_V, widths_T or [h_T], moves, n_steps, with_energy, True, memory).numbers
    n_sp = n_steps if _every_sp(every_state, with_energy, widths_T is None) else 1
    return (numbers,), (n_sp, h_V), (n_steps if every_state else 1, h_T), (n_steps if with_energy else 0, h_T)


class Result(NamedTuple):
    """What `forward` returns; all but the first two for `backward`."""

    states: Tensor
    """[B, n_steps + 1 or 1, 2d]."""
    energy: Tensor
    """[B, n_steps + 1 or 0]."""
    tape: Tensor
    """[B, *]; with checkpoints the hidden states that segments of steps start from."""
    sp: Tensor
    """[B, n_steps or 1, hV], and sq and aT likewise, [B, *, hT]: after each step, or the last. [B, 0, *] where not needed."""
    sq: Tensor
    aT: Tensor


def forward(backend: ModuleType, problem: Problem) -> Result:
    """Run the rollout."""
    n_steps, memory = problem.n_steps, kept_as(problem.memory, problem.n_steps)
    z0, N, start = problem.z0, problem.coupling(backend), problem.start()
    state, runs, checkpoints = start, [], []
    for begin, end in _segments(n_steps, memory):
        if memory == "checkpoint":
            checkpoints.append(torch.cat(state, dim=1))
        run = _run(backend, problem, N, state, begin, end, "none" if memory == "checkpoint" else memory)
        runs.append(run)
        state = run.end
    sp, sq, aT, energy_of_V = (
        parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        for parts in zip(*((run.sp, run.sq, run.aT, run.energy) for run in runs), strict=True)
    )
    if not problem.every_state:
        sq = state.sq[:, None]
    last_sp = sp if problem.every_state else state.sp[:, None]
    energy = energy_of_V
    if problem.with_energy:
        energy = energy_of_V + _energy_of_T(problem, start.aT, aT, sp)
    states = _states(backend, problem, last_sp, sq)
    if memory in ("store", "recompute"):
        return Result(states, energy, runs[0].tape, sp if problem.every_sp else last_sp, sq, aT)
    none = [x.new_empty(x.shape[0], 0, x.shape[2]) for x in (sp, sq, aT)]
    tape = torch.cat(checkpoints, dim=1) if memory == "checkpoint" else z0.new_empty(z0.shape[0], 0)
    return Result(states, energy, tape, *none)


def _segments(n_steps: int, memory: str) -> list[tuple[int, int]]:
    length = segment_length(n_steps, memory)
    return [(begin, min(begin + length, n_steps)) for begin in range(0, max(n_steps, 1), length)]


def _run(backend: ModuleType, problem: Problem, N: Tensor, state: State, begin: int, end: int, memory: str) -> Rolled:
    run: Rolled = backend.forward(problem.loop(N, begin, end, memory), state, problem.every_sp, problem.with_energy)
    return run


def _energy_of_T(problem: Problem, aT0: Tensor, aT: Tensor, sp: Tensor) -> Tensor:
    """[B, n_steps + 1]. With p = p0 + sp WV, (s p) . p = (s p0) . p0 + sp . (aT0 + aT)."""
    if problem.kinetic is None:
        return torch_backend.energy(_tail(problem.T).to(aT.dtype), torch.cat((aT0[:, None], aT), dim=1))
    p0 = problem.z0.chunk(2, dim=1)[1]
    at_start = 0.5 * (problem.kinetic * p0 * p0).sum(1, keepdim=True)
    return torch.cat((at_start, at_start + 0.5 * (sp * (aT + aT0[:, None])).sum(-1)), dim=1)


def _states(backend: ModuleType, problem: Problem, sp: Tensor, sq: Tensor) -> Tensor:
    """[B, n_steps + 1 or 1, 2d], from sp and sq [B, n_steps or 1, h]."""
    z0, WV, s = problem.z0, problem.V.weights[0], problem.kinetic
    d = WV.shape[1]
    if not problem.n_steps:
        return z0[:, None].clone()
    first = int(problem.every_state)
    states = z0.new_empty(z0.shape[0], sp.shape[1] + first, 2 * d)
    states[:, :first] = z0[:, None]
    q0, p0 = z0.chunk(2, dim=1)
    q, p = states[:, first:, :d], states[:, first:, d:]
    backend.product(sp, WV, p, p0)
    backend.product(sq, problem.weights_of_q if s is None else WV * s, q, q0)
    if s is not None:
        q.addcmul_(problem.taus[:, -sp.shape[1] :, None], (s * p0)[:, None])
    return states


class Parameters(NamedTuple):
    """Gradients of a term's parameters, empty where they are not needed."""

    weights: list[Tensor]
    biases: list[Tensor]
    stiffness: list[Tensor]


class _Sweep:
    """What the backward pass adds up."""

    def __init__(self, problem: Problem, need_V: bool, need_T: bool) -> None:
        self.problem = problem
        zeros = torch.zeros_like
        self.z0 = zeros(problem.z0)
        self.q0, self.p0 = self.z0.chunk(2, dim=1)
        self.WV = zeros(problem.V.weights[0]) if need_V else None
        self.WT = zeros(problem.T.weights[0]) if need_T and problem.kinetic is None else None
        self.s = zeros(problem.kinetic) if need_T and problem.kinetic is not None else None
        self.V = self._sums(problem.V) if need_V else None
        self.T = self._sums(problem.T) if self.WT is not None else None
        self.dt = problem.dt.new_zeros(problem.z0.shape[0], problem.n_steps)

    def _sums(self, term: Term) -> Gradients:
        weights, biases = ([torch.zeros_like(x, dtype=self.z0.dtype) for x in part[1:]] for part in (term.weights, term.biases))
        return Gradients(self.z0.new_empty(0), weights, biases)

    def add_to_s(self, g: Tensor) -> None:
        """g [*, d]."""
        if self.s is not None:
            self.s += g.sum_to_size(self.s.shape)

    def of_states(self, backend: ModuleType, G: Tensor, begin: int, sp: Tensor, sq: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of sp and sq from those of states, G [B, n, 2d], after steps `begin` and on; adds what goes elsewhere."""
        problem = self.problem
        Gq, Gp = G.chunk(2, dim=-1)
        WV, s = problem.V.weights[0], problem.kinetic
        if s is not None:
            p0 = problem.z0.chunk(2, dim=1)[1]
            taus = problem.taus[:, begin : begin + sp.shape[1]]
            if self.s is not None:
                self.add_to_s((Gq * (taus[:, :, None] * p0[:, None] + sq @ WV)).flatten(0, 1))
            Gq = s * Gq
            self.p0 += torch.einsum("bn,bnd->bd", taus.expand(Gq.shape[:2]), Gq)
            g_tau = torch.einsum("bnd,bd->bn", Gq, p0) * sum(move.drift for move in problem.moves)
            # tau_t holds every dt up to t
            self.dt[:, begin : begin + g_tau.shape[1]] += g_tau.flip(1).cumsum(1).flip(1)
            self.dt[:, :begin] += g_tau.sum(1, keepdim=True)
        to_q = self.WV if s is not None else self.WT
        if self.WV is not None:
            self.WV.addmm_(sp.flatten(0, 1).T, Gp.flatten(0, 1))
        if to_q is not None:
            to_q.addmm_(sq.flatten(0, 1).T, Gq.flatten(0, 1))
        return backend.product(Gp, WV.T), backend.product(Gq, problem.weights_of_q.T)

    def of_energy_of_T(self, gE: Tensor, aT: Tensor) -> Tensor:
        """Cotangent of aT [B, n, hT] from gE [B, n], where T is a network; adds its parameters' share."""
        tail = _tail(self.problem.T).to(aT.dtype)
        a, z, slopes = aT.flatten(0, 1), [], []
        for weight, bias in zip(tail.weights, tail.biases, strict=True):
            value, slope, _ = tail.activation.derivatives(a)
            z.append(value)
            slopes.append(slope)
            a = torch.addmm(bias, value, weight.T)
        e = gE.reshape(-1, 1)
        for i in range(len(z) - 1, -1, -1):
            if self.T is not None:
                self.T.weights[i].addmm_(e.T, z[i])
                self.T.biases[i].add_(e.sum(0))
            e = (e @ tail.weights[i]) * slopes[i]
        return e.view_as(aT)

    def of_start(self, backend: ModuleType, at_start: State, gN: Tensor | None) -> None:
        """From cotangents of aV and aT at the start, and of N."""
        problem = self.problem
        WV, s = problem.V.weights[0], problem.kinetic
        q0, p0 = problem.z0.chunk(2, dim=1)
        self.q0 += at_start.aV @ WV
        if self.WV is not None:
            self.WV.addmm_(at_start.aV.T, q0)
        if s is None:
            WT = problem.T.weights[0]
            self.p0 += at_start.aT @ WT
            if self.WT is not None and gN is not None:
                self.WT.addmm_(at_start.aT.T, p0).add_(backend.product(gN.T, WV))
            if self.WV is not None and gN is not None:
                self.WV.add_(backend.product(gN, WT))
            return
        to_p = at_start.aT @ WV
        self.p0 += s * to_p
        self.add_to_s(to_p * p0)
        if gN is not None:
            carried = backend.product(gN + gN.T, WV)
            self.add_to_s(0.5 * carried * WV)
            if self.WV is not None:
                self.WV.addmm_(at_start.aT.T, s * p0).add_(s * carried)


def backward(
    backend: ModuleType,
    problem: Problem,
    g_states: Tensor | None,
    g_energy: Tensor | None,
    saved: Sequence[Tensor],
    need_V: bool,
    need_T: bool,
) -> tuple[Tensor, Parameters, Parameters, Tensor]:
    """Gradients of z0 [B, 2d], the parameters of V and of T, and dt [B, n_steps].

    Parameters
    ----------
    g_states, g_energy : cotangents of what `forward` returned, or None
    saved : tape, sp, sq, aT as `forward` returned them
    need_V, need_T : whether the gradients of their parameters are wanted
    """
    n_steps, s = problem.n_steps, problem.kinetic
    N, start = problem.coupling(backend), problem.start()
    sweep = _Sweep(problem, need_V, need_T)
    gN = torch.zeros_like(N) if need_V or need_T else None
    if g_states is not None:
        sweep.z0 += g_states.sum(1)
    cotangents = State(*map(torch.zeros_like, start))
    aT0_share = torch.zeros_like(start.aT)
    for begin, end, loop, tape, sp, sq, aT in _backwards(backend, problem, N, start, saved):
        of_states: tuple[Tensor, Tensor] | None = None
        if g_states is not None and n_steps and problem.every_state:
            of_states = sweep.of_states(backend, g_states[:, begin + 1 : end + 1], begin, sp, sq)
        elif g_states is not None and n_steps and end == n_steps:
            gsp, gsq = sweep.of_states(backend, g_states, n_steps - 1, sp[:, -1:], sq)
            cotangents = cotangents._replace(sp=gsp[:, 0], sq=gsq[:, 0])
        of_aT = of_energy = None
        if g_energy is not None:
            of_energy, gE = g_energy[:, begin : end + 1], g_energy[:, begin + 1 : end + 1]
            if s is None:
                of_aT = sweep.of_energy_of_T(gE, aT)
            else:
                of_aT = 0.5 * gE[:, :, None] * sp
                aT0_share += of_aT.sum(1)
                of_sp = 0.5 * gE[:, :, None] * (aT + start.aT[:, None])
                of_states = (of_sp, torch.zeros_like(of_sp)) if of_states is None else (of_states[0] + of_sp, of_states[1])
        last_sp = sp[:, -1] if sp.shape[1] else start.sp
        cotangents, gdt = backend.backward(loop, cotangents, last_sp, of_states, of_aT, of_energy, tape, sweep.V, sweep.T, gN)
        sweep.dt[:, begin:end] += gdt
    if g_energy is not None and s is None:
        aT0_share = sweep.of_energy_of_T(g_energy[:, :1], start.aT[:, None])[:, 0]
    if g_energy is not None and s is not None:
        p0, total = problem.z0.chunk(2, dim=1)[1], g_energy.sum(1, keepdim=True)
        sweep.p0 += total * s * p0
        sweep.add_to_s(0.5 * total * p0 * p0)
    cotangents = cotangents._replace(aT=cotangents.aT + aT0_share)
    sweep.of_start(backend, cotangents, gN)
    V = T = Parameters([], [], [])
    if sweep.V is not None and sweep.WV is not None:
        V = Parameters([sweep.WV, *sweep.V.weights], [cotangents.aV.sum(0), *sweep.V.biases], [])
    if sweep.T is not None and sweep.WT is not None:
        T = Parameters([sweep.WT, *sweep.T.weights], [cotangents.aT.sum(0), *sweep.T.biases], [])
    if sweep.s is not None:
        T = Parameters([], [], [sweep.s])
    return sweep.z0, V, T, sweep.dt


def _backwards(
    backend: ModuleType, problem: Problem, N: Tensor, start: State, saved: Sequence[Tensor]
) -> Iterator[tuple[int, int, Loop, Tensor, Tensor, Tensor, Tensor]]:
    """Segments of steps, the last one first, with tape, sp, sq and aT: as kept, or computed again from a checkpoint."""
    memory = kept_as(problem.memory, problem.n_steps)
    tape, sp, sq, aT = saved
    if memory != "checkpoint":
        yield 0, problem.n_steps, problem.loop(N, 0, problem.n_steps, memory), tape, sp, sq, aT
        return
    segments = _segments(problem.n_steps, memory)
    checkpoints = tape.unflatten(1, (len(segments), -1))
    for index in reversed(range(len(segments))):
        begin, end = segments[index]
        state = State(*checkpoints[:, index].split([x.shape[1] for x in start], dim=1))
        run = _run(backend, problem, N, state, begin, end, "store")
        sp, sq = (x if x.shape[1] else at_end[:, None] for x, at_end in ((run.sp, run.end.sp), (run.sq, run.end.sq)))
        if not problem.every_state:
            sq = sq[:, -1:]
        yield begin, end, problem.loop(N, begin, end, "store"), run.tape, sp, sq, run.aT
