"""Rollouts and gradients of a Hamiltonian that was read: the numbers are checked, and a backend runs them."""

from __future__ import annotations

import os
import typing
from typing import TYPE_CHECKING, Generic, NamedTuple

import torch
from torch import Tensor

from . import gradient_ops, ops, plan, transforms, validation
from .backends import cpp, cuda, reference, triton
from .errors import NotFusedError, warn
from .hamiltonian import Hamiltonian, MechanicalHamiltonian, ModuleHamiltonian, SumHamiltonian, Term
from .hidden_space.outline import work_dtype
from .hidden_space.program import UNDRIVEN, Drive
from .names import Backend, Memory, States, Unconverged
from .schemes import SCHEMES, for_separable
from .state_space import ops as state_ops

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Energy = TypeVar("Energy", bound=Tensor | None, default=Tensor | None)
else:
    Energy = typing.TypeVar("Energy")  # a default takes Python 3.13

INTEGRATORS = tuple(SCHEMES)
BACKENDS: tuple[str, ...] = typing.get_args(Backend)
MEMORY: tuple[str, ...] = typing.get_args(Memory)

said = False
"""Whether this process was told what "auto" would rather take."""


class Solve(NamedTuple):
    """How well the equations of implicit steps were solved."""

    converged: Tensor
    """[..., n_steps], bool: whether a step's states are those of the method, up to the tolerance."""
    residual: Tensor
    """[..., n_steps]: the largest difference between a point and where its own gradient takes it, in the first
    pre-activation (of a `MechanicalHNN` in z), relative to the largest number there, or to 1 if that is larger."""
    evaluations: Tensor
    """[..., n_steps], int32: gradients of H that a step took."""


class Rollout(NamedTuple, Generic[Energy]):
    """What `rollout` returns; to a type checker a `Rollout[Tensor]` with energy=True, a `Rollout[None]` without."""

    states: Tensor
    """[..., n_steps + 1, 2d], the initial state first; with `states="final"` the last one only, [..., 2d]."""
    energy: Energy
    """H at every state, [..., n_steps + 1], or None if it was not asked for."""
    solve: Solve | None = None
    """Of an implicit integrator; None for an explicit one, and for backend="reference"."""
    distance: Tensor | None = None
    """|(q, p) - (x, y)| of the copies of "tao" after each step, [..., n_steps]; None for any other, and for
    backend="reference"."""


def rollout(
    mlp: Hamiltonian,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    *,
    integrator: str,
    energy: bool,
    states: str,
    memory: str,
    backend: str,
    tolerance: float | None,
    max_evaluations: int,
    unconverged: str,
    omega: float,
    drive: Drive = UNDRIVEN,
    externals: tuple[Tensor, ...] = (),
) -> Rollout:
    """A rollout, driven by these numbers of every step: arguments and errors as of `hjepa_fast.rollout`."""
    key = None
    if isinstance(mlp, SumHamiltonian) and mlp.plans is not None and not drive:
        settings = (n_steps, max_evaluations, integrator, energy, states, memory, unconverged, tolerance, omega, backend)
        key = plan.key_of(mlp, z0, dt, settings)
        known = plan.recall(mlp, key)
        if known is not None:
            return _by_plan(known, z0, dt)
    z0 = validation.as_state(z0, mlp, "z0")
    n_steps = validation.as_count(n_steps, "n_steps")
    validation.check_choice(integrator, INTEGRATORS, "integrator")
    energy = validation.as_flag(energy, "energy")
    validation.check_choice(states, typing.get_args(States), "states")
    validation.check_choice(memory, MEMORY, "memory")
    validation.check_choice(unconverged, typing.get_args(Unconverged), "unconverged")
    tolerance = validation.as_tolerance(tolerance, work_dtype(z0.dtype))
    max_evaluations = validation.as_count(max_evaluations, "max_evaluations", least=1)
    omega = validation.as_number(omega, "omega") if integrator == "tao" else 1.0
    dt = validation.as_step_sizes(dt, z0, n_steps)

    given, lead, every_state = z0, z0.shape[:-1], states == "all"
    z0 = z0.reshape(-1, mlp.latent_dim)
    if isinstance(mlp, ModuleHamiltonian):
        backend = "reference"
        if not n_steps:
            mlp.energy(z0)  # which says what is no Hamiltonian; no step will
    if isinstance(mlp, MechanicalHamiltonian):
        backend = _for_mechanical(backend, integrator, memory)
        backend = through_transforms(backend, (z0, dt, *mlp.tensors))
    tensors = (*mlp.tensors, *externals)
    backend = _taken(backend, z0)
    separable = isinstance(mlp, SumHamiltonian) and mlp.separable
    _check_combination(integrator, separable, memory)
    differentiate = torch.is_grad_enabled() and any(transforms.requires_grad(t) for t in (z0, dt, *tensors))
    if not differentiate:
        memory = "none"
    elif memory == "reversible" and not _is_reversible(integrator, separable):
        memory = "checkpoint"  # what a separable H has taken it for since before it could step back
    H: Tensor | None
    solve = distance = None
    if backend == "reference":
        path = reference.rollout(mlp, z0, dt, n_steps, integrator, omega)
        H = mlp.energy(path) if energy else None
        path = path if every_state else path[:, -1:]
    elif isinstance(mlp, MechanicalHamiltonian):
        form = mlp.system.form
        memory = state_ops.kept_of(memory, backend, mlp.system, z0.shape[0], n_steps, integrator)
        of_states = state_ops.Attributes(
            n_steps, form.text(), form.numbers(), integrator, every_state, energy, memory, tolerance, max_evaluations,
            unconverged == "raise", backend,
        )  # fmt: skip
        path, H, residual, evaluations = state_ops.run(z0, mlp.tensors, dt, of_states)
        if SCHEMES[integrator].implicit:
            solve = _solve_of(residual, evaluations, tolerance, lead)
    else:
        assert isinstance(mlp, SumHamiltonian)
        coupling = "pair"
        if not drive:
            coupling = ops.choose_coupling(mlp.terms, integrator, z0, n_steps, every_state, differentiate, backend)
        attributes = ops.Attributes(
            n_steps, ops.text_of(mlp.terms), ops.softplus_of(mlp.terms), integrator, coupling, every_state, energy, memory,
            tolerance, max_evaluations, unconverged == "raise", omega, backend, drive.text(),
        )  # fmt: skip
        attributes = ops.with_tiles(attributes, mlp.terms, z0)
        if key is not None:
            outline = attributes.outline(mlp.terms, mlp.latent_dim)
            if plan.Plan.serves(mlp, outline, n_steps, z0):
                plan.remember(mlp, key, plan.Plan(mlp, outline, attributes, given))
        path, H, residual, evaluations = ops.run(z0, tensors, dt, attributes)
        if _solves(integrator, separable):
            solve = _solve_of(residual, evaluations, tolerance, lead)
        elif integrator == "tao":
            distance = residual.reshape(*lead, n_steps)
    path = path.reshape(*lead, n_steps + 1, mlp.latent_dim) if every_state else path.reshape(*lead, mlp.latent_dim)
    return Rollout(path, H.reshape(*lead, n_steps + 1) if energy and H is not None else None, solve, distance)


def gradient(
    H: Hamiltonian,
    z: Tensor,
    backend: str,
    rotated: bool = False,
    control: Tensor | None = None,
    condition: Tensor | None = None,
    without: str = "",
) -> Tensor:
    """grad H, or J grad H, at z [..., 2d], under a control and a condition, each [m] or [B, m] of as many states.

    Terms that read but what `without` names are left out.
    """
    rows = z.reshape(-1, H.latent_dim)
    if isinstance(H, ModuleHamiltonian):
        backend = "reference"
    if isinstance(H, MechanicalHamiltonian):
        backend = through_transforms(backend, (z, *H.tensors))
    backend = _taken(backend, rows)
    if isinstance(H, ModuleHamiltonian) or backend == "reference":
        g = reference.gradient(H.given(control, condition) if isinstance(H, SumHamiltonian) and H.takes_inputs else H, rows)
        return (gradient_ops.rotate(g) if rotated else g).reshape(z.shape)
    if isinstance(H, MechanicalHamiltonian):
        form = H.system.form
        g = state_ops.gradient(rows, H.tensors, form.text(), form.numbers(), backend)
        return (gradient_ops.rotate(g) if rotated else g).reshape(z.shape)

    def of(term: Term, x: Tensor, rotated: bool = False) -> Tensor:
        if not term.n_inputs:
            return _of_term(term, x, backend, rotated)
        assert term.activation is not None
        with_inputs = torch.cat((x, term.inputs(control, condition).expand(len(x), -1)), dim=1)
        g = gradient_ops.gradient(with_inputs, term.weights, term.biases, term.activation, backend)[:, : x.shape[1]]
        return gradient_ops.rotate(g) if rotated else g

    if len(H.terms) == 1 and H.terms[0].reads == "z":
        return of(H.terms[0], rows, rotated).reshape(z.shape)
    d = H.latent_dim // 2
    found = {"q": torch.zeros_like(rows[:, :d]), "p": torch.zeros_like(rows[:, d:])}
    for term in H.terms:
        if term.reads == without:
            continue
        if term.reads == "z":
            g = of(term, rows)
            found = {"q": found["q"] + g[:, :d], "p": found["p"] + g[:, d:]}
        else:
            found[term.reads] = found[term.reads] + of(term, rows[:, :d] if term.reads == "q" else rows[:, d:])
    return torch.cat((found["p"], -found["q"]) if rotated else (found["q"], found["p"]), dim=-1).reshape(z.shape)


def _of_term(term: Term, x: Tensor, backend: str, rotated: bool = False) -> Tensor:
    """Gradient at x, what the term reads."""
    if term.stiffness is not None:
        return term.stiffness.to(x.dtype) * x
    assert term.activation is not None
    return gradient_ops.gradient(x, term.weights, term.biases, term.activation, backend, rotated)


def _solve_of(residual: Tensor, evaluations: Tensor, tolerance: float, lead: torch.Size) -> Solve:
    residual, evaluations = (x.reshape(*lead, x.shape[1]) for x in (residual, evaluations))
    return Solve(residual <= tolerance, residual, evaluations)


def _for_mechanical(backend: str, integrator: str, memory: str) -> str:
    """The backend for a system with M(q) or angles, where Tao's method has no fused loop.

    Raises
    ------
    ValueError
        What there is none for.
    """
    if memory == "reversible":
        raise ValueError(
            'memory="reversible" is not there for a mechanical system with M(q) or angles, whose tape is 4d numbers a '
            'sub-step; use "store" or "checkpoint"'
        )
    if integrator != "tao":
        return backend
    return _by_nested_autograd(
        backend, 'integrator "tao" has no fused loop for a mechanical system with M(q) or angles', NotFusedError
    )


def _by_nested_autograd(backend: str, why: str, error: type[Exception]) -> str:
    """ "reference" instead of "auto", with a warning; an error of a fused backend that was asked for by name."""
    if backend == "auto":
        warn(f'{why}. Nested autograd is used instead, which is slower by a factor; backend="reference" takes this as it is')
    elif backend != "reference":
        raise error(f'{why}: backend "{backend}" found; use backend="reference"')
    return "reference"


def _by_plan(known: plan.Plan, z0: Tensor, dt: float | Tensor) -> Rollout:
    steps = validation.as_step_sizes(dt, z0, known.n_steps)
    states, H = ops.run_plan(known, z0.reshape(-1, known.latent_dim), steps)
    if known.to_shape is not None:
        states = states.reshape(known.to_shape)
    elif not known.every:
        states = states[:, 0]
    H_shape = (*known.lead, known.n_steps + 1)
    return Rollout(states, H.reshape(H_shape) if known.attributes.with_energy else None)


def through_transforms(backend: str, tensors: tuple[Tensor, ...]) -> str:
    """ "reference" instead of "auto" under torch.func and dual numbers, which go through no fused loop on states.

    Raises
    ------
    RuntimeError
        Another backend was asked for by name. Without this error tangents would be lost without a word.
    """
    if not transforms.transformed(tensors):
        return backend
    why = "torch.func and forward mode cannot go through the fused operators of a mechanical system with M(q) or angles"
    return _by_nested_autograd(backend, why, RuntimeError)


def _is_reversible(integrator: str, separable: bool) -> bool:
    scheme = SCHEMES[integrator]
    return (scheme.separable if separable else scheme.general).reversible


def _solves(integrator: str, separable: bool) -> bool:
    """Whether there are equations to solve in a step."""
    scheme = SCHEMES[integrator]
    return scheme.implicit and not (separable and for_separable(scheme))


def _check_combination(integrator: str, separable: bool, memory: str) -> None:
    if memory == "reversible" and not separable and not _is_reversible(integrator, False):
        able = [name for name in INTEGRATORS if SCHEMES[name].general.reversible]
        raise ValueError(f'memory="reversible" needs a reversible integrator, one of {", ".join(able)}; found "{integrator}"')


def _taken(backend: str, z0: Tensor) -> str:
    """`choose_backend`; says it once where "auto" stands for plain PyTorch and something that can be installed is missing."""
    global said
    choice = choose_backend(backend, z0)
    if backend == "auto" and choice == "torch" and not torch.compiler.is_compiling() and not said:
        lacks = missing(z0.device.type)
        if lacks:
            said = True
            warn(
                f'backend="auto" takes "torch", plain PyTorch operations, since {lacks}. '
                'This is said once; backend="torch" takes it without a word'
            )
    return choice


def missing(device: str) -> str:
    """What "auto" would rather take on this type of device, and how to install it; "" if there is no such thing."""
    if device == "cpu" and os.name == "posix":
        return cpp.why_not()
    return triton.why_not() if device == "cuda" else ""


def choose_backend(backend: str, z0: Tensor) -> str:
    """The backend that "auto" stands for: C++ on a CPU where it was built; on a CUDA device the CUDA kernel for few samples
    where it was built, else Triton; else plain PyTorch.

    Raises
    ------
    RuntimeError
        A backend asked for by name that is not there; the message says how to get it.
    """
    if backend == "auto":
        if z0.device.type == "cpu":
            return "cpp" if cpp.available() else "torch"
        if z0.device.type == "cuda":
            if cuda.available() and z0.shape[0] <= cuda.MOST_SAMPLES:
                return "cuda"
            if triton.available():
                return "triton"
        return "torch"
    if backend == "cuda":
        cuda.require(z0)
    if backend == "triton":
        triton.require(z0)
    if backend == "cpp":
        if not cpp.available():
            raise RuntimeError(f'backend "cpp" is not there: {cpp.why_not()}')
        if z0.device.type != "cpu":
            raise RuntimeError(f'backend "cpp" runs on the CPU, z0 is on {z0.device}; use "auto" or "torch"')
    return backend
