"""Programs in plain PyTorch operations: any device, any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .network import Gradients, Tail, adjoint, delta_at, evaluate, restore, tape_width
from .program import (
    ADD,
    ADJOINT,
    CLEAR,
    EVALUATE,
    FORGET,
    GIVE,
    HESSIAN,
    KEEP,
    LOAD,
    RESTORE,
    SCALE,
    TAKE,
    UNSCALE,
    Code,
    Instruction,
    Key,
    Program,
)


def half_of(z: Tensor, side: str) -> Tensor:
    """q or p of states z [..., 2d], or "z" itself."""
    d = z.shape[-1] // 2
    return z if side == "z" else z[..., :d] if side == "q" else z[..., d:]


class Job(NamedTuple):
    """A program and its numbers, in the dtype that is computed in."""

    program: Program
    z0: Tensor
    """[B, 2d]."""
    firsts: Sequence[tuple[Tensor, Tensor]]
    """W, b of each network's first layer."""
    given: Sequence[Tensor]
    """Of `Program.matrices` those that are no halves of first layers: [n, m], of any strides, or [n] of a diagonal."""
    networks: Sequence[Tail]
    """What follows each network's first layer."""
    dt: Tensor
    """[1 or B, n_steps]."""
    with_energy: bool
    every_state: bool
    memory: str
    """"none", "recompute" or "store", what to keep for `run_back`."""
    widths: tuple[int, ...]
    """Of every register."""
    externals: Sequence[Tensor] = ()
    """[1 or B, 1 or n_steps, width] of each: see `program.Drive`."""
    of_externals: Sequence[Tensor] = ()
    """[B, n_steps, width], where `run_back` adds their cotangents."""

    @property
    def matrices(self) -> list[Tensor]:
        """All of `Program.matrices`."""
        program, given = self.program, iter(self.given)
        return [
            self.half(program.networks.index(int(key[1])), str(key[2])) if key[0] == "W" else next(given)
            for key in program.matrices
        ]

    def half(self, n: int, side: str) -> Tensor:
        """What network n's first layer reads this half of the state by, [h, d]."""
        W = self.firsts[n][0]
        return half_of(W, side) if self.program.reads[n] == "z" else W

    def start(self) -> list[Tensor]:
        """The registers of `Program.state` at the start, [B, width] each."""
        return [self._at_start(self.program.registers[i], self.widths[i]) for i in self.program.state]

    def _at_start(self, key: Key, width: int) -> Tensor:
        name, z0 = key[0], self.z0
        if name == "Z":
            return half_of(z0, str(key[1]))
        if name == "C":
            # made on the device: a copy of the host's numbers would wait for it
            return torch.eye(2, dtype=z0.dtype, device=z0.device)[int(key[1] == "p")].expand(len(z0), 2)
        if name == "S":
            return z0.new_zeros(len(z0), width)
        n = self.program.networks.index(int(key[1]))
        (W, b), reads = self.firsts[n], self.program.reads[n]
        if name == "B":
            return b.expand(len(z0), -1)
        if name == "U":
            return half_of(z0, "p" if reads == "q" else "q") @ W.T
        return torch.addmm(b, half_of(z0, reads), W.T)

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    @property
    def multiplications(self) -> int:
        """Of one row in one step, in products and networks."""
        total = 0
        for x in self.program.later:
            if x.op == ADD and x.matrix >= 0 and self.program.matrices[x.matrix][0] != "k":
                total += self.widths[x.x] * self.widths[x.y]
            elif x.op == EVALUATE:
                total += sum(2 * m * n for m, n in pairwise(self.networks[x.item].widths))
        return max(total, 1)

    def sections(self) -> list[tuple[int, int]]:
        """Of each item on the tape: slots, and numbers of a slot."""
        found = []
        for n, item in enumerate(self.program.items):
            width = self.widths[item.register]
            if self.memory == "none":
                width = 0
            elif item.network:
                width = tape_width(self.networks[n].widths or [width], self.memory)
            found.append((item.slots(self.n_steps), width))
        return found

    @property
    def tape_size(self) -> int:
        """Numbers a sample on the tape."""
        return sum(n * width for n, width in self.sections())

    def in_work_dtype(self) -> Job:
        """With every network in the dtype that is computed in."""
        return self._replace(networks=[network.to(self.dt.dtype) for network in self.networks])

    def code(self, step: int) -> Code:
        return self.program.later if step else self.program.first

    def back_code(self, step: int) -> Code:
        return self.program.back_later if step else self.program.back_first


class Run(NamedTuple):
    """What a program leaves."""

    state: list[Tensor]
    """Of `Program.state` at the end, [B, width] each."""
    path: list[Tensor]
    """Of `Program.path`, [B, n_steps, width] after each step, or [B, 1, width] at the end."""
    energy: Tensor
    """[B, n_steps + 1], of the terms in `Program.energies`; [B, 0] if not asked for."""
    tape: Tensor
    """[B, *]: every item's slots side by side."""


class Sums(NamedTuple):
    """What gradients are added to."""

    matrices: list[Tensor]
    networks: list[Gradients]
    fresh: bool = False
    """Whether they hold nothing yet, not even zeros."""

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.matrices, *(x for g in self.networks for x in (*g.weights, *g.biases))]


class _Tape:
    def __init__(self, job: Job, tape: Tensor) -> None:
        sections = job.sections()
        parts = tape.split([n * width for n, width in sections], dim=1)
        self.slots = [part.unflatten(1, (n, width)) for part, (n, width) in zip(parts, sections, strict=True)]
        self.items = job.program.items

    def at(self, x: Instruction, step: int) -> Tensor:
        return self.slots[x.item][:, self.items[x.item].before(step) + x.slot]


def _times(x: Tensor, matrices: Sequence[Tensor], at: Instruction) -> Tensor:
    if at.matrix < 0:
        return x
    M = matrices[at.matrix]
    return x * M if M.ndim == 1 else x @ (M.T if at.transposed else M)


def _add(values: list[Tensor], x: Instruction, matrices: Sequence[Tensor], dt: Tensor) -> None:
    moved = _times(values[x.x], matrices, x)
    values[x.y] = values[x.y] + (x.c * dt if x.scaled else x.c) * moved


def run(
    job: Job, start: Sequence[Tensor] | None = None, states: Tensor | None = None, want_end: bool = True, want_path: bool = True
) -> Run:
    """Run all steps.

    Parameters
    ----------
    start : the registers of `Program.state`, [B, width] each; None for what they are at z0
    states : Tensor [B, n_steps + 1 or 1, 2d], optional
        Where the states go if the path is those, the first one too where every one is wanted.
    want_end, want_path : bool
        Whether `Run.state` and `Run.path` are looked at.
    """
    job = job.in_work_dtype()
    program, n_steps, matrices = job.program, job.n_steps, job.matrices
    start = job.start() if start is None else start
    values = _registers(program, start)
    batch = start[0].shape[0]
    tapes: list[list[Tensor]] = [[] for _ in program.items]
    path: list[list[Tensor]] = [[] for _ in program.path]
    energy = start[0].new_zeros(batch, n_steps + 1 if job.with_energy else 0)

    def execute(code: Code, step: int) -> None:
        dt = job.dt[:, min(step, n_steps - 1), None]
        for x in code:
            if x.op == EVALUATE:
                point, values[x.y], H = evaluate(job.networks[x.item], values[x.x])
                values[x.y] = values[x.y].expand_as(values[x.x])
                if job.memory != "none":
                    tapes[x.item].append(point.a[0] if job.memory == "recompute" else point.tape())
                if x.energy >= 0:
                    energy[:, step + x.energy] += H
            elif x.op == ADD:
                _add(values, x, matrices, dt)
            elif x.op == CLEAR:
                values[x.y] = start[0].new_zeros(())
            elif x.op == KEEP and job.memory != "none":
                tapes[x.item].append(values[x.x])
            elif x.op in (TAKE, SCALE):
                _take(values, x, job, step)

    for step in range(n_steps):
        execute(job.code(step), step)
        if job.every_state or step + 1 == n_steps:
            for rows, register in zip(path, program.path, strict=True):
                rows.append(values[register])
    execute(program.end, n_steps)
    tape = [x for part in tapes for x in part]
    stacked = [torch.stack(rows, 1) for rows in path]
    if states is not None:
        first = int(job.every_state)
        for register, x in zip(program.path, stacked, strict=True):
            half = half_of(states, str(program.registers[register][1]))
            half[:, first:] = x
            half[:, :first] = start[program.state.index(register)][:, None]
    return Run(
        [values[i] for i in program.state], stacked, energy, torch.cat(tape, 1) if tape else start[0].new_empty(batch, 0)
    )


def _take(values: list[Tensor], x: Instruction, job: Job, step: int) -> None:
    external = job.externals[x.item]
    e = external[:, min(step, external.shape[1] - 1)]
    values[x.y] = e.expand(len(job.z0), -1) if x.op == TAKE else e * values[x.x]


def _registers(program: Program, start: Sequence[Tensor]) -> list[Tensor]:
    values = [start[0].new_zeros(())] * len(program.registers)
    for register, x in zip(program.state, start, strict=True):
        values[register] = x
    return values


def run_back(
    job: Job,
    cotangents: Sequence[Tensor],
    values: Sequence[Tensor],
    g_path: Sequence[Tensor] | None,
    g_energy: Tensor | None,
    tape: Tensor,
    sums: Sums | None,
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of `run`.

    Parameters
    ----------
    cotangents : of the state at the end, [B, width] each; they may be overwritten
    values : of the state's registers where they end; only those of `Program.tracked`, and the constant ones, are read
    g_path : of `Run.path`, or None
    g_energy : Tensor [B, n_steps + 1] or None
    tape : what `run` left; or nothing, [B, 0], and the rollout is run again from z0
    sums : None if gradients of matrices and networks are not wanted

    Returns
    -------
    Cotangents of the start; gdt [B, n_steps]
    """
    job = job.in_work_dtype()
    if not tape.shape[1]:
        tape = run(job).tape
    for x in sums.tensors if sums is not None and sums.fresh else ():
        x.zero_()
    program, n_steps, matrices = job.program, job.n_steps, job.matrices
    at, kept = _registers(program, values), _Tape(job, tape)
    zero = cotangents[0].new_zeros(())
    given = [zero] * len(program.registers)
    for register, x in zip(program.state, cotangents, strict=True):
        given[register] = x
    gdt = cotangents[0].new_zeros(cotangents[0].shape[0], n_steps)

    def execute(code: Code, step: int) -> None:
        dt = job.dt[:, min(step, n_steps - 1), None]
        for x in code:
            if x.op in (RESTORE, HESSIAN):
                saved = kept.at(x, step)
                point = restore(job.networks[x.item], saved, job.memory)
                at[x.y] = delta_at(job.networks[x.item], point).expand(saved.shape[0], -1)
                if x.op == HESSIAN:
                    gE = g_energy[:, step + x.energy] if g_energy is not None and x.energy >= 0 else None
                    v = given[x.y].expand_as(at[x.y])
                    given[x.x] = given[x.x] + adjoint(
                        job.networks[x.item], point, v, gE, None if sums is None else sums.networks[x.item]
                    )
                    given[x.y] = zero
            elif x.op == ADD:
                _add(at, x, matrices, dt)
            elif x.op == CLEAR:
                at[x.y] = zero
            elif x.op == LOAD:
                at[x.x] = kept.at(x, step)
            elif x.op == FORGET:
                given[x.y] = zero
            elif x.op in (TAKE, SCALE):
                _take(at, x, job, step)
            elif x.op in (GIVE, UNSCALE) and given[x.y] is not zero:
                e, to = job.externals[x.item], job.of_externals[x.item][:, step]
                if x.op == UNSCALE:
                    given[x.x] = given[x.x] + e[:, min(step, e.shape[1] - 1)] * given[x.y]
                to += given[x.y] if x.op == GIVE else given[x.y] * at[x.x]
                given[x.y] = zero
            elif x.op == ADJOINT and given[x.y] is not zero:
                c = x.c * dt if x.scaled else x.c
                back = _times(given[x.y], matrices, x._replace(transposed=not x.transposed))
                if x.scaled:
                    gdt[:, step] += x.c * (back * at[x.x]).sum(-1)
                given[x.x] = given[x.x] + c * back
                if sums is not None and x.matrix >= 0:
                    _add_to(sums.matrices[x.matrix], at[x.x], c * given[x.y], x.transposed)

    execute(program.back_end, n_steps)
    for step in range(n_steps - 1, -1, -1):
        if g_path is not None and (job.every_state or step + 1 == n_steps):
            for register, g in zip(program.path, g_path, strict=True):
                given[register] = given[register] + g[:, step if job.every_state else 0]
        execute(job.back_code(step), step)
    return [given[i].expand_as(x) for i, x in zip(program.state, cotangents, strict=True)], gdt


def _add_to(total: Tensor, x: Tensor, gy: Tensor, transposed: bool) -> None:
    if total.ndim == 1:
        total.add_((x * gy).sum(0))
    else:
        left, right = (gy, x) if transposed else (x, gy)
        total.addmm_(left.expand(len(right), -1).T, right)
