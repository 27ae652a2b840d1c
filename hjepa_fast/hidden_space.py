"""From states to the hidden space and back: what surrounds a backend's loop, forward and adjoint.

A backend supplies `forward` and `backward` on a = z W^T + b (see `backends/torch.py` for the mathematics). Here are the
products with the first layer's weights that lead there, and their share of the gradients:

    K = Wp Wq^T,    q_t = q0 + sq_t Wp,    p_t = p0 + sp_t Wq

The only place where the latent size 2d counts; what the loop costs does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .activations import Activation
from .backends import torch as torch_backend
from .backends.torch import Gradients, Tail
from .schemes import SubStep


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
    scheme: Sequence[SubStep]
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute" or "checkpoint"."""

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


def segment_length(n_steps: int, memory: str) -> int:
    """Steps between two kept states: all in one segment, or about sqrt(n) with checkpoints, which needs the least memory."""
    return math.isqrt(max(n_steps - 1, 0)) + 1 if memory == "checkpoint" else max(n_steps, 1)


def saved_widths(widths: Sequence[int], n_steps: int, n_sub_steps: int, memory: str, every_state: bool) -> tuple[int, int]:
    """Numbers a sample that are kept for the backward pass: of the tape, and of sq and sp."""
    if memory == "none":
        return 0, 0
    if memory == "checkpoint":
        return 3 * widths[0] * -(-n_steps // segment_length(n_steps, memory)), 0
    n_kept = n_steps if every_state else min(n_steps, 1)
    return n_steps * n_sub_steps * torch_backend.tape_width(widths, memory), 2 * widths[0] * n_kept


_products: list[tuple[Tensor, Tensor]] = []
_MOST_PRODUCTS, _LARGEST_WEIGHT = 4, 2**22


def _remembered_product(W: Tensor) -> Tensor:
    """K = Wp Wq^T of the first layer's weights W [h, 2d], remembered for prediction on a CPU.

    K takes as many multiplications as 128 sub-steps of one sample of the published network: 1.4 ms, about as long as its
    15 steps at batch 1. Comparing W with a copy of the one that K was made from takes 0.06 ms and cannot be wrong, which
    the version counters of parameters can (`p.data.copy_` does not move them).
    """
    Wq, Wp = W.chunk(2, dim=1)
    if W.device.type != "cpu" or W.numel() > _LARGEST_WEIGHT:
        return Wp @ Wq.T
    values = W.detach().numpy()
    for copy, K in tuple(_products):
        if copy.dtype == W.dtype and np.array_equal(copy.numpy(), values):
            return K
    K = Wp @ Wq.T
    _products.insert(0, (W.detach().clone(), K))
    del _products[_MOST_PRODUCTS:]
    return K


def forward(backend: ModuleType, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [B, n_steps + 1 or 1, 2d], energies [B, n_steps + 1 or 0], and what `backward` needs, [B, *] twice."""
    z0, n_steps, tail = problem.z0, problem.n_steps, problem.tail
    Wq, Wp = problem.halves
    a = problem.first_layer()
    K = _remembered_product(problem.weights[0]) if problem.memory == "none" else backend.product(Wp, Wq.T)
    length = segment_length(n_steps, problem.memory)
    sq0, sp0 = torch.zeros_like(a), torch.zeros_like(a)
    sqs, sps, energies, kept = [], [], [], []
    tape = a.new_empty(z0.shape[0], 0)
    for start in range(0, n_steps, length):
        if problem.memory == "checkpoint":
            kept += [a, sq0, sp0]
        steps = min(length, n_steps - start)
        memory = "none" if problem.memory == "checkpoint" else problem.memory
        dt = problem.dt[:, start : start + steps]
        a, sq, sp, H, tape = backend.forward(
            a, K, tail, dt, problem.scheme, steps, problem.every_state, problem.with_energy, memory
        )
        if start:
            sq, sp = sq + sq0[:, None], sp + sp0[:, None]
        sq0, sp0 = sq[:, -1], sp[:, -1]
        if problem.every_state or start + steps == n_steps:
            sqs.append(sq)
            sps.append(sp)
        energies.append(H)
    if n_steps:
        sq, sp = torch.cat(sqs, 1), torch.cat(sps, 1)
    else:
        sq = sp = a.new_empty(a.shape[0], 0, a.shape[1])
    states = _states(backend, problem, sq, sp)
    energy = a.new_empty(a.shape[0], 0)
    if problem.with_energy:
        energy = torch.cat((*energies, torch_backend.energy(tail.to(a.dtype), a)[:, None]), dim=1)
    if problem.memory == "none":
        return states, energy, a.new_empty(a.shape[0], 0), a.new_empty(a.shape[0], 0)
    if problem.memory == "checkpoint":
        return states, energy, torch.cat(kept, dim=1) if kept else a.new_empty(a.shape[0], 0), a.new_empty(a.shape[0], 0)
    return states, energy, tape.flatten(1), torch.cat((sq, sp), dim=2).flatten(1)


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
    """
    z0, n_steps, tail = problem.z0, problem.n_steps, problem.tail
    W, (Wq, Wp) = problem.weights[0], problem.halves
    K = backend.product(Wp, Wq.T)
    sums = Gradients.zeros(K, tail) if need_weights else None
    gW = torch.zeros_like(W) if need_weights else None
    g_z0 = torch.zeros_like(z0) if g_states is None else g_states.sum(dim=1)
    # the cotangent of a state reaches sq, sp, z0, and the first layer's weights directly
    g_moved = None if g_states is None or not n_steps else g_states[:, 1:] if problem.every_state else g_states

    la = lsq = lsp = z0.new_zeros(z0.shape[0], W.shape[0])
    gdts: list[Tensor] = []
    for start, steps, a, sq, sp, segment_tape, memory in _segments_backwards(backend, problem, K, tape, kept):
        if start + steps == n_steps and g_energy is not None:
            F = tail.to(a.dtype)
            point, _, _ = torch_backend.evaluate(F, a)
            la = la + torch_backend.adjoint(F, point, torch.zeros_like(la), g_energy[:, -1], sums)
        if not steps:
            break
        gsq = gsp = la.new_zeros(la.shape[0], 1, la.shape[1])
        if g_moved is not None and (problem.every_state or start + steps == n_steps):
            G = g_moved[:, start : start + steps] if problem.every_state else g_moved
            Gq, Gp = G.chunk(2, dim=-1)
            gsq, gsp = backend.product(Gq, Wp.T), backend.product(Gp, Wq.T)
            if gW is not None:
                gWq, gWp = gW.chunk(2, dim=1)
                gWq.addmm_(sp.flatten(0, 1).T, Gp.flatten(0, 1))
                gWp.addmm_(sq.flatten(0, 1).T, Gq.flatten(0, 1))
        dt = problem.dt[:, start : start + steps]
        gE = None if g_energy is None else g_energy[:, start : start + steps]
        la, lsq, lsp, gdt = backend.backward(
            la, lsq, lsp, gsq, gsp, gE, segment_tape, K, tail, dt, problem.scheme, memory, sums
        )
        gdts.insert(0, gdt)

    g_z0 = g_z0 + la @ W
    gdt = torch.cat(gdts, dim=1) if gdts else problem.dt.new_zeros(z0.shape[0], 0)
    if gW is None or sums is None:
        return g_z0, [], [], gdt
    gWq, gWp = gW.chunk(2, dim=1)
    gWp += backend.product(sums.K, Wq)
    gWq += backend.product(sums.K.T, Wp)
    gW.addmm_(la.T, z0)
    return g_z0, [gW, *sums.weights], [la.sum(0), *sums.biases], gdt


def _segments_backwards(
    backend: ModuleType, problem: Problem, K: Tensor, tape: Tensor, kept: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, Tensor, str]]:
    """From the last segment to the first: start, steps, a at its end, sq and sp [B, steps or 1, h], tape, its memory mode."""
    n_steps, tail, scheme = problem.n_steps, problem.tail, problem.scheme
    h = K.shape[0]
    if not n_steps:
        a = problem.first_layer()
        yield 0, 0, a, a, a, tape, "none"
    elif problem.memory != "checkpoint":
        tape = tape.unflatten(1, (n_steps, len(scheme), -1))
        sq, sp = kept.unflatten(1, (-1, 2 * h)).split(h, dim=2)
        a0 = tape[:, 0, 0, :h]
        yield 0, n_steps, a0 + sq[:, -1] @ K + sp[:, -1] @ K.T, sq, sp, tape, problem.memory
    else:
        length = segment_length(n_steps, problem.memory)
        starts = range(0, n_steps, length)
        checkpoints = tape.unflatten(1, (len(starts), 3, h))
        for index in reversed(range(len(starts))):
            steps = min(length, n_steps - starts[index])
            dt = problem.dt[:, starts[index] : starts[index] + steps]
            a0, sq0, sp0 = checkpoints[:, index].unbind(1)
            a, sq, sp, _, segment_tape = backend.forward(a0, K, tail, dt, scheme, steps, problem.every_state, False, "store")
            yield starts[index], steps, a, sq + sq0[:, None], sp + sp0[:, None], segment_tape, "store"
