"""The functions a user calls: they check arguments, pick the backend, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from . import hamiltonian, validation
from .backends import reference

INTEGRATORS = tuple(reference.STEPS)
BACKENDS = ("auto", "reference")


class Rollout(NamedTuple):
    """What `rollout` returns."""

    states: Tensor
    """[..., n_steps + 1, 2d], the initial state first."""
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
    backend: str = "auto",
) -> Rollout:
    """Roll an MLP Hamiltonian's dynamics q' = dH/dp, p' = -dH/dq forward in time.

    Parameters
    ----------
    hnn : nn.Module
        Is, or holds as `.net`, an `nn.Sequential` of Linear layers with one smooth activation between
        them and one output.
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
    backend : str
        "auto", or "reference" (nested autograd).

    Returns
    -------
    Rollout
        `.states` [..., n_steps + 1, 2d] and `.energy` [..., n_steps + 1] or None, both differentiable with respect
        to z0, dt and every parameter of `hnn`.

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it.
    """
    mlp = hamiltonian.from_module(hnn)
    validation.check_state(z0, mlp, "z0")
    validation.check_steps(n_steps)
    validation.check_choice(integrator, INTEGRATORS, "integrator")
    validation.check_choice(backend, BACKENDS, "backend")
    dt = validation.as_step_sizes(dt, z0, n_steps)

    lead = z0.shape[:-1]
    z0 = z0.reshape(-1, mlp.latent_dim)
    hamiltonian.check_forward(hnn, mlp, z0)
    if dt.ndim > 1:
        dt = dt.expand(*lead, dt.shape[-1]).reshape(-1, dt.shape[-1])
    states = reference.rollout(mlp, z0, dt, n_steps, integrator)
    states = states.reshape(*lead, n_steps + 1, mlp.latent_dim)
    return Rollout(states, mlp.energy(states) if energy else None)


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
