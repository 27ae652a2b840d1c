"""The loops of a rollout, and what their registers mean: a program's, or those of a kernel with one first layer.

Explicit schemes are programs. What no program covers (implicit sub-steps, Tao's method, quadratic forms under Runge-Kutta
methods), and one network of q and p with a dense coupling, for which kernels stand ready, runs in a `Kernel`: all first layers
are one, W = [Wq | Wp] stacked, with K = Wp Wq^T, and F is the sum of what follows each (see `backends/torch.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..hamiltonian import Term
from ..schemes import explicit_moves, inverse
from . import program
from .coupling import remembered
from .fixed_point import Solver
from .machine import Job, Run, Sums, half_of
from .network import (
    Gradients,
    Network,
    Quadratic,
    Stack,
    TermSums,
    energy_adjoint,
    pre_activations,
    tail_of,
    value_adjoint,
    value_at,
)
from .network import energy as energy_of
from .outline import Outline, kernel_stages
from .program import Key


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
    externals: Sequence[Tensor] = ()
    """[1 or B, 1 or n_steps, width], in the work dtype: see `program.Drive`."""

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    def loop(self) -> Loop:
        return (Kernel if self.outline.in_kernel else Programmed)(self)


class Sweep:
    """What the backward pass adds up."""

    def __init__(self, problem: Problem, need_parameters: bool) -> None:
        # whether the loop is the first to write the sums of parameters' gradients, and writes them all
        self.fresh = bool(problem.n_steps) and problem.outline.loop_writes_sums
        self.z0 = torch.empty_like(problem.z0, memory_format=torch.contiguous_format)
        self.dt = problem.z0.new_empty(problem.z0.shape[0], problem.n_steps)
        self.terms = [TermSums(term, problem.z0.dtype) for term in problem.terms] if need_parameters else None
        self.residual = problem.z0.new_empty(problem.z0.shape[0])
        self.externals = [problem.z0.new_empty(*self.dt.shape, e.shape[2]) for e in problem.externals]
        self.loop: list[Tensor] = []
        """What the loop adds gradients of its matrices to."""
        to_fill = [x for term in self.terms or () for x in term.to_fill(self.fresh)]
        # in one launch on a GPU
        torch._foreach_zero_([self.z0, self.dt, self.residual, *self.externals, *to_fill])

    def snapshot(self) -> list[Tensor]:
        return [x.clone() for x in self._all()]

    def restore(self, saved: Sequence[Tensor]) -> None:
        for x, y in zip(self._all(), saved, strict=True):
            x.copy_(y)

    def _all(self) -> list[Tensor]:
        return [self.z0, self.dt, self.residual, *self.loop, *(x for term in self.terms or () for x in term.tensors)]


class Loop(ABC):
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

    def ofhalf_of(self, sums: Sweep, k: int, side: str) -> Tensor | None:
        """Its gradient."""
        if sums.terms is None:
            return None
        W = sums.terms[k].weights[0]
        return half_of(W, side) if self.problem.terms[k].reads == "z" else W

    @abstractmethod
    def start(self) -> list[Tensor]:
        """The registers of `state` at z0."""

    def of_start(self, sums: Sweep, cotangents: Sequence[Tensor]) -> None:
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
                own.biases[0].add_(given.sum_to_size(own.biases[0].shape))

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

    def of_states(self, sums: Sweep, G: Tensor, path: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of the path's registers from those of states, G [B, n, 2d]; adds what goes elsewhere."""
        z0, product = self.problem.z0, self.backend.product
        found: list[Tensor] = [z0.new_empty(0)] * len(self.path)
        rows = G.flatten(0, 1)
        by_sums = not any(key[0] in ("Z", "C") for key in self.path)
        if by_sums:
            sums.z0 += G.sum(1)
        for half in "qp":
            own = half_of(G, half)
            if ("Z", half) in self.path:
                found[self.path.index(("Z", half))] = own
                continue
            C = self.coefficients(half)
            if C < 0 and not by_sums:
                half_of(sums.z0, half).add_(own.sum(1))
            elif C >= 0:
                found[C] = torch.einsum("bnd,bcd->bnc", own, z0.unflatten(1, (2, -1)))
                sums.z0 += torch.einsum("bnc,bnd->bcd", path[C], own).flatten(1)
            for i, k, side in self.sums_in(half):
                # of rows, whose halves are matrices as they are: of three dimensions they would be copied
                found[i] = product(half_of(rows, half), self.half(k, side).T).unflatten(0, G.shape[:2])
                gW = self.ofhalf_of(sums, k, side)
                if gW is not None:
                    gW.addmm_(path[i].flatten(0, 1).T, half_of(rows, half))
        return found

    @abstractmethod
    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> Ran:
        """Steps begin..end-1 from this state, or from z0."""

    @abstractmethod
    def run_back(
        self,
        sums: Sweep,
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
        """The adjoint of `run`, from the cotangents and values of the state after these steps; gives those before."""

    @abstractmethod
    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], Ran]:
        """The registers before step `begin` from those before step `end`, by stepping back; and what `run` gives from there."""

    @abstractmethod
    def new_sums(self, sums: Sweep) -> None:
        """Make `sums.loop`."""

    @abstractmethod
    def of_matrices(self, sums: Sweep) -> None:
        """From `sums.loop` to the parameters' gradients."""


class Ran(NamedTuple):
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


class Programmed(Loop):
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
            problem.externals,
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
        some = [e if e.shape[1] == 1 else e[:, begin:end] for e in self.problem.externals]
        return self.whole._replace(dt=steps, every_state=every, memory=memory, externals=some)

    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> Ran:
        run: Run = self.backend.run(self.job(begin, end, memory, every), state, states, want_end)
        none = run.energy[:, :0]
        return Ran(run.state, run.path, run.energy, run.tape, none, none)

    def new_sums(self, sums: Sweep) -> None:
        if sums.terms is not None:
            sums.loop = [
                torch.zeros_like(M, memory_format=torch.contiguous_format)
                if key[0] != "W"
                else self.ofhalf_of(sums, int(key[1]), str(key[2]))  # type: ignore[misc]
                for key, M in zip(self.program.matrices, self.matrices, strict=True)
            ]

    def of_matrices(self, sums: Sweep) -> None:
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
        sums: Sweep,
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
        gradients = None
        if sums.terms is not None:
            gradients = Sums(sums.loop, [sums.terms[k].tail() for k in self.program.networks], sums.fresh)
            sums.fresh = False
        job = self.job(begin, end, memory, every)._replace(of_externals=[x[:, begin:end] for x in sums.externals])
        found, gdt = self.backend.run_back(job, cotangents, values, g_path, g_energy, tape, gradients)
        sums.dt[:, begin:end] = gdt
        return found

    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], Ran]:
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


class Kernel(Loop):
    """One first layer, W = [Wq | Wp]: the terms' own, stacked."""

    state = (("A", 0), ("S", "q", 0, "p"), ("S", "p", 0, "q"))
    path = state[1:]

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        outline, terms, work = self.outline, problem.terms, problem.z0.dtype
        self.single = len(terms) == 1 and terms[0].reads == "z"
        self.kernel = self.backend if self.single else backends.of("torch")
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
            if any(b.ndim > 1 for b in biases):
                biases = [b.expand(len(problem.z0), -1) for b in biases]
            parts = [Quadratic([term.stiffness], d) if term.stiffness is not None else tail_of(term) for term in terms]
            self.W, self.b, self.F = torch.cat(rows), torch.cat(biases, dim=-1), Stack(parts, outline.stacked_widths)
        self.Wq, self.Wp = self.W.chunk(2, dim=1)
        remember = outline.memory == "none"
        self.K = remembered(_product_of_halves, self.W) if remember else self.backend.product(self.Wp, self.Wq.T)
        self.stages = kernel_stages(outline.stages, outline.with_energy)

    def half(self, k: int, side: str) -> Tensor:
        return self.Wq if side == "q" else self.Wp

    def ofhalf_of(self, sums: Sweep, k: int, side: str) -> Tensor | None:
        return half_of(sums.loop[1], side) if sums.loop else None

    def start(self) -> list[Tensor]:
        a = self.a_at_start()
        return [a, torch.zeros_like(a), torch.zeros_like(a)]

    def a_at_start(self) -> Tensor:
        return torch.addmm(self.b, self.problem.z0, self.W.T)

    def of_start(self, sums: Sweep, cotangents: Sequence[Tensor]) -> None:
        la = cotangents[0]
        sums.z0.addmm_(la, self.W)
        if not sums.loop:
            return
        gK, gW, gb = sums.loop[:3]
        gWq, gWp = gW.chunk(2, dim=1)
        self._add_product(gWp, gK, self.Wq)
        self._add_product(gWq, gK.T, self.Wp)
        gW.addmm_(la.T, self.problem.z0)
        gb += la.sum_to_size(gb.shape)

    def _add_product(self, total: Tensor, x: Tensor, W: Tensor) -> None:
        """total += x W, in one operation where the backend's products are PyTorch's."""
        product = self.backend.product
        if product is backends.of("torch").product:
            total.addmm_(x, W)
        else:
            total += product(x, W)

    def new_sums(self, sums: Sweep) -> None:
        if sums.terms is None:
            return
        if self.single:
            own = sums.terms[0]
            sums.loop = [torch.zeros_like(self.K, memory_format=torch.contiguous_format), own.weights[0], own.biases[0]]
        else:
            sums.loop = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (self.K, self.W, self.b)]

    def gradients(self, sums: Sweep) -> Gradients | None:
        if sums.terms is None:
            return None
        weights, biases = [], []
        for own in sums.terms:
            weights += own.weights[1:] if own.stiffness is None else [own.stiffness]
            biases += own.biases[1:]
        return Gradients(sums.loop[0], weights, biases)

    def of_matrices(self, sums: Sweep) -> None:
        if sums.terms is None or self.single:
            return
        _, gW, gb = sums.loop
        sizes = self.outline.stacked_widths
        for term, own, W, b in zip(self.problem.terms, sums.terms, gW.split(sizes), gb.split(sizes, dim=-1), strict=True):
            if own.stiffness is None:
                own.weights[0].add_(half_of(W, term.reads))
                own.biases[0].add_(b.sum_to_size(own.biases[0].shape))

    def run(
        self,
        state: Sequence[Tensor] | None,
        begin: int,
        end: int,
        memory: str,
        every: bool,
        states: Tensor | None = None,
        want_end: bool = True,
    ) -> Ran:
        a, *moved = state or [self.a_at_start()]
        problem = self.problem
        rolled = self.kernel.forward(
            a, self.K, self.F, problem.dt[:, begin:end], self.stages, end - begin, every, self.outline.with_energy, memory,
            problem.solver,
        )  # fmt: skip
        path = [rolled.sq, rolled.sp]
        if begin:
            path = [x + before[:, None] for x, before in zip(path, moved, strict=True)]
        energy = rolled.energy
        if self.outline.with_energy:
            energy = torch.cat((energy, energy_of(self.F.to(a.dtype), rolled.a)[:, None]), dim=1)
        tape = rolled.tape.flatten(1)
        return Ran([rolled.a, path[0][:, -1], path[1][:, -1]], path, energy, tape, rolled.residual, rolled.evaluations)

    def run_back(
        self,
        sums: Sweep,
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
            la = la + energy_adjoint(self.F.to(la.dtype), values[0], g_energy[:, -1], gradients)
        gsq, gsp = g_path or [la.new_zeros(la.shape[0], 1, la.shape[1])] * 2
        gE = None if g_energy is None else g_energy[:, :-1]
        tape = tape.unflatten(1, (end - begin, len(self.stages), -1))
        la, lsq, lsp, gdt, residual = self.kernel.backward(
            la, lsq, lsp, gsq, gsp, gE, tape, self.K, self.F, problem.dt[:, begin:end], self.stages, memory, gradients,
            problem.solver,
        )  # fmt: skip
        if end - begin == problem.n_steps:
            sums.dt = gdt
        else:
            sums.dt[:, begin:end] = gdt
        if self.outline.implicit:
            torch.maximum(sums.residual, residual, out=sums.residual)
        return [la, lsq, lsp]

    def rebuilt(self, state: Sequence[Tensor], begin: int, end: int, every: bool) -> tuple[list[Tensor], Ran]:
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
        ran = Ran([a, sq, sp], [sqs[:, kept], sps[:, kept]], none, run.tape.flip(1, 2).flatten(1), none, none.int())
        return [run.a, sqs[:, 0], sps[:, 0]], ran


def _product_of_halves(W: Tensor) -> Tensor:
    """K = Wp Wq^T of the first layer's weights W [h, 2d]."""
    Wq, Wp = W.chunk(2, dim=1)
    return Wp @ Wq.T


def energy_of_states(problem: Problem, states: Tensor, terms: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Of these terms at the states [B, n, 2d]: [B, n], [B, 0] if not asked for; and the networks' layers, [B n, h_i]."""
    if not problem.outline.with_energy:
        return states.new_empty(len(states), 0), []
    found: list[Tensor] = []
    values: list[Tensor] = []
    for k in terms:
        term = _in_work_dtype(problem.terms[k], states.dtype)
        if term.stiffness is not None:
            values.append(term.value(states))
            continue
        x = half_of(states, term.reads).flatten(0, 1)
        layers = pre_activations(term, x)
        values.append(value_at(term, x, layers).view(states.shape[:2]))
        found += layers
    return torch.stack(values).sum(0), found


def _in_work_dtype(term: Term, dtype: torch.dtype) -> Term:
    return term._replace(weights=tuple(w.to(dtype) for w in term.weights), biases=tuple(b.to(dtype) for b in term.biases))


def of_energy_of_states(
    problem: Problem, sums: Sweep, states: Tensor, gE: Tensor, terms: Sequence[int], layers: Sequence[Tensor] = ()
) -> Tensor:
    """The adjoint of `energy_of_states`: the cotangent of the states; adds the parameters' share. `layers` as it gave them."""
    G = torch.zeros_like(states)
    known = iter(layers)
    flat_gE = gE.reshape(-1)
    for k in terms:
        term, own = _in_work_dtype(problem.terms[k], states.dtype), None if sums.terms is None else sums.terms[k]
        half, to = half_of(states, term.reads), half_of(G, term.reads)
        if term.stiffness is not None:
            # as few passes over the states as there can be: nothing else here is as long
            to.addcmul_(half, gE[..., None] * term.stiffness)
            if own is not None and own.stiffness is not None:
                squares = 0.5 * (flat_gE @ half.square().flatten(0, 1))
                own.stiffness += squares.sum_to_size(own.stiffness.shape)
            continue
        x = half.flatten(0, 1)
        own_layers = [next(known) for _ in term.weights[1:]] if layers else None
        to += value_adjoint(term, x, flat_gE, own, own_layers).view_as(to)
    return G
