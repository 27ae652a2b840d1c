"""From states to the hidden space and back: what surrounds a loop, forward and adjoint.

A loop works on registers (see `program.py`), whose start comes from z0 by products with the first layers' weights, and from
which the states come by products again, or which hold them. With a dense coupling this is the only place where the latent size
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConvergenceError, warn
from . import tao
from .fixed_point import Solver, refuse_in_capture, waits
from .loops import Kernel, Problem, Ran, Sweep, energy_of_states, of_energy_of_states
from .machine import half_of
from .memory import Backwards
from .network import energy as energy_of
from .outline import segment_length


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
        return _result(states, energy_of_states(problem, states, range(len(outline.forms)))[0], none, none, none, none.int())
    if outline.tao:
        return _forward_tao(problem)
    loop, memory = problem.loop(), outline.memory
    length = segment_length(n_steps, memory)
    inner = memory if memory in ("store", "recompute") else "none"
    first, every = int(outline.every_path), outline.every_path
    states = z0.new_empty(len(z0), n_steps + 1 if every else 1, 2 * outline.d)
    state: Sequence[Tensor] | None = loop.start() if memory == "checkpoint" else None
    runs: list[Ran] = []
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
    layers: list[Tensor] = []
    if outline.with_energy:
        energy = _joined([run.energy[:, : None if run is runs[-1] else -1] for run in runs])
        if outline.from_states:
            of_states, layers = energy_of_states(problem, states, outline.from_states)
            energy = energy + of_states
    of_path = outline.saved(n_steps)[1] - (n_steps + 1) * sum(outline.energy_widths)
    if of_path and outline.by_pair:
        path = [half_of(states, str(key[1]))[:, first:] for key in loop.path]
    if not outline.every_state and states.shape[1] > 1:
        states = states[:, -1:].clone()
    residual, evaluations = _joined([run.residual for run in runs]), _joined([run.evaluations for run in runs])
    if problem.must_converge and residual.numel():
        check_converged(problem.solver, problem.z0, residual)
    if memory in ("none", "checkpoint", "reversible"):
        tape = torch.cat([x.expand(len(z0), -1) for x in kept], dim=1) if kept else none
        return _result(states, energy, tape, none, residual, evaluations)
    to_keep: list[Tensor] = []
    if of_path:
        n = of_path // sum(outline.path_widths())
        to_keep = [x[:, -n:].flatten(1) for x in path]
    if outline.energy_widths:
        to_keep += [x.unflatten(0, (len(z0), n_steps + 1)).flatten(1) for x in layers]
    return _result(states, energy, runs[0].tape, torch.cat(to_keep, dim=1) if to_keep else none, residual, evaluations)


def _result(*parts: Tensor) -> Result:
    states, energy, tape, kept, residual, evaluations = parts
    return Result(states, energy, tape, kept, residual, evaluations if evaluations.dtype == torch.int32 else evaluations.int())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _forward_tao(problem: Problem) -> Result:
    outline, z0, dt = problem.outline, problem.z0, problem.dt
    loop = Kernel(problem)
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


def check_converged(solver: Solver, z0: Tensor, residual: Tensor) -> None:
    """Every residual [B, n_steps] of a sample that starts from finite numbers must be within the tolerance.

    Raises
    ------
    ConvergenceError
    """
    refuse_in_capture(residual, 'unconverged="raise"', '"flag"')
    failed = ~(residual <= solver.tolerance) & z0.isfinite().all(dim=1, keepdim=True)
    if not failed.any():
        return
    sample, step = (int(i) for i in failed.nonzero()[0])
    raise ConvergenceError(
        f"{int(failed.sum())} of {residual.numel()} implicit steps did not converge to {solver.tolerance:.1e} "
        f"in {solver.max_evaluations} evaluations of the gradient; the largest residual is "
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
    """Gradients of z0 [B, 2d], every parameter of every term and every external (none unless needed), and dt [B, n_steps].

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
    sums = Sweep(problem, need_parameters)
    if not n_steps:
        if g_states is not None:
            sums.z0 += g_states[:, 0]
        if g_energy is not None:
            sums.z0 += of_energy_of_states(problem, sums, problem.z0[:, None], g_energy, range(len(outline.forms)))[:, 0]
    elif outline.tao:
        _tao_back(problem, sums, g_states, g_energy, tape, kept)
    else:
        Backwards(problem, sums, g_states, g_energy).run(tape, kept)
    if outline.implicit:
        check_adjoint(problem.solver, sums.residual, problem.must_converge)
    if sums.terms is None:
        return sums.z0, [], sums.dt
    externals = [g.sum_to_size(e.shape) for g, e in zip(sums.externals, problem.externals, strict=True)]
    return sums.z0, [*[x for term in sums.terms for x in term.tensors], *externals], sums.dt


def check_adjoint(solver: Solver, residual: Tensor, must_converge: bool) -> None:
    """Every residual [B] of the implicit steps' adjoint equations must be within the tolerance; or a warning says so, but not
    where to look would wait for a device.

    Raises
    ------
    ConvergenceError
        They must converge, and did not.
    """
    if not must_converge and waits(residual):
        return
    refuse_in_capture(residual, 'unconverged="raise"', '"flag"')
    failed = residual > solver.tolerance
    if not failed.any():
        return
    message = (
        f"the adjoint equations of the implicit steps did not converge for {int(failed.sum())} of {residual.numel()} samples: "
        f"the largest residual is {residual[failed].max():.1e}, wanted {solver.tolerance:.1e} within "
        f"{solver.max_evaluations} evaluations; dt is too large for the curvature of H"
    )
    if must_converge:
        raise ConvergenceError(message)
    warn(f"{message}; gradients are inexact")


def _tao_back(
    problem: Problem, sums: Sweep, g_states: Tensor | None, g_energy: Tensor | None, tape: Tensor, kept: Tensor
) -> None:
    outline = problem.outline
    loop = Kernel(problem)
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
