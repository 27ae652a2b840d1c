"""The readable oracle: gradients of H by nested autograd, integrators as in the books. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import transforms
from ..errors import ConvergenceError
from ..hamiltonian import Hamiltonian, MechanicalHamiltonian, ModuleHamiltonian, SumHamiltonian
from ..schemes import SUZUKI_4, YOSHIDA_4, YOSHIDA_6

Gradient = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Gradient, Gradient, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_MOST_ITERATIONS = 500


def leapfrog_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Kick, drift, kick (H-JEPA, Algorithm 1).

    Stormer-Verlet if H = T(p) + V(q): then symplectic, reversible, order 2. For any other H it is neither
    symplectic nor reversible, and of order 1.
    """
    p = p - dt / 2 * Hq(q, p)
    q = q + dt * Hp(q, p)
    p = p - dt / 2 * Hq(q, p)
    return q, p


def implicit_leapfrog_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Stormer-Verlet for any H (Hairer, Lubich, Wanner, VI.3, (3.4)). Order 2, symplectic, reversible."""
    half = solve(lambda x: p - dt / 2 * Hq(q, x), p)
    new = solve(lambda x: q + dt / 2 * (Hp(q, half) + Hp(x, half)), q)
    return new, half - dt / 2 * Hq(new, half)


def implicit_midpoint_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """z+ = z + dt J grad H((z + z+) / 2) (Hairer, Lubich, Wanner, VI.4). Order 2, symplectic, reversible."""

    def step(z: Tensor) -> Tensor:
        middle_q, middle_p = ((q + z[0]) / 2, (p + z[1]) / 2)
        return torch.stack((q + dt * Hp(middle_q, middle_p), p - dt * Hq(middle_q, middle_p)))

    new_q, new_p = solve(step, torch.stack((q, p)))
    return new_q, new_p


def symplectic_euler_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Implicit in p (Hairer, Lubich, Wanner, VI.3, (3.1)). Order 1, symplectic, not reversible."""
    new = solve(lambda x: p - dt * Hq(q, x), p)
    return q + dt * Hp(q, new), new


def euler_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Forward Euler, z + dt J grad H. Order 1, not symplectic, not reversible."""
    return q + dt * Hp(q, p), p - dt * Hq(q, p)


def rk4_step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The classical Runge-Kutta method. Order 4, not symplectic, not reversible."""
    k1, l1 = Hp(q, p), -Hq(q, p)
    k2, l2 = Hp(q + dt / 2 * k1, p + dt / 2 * l1), -Hq(q + dt / 2 * k1, p + dt / 2 * l1)
    k3, l3 = Hp(q + dt / 2 * k2, p + dt / 2 * l2), -Hq(q + dt / 2 * k2, p + dt / 2 * l2)
    k4, l4 = Hp(q + dt * k3, p + dt * l3), -Hq(q + dt * k3, p + dt * l3)
    return q + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), p + dt / 6 * (l1 + 2 * l2 + 2 * l3 + l4)


def composition(base: Step, factors: tuple[float, ...]) -> Step:
    """Steps of `base` by factors[i] dt, one after the other."""

    def step(Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        for factor in factors:
            q, p = base(Hq, Hp, q, p, factor * dt)
        return q, p

    return step


def solve(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x = f(x) by plain iteration, until x changes no more than rounding does.

    Differentiable: as many iterations again as were needed are recorded from the solution on, so that the derivative has
    converged as well.

    Raises
    ------
    ConvergenceError
    """
    with torch.no_grad():
        y = x.detach()
        n = 0
        while n < _MOST_ITERATIONS:
            n, y, before = n + 1, f(y), y
            change = (y - before).abs().amax(-1) / y.abs().amax(-1).clamp_min(1)
            # whatever is mapped over iterates together, as long as any of it needs
            if not transforms.bare(change > 4 * torch.finfo(y.dtype).eps).any():
                break
        else:
            raise ConvergenceError(
                f"{_MOST_ITERATIONS} iterations did not solve an implicit step: the last changed the state by a relative "
                f"{transforms.bare(change).max():.1e}; dt is too large for the curvature of H"
            )
    for _ in range(n if torch.is_grad_enabled() or transforms.active() else 0):
        y = f(y)
    return y


STEPS: dict[str, Step] = {
    "leapfrog": leapfrog_step,
    "implicit-leapfrog": implicit_leapfrog_step,
    "implicit-midpoint": implicit_midpoint_step,
    "symplectic-euler": symplectic_euler_step,
    "yoshida4": composition(implicit_leapfrog_step, YOSHIDA_4),
    "suzuki4": composition(implicit_leapfrog_step, SUZUKI_4),
    "yoshida6": composition(implicit_leapfrog_step, YOSHIDA_6),
    "yoshida4-midpoint": composition(implicit_midpoint_step, YOSHIDA_4),
    "suzuki4-midpoint": composition(implicit_midpoint_step, SUZUKI_4),
    "yoshida6-midpoint": composition(implicit_midpoint_step, YOSHIDA_6),
    "euler": euler_step,
    "rk4": rk4_step,
}


def _steps(
    Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dts: tuple[Tensor, ...], integrator: str
) -> Iterator[tuple[Tensor, Tensor]]:
    for dt in dts:
        q, p = STEPS[integrator](Hq, Hp, q, p, dt.unsqueeze(-1))
        yield q, p


def _tao(
    Hq: Gradient, Hp: Gradient, q: Tensor, p: Tensor, dts: tuple[Tensor, ...], omega: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tao, Phys. Rev. E 94, 043303 (2016): H(q, y) + H(x, p) + omega (|q - x|^2 + |p - y|^2) / 2, split; the copies' mean."""
    x, y = q, p
    for dt in (dt.unsqueeze(-1) for dt in dts):
        half = dt / 2
        p, x = p - half * Hq(q, y), x + half * Hp(q, y)
        q, y = q + half * Hp(x, p), y - half * Hq(x, p)
        cos, sin = torch.cos(2 * omega * dt), torch.sin(2 * omega * dt)
        sum_q, sum_p, dq, dp = q + x, p + y, q - x, p - y
        dq, dp = cos * dq + sin * dp, cos * dp - sin * dq
        q, p, x, y = (sum_q + dq) / 2, (sum_p + dp) / 2, (sum_q - dq) / 2, (sum_p - dp) / 2
        q, y = q + half * Hp(x, p), y - half * Hq(x, p)
        p, x = p - half * Hq(q, y), x + half * Hp(q, y)
        yield (q + x) / 2, (p + y) / 2


@transforms.outside_graphs("nested autograd is not for graphs; use a fused backend")
def gradient(H: Hamiltonian, z: Tensor) -> Tensor:
    """grad H at z [B, 2d], differentiable any number of times where grad mode is on."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return gradient(_ordinary(H), z.clone())
    if transforms.transformed((z, *H.tensors)):
        return torch.func.grad(lambda x: H.energy(x).sum())(z)
    record = torch.is_grad_enabled() and any(t.requires_grad for t in (z, *H.tensors))
    with torch.enable_grad():
        x = z.view_as(z) if record and z.requires_grad else z.detach().requires_grad_()
        return _derivative(H, x, x, record)


def _derivative(H: Hamiltonian, z: Tensor, x: Tensor, record: bool) -> Tensor:
    """That of the sum of H(z) with respect to x, of which z is made."""
    total = H.energy(z).sum()
    found = torch.autograd.grad(total, x, create_graph=record, allow_unused=True)[0] if total.requires_grad else None
    if found is None:
        what = type(H.module).__name__ if isinstance(H, ModuleHamiltonian) else "H"
        raise ValueError(
            f"{what} gives an energy that autograd cannot differentiate with respect to z: dequantise its layers, or take out "
            "what cuts the graph (detach, no_grad, NumPy)"
        )
    return found


def _ordinary(H: Hamiltonian) -> Hamiltonian:
    """Autograd refuses tensors made in inference mode, and gradients of H are needed even there."""
    if isinstance(H, ModuleHamiltonian):
        return H
    parts = H.system if isinstance(H, MechanicalHamiltonian) else H.terms
    own = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, parts)
    return MechanicalHamiltonian(own) if isinstance(H, MechanicalHamiltonian) else SumHamiltonian(own, H.latent_dim)


@transforms.outside_graphs("nested autograd is not for graphs; use a fused backend")
def rollout(H: Hamiltonian, z0: Tensor, dt: Tensor, n_steps: int, integrator: str, omega: float = 1.0) -> Tensor:
    """Roll z0 [B, 2d] forward; returns [B, n_steps + 1, 2d], z0 first.

    Differentiable with respect to z0, dt and the network where grad mode is on, any number of times.

    Parameters
    ----------
    H : Hamiltonian
    z0 : Tensor [B, 2d]
    dt : Tensor [1 or B, 1 or n_steps]
    n_steps : int
    integrator : str, a key of STEPS, or "tao"
    omega : float, of "tao"
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return rollout(_ordinary(H), z0.clone(), dt.clone(), n_steps, integrator, omega)

    tensors = (z0, dt, *H.tensors)
    transformed = transforms.transformed(tensors)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def gradient(of_p: bool) -> Gradient:
        def grad_H(q: Tensor, p: Tensor) -> Tensor:
            if transformed:  # torch.func differentiates under its own transforms, and keeps tangents
                return torch.func.grad(lambda x: H.energy(torch.cat((q, x) if of_p else (x, p), dim=-1)).sum())(
                    p if of_p else q
                )
            record = differentiable and torch.is_grad_enabled()
            with torch.enable_grad():
                x = p if of_p else q
                # a fresh node, so that the gradient is the partial one even where p was computed from q
                x = x.view_as(x) if record and x.requires_grad else x.detach().requires_grad_()
                return _derivative(H, torch.cat((q, x) if of_p else (x, p), dim=-1), x, record)

        return grad_H

    Hq, Hp = gradient(of_p=False), gradient(of_p=True)
    d = z0.shape[-1] // 2
    dts = dt.to(z0.dtype).expand(-1, n_steps).unbind(-1)
    q, p = z0[:, :d], z0[:, d:]
    steps = _tao(Hq, Hp, q, p, dts, omega) if integrator == "tao" else _steps(Hq, Hp, q, p, dts, integrator)
    return torch.stack([z0, *(torch.cat(state, dim=-1) for state in steps)], dim=1)
