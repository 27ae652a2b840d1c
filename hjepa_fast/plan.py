"""The usual call, worked out once for its shapes and settings: one program in C++ each way, and nothing else around it.

At batch 1 of a small network, checking arguments and preparing the loop in Python took five times as long as the loop. A plan
stands for a call that went through all of that before, with the same Hamiltonian, shapes, dtypes and settings: what is left to
look at is what may differ between two such calls. It holds no number and no view of a parameter, only the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import backends
from .hamiltonian import SumHamiltonian
from .hidden_space import coupling
from .hidden_space.machine import Job, Sums, half_of
from .hidden_space.network import Gradients, tail_of
from .hidden_space.outline import Outline
from .transforms import is_plain

_MOST = 64
"""Plans of one Hamiltonian."""


class Plan:
    """A rollout by pair with its tape, if any, in one piece: the states are the program's own registers."""

    def __init__(self, H: SumHamiltonian, outline: Outline, attributes: Any, z0: Tensor) -> None:
        program, d = outline.program, outline.d
        self.terms, self.parameters, self.attributes = H.terms, H.tensors, attributes
        self.backend = backends.of(attributes.backend)
        self.latent_dim, self.every = 2 * d, outline.every_state
        self.batch, self.lead = z0.reshape(-1, 2 * d).shape[0], z0.shape[:-1]
        self.n_steps: int = attributes.n_steps
        self.to_shape = None if z0.ndim == 2 else ((*self.lead, self.n_steps + 1, 2 * d) if self.every else z0.shape)
        terms = [H.terms[k] for k in program.networks]
        none = z0.new_empty(0)
        self.job = Job(
            program, none, [(t.weights[0], t.biases[0]) for t in terms], [], [tail_of(t) for t in terms], none,
            outline.with_energy, self.every, outline.memory, outline.register_widths,
        )  # fmt: skip
        self.given = [H.terms[int(key[1])].stiffness for key in program.matrices if key[0] == "k"]
        self.state = [program.registers[i] for i in program.state]
        self.widths = outline.state_widths()
        self.path = [str(program.registers[i][1]) for i in program.path]
        self.keeps_end = outline.saved(self.n_steps)[1] > 0

    @staticmethod
    def serves(H: SumHamiltonian, outline: Outline, n_steps: int, z0: Tensor) -> bool:
        """Whether this call is one that a plan can stand for."""
        return (
            n_steps > 0
            and z0.numel() > 0
            and z0.is_cpu
            and z0.dtype in (torch.float32, torch.float64)
            and all(t.dtype == z0.dtype for t in H.tensors)
            and not outline.tao
            and outline.by_pair
            and not outline.from_states
            and outline.memory in ("none", "store", "recompute")
            and all(outline.program.registers[i][0] in ("A", "Z") for i in outline.program.state)
        )

    def reads(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors that it works with."""
        return all([a is b for a, b in zip(parameters, self.parameters, strict=True)])

    def _job(self, z0: Tensor, dt: Tensor) -> Job:
        d = self.latent_dim // 2
        given = [k.expand(d) for k in self.given if k is not None]
        return self.job._replace(z0=z0, dt=dt.expand(-1, self.n_steps), given=given)

    def forward(self, z0: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, energies, and what `rollout.backward` or `backward` needs: as `rollout.forward`.

        z0 is [B, 2d], dt [1 or B, 1 or n_steps].
        """
        states = z0.new_empty(self.batch, self.n_steps + 1 if self.every else 1, self.latent_dim)
        run = self.backend.run(self._job(z0, dt), None, states, False)
        kept = torch.cat([half_of(states[:, -1], side) for side in self.path], dim=1) if self.keeps_end else run.tape[:, :0]
        return states, run.energy, run.tape, kept

    def backward(
        self, g_states: Tensor | None, g_energy: Tensor | None, tape: Tensor, kept: Tensor, z0: Tensor, dt: Tensor, sum_up: bool
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Gradients of z0, every parameter (none unless summed up), and dt: as `rollout.backward`."""
        job, terms = self._job(z0, dt), self.terms
        program = job.program
        cotangents = z0.new_zeros(self.batch, sum(self.widths)).split(self.widths, dim=1)
        values: Sequence[Tensor] = cotangents
        if self.keeps_end:
            end = dict(zip(self.path, kept.split(self.latent_dim // 2, dim=1), strict=True))
            values = [end[str(key[1])] if key[0] == "Z" else x for key, x in zip(self.state, cotangents, strict=True)]
        g_path, first = None, int(self.every)
        if g_states is not None:
            g_path = [half_of(g_states, side)[:, first:] for side in self.path]
        sums, weights, biases = None, [], []
        of_k: list[Tensor] = []
        if sum_up:
            weights = [[torch.empty_like(w, memory_format=torch.contiguous_format) for w in t.weights] for t in terms]
            # the first layer's is what reaches the start, and replaced there
            biases = [[*t.biases[:1], *[torch.zeros_like(b) for b in t.biases[1:]]] for t in terms]
            matrices = []
            for key in program.matrices:
                if key[0] == "k":
                    matrices.append(z0.new_empty(self.latent_dim // 2))
                    of_k.append(matrices[-1])
                else:
                    W = weights[int(key[1])][0]
                    matrices.append(half_of(W, str(key[2])) if terms[int(key[1])].reads == "z" else W)
            own = [Gradients(biases[k][0], weights[k][1:], biases[k][1:]) for k in program.networks]
            sums = Sums(matrices, own, fresh=True)
        found, g_dt = self.backend.run_back(job, cotangents, values, g_path, g_energy, tape, sums)
        g_z0 = torch.zeros_like(z0) if g_states is None or not self.every else g_states[:, 0].clone()
        for key, given in zip(self.state, found, strict=True):
            if key[0] == "Z":
                half_of(g_z0, str(key[1])).add_(given)
                continue
            k = int(key[1])
            term = terms[k]
            half_of(g_z0, term.reads).addmm_(given, term.weights[0])
            if sum_up:
                weights[k][0].addmm_(given.T, half_of(z0, term.reads))
                biases[k][0] = given.sum(0)
        parameters: list[Tensor] = []
        if sum_up:
            stiffness = iter(of_k)
            for k, term in enumerate(terms):
                parameters += [*weights[k], *biases[k]]
                if term.stiffness is not None:
                    parameters.append(next(stiffness).sum_to_size(term.stiffness.shape))
        return g_z0, parameters, g_dt


def key_of(H: SumHamiltonian, z0: Tensor, dt: float | Tensor, settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a call must share with another to have its plan; None of a call that can have none."""
    tensors = (z0, dt) if isinstance(dt, Tensor) else (z0,)
    if type(z0) is not Tensor or forward_ad._current_level >= 0 or not is_plain(tensors):
        return None
    # 1.0 and True are equal to 1, but are no numbers of steps
    if any([type(x) is not int for x in settings[:2]]) or not all([t.is_cpu for t in tensors]):
        return None
    differentiate = torch.is_grad_enabled() and any([t.requires_grad for t in (*tensors, *H.tensors)])
    step = (dt.shape, dt.dtype) if isinstance(dt, Tensor) else None
    return z0.shape, z0.dtype, step, differentiate, coupling.forced, *settings


def recall(H: SumHamiltonian, key: tuple[Any, ...] | None) -> Plan | None:
    """The plan of an equal call before."""
    try:
        found: Plan | None = H.plans.get(key) if H.plans else None
    except TypeError:  # of a setting that cannot be compared, which will be refused
        return None
    return found


def remember(H: SumHamiltonian, key: tuple[Any, ...] | None, plan: Plan) -> None:
    if key is not None and H.plans is not None:
        if len(H.plans) >= _MOST:
            H.plans.clear()
        H.plans[key] = plan
