"""The functions a user calls: they check arguments, pick the backend, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import hamiltonian, ops, validation  # noqa: F401  (ops registers the operators)
from .backends import cpp, reference
from .hamiltonian import SeparableHamiltonian
from .schemes import SCHEMES

INTEGRATORS = tuple(SCHEMES)
BACKENDS = ("auto", "reference", "torch", "cpp")
MEMORY = ("store", "recompute", "checkpoint")


class Rollout(NamedTuple):
    """What `rollout` returns."""

    states: Tensor
    """[..., n_steps + 1, 2d], the initial state first; with `states="final"` the last one only, [..., 2d]."""
    energy: Tensor | None
    """H at those states, [..., n_steps + 1], or None if it was not asked for."""


def rollout(
    hnn: nn.Module,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    *,
    integrator: str = "leapfrog",
    energy: bool = False,
    states: str = "all",
    memory: str = "store",
    backend: str = "auto",
) -> Rollout:
    """Roll an MLP Hamiltonian's dynamics q' = dH/dp, p' = -dH/dq forward in time, all steps in one call.

    Parameters
    ----------
    hnn : nn.Module
        Is, or holds as `.net`, an `nn.Sequential` of Linear layers with one smooth activation between
        them and one output; or a `SeparableHNN`.
    z0 : Tensor [..., 2d]
        Initial states z = [q, p]: float32, float64 or bfloat16, of the network's dtype and device.
    dt : float or Tensor
        Step size; a tensor may require grad. 0-d for all, [n_steps] per step, [..., 1] per sample, [..., n_steps] both.
    n_steps : int
        Number of steps, >= 0.
    integrator : str
        "leapfrog" (H-JEPA's Algorithm 1; symplectic only for a separable H) or "euler" (forward Euler).
    energy : bool
        Also return H at every state.
    states : str
        "all", or "final": then what the call costs depends on the latent size only at its two ends.
    memory : str
        What is kept for the backward pass: "store" (every layer's values), "recompute" (the first layer's at each
        sub-step), "checkpoint" (the first layer's, every sqrt(n_steps) steps). Less memory, more time; same gradients.
        A `SeparableHNN` keeps its states and nothing else.
    backend : str
        "auto" (the fastest that is there, see `backends`), "cpp", "torch", or "reference" (nested autograd, the only one
        that is differentiable more than once; it knows no `memory`).

    Returns
    -------
    Rollout
        `.states` [..., n_steps + 1, 2d] (or [..., 2d]) and `.energy` [..., n_steps + 1] or None, both differentiable with
        respect to z0, dt and every parameter of `hnn`.

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it.
    RuntimeError
        A backend asked for by name that is not there, or a second derivative through one that has none.
    """
    mlp = hamiltonian.from_module(hnn)
    validation.check_state(z0, mlp, "z0")
    validation.check_steps(n_steps)
    validation.check_choice(integrator, INTEGRATORS, "integrator")
    validation.check_choice(states, ("all", "final"), "states")
    validation.check_choice(memory, MEMORY, "memory")
    validation.check_choice(backend, BACKENDS, "backend")
    dt = validation.as_step_sizes(dt, z0, n_steps)

    lead, every_state = z0.shape[:-1], states == "all"
    z0 = z0.reshape(-1, mlp.latent_dim)
    hamiltonian.check_forward(hnn, mlp, z0)
    backend = choose_backend(backend, z0)
    H: Tensor | None
    if backend == "reference":
        path = reference.rollout(mlp, z0, dt, n_steps, integrator)
        H = mlp.energy(path) if energy else None
        path = path if every_state else path[:, -1:]
    elif isinstance(mlp, SeparableHamiltonian):
        V, T = mlp.V, mlp.T
        path, H = torch.ops.hjepa_fast.rollout_separable(
            z0, V.weights, V.biases, T.weights, T.biases, V.stiffness, T.stiffness, dt,
            n_steps, integrator, *V.activation, *T.activation, energy,
        )  # fmt: skip
        path = path if every_state else path[:, -1:]
    else:
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (z0, dt, *mlp.tensors))):
            memory = "none"
        path, H, *_ = torch.ops.hjepa_fast.rollout(
            z0, mlp.weights, mlp.biases, dt, n_steps, integrator, *mlp.activation, every_state, energy, memory, backend
        )
    path = path.reshape(*lead, n_steps + 1, mlp.latent_dim) if every_state else path.reshape(*lead, mlp.latent_dim)
    return Rollout(path, H.reshape(*lead, n_steps + 1) if energy and H is not None else None)


def choose_backend(backend: str, z0: Tensor) -> str:
    """The backend that "auto" stands for: C++ for tensors on a CPU where it was built, else plain PyTorch.

    Raises
    ------
    RuntimeError
        A backend asked for by name that is not there; the message says how to get it.
    """
    if backend == "auto":
        return "cpp" if z0.device.type == "cpu" and cpp.available() else "torch"
    if backend == "cpp":
        if not cpp.available():
            raise RuntimeError(f'backend "cpp" is not there: {cpp.why_not()}')
        if z0.device.type != "cpu":
            raise RuntimeError(f'backend "cpp" runs on the CPU, z0 is on {z0.device}; use "auto" or "torch"')
    return backend


def backends() -> dict[str, str]:
    """Every backend's name, and "available" or what it lacks."""
    return {"reference": "available", "torch": "available", "cpp": "available" if cpp.available() else cpp.why_not()}


def leapfrog(hnn: nn.Module, z0: Tensor, dt: float | Tensor, n_steps: int) -> Tensor:
    """Leapfrog trajectory of an MLP Hamiltonian: kick, drift, kick (H-JEPA, Algorithm 1).

    p' = p - dt/2 Hq(q, p);  q+ = q + dt Hp(q, p');  p+ = p' - dt/2 Hq(q+, p').

    Arguments as for `rollout`. Returns the states [..., n_steps + 1, 2d], z0 first.
    """
    return rollout(hnn, z0, dt, n_steps, integrator="leapfrog").states


def energy(hnn: nn.Module, z: Tensor) -> Tensor:
    """H(z) of an MLP Hamiltonian: [..., 2d] to [...], differentiable.

    Raises
    ------
    TypeError, ValueError
        As for `rollout`.
    """
    mlp = hamiltonian.from_module(hnn)
    validation.check_state(z, mlp, "z")
    return mlp.energy(z)
