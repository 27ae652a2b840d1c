"""What an integrator keeps of a network's Hamiltonian dynamics, measured on the network itself.

Every number comes out of `hjepa_fast.rollout`, so it is about what a user runs: `backend` is passed on, and networks and
states are copied to `dtype`, float64 unless another is asked for, so that rounding does not hide a defect. The properties
that are measured and what is known of each method: Hairer, Lubich, Wanner, Geometric Numerical Integration, V, VI and IX.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import hamiltonian, ports, reader, validation
from .api import INTEGRATORS, energy, rollout
from .driven import given
from .errors import ConvergenceError
from .integrators import SymplecticIntegrator
from .matching import gradient, vector_field
from .names import Backend, Integrator
from .ports import PortHNN
from .schemes import SCHEMES, Properties

SYMPLECTICITY, VOLUME, REVERSAL, ORDER, GROWTH, GRADIENTS = 1e-12, 1e-10, 1e-9, 0.2, 3.0, 1e-6
"""What `check` lets pass, in float64: see `check`."""
SEPARABLE = 1e-12
"""Separability defect up to which H counts as T(p) + V(q)."""
FLOOR = 1e-12
"""Relative error below which an error is rounding and says nothing of a method's order."""
RETURN = 3.0
"""`Drift.path` from which states count as coming back, as one round of a circle: no bound of the energy error is known of
states that leave for good, nor can it be seen before they return."""
PIECES = 20
"""Parts that `energy_drift` rolls out one by one, so also its least number of steps."""
_ROWS = 1024
_REVERSAL_STEPS = 100
_GRADIENT_STEPS = 5

Outcome = Literal["passed", "failed", "not claimed", "not measured"]


class Order(NamedTuple):
    """What `convergence_order` returns."""

    slope: float
    """Least-squares slope of log error against log dt over the points used; NaN if fewer than two are."""
    step_sizes: Tensor
    """[k]."""
    errors: Tensor
    """[k], at t_end, over all samples, relative to max(1, |exact|)."""
    used: Tensor
    """[k], bool: the error is finite and above rounding and above the reference solution's own."""


class Drift(NamedTuple):
    """What `energy_drift` returns: |H(z_t) - H(z_0)| and how it grows."""

    mean: Tensor
    """[n_steps + 1], over samples."""
    maximum: Tensor
    """[n_steps + 1], over samples."""
    growth: float
    """Mean over the last tenth of the run over that of the second tenth; infinite where an energy is not finite."""
    slope: float
    """Of the second half's mean, per step, relative to its level: about 0 if bounded, 1 / n_steps or more if it grows."""
    path: float
    """Length of a state's path over its largest distance from the start, seen at 20 points in time, the smallest over
    samples: 1 for one that only moves away, 3 for one round of a circle. NaN for "tao", which is rolled out in one piece."""
    diverged_at: int | None
    """First step with an energy that is not finite."""
    rounding: float
    """What rounding alone may amount to; growth means nothing below it."""


class Gradients(NamedTuple):
    """What `gradient_check` returns: relative differences between analytic gradients and finite differences."""

    z0: float
    dt: float
    weights: float


class Verdict(NamedTuple):
    """One number, and whether the integrator keeps what is claimed of it."""

    name: str
    value: float
    threshold: float
    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class Report:
    """What `check` found out about one integrator on one network."""

    integrator: str
    source: str
    dt: float
    n_steps: int
    separability: float
    """See `separability_defect`; the largest over the states."""
    claimed: Properties
    """What is known of the method, for a separable H if this one is."""
    verdicts: tuple[Verdict, ...]
    """symplectic, volume, reversible, order, energy, gradients."""
    order: Order | None
    drift: Drift | None
    """None where an implicit step had no solution."""

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts that contradict what is claimed."""
        return tuple(v for v in self.verdicts if v.outcome == "failed")

    def __getitem__(self, name: str) -> Verdict:
        """The verdict of that name."""
        return next(v for v in self.verdicts if v.name == name)


def step_jacobian(
    hnn: nn.Module,
    z: Tensor,
    dt: float,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Jacobian dz_1/dz_0 of one step.

    By reverse mode: one rollout of 2d copies of each state and one backward pass with the unit vectors.

    Parameters
    ----------
    hnn : nn.Module
        A Hamiltonian as `hjepa_fast.rollout` takes it; it is not changed.
    z : Tensor [..., 2d]
    dt : float
    integrator, backend : str
        See `hjepa_fast.rollout`.
    dtype : torch.dtype
        What is computed in, on copies of `hnn` and z.

    Returns
    -------
    Tensor [..., 2d, 2d], row i is the gradient of component i.

    Raises
    ------
    TypeError, ValueError
        As `hjepa_fast.rollout`.
    """
    network, z = _copies(hnn, z, dtype)
    size = z.shape[-1]
    states = z.reshape(-1, size)
    copies = states.repeat_interleave(size, dim=0)
    cotangents = torch.eye(size, dtype=dtype, device=z.device).repeat(len(states), 1)
    rows = []
    with torch.enable_grad():
        for x, cotangent in zip(copies.split(_ROWS), cotangents.split(_ROWS), strict=True):
            x = x.detach().requires_grad_()
            end = rollout(network, x, dt, 1, integrator=integrator, states="final", backend=backend).states
            rows.append(torch.autograd.grad(end, x, cotangent)[0])
    return torch.cat(rows).reshape(*z.shape, size) if rows else z.new_empty(*z.shape, size)


def symplecticity_defect(
    hnn: nn.Module,
    z: Tensor,
    dt: float,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
    contraction: float | Tensor = 0.0,
) -> Tensor:
    """max |J^T Omega J - c Omega| of one step's Jacobian J, Omega = [[0, I], [-I, 0]], c = 1: zero for a symplectic map.

    With `contraction` g dt it is c = exp(-g dt): zero for a symplectic step with conformal friction g of one coefficient
    (`PortHNN`). Parameters and errors as for `step_jacobian`; returns float64 [...].
    """
    J = step_jacobian(hnn, z, dt, integrator=integrator, backend=backend, dtype=dtype)
    return _omega_defect(J, torch.exp(-torch.as_tensor(contraction, dtype=torch.float64, device=J.device)))


def volume_defect(
    hnn: nn.Module,
    z: Tensor,
    dt: float,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """|det J - 1| of one step's Jacobian J: zero for a map that keeps phase space volume, as every symplectic one does.

    Parameters and errors as for `step_jacobian`; returns float64 [...].
    """
    return _determinant_defect(step_jacobian(hnn, z, dt, integrator=integrator, backend=backend, dtype=dtype))


def separability_defect(hnn: nn.Module, z: Tensor, *, n_vectors: int = 4, seed: int = 0) -> Tensor:
    """How far H is from T(p) + V(q): the size of d2H/dqdp relative to the whole Hessian, both in Frobenius norm.

    Estimated in float64 with `n_vectors` normal random vectors v, from the Hessian's products with [v_q, 0] and [0, v_p]:
    the mean of |A v|^2 is the squared norm of A.

    Parameters
    ----------
    hnn : nn.Module
    z : Tensor [..., 2d]

    Returns
    -------
    Tensor [...], float64: 0 for a separable H; the square root of 1/2 if all blocks of the Hessian are alike; up to 1.
    """
    network, z = _copies(hnn, z, torch.float64)
    H = hamiltonian.of_any_module(network, z, "reference")
    generator = torch.Generator().manual_seed(seed)
    half = z.shape[-1] // 2
    mixed = whole = torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device)
    with torch.enable_grad():
        x = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(H.energy(x).sum(), x, create_graph=True)
        for _ in range(n_vectors if gradient.requires_grad else 0):  # a linear H has no second derivatives
            v = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            for kept in (slice(0, half), slice(half, None)):
                one_half = torch.zeros_like(v)
                one_half[..., kept] = v[..., kept]
                (product,) = torch.autograd.grad(gradient, x, one_half, retain_graph=True)
                squares = product.square()
                own = squares[..., kept].sum(-1)
                whole = whole + squares.sum(-1)
                mixed = mixed + (squares.sum(-1) - own)
    return (mixed / whole.where(whole > 0, 1.0)).clamp(min=0).sqrt()


def reversal_error(
    hnn: nn.Module,
    z0: Tensor,
    dt: float,
    n_steps: int,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """n_steps with dt, then n_steps with -dt: max |z - z0| over max(1, max |z0|). Rounding for a reversible method.

    Parameters and errors as for `step_jacobian`, with z0 [..., 2d]; returns [...] of `dtype`, infinite where the way is lost
    in infinities.
    """
    network, z0 = _copies(hnn, z0, dtype)
    there = _end(network, z0, dt, n_steps, integrator, backend)
    return _distance(_end(network, there, -dt, n_steps, integrator, backend), z0)


def convergence_order(
    hnn: nn.Module,
    z0: Tensor,
    t_end: float,
    n_steps: Sequence[int] = (8, 16, 32, 64),
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
) -> Order:
    """The order that the global error at t_end shows, in float64.

    The reference solution is "rk4" with 4 and 8 times the most steps, extrapolated (Richardson). Errors that are not above
    1e-12, or not above the reference solution's own, are left out.

    Parameters
    ----------
    hnn : nn.Module
    z0 : Tensor [..., 2d]
    t_end : float
        Time span; the step sizes are t_end / n_steps.
    n_steps : sequence of int
        Numbers of steps, rising, at least two.
    integrator, backend : str
        See `hjepa_fast.rollout`.

    Raises
    ------
    ValueError
        Fewer than two numbers of steps, or not rising; and as `hjepa_fast.rollout`.
    """
    if len(n_steps) < 2 or n_steps[0] < 1 or any(b <= a for a, b in itertools.pairwise(n_steps)):
        raise ValueError(f"n_steps must be two or more rising positive numbers, found {tuple(n_steps)}")
    network, z0 = _copies(hnn, z0, torch.float64)
    exact, own_error = _exact(network, z0, t_end, n_steps[-1], backend)
    return _order(network, z0, t_end, n_steps, integrator, backend, exact, own_error)


def energy_drift(
    hnn: nn.Module,
    z0: Tensor,
    dt: float,
    n_steps: int,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Drift:
    """|H(z_t) - H(z_0)| along rollouts, and whether it grows. States are not kept, so n_steps may be large.

    Parameters as for `step_jacobian`, with z0 [..., 2d] and n_steps >= 20.

    Raises
    ------
    ValueError
        Fewer steps; and as `hjepa_fast.rollout`.
    """
    n_steps = validation.as_count(n_steps, "n_steps")
    if n_steps < PIECES:
        raise ValueError(f"n_steps must be at least {PIECES} to tell growth from bounded error, found {n_steps}")
    network, z0 = _copies(hnn, z0, dtype)
    states: list[Tensor] = [z0]
    energies: list[Tensor] = []
    # the two copies of "tao" would start as one again in every piece
    pieces = 1 if integrator == "tao" else PIECES
    ends = [n_steps * piece // pieces for piece in range(pieces + 1)]
    with torch.no_grad():
        for start, end in itertools.pairwise(ends):
            out = rollout(
                network, states[-1], dt, end - start, integrator=integrator, energy=True, states="final", backend=backend
            )
            assert out.energy is not None
            states.append(out.states)
            energies.append(out.energy[..., 1:] if energies else out.energy)
    H = torch.cat(energies, dim=-1).reshape(-1, n_steps + 1).double()
    drift = (H - H[:, :1]).abs()
    mean, maximum = drift.mean(0), drift.amax(0)
    infinite = (~mean.isfinite()).nonzero()
    seen = torch.stack(states).double()
    length, reach = seen.diff(dim=0).norm(dim=-1).sum(0), (seen - seen[0]).norm(dim=-1).amax(0)
    path = torch.where(reach > 0, length / reach, math.inf).amin().item() if pieces > 1 else math.nan
    rounding = 100 * torch.finfo(dtype).eps * math.sqrt(n_steps) * max(1.0, H[:, 0].abs().max().item())
    growth, slope = math.inf, math.nan
    if not len(infinite):
        tenth, half = n_steps // 10, mean[n_steps // 2 :]
        early, late = mean[tenth : 2 * tenth].mean().item(), mean[-tenth:].mean().item()
        growth = late / early if early else (math.inf if late else 1.0)
        steps = torch.arange(len(half), dtype=torch.float64, device=half.device)
        steps = steps - steps.mean()
        level = half.mean().item()
        slope = (steps @ half / steps.square().sum()).item() / level if level else 0.0
    return Drift(mean, maximum, growth, slope, path, int(infinite[0]) if len(infinite) else None, rounding)


def energy_growth(
    hnn: nn.Module,
    z0: Tensor,
    dt: float,
    n_steps: int,
    *,
    control: Tensor | None = None,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The largest rise of H over a step of a rollout, max_t H(z_{t+1}) - H(z_t); negative where H falls in every step.

    Friction takes energy out, so without a control a rise is an error of the discretisation: of a `PortHNN` with "rayleigh"
    friction its size is what the step violates dH/dt <= 0 by. Parameters as for `energy_drift`; returns float64 [...].
    """
    network, z0 = _copies(hnn, z0, dtype)
    with torch.no_grad():
        u = None if control is None else control.detach().to(dtype)
        out = rollout(network, z0, dt, n_steps, integrator=integrator, energy=True, backend=backend, control=u)
    assert out.energy is not None
    return out.energy.double().diff(dim=-1).amax(-1)


class Power(NamedTuple):
    """Where a `PortHNN`'s energy comes from and goes to, at given states, [...] each: rate = supplied - lost."""

    rate: Tensor
    """dH/dt = grad H . z', by the vector field."""
    supplied: Tensor
    """Hp . G u, by the control."""
    lost: Tensor
    """Hp . (g p) of conformal friction, Hp . (g Hp) of Rayleigh's, which is never negative."""


def power_balance(model: PortHNN, z: Tensor, control: Tensor | None = None, *, backend: Backend = "auto") -> Power:
    """dH/dt at states z [..., 2d] under a control [..., m], beside the power put in and the power lost.

    Raises
    ------
    TypeError, ValueError
        Not a `PortHNN`; and as `vector_field`.
    """
    if not isinstance(model, PortHNN):
        raise TypeError(f"power_balance is of a PortHNN, found {type(model).__name__}")
    with torch.no_grad():
        field = vector_field(model, z, control=control, backend=backend)
        gradient_of_H = gradient(model, z, backend=backend)
        p, Hp = z.chunk(2, dim=-1)[1], gradient_of_H.chunk(2, dim=-1)[1]
        g, zero = ports.friction_of(model, z), Hp.new_zeros(())
        lost = zero if g is None else Hp * g * (p if model.kind == "conformal" else Hp)
        supplied = zero if control is None else Hp * ports.force_of(model, control)
        rate = gradient_of_H * field
        return Power(rate.sum(-1), *(x.expand(field.chunk(2, dim=-1)[0].shape).sum(-1) for x in (supplied, lost)))


class Balance(NamedTuple):
    """What `energy_balance` returns, [..., n_steps + 1] each, 0 at the first state: change = supplied - lost + error."""

    change: Tensor
    """H(z_t) - H(z_0)."""
    supplied: Tensor
    """Energy that the control has put in by then."""
    lost: Tensor
    """Energy that friction has taken out by then."""
    error: Tensor
    """What neither accounts for: the energy drift, where there is neither."""


def energy_balance(
    hnn: nn.Module, states: Tensor, dt: float | Tensor, control: Tensor | None = None, *, backend: Backend = "auto"
) -> Balance:
    """The energy balance along a path of states, H(z_t) - H(z_0) = integral of (Hp . G u - Hp . friction) + error.

    The integrals are sums by the trapezoidal rule over the states, of second order in dt, with the control of each step held
    over it. For exact solutions the error goes to zero with dt^2; without friction and control it is H(z_t) - H(z_0).

    Parameters
    ----------
    hnn : nn.Module
        A `PortHNN`, or a Hamiltonian without friction and control.
    states : Tensor [..., n_steps + 1, 2d]
        Of a rollout, or of data.
    dt : float or Tensor
        The time between two states, shaped as for `hjepa_fast.rollout`.
    control : Tensor [..., m] or [..., n_steps, m], optional
        Held throughout, or over each step.
    backend : str
        See `gradient`.

    Returns
    -------
    Balance, differentiable with respect to states, dt, control and every parameter.

    Raises
    ------
    TypeError, ValueError
        As `gradient`; a control that does not fit, or an H that reads one itself.
    """
    if not isinstance(states, Tensor) or states.ndim < 2 or not states.shape[-2]:
        raise ValueError(f"states must be [..., n_steps + 1, 2d], found {list(getattr(states, 'shape', ()))}")
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    n_steps = states.shape[-2] - 1
    if given(hnn, states[..., 0, :], backend, control, None, n_steps, "states").H.takes_inputs:
        raise ValueError(
            f"energy_balance is of an H(z), found {reader.name_of(hnn)}, whose H reads a control or a condition, so that it "
            "changes with that"
        )
    steps = validation.as_step_sizes(dt, states[..., 0, :], n_steps).to(states.dtype)
    steps = steps.reshape(*(states.shape[:-2] if len(steps) > 1 else [1] * (states.ndim - 2)), -1)
    H = energy(hnn, states)
    change = H - H[..., :1]
    nothing = torch.zeros_like(change)
    if not isinstance(hnn, PortHNN) or (hnn.kind is None and control is None):
        return Balance(change, nothing, nothing, change)
    p, Hp = states.chunk(2, dim=-1)[1], gradient(hnn, states, backend=backend).chunk(2, dim=-1)[1]
    g = ports.friction_of(hnn, states)

    def so_far(power: Tensor) -> Tensor:
        """Power [..., n_steps] that is held over each step, as energy by the end of it."""
        work = (power * steps).cumsum(dim=-1)
        return torch.cat((torch.zeros_like(work[..., :1]) if n_steps else nothing, work), dim=-1)

    lost = supplied = nothing
    if g is not None:
        power = (Hp * g * (p if hnn.kind == "conformal" else Hp)).sum(-1)
        lost = so_far((power[..., :-1] + power[..., 1:]) / 2)
    if control is not None:
        force = ports.force_of(hnn, control[..., None, :] if control.ndim < states.ndim else control)
        supplied = so_far(((Hp[..., :-1, :] + Hp[..., 1:, :]) / 2 * force).sum(-1))
    return Balance(change, supplied, lost, change - supplied + lost)


def gradient_check(
    hnn: nn.Module,
    z0: Tensor,
    dt: float,
    n_steps: int = _GRADIENT_STEPS,
    *,
    integrator: Integrator = "leapfrog",
    backend: Backend = "auto",
    n_directions: int = 3,
    seed: int = 0,
) -> Gradients:
    """The gradients of a random linear function of states and energies against finite differences, in float64.

    Separately for z0, dt and all weights: along `n_directions` random directions (dt has one), differences of order 4,
    |analytic - difference| over |analytic|, each as the norm over the directions.

    Parameters as for `step_jacobian`, with z0 [..., 2d]; a `hnn` without parameters of a kind gives 0 for it.
    """
    network, z0 = _copies(hnn, z0, torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(z0.device)

    size = torch.tensor(float(dt), dtype=torch.float64, device=z0.device)
    weights: list[Tensor] = list(network.parameters())
    of_states, of_energy = normal((*z0.shape[:-1], n_steps + 1, z0.shape[-1])), normal((*z0.shape[:-1], n_steps + 1))

    def value() -> Tensor:
        out = rollout(network, z0, size, n_steps, integrator=integrator, energy=True, backend=backend)
        assert out.energy is not None
        return (of_states * out.states).sum() + (of_energy * out.energy).sum()

    groups: dict[str, list[Tensor]] = {"z0": [z0], "dt": [size], "weights": weights}
    leaves = [tensor for group in groups.values() for tensor in group]
    for tensor in leaves:
        tensor.requires_grad_()
    with torch.enable_grad():
        found = torch.autograd.grad(value(), leaves, allow_unused=True)
    gradient_of = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)}
    result = {}
    with torch.no_grad():
        for name, group in groups.items():
            norm, count = sum(float(t.square().sum()) for t in group), sum(t.numel() for t in group)
            scale = math.sqrt(norm / max(count, 1)) or 1.0  # zero biases move as far as the weights do
            analytic, numeric = [], []
            for _ in range(1 if name == "dt" else n_directions):
                direction = [scale * (torch.ones_like(t) if name == "dt" else normal(t.shape)) for t in group]
                analytic.append(sum(float((gradient_of[id(t)] * v).sum()) for t, v in zip(group, direction, strict=True)))
                numeric.append(_difference(value, group, direction))
            error = math.dist(analytic, numeric)
            result[name] = error / math.hypot(*analytic) if error else 0.0
    return Gradients(**result)


def check(
    hnn: nn.Module,
    z0: Tensor,
    dt: float | None = None,
    *,
    integrators: Sequence[Integrator] | None = None,
    n_steps: int = 1000,
    backend: Backend = "auto",
) -> list[Report]:
    """Measure everything of this module, in float64, and hold it against what is known of each integrator.

    A verdict passes if: the symplecticity defect is at most 1e-12 and the volume defect 1e-10, both times the largest
    squared entry of the Jacobian where that exceeds 1; 100 steps there and back lose at most 1e-9, or 1000 times what comes
    back of one rounding of the turning point, where the dynamics are that sensitive; the order is at most 0.2 below the
    stated one, at step sizes from dt downwards that show one slope; the energy error of the last tenth of n_steps is less than
    3 times that of the second; gradients agree to 1e-6. Jacobians, orders and gradients are taken at the first two states.

    Parameters
    ----------
    hnn : nn.Module
        A Hamiltonian, or a `SymplecticIntegrator`, which also gives dt and the first integrator.
    z0 : Tensor [n, 2d]
        States; for a model of standardised latents without data, standard normal ones will do.
    dt : float, optional
        Step size; by default that of the `SymplecticIntegrator`'s sub-steps.
    integrators : sequence of str, optional
        By default the `SymplecticIntegrator`'s own ("leapfrog" for a bare Hamiltonian), then "implicit-leapfrog".
    n_steps : int
        Of the energy drift, >= 20.
    backend : str
        See `hjepa_fast.rollout`.

    Raises
    ------
    TypeError, ValueError
        No dt, an unknown integrator, no state; and as `hjepa_fast.rollout`.
    """
    own: Integrator = "leapfrog"
    if isinstance(hnn, SymplecticIntegrator):
        own = hnn.integrator
        dt = hnn.step_size.item() / hnn.sub_steps if dt is None else dt
        hnn = hnn.hnn
    if dt is None:
        raise ValueError("dt is needed: only a SymplecticIntegrator has a step size of its own")
    if not math.isfinite(dt) or dt == 0:
        raise ValueError(f"dt must be finite and not 0, found {dt}")
    if integrators is None:
        integrators = list(dict.fromkeys((own, "implicit-leapfrog")))
    for name in integrators:
        validation.check_choice(name, INTEGRATORS, "integrator")
    network, z0 = _copies(hnn, z0, torch.float64)
    if z0.numel() == 0:
        raise ValueError(f"at least one state is needed, found z0 {list(z0.shape)}")
    z0 = z0.reshape(-1, z0.shape[-1])
    separability = separability_defect(network, z0).max().item()
    # the exact solutions are those of every integrator
    exact = functools.cache(lambda finest: _exact(network, z0[:2], 4 * float(dt), finest, backend))
    return [_report(network, z0, float(dt), name, n_steps, backend, separability, exact) for name in integrators]


def plain_words(report: Report) -> str:
    """What a report says, in a few sentences."""
    name, x, claimed = report.integrator, report.separability, report.claimed
    separable = x <= SEPARABLE
    if separable:
        text = f"{name}: {report.source}. H is separable, T(p) + V(q), at these states."
    else:
        text = f"{name}: {report.source}. H is not separable: d2H/dqdp makes up {x:.2g} of its Hessian's norm."
    if name == "leapfrog" and not separable:
        text += " The published step is symplectic, reversible and of order 2 for a separable H only, so not here."
    for verdict in report.verdicts:
        text += f" {verdict.sentence[0].upper()}{verdict.sentence[1:]}."
    if report.failed:
        text += f" That contradicts what is claimed of {name}: {', '.join(v.name for v in report.failed)}."
    elif not claimed.symplectic:
        text += ' For a method that is symplectic for any H, use integrator="implicit-leapfrog".'
    return text


def _report(
    network: nn.Module,
    z0: Tensor,
    dt: float,
    integrator: Integrator,
    n_steps: int,
    backend: Backend,
    separability: float,
    exact: Callable[[int], tuple[Tensor, float]],
) -> Report:
    scheme = SCHEMES[integrator]
    claimed = scheme.separable if separability <= SEPARABLE else scheme.general
    options: dict[str, Any] = {"integrator": integrator, "backend": backend}
    few = z0[:2]
    failures: dict[str, str] = {}

    def attempt(name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or None where an implicit step has no solution at this dt: that is a finding too."""
        try:
            return measure()
        except ConvergenceError as error:
            failures[name] = str(error)
            return None

    def verdict(name: str, measured: Any, judge: Callable[..., Verdict], *arguments: Any) -> Verdict:
        if measured is None:
            return Verdict(name, math.nan, math.nan, "failed", f"the check '{name}' ended with: {failures[name]}")
        return judge(measured, *arguments)

    J = attempt("symplectic", lambda: step_jacobian(network, few, dt, **options))
    if J is None:
        failures["volume"] = failures["symplectic"]
    reversal = attempt("reversible", lambda: _reversal(network, z0, dt, integrator, backend))
    order = attempt("order", lambda: _asymptotic_order(network, few, 4 * dt, integrator, backend, exact))
    drift = attempt("energy", lambda: energy_drift(network, z0, dt, n_steps, **options))
    gradients = attempt("gradients", lambda: gradient_check(network, few, dt, **options))
    verdicts = (
        verdict("symplectic", J, _symplectic_verdict, claimed),
        verdict("volume", J, _volume_verdict, claimed),
        verdict("reversible", reversal, _reversal_verdict, claimed),
        verdict("order", order, _order_verdict, claimed),
        verdict("energy", drift, _energy_verdict, n_steps, claimed, _jump(network)),
        verdict("gradients", gradients, _gradient_verdict),
    )
    return Report(integrator, scheme.source, dt, n_steps, separability, claimed, verdicts, order, drift)


def _reversal(network: nn.Module, z0: Tensor, dt: float, integrator: Integrator, backend: Backend) -> tuple[float, float]:
    """What is lost there and back; and what becomes of one rounding of the turning point, which no method can do without."""
    there = _end(network, z0, dt, _REVERSAL_STEPS, integrator, backend)
    nudged = there * (1 + torch.finfo(there.dtype).eps)
    back, other = (_end(network, z, -dt, _REVERSAL_STEPS, integrator, backend) for z in (there, nudged))
    return _distance(back, z0).max().item(), _distance(other, back).max().item()


def _exact(network: nn.Module, z0: Tensor, t_end: float, finest: int, backend: Backend) -> tuple[Tensor, float]:
    """States at t_end, far nearer to the solution than `finest` steps of order 4 come, and a bound of their error."""
    coarse, fine = (_end(network, z0, t_end / steps, steps, "rk4", backend) for steps in (4 * finest, 8 * finest))
    exact = fine + (fine - coarse) / 15
    return exact, (exact - fine).norm().item()


def _order(
    network: nn.Module,
    z0: Tensor,
    t_end: float,
    n_steps: Sequence[int],
    integrator: Integrator,
    backend: Backend,
    exact: Tensor,
    own_error: float,
) -> Order:
    scale = max(1.0, exact.norm().item())
    ends = [_end(network, z0, t_end / steps, steps, integrator, backend) for steps in n_steps]
    errors = torch.tensor([(end - exact).norm().item() / scale for end in ends], dtype=torch.float64)
    step_sizes = torch.tensor([abs(t_end) / steps for steps in n_steps], dtype=torch.float64)
    used = errors.isfinite() & (errors > max(FLOOR, own_error / scale))
    slope = math.nan
    if used.sum() >= 2:
        x, y = step_sizes[used].log(), errors[used].log()
        slope = ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()
    return Order(slope, step_sizes, errors, used)


def _asymptotic_order(
    network: nn.Module,
    z0: Tensor,
    t_end: float,
    integrator: Integrator,
    backend: Backend,
    exact: Callable[[int], tuple[Tensor, float]],
) -> Order:
    """The order with dt, dt / 2, dt / 4, dt being t_end / 4, if both slopes are the same there, else with half of those,
    and so on; with longer steps than dt where its errors are rounding. `exact` is `_exact` as a function of `finest`."""

    def measure(coarsest: int) -> Order:
        n_steps = (coarsest, 2 * coarsest, 4 * coarsest)
        return _order(network, z0, t_end, n_steps, integrator, backend, *exact(n_steps[-1]))

    order = measure(4)
    for coarsest in (2, 1):
        if order.used.sum() < 2:
            order = measure(coarsest)
    for coarsest in (8, 16):
        slopes = order.errors.log2().diff()
        if not order.used.all() or (slopes[0] - slopes[1]).abs() <= 0.1:
            break
        finer = measure(coarsest)
        order = finer if finer.used.all() else order
    return order


def _symplectic_verdict(J: Tensor, claimed: Properties) -> Verdict:
    defect, threshold = _omega_defect(J).max().item(), SYMPLECTICITY * _stretch(J)
    kept = defect <= threshold
    sentence = f"one step is {'' if kept else 'not '}symplectic: max |J^T Omega J - Omega| is {defect:.1e}"
    return Verdict("symplectic", defect, threshold, _outcome(claimed.symplectic, kept), sentence)


def _volume_verdict(J: Tensor, claimed: Properties) -> Verdict:
    defect, threshold = _determinant_defect(J).max().item(), VOLUME * _stretch(J)
    kept = defect <= threshold
    sentence = f"it {'keeps' if kept else 'does not keep'} phase space volume: |det J - 1| is {defect:.1e}"
    return Verdict("volume", defect, threshold, _outcome(claimed.symplectic, kept), sentence)


def _stretch(J: Tensor) -> float:
    """What the rounding of products of a Jacobian's entries scales with."""
    return max(1.0, J.square().max().item())


def _reversal_verdict(reversal: tuple[float, float], claimed: Properties) -> Verdict:
    error, sensitivity = reversal
    threshold = max(REVERSAL, 1000 * sensitivity)
    kept = error <= threshold
    if threshold >= 1:
        lost = f"whether it is reversible cannot be told: after {_REVERSAL_STEPS} steps one rounding error is {sensitivity:.1e}"
        return Verdict("reversible", error, threshold, "not measured" if claimed.reversible else "not claimed", lost)
    sentence = (
        f"it is {'' if kept else 'not '}reversible: {_REVERSAL_STEPS} steps there and back "
        f"{'return to within' if kept else 'miss the start by'} {error:.1e}"
    )
    return Verdict("reversible", error, threshold, _outcome(claimed.reversible, kept), sentence)


def _order_verdict(order: Order, claimed: Properties) -> Verdict:
    threshold = claimed.order - ORDER
    if math.isnan(order.slope):
        finite = bool(order.errors.isfinite().all())
        sentence = (
            f"its errors, {order.errors.min():.1e} to {order.errors.max():.1e}, are too near rounding to show an order"
            if finite
            else "its errors are not finite at this dt"
        )
        return Verdict("order", order.slope, threshold, "not measured" if finite else "failed", sentence)
    used = order.step_sizes[order.used]
    sizes = f"step sizes from {used.max():.2g} to {used.min():.2g}"
    sentence = f"it shows order {order.slope:.2f}, {claimed.order} being stated, at {sizes}"
    return Verdict("order", order.slope, threshold, _outcome(True, order.slope >= threshold), sentence)


def _jump(network: nn.Module) -> float:
    """How far PyTorch's softplus jumps at the threshold from where on it is linear: no method's error says much below it."""
    return max((math.exp(-m.threshold) / m.beta for m in network.modules() if isinstance(m, nn.Softplus)), default=0.0)


def _energy_verdict(drift: Drift, n_steps: int, claimed: Properties, jump: float) -> Verdict:
    def verdict(outcome: Outcome, sentence: str) -> Verdict:
        return Verdict("energy", drift.growth, GROWTH, outcome, sentence)

    if drift.diverged_at is not None:
        lost = f"the rollout diverges: its energy is not finite from step {drift.diverged_at} on"
        return verdict("failed" if claimed.symplectic else "not claimed", lost)
    tenth = n_steps // 10
    late = drift.mean[-tenth:].mean().item()
    about = f"the energy error is {late:.1e} on average at the end of {n_steps} steps"
    if late <= drift.rounding:
        return verdict(_outcome(claimed.symplectic, True), f"{about}: rounding")
    about += f", {drift.growth:.2g} times that of the second tenth"
    kept = drift.growth < GROWTH
    if not kept and claimed.symplectic and late <= 10 * jump:
        return verdict("not measured", f"{about}, which the jumps of softplus at its threshold, {jump:.1e}, may well make up")
    if not kept and drift.path < RETURN:
        return verdict("not claimed", f"{about}; a bound is known only of states that stay, and some only move away so far")
    judged = "it grows" if not kept else "bounded so far" if claimed.symplectic else "no growth so far, and no promise of that"
    return verdict(_outcome(claimed.symplectic, kept), f"{about}: {judged}")


def _gradient_verdict(gradients: Gradients) -> Verdict:
    worst = max(gradients, key=lambda x: math.inf if math.isnan(x) else x)
    parts = ", ".join(f"{name} {x:.1e}" for name, x in gradients._asdict().items())
    kept = worst <= GRADIENTS
    sentence = f"gradients {'agree' if kept else 'do not agree'} with finite differences (relative difference {parts})"
    return Verdict("gradients", worst, GRADIENTS, _outcome(True, kept), sentence)


def _outcome(claimed: bool, kept: bool) -> Outcome:
    if not claimed:
        return "not claimed"
    return "passed" if kept else "failed"


def _copies(hnn: nn.Module, z: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The network and the states in `dtype`, detached from the caller's."""
    network = copy.deepcopy(hnn).to(dtype).requires_grad_(False)
    if isinstance(z, Tensor):
        z = z.detach().to(dtype, copy=True)
    inner = network.H if isinstance(network, PortHNN) else network
    return network, validation.as_state(z, hamiltonian.of_any_module(inner, z, "reference"), "z")


def _end(network: nn.Module, z: Tensor, dt: float, n_steps: int, integrator: Integrator, backend: Backend) -> Tensor:
    with torch.no_grad():
        return rollout(network, z, dt, n_steps, integrator=integrator, states="final", backend=backend).states


def _distance(z: Tensor, z0: Tensor) -> Tensor:
    distance = (z - z0).abs().amax(-1) / z0.abs().amax(-1).clamp(min=1)
    return distance.nan_to_num(nan=math.inf)


def _omega_defect(J: Tensor, c: float | Tensor = 1.0) -> Tensor:
    half = J.shape[-1] // 2
    of_q, of_p = J.double().split(half, dim=-2)
    form = of_q.mT @ of_p
    form = form - form.mT
    eye = c * torch.eye(half, dtype=form.dtype, device=form.device)
    form[..., :half, half:] -= eye
    form[..., half:, :half] += eye
    return form.abs().amax((-2, -1))


def _determinant_defect(J: Tensor) -> Tensor:
    sign, logarithm = torch.linalg.slogdet(J.double())
    # expm1 keeps the digits that 1 - det would lose
    return torch.where(sign > 0, logarithm.expm1().abs(), 1 + logarithm.exp())


def _difference(value: Any, group: Sequence[Tensor], direction: Sequence[Tensor], h: float = 1e-3) -> float:
    """d value / dh along `direction`, by central differences of order 4; the tensors are moved and put back."""
    before = [t.clone() for t in group]

    def at(x: float) -> float:
        for t, start, v in zip(group, before, direction, strict=True):
            t.copy_(start + x * v)
        return float(value())

    result = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    for t, start in zip(group, before, strict=True):
        t.copy_(start)
    return result
