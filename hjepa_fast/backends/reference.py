"""The readable oracle: gradients of H by nested autograd, any dtype and device. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..hamiltonian import Hamiltonian

Gradient = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Gradient, Gradient, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def leapfrog_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Kick, drift, kick (H-JEPA, Algorithm 1).

    Stormer-Verlet if H = T(p) + V(q): then symplectic, reversible, order 2. For any other H it is neither
    symplectic nor reversible, and of order 1.
    """
    p = p - dt / 2 * Hq(q, p)
    q = q + dt * Hp(q, p)
    p = p - dt / 2 * Hq(q, p)
    return q, p


def euler_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Forward Euler, z + dt J grad H. Order 1, not symplectic, not reversible."""
    return q + dt * Hp(q, p), p - dt * Hq(q, p)


STEPS: dict[str, Step] = {"leapfrog": leapfrog_step, "euler": euler_step}


def rollout(H: Hamiltonian, z0: Tensor, dt: Tensor, n_steps: int, integrator: str) -> Tensor:
    """Roll z0 [B, 2d] forward; returns [B, n_steps + 1, 2d], z0 first.

    Differentiable with respect to z0, dt and the network where grad mode is on, any number of times.

    Parameters
    ----------
    H : Hamiltonian
    z0 : Tensor [B, 2d]
    dt : Tensor [1 or B, 1 or n_steps]
    n_steps : int
    integrator : str, a key of STEPS
    """
    if torch.is_inference_mode_enabled():
        # autograd refuses tensors made in inference mode, and gradients of H are needed even there
        with torch.inference_mode(False):
            ordinary = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, H)
            with torch.no_grad():
                return rollout(ordinary, z0.clone(), dt.clone(), n_steps, integrator)

    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (z0, dt, *H.tensors))

    def gradient(of_p: bool) -> Gradient:
        def grad_H(q: Tensor, p: Tensor) -> Tensor:
            with torch.enable_grad():
                x = p if of_p else q
                # a fresh node, so that the gradient is the partial one even where p was computed from q
                x = x.view_as(x) if differentiable and x.requires_grad else x.detach().requires_grad_()
                total = H.energy(torch.cat((q, x) if of_p else (x, p), dim=-1)).sum()
                return torch.autograd.grad(total, x, create_graph=differentiable)[0]

        return grad_H

    Hq, Hp = gradient(of_p=False), gradient(of_p=True)
    d = z0.shape[-1] // 2
    step = STEPS[integrator]
    dts = dt.to(z0.dtype).expand(-1, n_steps).unbind(-1)
    q, p = z0[:, :d], z0[:, d:]
    states = [z0]
    for t in range(n_steps):
        q, p = step(Hq, Hp, q, p, dts[t].unsqueeze(-1))
        states.append(torch.cat((q, p), dim=-1))
    return torch.stack(states, dim=1)
