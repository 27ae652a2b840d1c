"""States at given times, as `torchdiffeq.odeint` gives them, by the fused steps of an integrator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import transforms, validation
from .api import rollout
from .matching import vector_field
from .names import Backend, Integrator, Memory


def odeint(
    hnn: nn.Module,
    z0: Tensor,
    t: Tensor | Sequence[float],
    dt: float | None = None,
    *,
    integrator: Integrator = "implicit-leapfrog",
    dense: bool = False,
    control: Tensor | None = None,
    condition: Tensor | None = None,
    memory: Memory = "store",
    backend: Backend = "auto",
) -> Tensor:
    """States of Hamilton's equations at the times t, where t[0] is that of z0.

    Takes the place of `torchdiffeq.odeint(func, z0, t, method=...)`: H instead of the field, and a step size instead of
    tolerances, since a step that adapts itself to the state is not symplectic. What comes back has the times first, as there.

    Parameters
    ----------
    hnn : nn.Module
        As for `hjepa_fast.rollout`.
    z0 : Tensor [..., 2d]
        States at the first time.
    t : Tensor [T] or [..., T], or a sequence of float
        Times, increasing or decreasing; [..., T] for each sample its own. May require grad. Their values decide how many steps
        are taken, so they are read back to the host.
    dt : float, optional
        The largest step, > 0. Without one there is one step from each time to the next.
    integrator, memory, backend : str
        As for `rollout`. The default integrator is symplectic for any H and of order 2.
    dense : bool
        False: from each time to the next by equal steps of at most dt. Steps of different intervals then differ; with times
        that are unevenly spaced the energy error need not stay bounded for long.
        True: equal steps of at most dt throughout, which keeps that promise, and between them the cubic through the states and
        their derivatives (Hermite), whose own error is of order 4. It takes dt.
    control : Tensor [..., m] or [..., T - 1, m], optional
        Held throughout, or from each time to the next (not with `dense`); see `rollout`.
    condition : Tensor [..., c], optional
        As for `rollout`.

    Returns
    -------
    Tensor [T, ..., 2d], differentiable with respect to z0, t, the control and every parameter.

    Raises
    ------
    TypeError, ValueError
        Times that do not increase or decrease, are not finite or do not fit z0; a step size that is not positive; and as
        `rollout`.
    """
    dense = validation.as_flag(dense, "dense")
    if not isinstance(z0, Tensor) or z0.ndim == 0:
        raise TypeError(f"z0 must be a tensor [..., 2d], found {type(z0).__name__}")
    times = _as_times(t, z0)
    n_times = times.shape[-1]
    if dt is not None and not validation.as_number(dt, "dt") > 0:
        raise ValueError(f"dt must be positive, found {dt}")
    if dense and dt is None:
        raise ValueError("dense=True takes dt, the size of its equal steps")
    if dense and control is not None and control.ndim > z0.ndim:
        raise ValueError("a control for each interval has no place in equal steps across them; leave dense out")
    settings: dict[str, Any] = {"integrator": integrator, "memory": memory, "backend": backend, "condition": condition}
    if n_times == 1:
        return rollout(hnn, z0, 0.0, 0, control=control, **settings).states.movedim(-2, 0)  # which checks the rest
    if dense:
        assert dt is not None
        return _between_equal_steps(hnn, z0, times, dt, control, settings)
    gaps = times.diff(dim=-1)
    sizes = transforms.bare(gaps.detach()).abs().reshape(-1, n_times - 1).amax(0).double().cpu()
    counts = [1] * (n_times - 1) if dt is None else [_count(size, dt) for size in sizes.tolist()]
    repeats = torch.tensor(counts, device=times.device)
    steps = (gaps / repeats).repeat_interleave(repeats, dim=-1)
    if control is not None and control.ndim > z0.ndim:
        if control.shape[-2] != n_times - 1:
            raise ValueError(
                f"control must be [..., m] or [..., {n_times - 1}, m] for {n_times} times, found {list(control.shape)}"
            )
        control = control.repeat_interleave(repeats.to(control.device), dim=-2)
    states = rollout(hnn, z0, steps, sum(counts), control=control, **settings).states
    ends = torch.tensor([0, *counts], device=states.device).cumsum(0)
    return states.index_select(-2, ends).movedim(-2, 0)


def _count(size: float, dt: float) -> int:
    """Steps of at most dt, or a millionth more: a multiple of dt but for rounding to float32 takes no further step."""
    return max(1, math.ceil(size / dt * (1 - 1e-6)))


def _as_times(t: Tensor | Sequence[float], z0: Tensor) -> Tensor:
    times = t if isinstance(t, Tensor) else torch.tensor([validation.as_number(x, "t") for x in t], dtype=torch.float64)
    if not isinstance(t, Tensor):
        times = times.to(z0.device)
    if not times.is_floating_point():
        raise TypeError(f"t must be floating-point times, found {times.dtype}")
    if times.device != z0.device:
        raise ValueError(f"t and z0 must be on one device, found {times.device} and {z0.device}")
    if transforms.mapped(times):
        raise ValueError("t cannot be mapped over by torch.func.vmap: give times [..., T], for each sample its own")
    lead = times.shape[:-1]
    if not times.ndim or not times.shape[-1] or (lead and lead != z0.shape[:-1]):
        raise ValueError(f"t must be [T] or {[*z0.shape[:-1], 'T']} for states {list(z0.shape)}, found {list(times.shape)}")
    values = transforms.bare(times.detach())
    gaps = values.diff(dim=-1)
    if not bool(values.isfinite().all()):
        raise ValueError("t must be finite")
    if not bool((gaps > 0).all() | (gaps < 0).all()):
        raise ValueError("t must increase, or decrease, from each time to the next")
    return times


def _between_equal_steps(
    hnn: nn.Module, z0: Tensor, times: Tensor, dt: float, control: Tensor | None, settings: dict[str, Any]
) -> Tensor:
    span = times[..., -1:] - times[..., :1]
    n_steps = _count(transforms.bare(span.detach()).abs().amax().item(), dt)
    h = span / n_steps
    states = rollout(hnn, z0, h, n_steps, control=control, **settings).states
    at = (times - times[..., :1]) / h
    before = at.detach().floor().clamp(0, n_steps - 1)
    s = (at - before).to(states.dtype)[..., None]
    index = before.long().expand(*states.shape[:-2], -1)[..., None]
    z, z_next = (states.take_along_dim(index + k, dim=-2) for k in (0, 1))
    u, c = (None if x is None else x[..., None, :] for x in (control, settings["condition"]))
    f, f_next = (
        h.to(states.dtype)[..., None] * vector_field(hnn, x, control=u, condition=c, backend=settings["backend"])
        for x in (z, z_next)
    )
    found = (1 + 2 * s) * (1 - s) ** 2 * z + s * (1 - s) ** 2 * f + s * s * (3 - 2 * s) * z_next + s * s * (s - 1) * f_next
    return found.movedim(-2, 0)
