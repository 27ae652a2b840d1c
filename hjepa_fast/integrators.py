"""Integrators as modules with a learnable step size, interchangeable with the published notebook's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from . import validation
from .api import INTEGRATORS, Rollout, Solve, rollout
from .names import Backend, Integrator, TrajectoryOptions
from .schemes import SCHEMES

DT_BOUNDS = (0.1, 2.0)
"""Range that a learnable dt is clamped to where it is used (H-JEPA)."""
Bounds = tuple[float, float]


def check_dt(dt: float, bounds: Sequence[float] | None, dtype: torch.dtype = torch.float64) -> Bounds | None:
    """The bounds as a pair of floats, or None; an initial step size must be a finite number within them.

    Parameters
    ----------
    dt : float
    bounds : pair of floats, or None
        Smallest and largest step size; either may be infinite.
    dtype : torch.dtype
        What dt and its bounds are rounded to before they are compared.

    Raises
    ------
    TypeError
        dt is not a number.
    ValueError
        dt is not finite or lies outside the bounds, or these are not a pair low < high; the message says what to do.
    """
    if isinstance(dt, Tensor):
        if dt.numel() != 1 or dt.is_meta:
            raise TypeError(f"dt must be a number, found a tensor {list(dt.shape)} on {dt.device}")
        dt = dt.item()
    dt = validation.as_number(dt, "dt")
    if bounds is None:
        return None
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if isinstance(bounds, str) or not low < high:
        raise ValueError(f"dt_bounds must be two numbers, low < high, or None for no clamp; found {bounds!r}")
    if not _within(torch.tensor(dt, dtype=dtype), (low, high)):
        raise ValueError(
            f"dt must lie within dt_bounds, which it is clamped to where it is used: from {low:g} to {high:g}, found {dt:g}. "
            "Give dt_bounds=(low, high) that hold it, or dt_bounds=None for no clamp"
        )
    return low, high


def _within(dt: Tensor, bounds: Bounds) -> bool:
    low, high = (torch.tensor(bound, dtype=dt.dtype).item() for bound in bounds)
    return low <= dt.item() <= high


def _of_whole_steps(solve: Solve, n_steps: int, k: int) -> Solve:
    """How well n_steps steps of k sub-steps each were solved."""
    converged, residual, evaluations = (x.unflatten(-1, (n_steps, k)) for x in solve)
    return Solve(converged.all(-1), residual.amax(-1), evaluations.sum(-1, dtype=evaluations.dtype))


class SymplecticIntegrator(nn.Module):
    """Rolls a Hamiltonian forward with a learnable step size; the default step is symplectic only for a separable H.

    That step, "leapfrog", is the published one. `hjepa_fast.rollout` names those that are symplectic for any H.

    State-dict keys are `dt` and `hnn.*`, as in published checkpoints.

    `.dt` is clamped to `dt_bounds` where it is used, and only there. An optimizer can move it past a bound, as in published
    training: it is then used as that bound and gets no gradient, so that only weight decay or momentum brings it back.
    A state dict whose dt lies outside is loaded with a warning.

    Parameters
    ----------
    hnn : nn.Module
        An MLP Hamiltonian, see `hjepa_fast.rollout`.
    dt : float
        Initial step size, within `dt_bounds`; the parameter `.dt` is 0-d.
    dt_bounds : (float, float), or None
        Smallest and largest step size that is used, low < high, infinite or not. By default (0.1, 2.0), as published.
        None: dt is used as it is.
    integrator : str
        Name of the scheme, see `hjepa_fast.rollout`.
    backend : str
        See `hjepa_fast.rollout`.
    sub_steps : int
        Steps of the scheme, each by dt / sub_steps, that one step of this module is made of, >= 1.

    Raises
    ------
    TypeError
        dt is not a number, or sub_steps no integer.
    ValueError
        An unknown integrator, a dt that is not finite or lies outside `dt_bounds`, bounds that are not low < high, or less
        than one sub-step.
    """

    # of instances that were pickled before they had their own
    dt_bounds: Bounds | None = DT_BOUNDS
    sub_steps: int = 1

    def __init__(
        self,
        hnn: nn.Module,
        dt: float = 1.0,
        *,
        dt_bounds: Bounds | None = DT_BOUNDS,
        integrator: Integrator = "leapfrog",
        backend: Backend = "auto",
        sub_steps: int = 1,
    ) -> None:
        super().__init__()
        validation.check_choice(integrator, INTEGRATORS, "integrator")
        if not isinstance(hnn, nn.Module):
            raise TypeError(f"hnn must be an nn.Module, found {type(hnn).__name__}")
        self.hnn = hnn
        self.integrator: Integrator = integrator
        self.backend: Backend = backend
        self.sub_steps = validation.as_count(sub_steps, "sub_steps", 1)
        like = next(hnn.parameters(), torch.empty(0))
        if not like.is_floating_point():
            raise TypeError(f"hnn must have floating-point parameters, found {like.dtype}")
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.dt_bounds = check_dt(dt, dt_bounds, dtype)
        self.dt = nn.Parameter(torch.tensor(float(dt), dtype=dtype, device=like.device))

    @property
    def step_size(self) -> Tensor:
        """dt as it is used: clamped to `dt_bounds`, 0-d, differentiable."""
        return self.dt if self.dt_bounds is None else self.dt.clamp(*self.dt_bounds)

    @overload
    def trajectory(
        self, z0: Tensor, n_steps: int, *, energy: Literal[True], integrator: Integrator | None = None,
        **options: Unpack[TrajectoryOptions],
    ) -> Rollout[Tensor]: ...  # fmt: skip
    @overload
    def trajectory(
        self, z0: Tensor, n_steps: int, *, energy: Literal[False] = False, integrator: Integrator | None = None,
        **options: Unpack[TrajectoryOptions],
    ) -> Rollout[None]: ...  # fmt: skip
    @overload
    def trajectory(
        self,
        z0: Tensor,
        n_steps: int,
        *,
        energy: bool,
        integrator: Integrator | None = None,
        **options: Unpack[TrajectoryOptions],
    ) -> Rollout: ...
    def trajectory(
        self, z0: Tensor, n_steps: int, *, energy: bool = False, integrator: Integrator | None = None,
        **options: Unpack[TrajectoryOptions],
    ) -> Rollout[Any]:  # fmt: skip
        """`hjepa_fast.rollout` with this module's network, step size, scheme and backend; `options` are its others.

        What is returned is of whole steps: with sub-steps, the states, energies and distances at their ends, the largest
        residual and all the evaluations of each.

        Parameters
        ----------
        integrator : str, optional
            Another scheme than the module's.
        """
        scheme, k = integrator or self.integrator, self.sub_steps
        if k == 1:
            return rollout(
                self.hnn, z0, self.step_size, n_steps, energy=energy, integrator=scheme, backend=self.backend, **options
            )
        n_steps = validation.as_count(n_steps, "n_steps")
        control = options.get("control")
        if isinstance(control, Tensor) and control.ndim > z0.ndim:  # of each step
            options["control"] = control.repeat_interleave(k, dim=-2)
        fine = rollout(
            self.hnn, z0, self.step_size / k, n_steps * k, energy=energy, integrator=scheme, backend=self.backend, **options
        )
        states = fine.states if options.get("states") == "final" else fine.states[..., ::k, :]
        energies = None if fine.energy is None else fine.energy[..., ::k]
        distance = None if fine.distance is None else fine.distance[..., k - 1 :: k]
        return Rollout(states, energies, None if fine.solve is None else _of_whole_steps(fine.solve, n_steps, k), distance)

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
        scheme = SCHEMES[self.integrator]
        note = ""
        if not scheme.general.symplectic:
            note = " (symplectic only for a separable H)" if scheme.separable.symplectic else " (not symplectic)"
        sub_steps = "" if self.sub_steps == 1 else f", sub_steps={self.sub_steps}"
        return f"integrator={self.integrator!r}{note}, dt_bounds={self.dt_bounds}, backend={self.backend!r}{sub_steps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}dt" not in state_dict or self.dt_bounds is None or self.dt.is_meta or self.dt.numel() != 1:
            return
        if not _within(self.dt.detach(), self.dt_bounds):
            low, high = self.dt_bounds
            warnings.warn(
                f"the loaded dt, {self.dt.item():g}, lies outside dt_bounds, {low:g} to {high:g}: it is clamped where it is "
                f"used and gets no gradient. Make the {type(self).__name__} with dt_bounds that hold it if it was trained so",
                stacklevel=2,
            )


class EulerIntegrator(SymplecticIntegrator):
    """Forward Euler, z + dt J grad H, the published ablation: one gradient a step, not symplectic."""

    def __init__(
        self,
        hnn: nn.Module,
        dt: float = 1.0,
        *,
        dt_bounds: Bounds | None = DT_BOUNDS,
        backend: Backend = "auto",
        sub_steps: int = 1,
    ) -> None:
        super().__init__(hnn, dt, dt_bounds=dt_bounds, integrator="euler", backend=backend, sub_steps=sub_steps)
