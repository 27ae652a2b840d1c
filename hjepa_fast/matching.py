"""What Hamiltonian networks are trained with where no rollout is: gradient, vector field, residuals of single steps.

Each is differentiable with respect to states and every parameter, by a written-out backward, and any number of times.
"""

from __future__ import annotations

import typing

import torch
from torch import Tensor, nn

from . import inputs, ports, rolling, validation
from .api import BACKENDS, rollout
from .driven import Given, given
from .names import Backend, StepScheme
from .ports import PortHNN

STEPS: tuple[str, ...] = typing.get_args(StepScheme)
"""Schemes of `step_residual`."""


def gradient(
    hnn: nn.Module, z: Tensor, *, control: Tensor | None = None, condition: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """grad H = (Hq, Hp) at every state, in one fused pass.

    Parameters
    ----------
    hnn : nn.Module
        As for `hjepa_fast.rollout`.
    z : Tensor [..., 2d]
        States: float32, float64 or bfloat16, of the network's dtype and device.
    control, condition : Tensor [..., m] and [..., c], optional
        Where H takes them.
    backend : str
        "auto", "cpp", "torch" or "reference" (nested autograd, of any module). "triton" and "cuda" have
        no such kernel and leave it to PyTorch operations.

    Returns
    -------
    Tensor [..., 2d], differentiable any number of times with respect to z, control, condition and every parameter of `hnn`.

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it.
    RuntimeError
        A backend asked for by name that is not there.
    """
    return _gradient(hnn, z, control, condition, backend, rotated=False)[0]


def _gradient(
    hnn: nn.Module, z: Tensor, control: Tensor | None, condition: Tensor | None, backend: str, rotated: bool
) -> tuple[Tensor, Given]:
    validation.check_choice(backend, BACKENDS, "backend")
    x = given(getattr(hnn, "_orig_mod", hnn), z, backend, control, condition)  # of torch.compile
    u = inputs.rows(x.control, x.z.shape[:-1]) if x.read else None
    return rolling.gradient(x.H, x.z, backend, rotated, u, x.condition), x


def vector_field(
    hnn: nn.Module, z: Tensor, *, control: Tensor | None = None, condition: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """J grad H = (Hp, -Hq) at every state: z' of Hamilton's equations q' = Hp, p' = -Hq; with a `PortHNN`'s friction and force.

    To match derivatives z' of the data, minimise |z' - vector_field(hnn, z)|^2 (Greydanus et al., 2019).

    Parameters, errors and what is returned are those of `gradient`: [..., 2d]. A control may come through a `PortHNN`'s port.
    """
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    field, x = _gradient(hnn, z, control, condition, backend, rotated=True)
    return ports.added(hnn, x.z, field, x.control if x.forced else None) if isinstance(hnn, PortHNN) else field


def step_residual(
    hnn: nn.Module,
    z0: Tensor,
    z1: Tensor,
    dt: float | Tensor,
    *,
    scheme: StepScheme = "implicit-midpoint",
    control: Tensor | None = None,
    condition: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """z1 minus the step from z0: zero where the data follow the network's step. One-step matching minimises its square.

    With both ends known an implicit step needs no solve, and one gradient:

        implicit-midpoint   z1 - z0 - dt J grad H((z0 + z1) / 2)
        symplectic-euler    the same with grad H at (q0, p1)
        euler               the same with grad H at z0
        leapfrog            z1 - (kick, drift, kick from z0), see `hjepa_fast.rollout`

    Of a `PortHNN` all but leapfrog take the field with friction and force in it. Its rollouts with splitting="symmetric" have
    halves of both around the step instead, so that on steps of theirs this residual is as small as either one's own error
    (dt^3 for implicit-midpoint, dt^2 for symplectic-euler and euler), but not zero.

    Parameters
    ----------
    hnn : nn.Module
        As for `hjepa_fast.rollout`.
    z0, z1 : Tensor [..., 2d]
        States one step apart, of one shape.
    dt : float or Tensor
        Step size; a tensor may require grad. 0-d for all, or [..., 1] per sample.
    scheme : str
        One of `STEPS`.
    control, condition : Tensor [..., m] and [..., c], optional
        Held over the step, where H or a `PortHNN`'s port takes them.
    backend : str
        As for `gradient`.

    Returns
    -------
    Tensor [..., 2d], differentiable with respect to z0, z1, dt and every parameter of `hnn`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for `gradient` and `hjepa_fast.rollout`.
    """
    validation.check_choice(scheme, STEPS, "scheme")
    if not isinstance(z0, Tensor) or not isinstance(z1, Tensor):
        raise TypeError(f"z0 and z1 must be tensors, found {type(z0).__name__} and {type(z1).__name__}")
    if z0.shape != z1.shape:
        raise ValueError(f"z0 and z1 must have one shape, found {list(z0.shape)} and {list(z1.shape)}")
    if z0.dtype != z1.dtype or z0.device != z1.device:
        raise TypeError(
            f"z0 and z1 must share one dtype and device, found {z0.dtype} on {z0.device} and {z1.dtype} on {z1.device}"
        )
    if scheme == "leapfrog":
        return z1 - rollout(hnn, z0, dt, 1, states="final", backend=backend, control=control, condition=condition).states
    if z0.ndim == 0:
        raise ValueError("z0 must be [..., 2d], found a number")
    step = validation.as_step_sizes(dt, z0, 1)
    step = step.to(z0.dtype).reshape(*z0.shape[:-1], 1) if step.shape[0] == z0[..., 0].numel() else step.to(z0.dtype).reshape(1)
    d = z0.shape[-1] // 2
    where = {
        "implicit-midpoint": lambda: (z0 + z1) / 2,
        "symplectic-euler": lambda: torch.cat((z0[..., :d], z1[..., d:]), dim=-1),
        "euler": lambda: z0,
    }[scheme]()
    return z1 - z0 - step * vector_field(hnn, where, control=control, condition=condition, backend=backend)
