"""From states to the hidden space and back: what surrounds a loop, forward and adjoint.

A loop works on registers (see `program.py`), whose start comes from z0 by products with the first layers' weights, and from
which the states come by products again, or which hold them. Here are those, their share of the gradients, and what is kept
meanwhile. This is the only place where the latent size counts, with a dense coupling.

Explicit schemes are programs. What no program covers (implicit sub-steps, Tao's method, quadratic forms under Runge-Kutta
methods), and one network of q and p with a dense coupling, for which kernels stand ready, runs in a `Kernel`: all first layers
are one, W = [Wq | Wp] stacked, with K = Wp Wq^T, and F is the sum of what follows each (see `backends/torch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConvergenceError, warn
from ..hamiltonian import Term
from ..schemes import SubStep, explicit_moves, inverse
from . import program, tao
from .coupling import remembered
from .fixed_point import Solver
from .machine import Job, Run, Sums, half_of
from .network import (
    Gradients,
    Network,
    Quadratic,
    Stack,
    TermSums,
    adjoint,
    evaluate,
    evaluate_term,
    tail_of,
    tape_width,
    term_adjoint,
)
from .network import energy as energy_of
from .program import Form, Key, Program, stages_of


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: states and sums of bfloat16 networks are kept in float32."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def kernel_stages(stages: tuple[SubStep, ...], with_energy: bool) -> tuple[SubStep, ...]:
    """With energies wanted and the first sub-step's point not the state, one before it that only looks at the energy."""
    return (SubStep(0.0, 0.0), *stages) if with_energy and stages and stages[0].implicit else stages


@dataclass(frozen=True)
class Outline:
    """A rollout without its numbers: enough to know what comes back and what is kept."""

    forms: tuple[Form, ...]
    widths: tuple[tuple[int, ...], ...]
    """h_1, ..., h_L of each network (1 of a linear one); () of a quadratic form."""
    d: int
    integrator: str
    dense: bool
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute", "checkpoint" or "reversible"; or "tiles", which keeps no tape: the backward pass runs a few
    rows forward again and back while what they leave is in the cache."""

    @cached_property
    def stages(self) -> tuple[SubStep, ...]:
        return stages_of(self.integrator, self.forms)

    @cached_property
    def tao(self) -> bool:
        return self.integrator == "tao"

    @cached_property
    def in_kernel(self) -> bool:
        """Whether a `Kernel` runs it, not a program."""
        if not program.covers(self.forms, self.stages):
            return True
        return len(self.forms) == 1 and self.dense and self.forms[0].reads == "z"

    @cached_property
    def program(self) -> Program:
        return program.compiled(self.forms, self.stages, self.dense, self.with_energy)

    @cached_property
    def implicit(self) -> bool:
        return any(s.implicit for s in self.stages)

    @cached_property
    def stacked_widths(self) -> list[int]:
        """Of each term's share of a kernel's first layer."""
        return [self.d if form.quadratic else w[0] for form, w in zip(self.forms, self.widths, strict=True)]

    @cached_property
    def from_states(self) -> tuple[int, ...]:
        """Terms whose energies are those of the states."""
        if not self.with_energy or self.in_kernel:
            return ()
        return tuple(k for k in range(len(self.forms)) if k not in self.program.energies)

    @cached_property
    def every_path(self) -> bool:
        """Whether what states are made of is wanted after every step."""
        return self.every_state or bool(self.from_states)

    def register_width(self, key: Key) -> int:
        name, *rest = key
        if name in ("C", "Z", "Y"):
            return 2 if name == "C" else self.d
        return self.widths[int(rest[1 if name in ("S", "G", "X") else 0])][0]

    @cached_property
    def register_widths(self) -> tuple[int, ...]:
        """Of every register of the program."""
        return tuple(self.register_width(key) for key in self.program.registers)

    @cached_property
    def by_pair(self) -> bool:
        """Whether the states themselves are registers."""
        return not self.in_kernel and not self.dense

    def state_widths(self) -> list[int]:
        """Of the registers that say where a rollout is."""
        if self.in_kernel:
            return [sum(self.stacked_widths)] * 3
        return [self.register_width(self.program.registers[i]) for i in self.program.state]

    def path_widths(self) -> list[int]:
        if self.in_kernel:
            return [sum(self.stacked_widths)] * 2
        return [self.register_width(self.program.registers[i]) for i in self.program.path]

    def tape_widths(self, n_steps: int, memory: str) -> int:
        """Numbers on a tape of this many steps, "store" or "recompute"."""
        if self.in_kernel:
            each = zip(self.forms, self.widths, self.stacked_widths, strict=True)
            width = sum(h if f.quadratic else tape_width(w, memory) for f, w, h in each)
            return n_steps * len(kernel_stages(self.stages, self.with_energy)) * width
        total = 0
        for item in self.program.items:
            key = self.program.registers[item.register]
            width = tape_width(self.widths[int(key[1])], memory) if item.network else self.register_width(key)
            total += item.slots(n_steps) * width
        return total

    def saved(self, n_steps: int) -> tuple[int, int]:
        """Numbers a sample that are kept for the backward pass: on the tape, and of the path."""
        if self.memory == "none" or not n_steps:
            return 0, 0
        if self.memory in ("checkpoint", "reversible") and not self.tao:
            return sum(self.state_widths()) * -(-n_steps // segment_length(n_steps, self.memory)), 0
        n_kept = n_steps if self.every_path else 1
        if self.tao:
            h = sum(self.stacked_widths)
            return tao.POINTS * h * n_steps, 2 * h * n_kept
        of_path = sum(self.path_widths())
        if not self.in_kernel and not self.dense and not self.from_states:
            n_kept = 1 if self.program.tracked else 0
        return 0 if self.memory == "tiles" else self.tape_widths(n_steps, self.memory), n_kept * of_path


_CHUNK, _MOST_ANCHORS = 16, 8
"""Reversible: steps whose layer values are held at a time; states kept of a rollout, whatever its length."""


def segment_length(n_steps: int, memory: str) -> int:
    """Steps between two kept states: all in one segment; with checkpoints about sqrt(n), which needs the least memory; an
    eighth of them, in whole chunks, with reversal."""
    if memory == "checkpoint":
        return math.isqrt(max(n_steps - 1, 0)) + 1
    if memory == "reversible":
        return _CHUNK * max(1, -(-n_steps // (_CHUNK * _MOST_ANCHORS)))
    return max(n_steps, 1)


class Problem(NamedTuple):
    """One rollout, checked and flattened; z0, dt, first layers and quadratic forms in the work dtype."""

    outline: Outline
    z0: Tensor
    """[B, 2d]."""
    terms: Sequence[Term]
    dt: Tensor
    """[1 or B, n_steps]."""
    solver: Solver
    must_converge: bool
    """Whether an implicit sub-step that does not converge raises an error."""
    omega: float
    """Of Tao's method."""
    backend: ModuleType

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    def loop(self) -> _Loop:
        return (_Kernel if self.outline.in_kernel else _Programmed)(self)


class _Sweep:
    """What the backward pass adds up."""

    def __init__(self, problem: Problem, need_parameters: bool) -> None:
        self.z0 = torch.zeros_like(problem.z0, memory_format=torch.contiguous_format)
        self.dt = problem.z0.new_zeros(problem.z0.shape[0], problem.n_steps)
        self.terms = [TermSums(term, problem.z0.dtype) for term in problem.terms] if need_parameters else None
        self.residual = problem.z0.new_zeros(problem.z0.shape[0])
        self.loop: list[Tensor] = []
        """What the loop adds gradients of its matrices to."""

    def snapshot(self) -> list[Tensor]:
        return [x.clone() for x in self._all()]

    def restore(self, saved: Sequence[Tensor]) -> None:
        for x, y in zip(self._all(), saved, strict=True):
            x.copy_(y)

    def _all(self) -> list[Tensor]:
        return [self.z0, self.dt, self.residual, *self.loop, *(x for term in self.terms or () for x in term.tensors)]


class _Loop:
    """Registers and what they mean; `state` names those that say where a rollout is, `path` those that states are made of."""

    state: Sequence[Key]
    path: Sequence[Key]

    def __init__(self, problem: Problem) -> None:
        self.problem, self.outline, self.backend = problem, problem.outline, problem.backend

    def half(self, k: int, side: str) -> Tensor:
        """The half of term k's first layer that reads this side, [h, d]."""
        term = self.problem.terms[k]
        W = term.weights[0]
        return half_of(W, side) if term.reads == "z" else W

    def ofhalf_of(self, sums: _Sweep, k: int, side: str) -> Tensor | None:
        """Its gradient."""
        if sums.terms is None:
            return None
        W = sums.terms[k].weights[0]
        return half_of(W, side) if self.problem.terms[k].reads == "z" else W

    def start(self) -> list[Tensor]:
        """The registers of `state` at z0."""
        raise NotImplementedError

    def of_start(self, sums: _Sweep, cotangents: Sequence[Tensor]) -> None:
        """From the cotangents of the registers at the start to those of z0 and of the first layers."""
        for key, given in zip(self.state, cotangents, strict=True):
            name = key[0]
            if name in ("C", "S"):
                continue
            if name == "Z":
                half_of(sums.z0, str(key[1])).add_(given)
                continue
            k = int(key[1])
            term, own = self.problem.terms[k], None if sums.terms is None else sums.terms[k]
            side = term.reads if name != "U" else "p" if term.reads == "q" else "q"
            if name != "B":
                half_of(sums.z0, side).addmm_(given, term.weights[0])
            if own is not None and name != "B":
                own.weights[0].addmm_(given.T, half_of(self.problem.z0, side))
            if own is not None and name != "U":
                own.biases[0].add_(given.sum(0))

    def sums_in(self, half: str) -> list[tuple[int, int, str]]:
        """Which of the path's registers are coefficients in this half of the state: of term k's half `side`."""
        return [(i, int(key[2]), str(key[3])) for i, key in enumerate(self.path) if key[0] == "S" and key[1] == half]

    def coefficients(self, half: str) -> int:
        return self.path.index(("C", half)) if ("C", half) in self.path else -1

    def to_states(self, path: Sequence[Tensor], out: Tensor) -> None:
        """The states [B, n, 2d] that registers [B, n, width] stand for, into `out`."""
        z0, product = self.problem.z0, self.backend.product
        for half in "qp":
            to, base = half_of(out, half), half_of(z0, half)
            if ("Z", half) in self.path:
                to.copy_(path[self.path.index(("Z", half))])
                continue
            parts = self.sums_in(half)
            C = self.coefficients(half)
            if C < 0 and parts:
                (i, k, side), *parts = parts
                product(path[i], self.half(k, side), to, base)
            elif C < 0:
                to.copy_(base[:, None])
            else:
                to.copy_(torch.einsum("bnc,bcd->bnd", path[C], z0.unflatten(1, (2, -1))))
            for i, k, side in parts:
                to += product(path[i], self.half(k, side))

    def of_states(self, sums: _Sweep, G: Tensor, path: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the path's registers from those of states, G [B, n, 2d]; adds what goes elsewhere."""
        z0, product = self.problem.z0, self.backend.product
        found: list[Tensor] = [z0.new_empty(0)] * len(self.path)
        for half in "qp":
            own = half_of(G, half)
            if ("Z", half) in self.path:
                found[self.path.index(("Z", half))] = own
                continue
            C = self.coefficients(half)
            if C < 0:
                half_of(sums.z0, half).add_(own.sum(1))
            else:
                found[C] = torch.einsum("bnd,bcd->bnc", own, z0.unflatten(1, (2, -1)))
                sums.z0 += torch.einsum("bnc,bnd->bcd", path[C], own).flatten(1)
            for i, k, side in self.sums_in(half):
                found[i] = product(own, self.half(k, side).T)
                gW = self.ofhalf_of(sums, k, side)
                if gW is not None:
                    gW.addmm_(path[i].flatten(0, 1).T, own.flatten(0, 1))
        return found

    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> _Ran:
        """Steps begin..end-1 from this state, or from z0."""
        raise NotImplementedError

    def run_back(
        self,
        sums: _Sweep,
        cotangents: Sequence[Tensor],
        values: Sequence[Tensor],
        g_path: Sequence[Tensor] | None,
        g_energy: Tensor | None,
        tape: Tensor,
        begin: int,
        end: int,
        memory: str,
        every: bool,
    ) -> list[Tensor]:
        raise NotImplementedError

    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], _Ran]:
        """The registers before step `begin` from those before step `end`, by stepping back; and what `run` gives from there."""
        raise NotImplementedError

    def new_sums(self, sums: _Sweep) -> None:
        """Make `sums.loop`."""

    def of_matrices(self, sums: _Sweep) -> None:
        """From `sums.loop` to the parameters' gradients."""


class _Ran(NamedTuple):
    """What a loop leaves."""

    state: list[Tensor]
    path: list[Tensor]
    energy: Tensor
    """[B, steps + 1], of the terms whose energies are not those of the states; [B, 0] if not asked for."""
    tape: Tensor
    """[B, *]."""
    residual: Tensor
    """[B, steps], and `evaluations` likewise; [B, 0] of an explicit scheme."""
    evaluations: Tensor


class _Programmed(_Loop):
    """A program."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.program = self.outline.program
        self.state = [self.program.registers[i] for i in self.program.state]
        self.path = [self.program.registers[i] for i in self.program.path]
        terms = [problem.terms[k] for k in self.program.networks]
        given = [self.matrix(key) for key in self.program.matrices if key[0] != "W"]
        self.whole = Job(
            self.program, problem.z0, [(term.weights[0], term.biases[0]) for term in terms], given,
            [tail_of(term) for term in terms], problem.dt, self.outline.with_energy, True, "none", self.outline.register_widths,
        )  # fmt: skip

    def start(self) -> list[Tensor]:
        return self.whole.start()

    @property
    def matrices(self) -> list[Tensor]:
        return self.whole.matrices

    def matrix(self, key: Key) -> Tensor:
        if key[0] == "k":
            stiffness = self.problem.terms[int(key[1])].stiffness
            assert stiffness is not None
            n = key[2] if isinstance(key[2], int) else self.outline.d if key[2] == "d" else self.outline.widths[int(key[3])][0]
            return stiffness.expand(int(n))
        _, k, side, j, other = key
        factors = self.half(int(k), str(side)), self.half(int(j), str(other))

        def product(W: Tensor, S: Tensor) -> Tensor:
            K: Tensor = self.backend.product(W, S.T)
            return K

        return remembered(product, *factors) if self.outline.memory == "none" else product(*factors)

    def job(self, begin: int, end: int, memory: str, every: bool) -> Job:
        steps = self.problem.dt if (begin, end) == (0, self.problem.n_steps) else self.problem.dt[:, begin:end]
        return self.whole._replace(dt=steps, every_state=every, memory=memory)

    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> _Ran:
        run: Run = self.backend.run(self.job(begin, end, memory, every), state, states, want_end)
        none = run.energy[:, :0]
        return _Ran(run.state, run.path, run.energy, run.tape, none, none)

    def new_sums(self, sums: _Sweep) -> None:
        if sums.terms is not None:
            sums.loop = [
                torch.zeros_like(M, memory_format=torch.contiguous_format)
                if key[0] != "W"
                else self.ofhalf_of(sums, int(key[1]), str(key[2]))  # type: ignore[misc]
                for key, M in zip(self.program.matrices, self.matrices, strict=True)
            ]

    def of_matrices(self, sums: _Sweep) -> None:
        if sums.terms is None:
            return
        for key, g in zip(self.program.matrices, sums.loop, strict=True):
            if key[0] == "k":
                stiffness = sums.terms[int(key[1])].stiffness
                assert stiffness is not None
                stiffness.add_(g.sum_to_size(stiffness.shape))
            elif key[0] == "K":
                _, k, side, j, other = key
                for (n, s), (m, t), part in (((k, side), (j, other), g), ((j, other), (k, side), g.T)):
                    gW = self.ofhalf_of(sums, int(n), str(s))
                    assert gW is not None
                    gW.add_(self.backend.product(part, self.half(int(m), str(t))))

    def run_back(
        self,
        sums: _Sweep,
        cotangents: Sequence[Tensor],
        values: Sequence[Tensor],
        g_path: Sequence[Tensor] | None,
        g_energy: Tensor | None,
        tape: Tensor,
        begin: int,
        end: int,
        memory: str,
        every: bool,
    ) -> list[Tensor]:
        gradients = None if sums.terms is None else Sums(sums.loop, [sums.terms[k].tail() for k in self.program.networks])
        job = self.job(begin, end, memory, every)
        found, gdt = self.backend.run_back(job, cotangents, values, g_path, g_energy, tape, gradients)
        sums.dt[:, begin:end] = gdt
        return found

    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], _Ran]:
        stages = explicit_moves(inverse(self.outline.stages))
        assert stages is not None  # only a separable H has a reversible program
        back = program.compiled(self.outline.forms, stages, self.outline.dense, False)
        # another program's registers and matrices may be numbered in another order
        named = dict(zip(self.state, state, strict=True))
        given = dict(zip([key for key in self.program.matrices if key[0] != "W"], self.whole.given, strict=True))
        job = self.whole._replace(
            program=back,
            given=[given[key] for key in back.matrices if key[0] != "W"],
            dt=-self.problem.dt[:, begin:end].flip(1),
            with_energy=False,
            every_state=False,
            widths=tuple(self.outline.register_width(key) for key in back.registers),
        )
        run: Run = self.backend.run(job, [named[back.registers[i]] for i in back.state])
        found = dict(zip([back.registers[i] for i in back.state], run.state, strict=True))
        before = [found[key] for key in self.state]
        return before, self.run(before, begin, end, "store", every)


class _Kernel(_Loop):
    """One first layer, W = [Wq | Wp]: the terms' own, stacked."""

    state = (("A", 0), ("S", "q", 0, "p"), ("S", "p", 0, "q"))
    path = state[1:]

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        outline, terms, work = self.outline, problem.terms, problem.z0.dtype
        self.single = len(terms) == 1 and terms[0].reads == "z"
        self.kernel = self.backend if self.single else torch_kernel()
        self.F: Network
        if self.single:
            self.W, self.b, self.F = terms[0].weights[0], terms[0].biases[0], tail_of(terms[0])
        else:
            d, rows, biases = outline.d, [], []
            eye = torch.eye(d, dtype=work, device=problem.z0.device)
            for term in terms:
                W = eye if term.activation is None else term.weights[0]
                none = W.new_zeros(W.shape[0], d)
                rows.append(W if term.reads == "z" else torch.cat((W, none) if term.reads == "q" else (none, W), dim=1))
                biases.append(W.new_zeros(d) if term.activation is None else term.biases[0])
            parts = [Quadratic([term.stiffness], d) if term.stiffness is not None else tail_of(term) for term in terms]
            self.W, self.b, self.F = torch.cat(rows), torch.cat(biases), Stack(parts, outline.stacked_widths)
        self.Wq, self.Wp = self.W.chunk(2, dim=1)
        remember = outline.memory == "none"
        self.K = remembered(_product_of_halves, self.W) if remember else self.backend.product(self.Wp, self.Wq.T)
        self.stages = kernel_stages(outline.stages, outline.with_energy)

    def half(self, k: int, side: str) -> Tensor:
        return self.Wq if side == "q" else self.Wp

    def ofhalf_of(self, sums: _Sweep, k: int, side: str) -> Tensor | None:
        return half_of(sums.loop[1], side) if sums.loop else None

    def start(self) -> list[Tensor]:
        a = torch.addmm(self.b, self.problem.z0, self.W.T)
        return [a, torch.zeros_like(a), torch.zeros_like(a)]

    def of_start(self, sums: _Sweep, cotangents: Sequence[Tensor]) -> None:
        la = cotangents[0]
        sums.z0.addmm_(la, self.W)
        if not sums.loop:
            return
        gK, gW, gb = sums.loop[:3]
        gWq, gWp = gW.chunk(2, dim=1)
        gWp += self.backend.product(gK, self.Wq)
        gWq += self.backend.product(gK.T, self.Wp)
        gW.addmm_(la.T, self.problem.z0)
        gb += la.sum(0)

    def new_sums(self, sums: _Sweep) -> None:
        if sums.terms is not None:
            sums.loop = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (self.K, self.W, self.b)]

    def gradients(self, sums: _Sweep) -> Gradients | None:
        if sums.terms is None:
            return None
        weights, biases = [], []
        for own in sums.terms:
            weights += own.weights[1:] if own.stiffness is None else [own.stiffness]
            biases += own.biases[1:]
        return Gradients(sums.loop[0], weights, biases)

    def of_matrices(self, sums: _Sweep) -> None:
        if sums.terms is None:
            return
        _, gW, gb = sums.loop
        sizes = self.outline.stacked_widths
        for term, own, W, b in zip(self.problem.terms, sums.terms, gW.split(sizes), gb.split(sizes), strict=True):
            if own.stiffness is None:
                own.weights[0].add_(half_of(W, term.reads))
                own.biases[0].add_(b)

    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> _Ran:
        a, sq, sp = state or self.start()
        problem = self.problem
        rolled = self.kernel.forward(
            a, self.K, self.F, problem.dt[:, begin:end], self.stages, end - begin, every, self.outline.with_energy, memory,
            problem.solver,
        )  # fmt: skip
        path = [rolled.sq, rolled.sp] if not begin else [rolled.sq + sq[:, None], rolled.sp + sp[:, None]]
        energy = rolled.energy
        if self.outline.with_energy:
            energy = torch.cat((energy, energy_of(self.F.to(a.dtype), rolled.a)[:, None]), dim=1)
        tape = rolled.tape.flatten(1)
        return _Ran([rolled.a, path[0][:, -1], path[1][:, -1]], path, energy, tape, rolled.residual, rolled.evaluations)

    def run_back(
        self,
        sums: _Sweep,
        cotangents: Sequence[Tensor],
        values: Sequence[Tensor],
        g_path: Sequence[Tensor] | None,
        g_energy: Tensor | None,
        tape: Tensor,
        begin: int,
        end: int,
        memory: str,
        every: bool,
    ) -> list[Tensor]:
        la, lsq, lsp = cotangents
        problem, gradients = self.problem, self.gradients(sums)
        if g_energy is not None and end == problem.n_steps:
            F = self.F.to(la.dtype)
            point, _, _ = evaluate(F, values[0])
            la = la + adjoint(F, point, torch.zeros_like(la), g_energy[:, -1], gradients)
        gsq, gsp = g_path or [la.new_zeros(la.shape[0], 1, la.shape[1])] * 2
        gE = None if g_energy is None else g_energy[:, :-1]
        tape = tape.unflatten(1, (end - begin, len(self.stages), -1))
        la, lsq, lsp, sums.dt[:, begin:end], residual = self.kernel.backward(
            la, lsq, lsp, gsq, gsp, gE, tape, self.K, self.F, problem.dt[:, begin:end], self.stages, memory, gradients,
            problem.solver,
        )  # fmt: skip
        torch.maximum(sums.residual, residual, out=sums.residual)
        return [la, lsq, lsp]

    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], _Ran]:
        a, sq, sp = state
        problem = self.problem
        dt = -problem.dt[:, begin:end].flip(1)
        run = self.kernel.forward(
            a, self.K, self.F, dt, inverse(self.stages), end - begin, True, False, "store", problem.solver
        )
        # what each state, the last one first, is before the one at the end
        sqs, sps = (torch.cat((x[:, None], x[:, None] + moved), dim=1).flip(1) for x, moved in ((sq, run.sq), (sp, run.sp)))
        kept = slice(1, None) if every else slice(-1, None)
        none = run.residual[:, :0]
        ran = _Ran([a, sq, sp], [sqs[:, kept], sps[:, kept]], none, run.tape.flip(1, 2).flatten(1), none, none.int())
        return [run.a, sqs[:, 0], sps[:, 0]], ran


def _product_of_halves(W: Tensor) -> Tensor:
    """K = Wp Wq^T of the first layer's weights W [h, 2d]."""
    Wq, Wp = W.chunk(2, dim=1)
    return Wp @ Wq.T


def torch_kernel() -> ModuleType:
    from ..backends import torch as backend

    return backend


class Result(NamedTuple):
    """What `forward` returns."""

    states: Tensor
    """[B, n_steps + 1 or 1, 2d]."""
    energy: Tensor
    """[B, n_steps + 1 or 0]."""
    tape: Tensor
    """What `backward` needs, [B, *], and `kept` likewise."""
    kept: Tensor
    residual: Tensor
    """[B, n_steps], and `evaluations` likewise; [B, 0] of an explicit scheme. Of Tao's method the copies' distance."""
    evaluations: Tensor


def forward(problem: Problem) -> Result:
    """Run the rollout.

    Raises
    ------
    ConvergenceError
        An implicit sub-step did not converge, and must.
    """
    outline, z0, n_steps = problem.outline, problem.z0, problem.n_steps
    none = z0.new_empty(len(z0), 0)
    if not n_steps:
        states = z0[:, None].clone()
        return _result(states, _energy(problem, states, range(len(outline.forms))), none, none, none, none.int())
    if outline.tao:
        return _forward_tao(problem)
    loop, memory = problem.loop(), outline.memory
    length = segment_length(n_steps, memory)
    inner = memory if memory in ("store", "recompute") else "none"
    first, every = int(outline.every_path), outline.every_path
    states = z0.new_empty(len(z0), n_steps + 1 if every else 1, 2 * outline.d)
    state: Sequence[Tensor] | None = loop.start() if memory == "checkpoint" else None
    runs: list[_Ran] = []
    kept: list[Tensor] = []
    for begin in range(0, n_steps, length):
        end = min(begin + length, n_steps)
        if memory == "checkpoint":
            kept += state or []
        to = None
        if outline.by_pair:
            to = states[:, begin : end + 1] if every and length < n_steps else states
        run = loop.run(state, begin, end, inner, every, to, length < n_steps or memory == "reversible")
        state = run.state
        if memory == "reversible":
            kept += state
        runs.append(run)
    path: list[Tensor] = []
    if not outline.by_pair:
        path = [_joined([run.path[i] for run in (runs if every else runs[-1:])]) for i in range(len(loop.path))]
        states[:, :first] = z0[:, None]
        loop.to_states(path, states[:, first:])
    energy = none
    if outline.with_energy:
        energy = _joined([run.energy[:, : None if run is runs[-1] else -1] for run in runs])
        if outline.from_states:
            energy = energy + _energy(problem, states, outline.from_states)
    of_path = outline.saved(n_steps)[1]
    if of_path and outline.by_pair:
        path = [half_of(states, str(key[1]))[:, first:] for key in loop.path]
    if not outline.every_state and states.shape[1] > 1:
        states = states[:, -1:].clone()
    residual, evaluations = _joined([run.residual for run in runs]), _joined([run.evaluations for run in runs])
    if problem.must_converge and residual.numel():
        _check_converged(problem, residual)
    if memory in ("none", "checkpoint", "reversible"):
        tape = torch.cat([x.expand(len(z0), -1) for x in kept], dim=1) if kept else none
        return _result(states, energy, tape, none, residual, evaluations)
    kept_path = none
    if of_path:
        n = of_path // sum(outline.path_widths())
        kept_path = torch.cat([x[:, -n:].flatten(1) for x in path], dim=1)
    return _result(states, energy, runs[0].tape, kept_path, residual, evaluations)


def _result(*parts: Tensor) -> Result:
    states, energy, tape, kept, residual, evaluations = parts
    return Result(states, energy, tape, kept, residual, evaluations if evaluations.dtype == torch.int32 else evaluations.int())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _energy(problem: Problem, states: Tensor, terms: Sequence[int]) -> Tensor:
    """Of these terms at the states [B, n, 2d]: [B, n], [B, 0] if not asked for."""
    if not problem.outline.with_energy:
        return states.new_empty(len(states), 0)
    return torch.stack([_in_work_dtype(problem.terms[k], states.dtype).value(states) for k in terms]).sum(0)


def _in_work_dtype(term: Term, dtype: torch.dtype) -> Term:
    return term._replace(weights=tuple(w.to(dtype) for w in term.weights), biases=tuple(b.to(dtype) for b in term.biases))


def _of_energy(problem: Problem, sums: _Sweep, states: Tensor, gE: Tensor, terms: Sequence[int]) -> Tensor:
    """The adjoint of `_energy`: the cotangent of the states; adds the parameters' share."""
    G = torch.zeros_like(states)
    flat_gE = gE.reshape(-1)
    for k in terms:
        term, own = _in_work_dtype(problem.terms[k], states.dtype), None if sums.terms is None else sums.terms[k]
        x = half_of(states, term.reads).flatten(0, 1)
        to = half_of(G, term.reads)
        if term.stiffness is not None:
            to += (flat_gE[:, None] * term.stiffness * x).view_as(to)
            if own is not None and own.stiffness is not None:
                own.stiffness += (0.5 * flat_gE[:, None] * x * x).sum_to_size(own.stiffness.shape)
            continue
        at = evaluate_term(term, x)
        to += term_adjoint(term, at, torch.zeros_like(x), flat_gE, own).view_as(to)
    return G


def _forward_tao(problem: Problem) -> Result:
    outline, z0, dt = problem.outline, problem.z0, problem.dt
    loop = _Kernel(problem)
    a = loop.start()[0]
    end, sq, sp, energy, tape = tao.forward(
        a, tao.Grams.of(loop.Wq, loop.Wp), loop.F, dt, problem.n_steps, problem.omega, outline.with_energy
    )
    if outline.with_energy:
        energy = torch.cat((energy, energy_of(loop.F.to(a.dtype), end)[:, None]), dim=1)
    kept = slice(None) if outline.every_state else slice(-1, None)
    sq, sp = sq[:, kept], sp[:, kept]
    first = int(outline.every_state)
    states = z0.new_empty(len(z0), sq.shape[1] + first, 2 * outline.d)
    states[:, :first] = z0[:, None]
    loop.to_states([sq, sp], states[:, first:])
    none = z0.new_empty(len(z0), 0)
    apart = tao.distance(loop.Wq, loop.Wp, loop.F, dt, tape)
    if outline.memory == "none":
        return _result(states, energy, none, none, apart, none.int())
    return _result(states, energy, tape.flatten(1), torch.cat((sq.flatten(1), sp.flatten(1)), dim=1), apart, none.int())


def _check_converged(problem: Problem, residual: Tensor) -> None:
    """Every residual [B, n_steps] of a sample that starts from finite numbers must be within the tolerance."""
    failed = ~(residual <= problem.solver.tolerance) & problem.z0.isfinite().all(dim=1, keepdim=True)
    if not failed.any():
        return
    sample, step = (int(i) for i in failed.nonzero()[0])
    raise ConvergenceError(
        f"{int(failed.sum())} of {residual.numel()} implicit steps did not converge to {problem.solver.tolerance:.1e} "
        f"in {problem.solver.max_evaluations} evaluations of the gradient; the largest residual is "
        f"{residual[failed].nan_to_num(math.inf).max():.1e}, the first is at step {step} of sample {sample}. dt is too large "
        'for the curvature of H: take a smaller dt, a larger max_evaluations, or unconverged="flag" to get the states all the '
        "same, marked in .solve"
    )


def backward(
    problem: Problem,
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    need_parameters: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of z0 [B, 2d], every parameter of every term (none unless needed), and dt [B, n_steps].

    Parameters
    ----------
    g_states, g_energy : cotangents of what `forward` returned, or None
    tape, kept : what `forward` returned for this

    Raises
    ------
    ConvergenceError
        The equations of an implicit sub-step's adjoint did not converge, and must.
    """
    outline, n_steps = problem.outline, problem.n_steps
    sums = _Sweep(problem, need_parameters)
    if not n_steps:
        if g_states is not None:
            sums.z0 += g_states[:, 0]
        if g_energy is not None:
            sums.z0 += _of_energy(problem, sums, problem.z0[:, None], g_energy, range(len(outline.forms)))[:, 0]
    elif outline.tao:
        _tao_back(problem, sums, g_states, g_energy, tape, kept)
    else:
        _Backwards(problem, sums, g_states, g_energy).run(tape, kept)
    _check_adjoint(problem, sums.residual)
    parameters = [] if sums.terms is None else [x for term in sums.terms for x in term.tensors]
    return sums.z0, parameters, sums.dt


def _check_adjoint(problem: Problem, residual: Tensor) -> None:
    failed = residual > problem.solver.tolerance
    if not problem.outline.implicit or not failed.any():
        return
    message = (
        f"the adjoint equations of the implicit steps did not converge for {int(failed.sum())} of {residual.numel()} samples: "
        f"the largest residual is {residual[failed].max():.1e}, wanted {problem.solver.tolerance:.1e} within "
        f"{problem.solver.max_evaluations} evaluations; dt is too large for the curvature of H"
    )
    if problem.must_converge:
        raise ConvergenceError(message)
    warn(f"{message}; gradients are inexact")


def _tao_back(
    problem: Problem, sums: _Sweep, g_states: Tensor | None, g_energy: Tensor | None, tape: Tensor, kept: Tensor
) -> None:
    outline = problem.outline
    loop = _Kernel(problem)
    loop.new_sums(sums)
    h = loop.W.shape[0]
    sq, sp = (x.unflatten(1, (-1, h)) for x in kept.chunk(2, dim=1))
    gsq = gsp = sq.new_zeros(len(sq), 1, h)
    if g_states is not None:
        first = int(outline.every_state)
        sums.z0 += g_states[:, :first].sum(1)
        gsq, gsp = loop.of_states(sums, g_states[:, first:], [sq, sp])
    tape = tape.unflatten(1, (problem.n_steps, tao.POINTS, h))
    la, grams, gdt = tao.backward(
        gsq, gsp, g_energy, loop.start()[0], tape, tao.Grams.of(loop.Wq, loop.Wp), loop.F, problem.dt, problem.omega,
        loop.gradients(sums),
    )  # fmt: skip
    sums.dt += gdt
    if grams is not None:
        gK, gW, _ = sums.loop
        gK += grams.K
        gWq, gWp = gW.chunk(2, dim=1)
        gWq += (grams.q + grams.q.T) @ loop.Wq
        gWp += (grams.p + grams.p.T) @ loop.Wp
    loop.of_start(sums, [la, la, la])
    loop.of_matrices(sums)


_LOST = 1000
"""Reversal may be off by this many units of rounding."""


class _Backwards:
    """The adjoint's way through the segments, from the last step to the first."""

    def __init__(self, problem: Problem, sums: _Sweep, g_states: Tensor | None, g_energy: Tensor | None) -> None:
        self.problem, self.sums, self.loop = problem, sums, problem.loop()
        self.outline, self.n_steps = problem.outline, problem.n_steps
        self.loop.new_sums(sums)
        self.g_energy, self.g_states = g_energy, g_states
        if g_energy is not None and self.outline.from_states and g_states is not None and not self.outline.every_state:
            self.g_states = torch.cat((torch.zeros_like(g_states).expand(-1, self.n_steps, -1), g_states), dim=1)
        self.cotangents = [problem.z0.new_zeros(len(problem.z0), width) for width in self.outline.state_widths()]

    def run(self, tape: Tensor, kept: Tensor) -> None:
        loop, outline, n_steps = self.loop, self.outline, self.n_steps
        start = loop.start()
        if outline.memory == "checkpoint":
            self.from_checkpoints(tape)
        elif outline.memory == "reversible":
            self.by_reversal(start, tape)
        else:
            memory = "store" if outline.memory == "tiles" else outline.memory
            self.segment(0, n_steps, self.values(kept), self.path_of(kept), tape, memory)
        first = self.first_states()
        if first is not None:
            self.sums.z0 += first
        loop.of_start(self.sums, self.cotangents)
        loop.of_matrices(self.sums)

    def first_states(self) -> Tensor | None:
        """The cotangent of z0 as the first of the states."""
        extra = None
        if self.g_states is not None and (self.outline.every_state or self.g_states.shape[1] > 1):
            extra = self.g_states[:, 0]
        if self.g_energy is not None and self.outline.from_states:
            z0 = self.problem.z0[:, None]
            more = _of_energy(self.problem, self.sums, z0, self.g_energy[:, :1], self.outline.from_states)[:, 0]
            extra = more if extra is None else extra + more
        return extra

    def path_of(self, kept: Tensor) -> list[Tensor]:
        """The path's registers, [B, n, width], from what was kept; [B, 0, width] where nothing was."""
        widths = self.outline.path_widths()
        n = kept.shape[1] // sum(widths)
        return [x.unflatten(1, (n, -1)) for x in kept.split([n * width for width in widths], dim=1)] if n else []

    def values(self, kept: Tensor) -> list[Tensor]:
        """The state's registers at the end, as far as they are known from the path."""
        path = dict(zip(self.loop.path, self.path_of(kept), strict=False))
        start = self.loop.start()
        if isinstance(self.loop, _Kernel):
            if self.g_energy is None:
                return start
            sq, sp = (path[key][:, -1] for key in self.loop.path)
            K = self.loop.K
            return [start[0] + sq @ K + sp @ K.T, sq, sp]
        return [path[key][:, -1] if key in path else x for key, x in zip(self.loop.state, start, strict=True)]

    def segment(
        self,
        begin: int,
        end: int,
        values: Sequence[Tensor],
        path: Sequence[Tensor],
        tape: Tensor,
        memory: str,
    ) -> None:
        """Steps begin..end-1: values of the registers at the end, the path of these steps, their tape."""
        loop, outline, sums = self.loop, self.outline, self.sums
        every = outline.every_path
        G = None
        if self.g_states is not None and (every or end == self.n_steps):
            G = self.g_states[:, begin + 1 : end + 1] if self.g_states.shape[1] > 1 or every else self.g_states
        gE = None
        if self.g_energy is not None:
            gE = self.g_energy[:, begin : end + 1]
            if outline.from_states:
                states = self.problem.z0.new_empty(len(gE), end - begin, 2 * outline.d)
                loop.to_states(path, states)
                more = _of_energy(self.problem, sums, states, gE[:, 1:], outline.from_states)
                G = more if G is None else G + more
            if end < self.n_steps:
                # the energy after these steps is the one before the next
                gE = torch.cat((gE[:, :-1], torch.zeros_like(gE[:, -1:])), dim=1)
        g_path = None if G is None else loop.of_states(sums, G, path)
        self.cotangents = loop.run_back(sums, self.cotangents, values, g_path, gE, tape, begin, end, memory, every)

    def from_checkpoints(self, tape: Tensor) -> None:
        """Every segment forward again from its kept state, the last one first."""
        length = segment_length(self.n_steps, self.outline.memory)
        starts = range(0, self.n_steps, length)
        widths = self.outline.state_widths()
        checkpoints = tape.unflatten(1, (len(starts), -1))
        for index in reversed(range(len(starts))):
            state = list(checkpoints[:, index].split(widths, dim=1))
            self.again(starts[index], min(starts[index] + length, self.n_steps), state)

    def again(self, begin: int, end: int, state: Sequence[Tensor]) -> None:
        """Steps begin..end-1 from this state: forward, keeping everything, and back."""
        run = self.loop.run(state, begin, end, "store", self.outline.every_path)
        self.segment(begin, end, run.state, run.path, run.tape, "store")

    def by_reversal(self, start: Sequence[Tensor], tape: Tensor) -> None:
        """States rebuilt from the last one backwards, a chunk at a time; and from the kept ones where that went wrong."""
        n_steps = self.n_steps
        length = segment_length(n_steps, self.outline.memory)
        widths = self.outline.state_widths()
        ends = tape.unflatten(1, (-(-n_steps // length), -1))
        anchors: list[Sequence[Tensor]] = [start, *(x.split(widths, dim=1) for x in ends.unbind(1))]
        for index in reversed(range(len(anchors) - 1)):
            first, last = index * length, min((index + 1) * length, n_steps)
            state: Sequence[Tensor] = anchors[index + 1]
            cotangents, saved = self.cotangents, self.sums.snapshot()
            for begin in reversed(range(first, last, _CHUNK)):
                end = min(begin + _CHUNK, last)
                before, run = self.loop.rebuilt(state, begin, end, self.outline.every_path)
                self.segment(begin, end, state, run.path, run.tape, "store")
                state = before
            error = self.distance(state, anchors[index])
            limit = _LOST * torch.finfo(self.problem.z0.dtype).eps
            if error > limit:
                warn(
                    f'memory="reversible" rebuilt step {first} of {n_steps} only to {error:.1e} (limit {limit:.1e}): '
                    f"steps {first} to {last} are computed again from a kept state, as with checkpoints"
                )
                self.cotangents = cotangents
                self.sums.restore(saved)
                self.repeat(first, last, anchors[index])

    def distance(self, state: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """The largest difference of what the networks read, relative to its size."""
        worst = self.problem.z0.new_zeros(())
        for key, a, a0 in zip(self.loop.state, state, kept, strict=True):
            if key[0] != "A" or not len(a):
                continue
            error = ((a - a0).abs().amax(1) / a0.abs().amax(1).clamp_min(1)).nan_to_num(math.inf)
            worst = torch.maximum(worst, torch.where(a0.isfinite().all(1), error, 0).amax())
        return worst

    def repeat(self, first: int, last: int, start: Sequence[Tensor]) -> None:
        """Steps first..last-1 with checkpoints every chunk."""
        checkpoints = [start]
        for begin in range(first, last - _CHUNK, _CHUNK):
            checkpoints.append(self.loop.run(checkpoints[-1], begin, begin + _CHUNK, "none", False).state)
        for index in reversed(range(len(checkpoints))):
            begin = first + index * _CHUNK
            self.again(begin, min(begin + _CHUNK, last), checkpoints[index])
