"""Integrators as modules with a learnable step size, interchangeable with the published notebook's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .api import INTEGRATORS, Rollout, rollout

DT_BOUNDS = (0.1, 2.0)
"""Range that a learnable dt is clamped to where it is used (H-JEPA)."""


class SymplecticIntegrator(nn.Module):
    """Rolls a Hamiltonian forward with a learnable step size.

    State-dict keys are `dt` and `hnn.*`, as in published checkpoints.

    Parameters
    ----------
    hnn : nn.Module
        An MLP Hamiltonian, see `hjepa_fast.rollout`.
    dt : float
        Initial step size; the parameter `.dt` (0-d) is clamped to [0.1, 2.0] where it is used.
    integrator : str
        Name of the scheme, see `hjepa_fast.rollout`. The published one, "leapfrog", is symplectic only for a separable H.
    backend : str
        See `hjepa_fast.rollout`.

    Raises
    ------
    ValueError
        An unknown integrator; the message lists the known ones.
    """

    def __init__(self, hnn: nn.Module, dt: float = 1.0, *, integrator: str = "leapfrog", backend: str = "auto") -> None:
        super().__init__()
        validation.check_choice(integrator, INTEGRATORS, "integrator")
        self.hnn = hnn
        self.integrator = integrator
        self.backend = backend
        like = next(hnn.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.dt = nn.Parameter(torch.tensor(float(dt), dtype=dtype, device=like.device))

    @property
    def step_size(self) -> Tensor:
        """dt as it is used: clamped, 0-d, differentiable."""
        return self.dt.clamp(*DT_BOUNDS)

    def trajectory(self, z0: Tensor, n_steps: int, **options: Any) -> Rollout:
        """`hjepa_fast.rollout` with this module's network, step size, scheme and backend; `options` are its others."""
        return rollout(self.hnn, z0, self.step_size, n_steps, integrator=self.integrator, backend=self.backend, **options)

    def rollout(self, z0: Tensor, n_steps: int) -> Tensor:
        """States [..., n_steps + 1, 2d] from z0 [..., 2d], z0 first."""
        return self.trajectory(z0, n_steps).states

    def step(self, z: Tensor) -> Tensor:
        """The state one step after z: [..., 2d] to [..., 2d]."""
        return self.rollout(z, 1)[..., 1, :]

    def forward(self, z0: Tensor, n_steps: int = 1) -> Tensor:
        """Same as `rollout`."""
        return self.rollout(z0, n_steps)

    def extra_repr(self) -> str:
        return f"integrator={self.integrator!r}, backend={self.backend!r}"


class EulerIntegrator(SymplecticIntegrator):
    """Forward Euler, z + dt J grad H, the published ablation: one gradient a step, not symplectic."""

    def __init__(self, hnn: nn.Module, dt: float = 1.0, *, backend: str = "auto") -> None:
        super().__init__(hnn, dt, integrator="euler", backend=backend)
