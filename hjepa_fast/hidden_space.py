"""From states to the hidden space and back: what surrounds a backend's loop, forward and adjoint.

A backend supplies `forward` and `backward` on a = z W^T + b (see `backends/torch.py` for the mathematics). Here are the
products with the first layer's weights that lead there, and their share of the gradients:

    K = Wp Wq^T,    q_t = q0 + sq_t Wp,    p_t = p0 + sp_t Wq

The only place where the latent size 2d counts; what the loop costs does not depend on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .activations import Activation
from .backends import tao
from .backends import torch as torch_backend
from .backends.torch import Gradients, Solver, Tail
from .errors import ConvergenceError
from .schemes import Scheme, SubStep, inverse


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: states and sums of bfloat16 networks are kept in float32."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class Problem(NamedTuple):
    """One rollout, checked and flattened; z0, dt and the first layer in the work dtype."""

    z0: Tensor
    """[B, 2d]."""
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    dt: Tensor
    """[1 or B, n_steps]."""
    activation: Activation
    stages: Sequence[SubStep]
    """See `stages_of`."""
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute", "checkpoint" or "reversible"."""
    solver: Solver
    must_converge: bool
    """Whether an implicit sub-step that does not converge raises an error."""
    omega: float | None
    """Of Tao's method, which is run instead of `stages`; or None."""

    @property
    def n_steps(self) -> int:
        return self.dt.shape[1]

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Wq, Wp, [h, d] each."""
        Wq, Wp = self.weights[0].chunk(2, dim=1)
        return Wq, Wp

    def first_layer(self) -> Tensor:
        """a at the start, [B, h]."""
        return torch.addmm(self.biases[0], self.z0, self.weights[0].T)

    @property
    def tail(self) -> Tail:
        return Tail(self.weights[1:], self.biases[1:], self.activation)


def stages_of(scheme: Scheme, with_energy: bool) -> tuple[SubStep, ...]:
    """The scheme's sub-steps; if the first one's point is not the state, one before it that only looks at the energy there."""
    look = with_energy and bool(scheme.stages) and scheme.stages[0].implicit
    return (SubStep(0.0, 0.0), *scheme.stages) if look else scheme.stages


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


def saved_widths(widths: Sequence[int], n_steps: int, n_sub_steps: int, memory: str, every_state: bool) -> tuple[int, int]:
    """Numbers a sample that are kept for the backward pass: of the tape, and of sq and sp. No sub-steps: Tao's method."""
    if memory == "none":
        return 0, 0
    if not n_sub_steps:
        return tao.POINTS * widths[0] * n_steps, 2 * widths[0] * (n_steps if every_state else min(n_steps, 1))
    if memory in ("checkpoint", "reversible"):
        return 3 * widths[0] * -(-n_steps // segment_length(n_steps, memory)), 0
    n_kept = n_steps if every_state else min(n_steps, 1)
    return n_steps * n_sub_steps * torch_backend.tape_width(widths, memory), 2 * widths[0] * n_kept


_products: list[tuple[list[Tensor], Tensor]] = []
_MOST_PRODUCTS, _LARGEST_WEIGHT = 4, 2**22


def remembered(product: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """product(*factors), remembered for prediction on a CPU.

    K takes as many multiplications as 128 sub-steps of one sample of the published network: 1.4 ms, about as long as its
    15 steps at batch 1. Comparing the first layer's weights with a copy of those that K was made from takes 0.06 ms and
    cannot be wrong, which the version counters of parameters can (`p.data.copy_` does not move them).
    """
    if any(W.device.type != "cpu" or W.numel() > _LARGEST_WEIGHT for W in factors):
        return product(*factors)
    values = [W.detach().numpy() for W in factors]
    for copies, K in tuple(_products):
        if [x.dtype for x in copies] == [W.dtype for W in factors] and all(
            np.array_equal(x.numpy(), y) for x, y in zip(copies, values, strict=True)
        ):
            return K
    K = product(*factors)
    _products.insert(0, ([W.detach().clone() for W in factors], K))
    del _products[_MOST_PRODUCTS:]
    return K


def _remembered_product(W: Tensor) -> Tensor:
    """K = Wp Wq^T of the first layer's weights W [h, 2d]."""

    def product(W: Tensor) -> Tensor:
        Wq, Wp = W.chunk(2, dim=1)
        return Wp @ Wq.T

    return remembered(product, W)


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


def forward(backend: ModuleType, problem: Problem) -> Result:
    """Run the rollout.

    Raises
    ------
    ConvergenceError
        An implicit sub-step did not converge, and must.
    """
    if problem.omega is not None and problem.n_steps:
        return _forward_tao(backend, problem, problem.omega)
    n_steps, tail, memory = problem.n_steps, problem.tail, problem.memory
    Wq, Wp = problem.halves
    a = problem.first_layer()
    K = _remembered_product(problem.weights[0]) if memory == "none" else backend.product(Wp, Wq.T)
    length = segment_length(n_steps, memory)
    sq0, sp0 = torch.zeros_like(a), torch.zeros_like(a)
    none = a.new_empty(a.shape[0], 0)
    sqs, sps, energies, kept, residuals, evaluations = [], [], [none], [], [none], [none.int()]
    tape = none
    for start in range(0, n_steps, length):
        if memory == "checkpoint":
            kept += [a, sq0, sp0]
        steps = min(length, n_steps - start)
        a, sq, sp, H, tape, residual, count = backend.forward(
            a,
            K,
            tail,
            problem.dt[:, start : start + steps],
            problem.stages,
            steps,
            problem.every_state,
            problem.with_energy,
            memory if memory in ("store", "recompute") else "none",
            problem.solver,
        )
        if start:
            sq, sp = sq + sq0[:, None], sp + sp0[:, None]
        sq0, sp0 = sq[:, -1], sp[:, -1]
        if memory == "reversible":
            kept += [a, sq0, sp0]
        if problem.every_state or start + steps == n_steps:
            sqs.append(sq)
            sps.append(sp)
        energies.append(H)
        residuals.append(residual)
        evaluations.append(count)
    sq, sp = (torch.cat(x, 1) if x else a.new_empty(a.shape[0], 0, a.shape[1]) for x in (sqs, sps))
    states = _states(backend, problem, sq, sp)
    energy = none
    if problem.with_energy:
        energy = torch.cat((*energies, torch_backend.energy(tail.to(a.dtype), a)[:, None]), dim=1)
    residual = torch.cat(residuals, 1)
    if problem.must_converge and residual.numel():
        _check_converged(problem, residual)
    if memory in ("none", "checkpoint", "reversible"):
        tape, kept_states = torch.cat((none, *kept), dim=1), none
    else:
        tape, kept_states = tape.flatten(1), torch.cat((sq, sp), dim=2).flatten(1)
    return Result(states, energy, tape, kept_states, residual, torch.cat(evaluations, 1))


def _forward_tao(backend: ModuleType, problem: Problem, omega: float) -> Result:
    a, tail, dt = problem.first_layer(), problem.tail, problem.dt
    Wq, Wp = problem.halves
    end, sq, sp, energy, tape = tao.forward(a, tao.Grams.of(Wq, Wp), tail, dt, problem.n_steps, omega, problem.with_energy)
    if problem.with_energy:
        energy = torch.cat((energy, torch_backend.energy(tail.to(a.dtype), end)[:, None]), dim=1)
    kept = slice(None) if problem.every_state else slice(-1, None)
    sq, sp = sq[:, kept], sp[:, kept]
    states = _states(backend, problem, sq, sp)
    none = a.new_empty(a.shape[0], 0)
    apart = tao.distance(Wq, Wp, tail, dt, tape)
    if problem.memory == "none":
        return Result(states, energy, none, none, apart, none.int())
    return Result(states, energy, tape.flatten(1), torch.cat((sq, sp), dim=2).flatten(1), apart, none.int())


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


def _states(backend: ModuleType, problem: Problem, sq: Tensor, sp: Tensor) -> Tensor:
    """q0 + sq Wp and p0 + sp Wq, [B, n_steps + 1 or 1, 2d], from sq and sp [B, n, h]."""
    z0, (Wq, Wp) = problem.z0, problem.halves
    n, d = sq.shape[1], Wq.shape[1]
    first = 1 if problem.every_state or not n else 0
    states = z0.new_empty(z0.shape[0], n + first, 2 * d)
    if first:
        states[:, 0] = z0
    if n:
        backend.product(sq, Wp, states[:, first:, :d], z0[:, :d])
        backend.product(sp, Wq, states[:, first:, d:], z0[:, d:])
    return states


class _Sweep:
    """The adjoint's running values, from the last step to the first."""

    def __init__(self, backend: ModuleType, problem: Problem, K: Tensor, g_states: Tensor | None, need_weights: bool) -> None:
        self.backend, self.problem, self.K = backend, problem, K
        # the cotangent of a state reaches sq, sp, z0, and the first layer's weights directly
        self.g_moved = None
        if g_states is not None and problem.n_steps:
            self.g_moved = g_states[:, 1:] if problem.every_state else g_states
        self.sums = Gradients.zeros(K, problem.tail) if need_weights else None
        self.gW = torch.zeros_like(problem.weights[0]) if need_weights else None
        self.la = problem.z0.new_zeros(problem.z0.shape[0], K.shape[0])
        self.lsq = self.lsp = self.la
        self.gdt = problem.dt.new_zeros(problem.z0.shape[0], problem.n_steps)
        self.residual = problem.z0.new_zeros(problem.z0.shape[0])

    def add_last_energy(self, a: Tensor, gE: Tensor) -> None:
        """The energy after the last step, F(a), with cotangent gE [B]."""
        F = self.problem.tail.to(a.dtype)
        point, _, _ = torch_backend.evaluate(F, a)
        self.la = self.la + torch_backend.adjoint(F, point, torch.zeros_like(self.la), gE, self.sums)

    def of_states(self, start: int, stop: int, sq: Tensor, sp: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of sq, sp [B, steps or 1, h] after steps start..stop-1 or the last; adds the weights' direct share."""
        problem, product = self.problem, self.backend.product
        gsq = gsp = self.la.new_zeros(self.la.shape[0], 1, self.la.shape[1])
        if self.g_moved is not None and (problem.every_state or stop == problem.n_steps):
            G = self.g_moved[:, start:stop] if problem.every_state else self.g_moved
            Gq, Gp = G.chunk(2, dim=-1)
            Wq, Wp = problem.halves
            gsq, gsp = product(Gq, Wp.T), product(Gp, Wq.T)
            if self.gW is not None:
                gWq, gWp = self.gW.chunk(2, dim=1)
                gWq.addmm_(sp.flatten(0, 1).T, Gp.flatten(0, 1))
                gWp.addmm_(sq.flatten(0, 1).T, Gq.flatten(0, 1))
        return gsq, gsp

    def steps(self, start: int, sq: Tensor, sp: Tensor, tape: Tensor, g_energy: Tensor | None, memory: str) -> None:
        """Steps from `start` on, as many as the tape has; sq, sp as in `of_states`."""
        problem = self.problem
        stop = start + tape.shape[1]
        gsq, gsp = self.of_states(start, stop, sq, sp)
        gE = None if g_energy is None else g_energy[:, start:stop]
        self.la, self.lsq, self.lsp, self.gdt[:, start:stop], residual = self.backend.backward(
            self.la, self.lsq, self.lsp, gsq, gsp, gE, tape, self.K, problem.tail, problem.dt[:, start:stop],
            problem.stages, memory, self.sums, problem.solver,
        )  # fmt: skip
        self.residual = torch.maximum(self.residual, residual)

    def snapshot(self) -> tuple[Tensor, ...]:
        mutable = [] if self.sums is None or self.gW is None else [self.gW, self.sums.K, *self.sums.weights, *self.sums.biases]
        return self.la, self.lsq, self.lsp, self.residual, *(x.clone() for x in mutable)

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        self.la, self.lsq, self.lsp, self.residual, *sums = saved
        if self.sums is not None and self.gW is not None:
            for x, y in zip((self.gW, self.sums.K, *self.sums.weights, *self.sums.biases), sums, strict=True):
                x.copy_(y)


def backward(
    backend: ModuleType,
    problem: Problem,
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Gradients of z0 [B, 2d], every weight, every bias (both lists empty unless needed), and dt [B, n_steps].

    Parameters
    ----------
    g_states, g_energy : cotangents of what `forward` returned, or None
    tape, kept : what `forward` returned for this

    Raises
    ------
    ConvergenceError
        The equations of an implicit sub-step's adjoint did not converge, and must.
    """
    W, (Wq, Wp), n_steps = problem.weights[0], problem.halves, problem.n_steps
    K = backend.product(Wp, Wq.T)
    sweep = _Sweep(backend, problem, K, g_states, need_weights)
    if not n_steps:
        if g_energy is not None:
            sweep.add_last_energy(problem.first_layer(), g_energy[:, -1])
    elif problem.omega is not None:
        _tao_back(sweep, tape, kept, g_energy, problem.omega)
    elif problem.memory == "checkpoint":
        _from_checkpoints(sweep, tape, g_energy)
    elif problem.memory == "reversible":
        _by_reversal(sweep, tape, g_energy)
    else:
        h = K.shape[0]
        tape = tape.unflatten(1, (n_steps, len(problem.stages), -1))
        sq, sp = kept.unflatten(1, (-1, 2 * h)).split(h, dim=2)
        if g_energy is not None:
            # with energies the first sub-step's point is the state itself
            sweep.add_last_energy(tape[:, 0, 0, :h] + sq[:, -1] @ K + sp[:, -1] @ K.T, g_energy[:, -1])
        sweep.steps(0, sq, sp, tape, g_energy, problem.memory)
    _check_adjoint(problem, sweep.residual)

    la, gW, sums = sweep.la, sweep.gW, sweep.sums
    g_z0 = la @ W if g_states is None else g_states.sum(dim=1) + la @ W
    if gW is None or sums is None:
        return g_z0, [], [], sweep.gdt
    gWq, gWp = gW.chunk(2, dim=1)
    gWp += backend.product(sums.K, Wq)
    gWq += backend.product(sums.K.T, Wp)
    gW.addmm_(la.T, problem.z0)
    return g_z0, [gW, *sums.weights], [la.sum(0), *sums.biases], sweep.gdt


def _check_adjoint(problem: Problem, residual: Tensor) -> None:
    failed = residual > problem.solver.tolerance
    if not any(stage.implicit for stage in problem.stages) or not failed.any():
        return
    message = (
        f"the adjoint equations of the implicit steps did not converge for {int(failed.sum())} of {residual.numel()} samples: "
        f"the largest residual is {residual[failed].max():.1e}, wanted {problem.solver.tolerance:.1e} within "
        f"{problem.solver.max_evaluations} evaluations; dt is too large for the curvature of H"
    )
    if problem.must_converge:
        raise ConvergenceError(message)
    warnings.warn(f"hjepa_fast: {message}; gradients are inexact", stacklevel=2)


def _tao_back(sweep: _Sweep, tape: Tensor, kept: Tensor, g_energy: Tensor | None, omega: float) -> None:
    problem = sweep.problem
    h = sweep.K.shape[0]
    Wq, Wp = problem.halves
    sq, sp = kept.unflatten(1, (-1, 2 * h)).split(h, dim=2)
    gsq, gsp = sweep.of_states(0, problem.n_steps, sq, sp)
    tape = tape.unflatten(1, (problem.n_steps, tao.POINTS, h))
    sweep.la, grams, sweep.gdt = tao.backward(
        gsq, gsp, g_energy, problem.first_layer(), tape, tao.Grams.of(Wq, Wp), problem.tail, problem.dt, omega, sweep.sums
    )
    if grams is not None and sweep.gW is not None and sweep.sums is not None:
        sweep.sums.K.add_(grams.K)
        gWq, gWp = sweep.gW.chunk(2, dim=1)
        gWq += (grams.q + grams.q.T) @ Wq
        gWp += (grams.p + grams.p.T) @ Wp


def _from_checkpoints(sweep: _Sweep, tape: Tensor, g_energy: Tensor | None) -> None:
    """Every segment forward again from its kept state, the last one first."""
    problem = sweep.problem
    length = segment_length(problem.n_steps, problem.memory)
    starts = range(0, problem.n_steps, length)
    checkpoints = tape.unflatten(1, (len(starts), 3, -1))
    for index in reversed(range(len(starts))):
        a, sq0, sp0 = checkpoints[:, index].unbind(1)
        _again(sweep, starts[index], min(starts[index] + length, problem.n_steps), a, sq0, sp0, g_energy)


def _again(
    sweep: _Sweep,
    start: int,
    stop: int,
    a: Tensor,
    sq0: Tensor,
    sp0: Tensor,
    g_energy: Tensor | None,
    last_energy: bool = True,
) -> None:
    """Steps start..stop-1 from a, sq, sp [B, h] at the start: forward, keeping everything, and back."""
    problem = sweep.problem
    run = sweep.backend.forward(
        a, sweep.K, problem.tail, problem.dt[:, start:stop], problem.stages, stop - start, problem.every_state, False,
        "store", problem.solver,
    )  # fmt: skip
    if last_energy and stop == problem.n_steps and g_energy is not None:
        sweep.add_last_energy(run.a, g_energy[:, -1])
    sweep.steps(start, run.sq + sq0[:, None], run.sp + sp0[:, None], run.tape, g_energy, "store")


_LOST = 1000
"""Reversal may be off by this many units of rounding."""


def _by_reversal(sweep: _Sweep, tape: Tensor, g_energy: Tensor | None) -> None:
    """States rebuilt from the last one backwards, a chunk at a time; and from the kept ones where that went wrong."""
    problem = sweep.problem
    n_steps, length = problem.n_steps, segment_length(problem.n_steps, problem.memory)
    ends = tape.unflatten(1, (-(-n_steps // length), 3, -1))
    a0 = problem.first_layer()
    anchors = [(a0, torch.zeros_like(a0), torch.zeros_like(a0)), *(tuple(x.unbind(1)) for x in ends.unbind(1))]
    if g_energy is not None:
        sweep.add_last_energy(anchors[-1][0], g_energy[:, -1])
    back = inverse(problem.stages)
    for index in reversed(range(len(anchors) - 1)):
        first, last = index * length, min((index + 1) * length, n_steps)
        a, sq, sp = anchors[index + 1]
        saved = sweep.snapshot()
        for start in reversed(range(first, last, _CHUNK)):
            stop = min(start + _CHUNK, last)
            dt = problem.dt[:, start:stop]
            run = sweep.backend.forward(
                a, sweep.K, problem.tail, -dt.flip(1), back, stop - start, True, False, "store", problem.solver
            )
            # what each state, the last one first, is before the one at the end
            sqs, sps = (torch.cat((x[:, None], x[:, None] + moved), dim=1).flip(1) for x, moved in ((sq, run.sq), (sp, run.sp)))
            kept = slice(1, None) if problem.every_state else slice(-1, None)
            sweep.steps(start, sqs[:, kept], sps[:, kept], run.tape.flip(1, 2), g_energy, "store")
            a, sq, sp = run.a, sqs[:, 0], sps[:, 0]
        a0, *_ = anchors[index]
        error = ((a - a0).abs().amax(1) / a0.abs().amax(1).clamp_min(1)).nan_to_num(math.inf)
        error = torch.where(a0.isfinite().all(1), error, 0).amax() if len(error) else error.sum()
        limit = _LOST * torch.finfo(a.dtype).eps
        if error > limit:
            warnings.warn(
                f'hjepa_fast: memory="reversible" rebuilt step {first} of {n_steps} only to {error:.1e} (limit {limit:.1e}): '
                f"steps {first} to {last} are computed again from a kept state, as with checkpoints",
                stacklevel=2,
            )
            sweep.restore(saved)
            _repeat(sweep, first, last, anchors[index], g_energy)


def _repeat(sweep: _Sweep, first: int, last: int, start: tuple[Tensor, ...], g_energy: Tensor | None) -> None:
    """Steps first..last-1 with checkpoints every chunk."""
    problem = sweep.problem
    checkpoints = [start]
    for begin in range(first, last - _CHUNK, _CHUNK):
        a, sq, sp = checkpoints[-1]
        dt = problem.dt[:, begin : begin + _CHUNK]
        run = sweep.backend.forward(a, sweep.K, problem.tail, dt, problem.stages, _CHUNK, False, False, "none", problem.solver)
        checkpoints.append((run.a, sq + run.sq[:, -1], sp + run.sp[:, -1]))
    for index in reversed(range(len(checkpoints))):
        begin = first + index * _CHUNK
        stop = min(begin + _CHUNK, last)
        a, sq, sp = checkpoints[index]
        _again(sweep, begin, stop, a, sq, sp, g_energy, last_energy=False)  # that has been added already
