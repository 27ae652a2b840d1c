"""The functions a user calls: they check arguments, pick the backend, and nothing else."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import hamiltonian, inputs, ops, plan, ports, transforms, validation
from .backends import cpp, cuda, reference, triton
from .errors import NotFusedError, warn
from .hamiltonian import MechanicalHamiltonian, ModuleHamiltonian, SumHamiltonian
from .hidden_space.outline import work_dtype
from .hidden_space.program import UNDRIVEN, Drive, covers, stages_of
from .ports import PortHNN
from .schemes import SCHEMES, for_separable
from .state_space import ops as state_ops

INTEGRATORS = tuple(SCHEMES)
Backend = Literal["auto", "reference", "torch", "cpp", "triton", "cuda"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)
MEMORY = ("store", "recompute", "checkpoint", "reversible")


class Solve(NamedTuple):
    """How well the equations of implicit steps were solved."""

    converged: Tensor
    """[..., n_steps], bool: whether a step's states are those of the method, up to the tolerance."""
    residual: Tensor
    """[..., n_steps]: the largest difference between a point and where its own gradient takes it, in the first
    pre-activation (of a `MechanicalHNN` in z), relative to the largest number there, or to 1 if that is larger."""
    evaluations: Tensor
    """[..., n_steps], int32: gradients of H that a step took."""


class Rollout(NamedTuple):
    """What `rollout` returns."""

    states: Tensor
    """[..., n_steps + 1, 2d], the initial state first; with `states="final"` the last one only, [..., 2d]."""
    energy: Tensor | None
    """H at every state, [..., n_steps + 1], or None if it was not asked for."""
    solve: Solve | None = None
    """Of an implicit integrator; None for an explicit one, and for backend="reference"."""
    distance: Tensor | None = None
    """|(q, p) - (x, y)| of the copies of "tao" after each step, [..., n_steps]; None for any other, and for
    backend="reference"."""


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
    tolerance: float | None = None,
    max_evaluations: int = 50,
    unconverged: str = "raise",
    omega: float = 1.0,
    control: Tensor | None = None,
    condition: Tensor | None = None,
) -> Rollout:
    """Roll an MLP Hamiltonian's dynamics q' = dH/dp, p' = -dH/dq forward in time, all steps in one call.

    Parameters
    ----------
    hnn : nn.Module
        Is, or holds as `.net`, an `nn.Sequential` of Linear layers with one smooth activation between
        them and one output; or a `SeparableHNN`. Its own forward(z) must compute that and nothing else (or say
        `forward_is_net = True`), and no hooks may stand around it. Any other module that gives one number a state is
        run by nested autograd with backend "reference", which "auto" then takes, with a warning.
    z0 : Tensor [..., 2d]
        Initial states z = [q, p]: float32, float64 or bfloat16, of the network's dtype and device.
    dt : float or Tensor
        Step size; a tensor may require grad. 0-d for all, [n_steps] per step, [..., 1] per sample, [..., n_steps] both.
    n_steps : int
        Number of steps, >= 0.
    integrator : str
        Symplectic and reversible for any H: "implicit-leapfrog" (order 2), "implicit-midpoint" (2), "yoshida4", "suzuki4",
        "yoshida6" (compositions of the first; with "-midpoint" appended, of the second). Symplectic: "symplectic-euler" (1).
        "tao" (2, explicit, symplectic for two coupled copies of the state). "leapfrog" is H-JEPA's Algorithm 1: symplectic
        only for a separable H, of order 1 for any other. "euler" (1) and "rk4" (4) are not symplectic. `schemes.SCHEMES`
        has their sources. For a `SeparableHNN` those that can be are explicit: "implicit-leapfrog" is "leapfrog".
    energy : bool
        Also return H at every state.
    states : str
        "all", or "final": then what the call costs depends on the latent size only at its two ends.
    memory : str
        What is kept for the backward pass: "store" (every layer's values), "recompute" (the first layer's at each
        sub-step), "checkpoint" (the first layer's, every sqrt(n_steps) steps). Less memory, more time; same gradients.
        "reversible" keeps at most eight states of a rollout, however long, and rebuilds the others by stepping back, which
        takes a reversible integrator; where that turns out to have lost accuracy it warns and computes those steps again.
        A `SeparableHNN` takes "reversible" for "checkpoint" where the integrator is not reversible. Where "store" would take
        more than half a GiB the C++ backend keeps no layer's values and goes forward again, a few rows at a time.
    tolerance : float, optional
        Of implicit integrators: the largest residual (see `Solve`) that counts as solved; by default four units of rounding.
    max_evaluations : int
        Of implicit integrators: the most gradients of H that one implicit point may take.
    unconverged : str
        What a point that is not solved leads to: "raise", or "flag", which leaves it to the caller to look at `.solve`.
    omega : float
        Of "tao": how strongly its two copies of the state are coupled.
    control : Tensor [..., m] or [..., n_steps, m], optional
        u, held throughout, or over each step: through the port of a `PortHNN`, or as an input of H (`control_dim`). The energy
        of H(z, u) at a state is that under the step which starts there, and at the last state under the last step.
    condition : Tensor [..., c], optional
        An input of H (`condition_dim`) that holds throughout. Leading sizes of z0, control and condition are broadcast.
    backend : str
        "auto" (the fastest that is there, see `available_backends`), "cpp", "triton", "cuda", "torch", or "reference" (nested
        autograd, of any module; it knows no `memory`). Whatever the backend, tangents (forward mode) and second derivatives
        run in PyTorch operations, on the states themselves, and not in graphs of torch.compile.
        "triton" runs a rollout as one kernel each way, and leaves "rk4", "tao" and float64 to PyTorch operations; "cuda"
        runs "leapfrog" and "euler" as one kernel each way, for at most 64 samples in float32 or bfloat16, and leaves
        everything else to "triton", or to "torch" where that is missing. A `SeparableHNN` runs in "cpp", or in PyTorch
        operations: on a GPU, under "tao", and under integrators that stay implicit for it.

    Returns
    -------
    Rollout
        `.states` [..., n_steps + 1, 2d] (or [..., 2d]) and `.energy` [..., n_steps + 1] or None, both differentiable with
        respect to z0, dt and every parameter of `hnn`; `.solve`.

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it. `NotFusedError` is both: a backend other than "reference" was
        asked for by name, and the module is none of those that it can run.
    ConvergenceError
        dt is too large for an implicit integrator; the message names the largest residual. Tangents and second derivatives
        take plain iteration to converge.
    RuntimeError
        A backend asked for by name that is not there.

    Notes
    -----
    A row's result depends on the batch it is in, and gradients of parameters on the number of threads, to rounding: sums
    are taken in another order. A row that is not finite leaves the other rows' states as they are, but makes every
    parameter's gradient not finite. Rows that start out not finite do not raise an error, from implicit integrators either.
    Under autocast a rollout runs in float32.
    """
    validation.check_choice(backend, BACKENDS, "backend")
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    if isinstance(hnn, PortHNN) or control is not None or condition is not None:
        run = functools.partial(
            _rollout, integrator=integrator, memory=memory, backend=backend, tolerance=tolerance,
            max_evaluations=max_evaluations, unconverged=unconverged, omega=omega,
        )  # fmt: skip
        return _with_inputs(hnn, z0, dt, n_steps, control, condition, run, energy, states)
    mlp = hamiltonian.of_any_module(hnn, z0, backend)
    return _rollout(
        mlp, z0, dt, n_steps, integrator=integrator, energy=energy, states=states, memory=memory, backend=backend,
        tolerance=tolerance, max_evaluations=max_evaluations, unconverged=unconverged, omega=omega,
    )  # fmt: skip


def _rollout(
    mlp: hamiltonian.Hamiltonian,
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
    """`rollout` of a Hamiltonian that was read; driven by these numbers of every step."""
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
    validation.check_choice(states, ("all", "final"), "states")
    validation.check_choice(memory, MEMORY, "memory")
    validation.check_choice(unconverged, ("raise", "flag"), "unconverged")
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
    backend = choose_backend(backend, z0)
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
    if integrator != "tao" or backend == "reference":
        return backend
    what = 'integrator "tao" has no fused loop for a mechanical system with M(q) or angles'
    if backend != "auto":
        raise NotFusedError(f'{what}: backend "{backend}" found; use backend="reference"')
    warn(f'{what}. Nested autograd is used instead, which is slower by a factor; backend="reference" takes this as it is')
    return "reference"


class Given(NamedTuple):
    """A Hamiltonian and the states of a call that may come with a control and a condition, all checked."""

    H: hamiltonian.Hamiltonian
    z: Tensor
    """[..., 2d], of the common leading shape."""
    forced: bool
    """Whether the control enters by a port."""
    read: bool
    """Whether H reads the control."""
    condition: Tensor | None
    """[c] or [B, c]."""

    def under(self, control: Tensor | None) -> hamiltonian.Hamiltonian:
        """H of the state alone, where the control is [..., m]."""
        if not isinstance(self.H, SumHamiltonian) or not self.H.takes_inputs:
            return self.H
        return self.H.given(inputs.rows(control if self.read else None, self.z.shape[:-1]), self.condition)


def given(
    model: nn.Module,
    z: Tensor,
    backend: str,
    control: Tensor | None,
    condition: Tensor | None,
    n_steps: int | None = None,
    name: str = "z",
) -> Given:
    """Read and check what a call was given; with `n_steps` a control may be one for each step.

    Raises
    ------
    TypeError, ValueError
    """
    inner = ports.hamiltonian_of(model) if isinstance(model, PortHNN) else model
    if control is None and condition is None:
        H = hamiltonian.of_any_module(inner, z, backend)
        return Given(H, validation.as_state(z, H, name), False, False, None)
    H = hamiltonian.of_any_module(inner, z, backend, with_inputs=True)
    forced, read = ports.places_of(model, H, control, condition)
    z = validation.as_state(z, H, name)
    leads = [z.shape[:-1]]
    if control is not None:
        size = model.control_dim if isinstance(model, PortHNN) and model.control_dim else H.control_dim
        inputs.check(control, "control", size, z, n_steps)
        leads.append(control.shape[: -2 if n_steps is not None and control.ndim > z.ndim else -1])
    if condition is not None:
        inputs.check(condition, "condition", H.condition_dim, z)
        leads.append(condition.shape[:-1])
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"states, control and condition must agree in their leading sizes, found {', '.join(str(list(x)) for x in leads)}"
        ) from None
    return Given(H, z.expand(*lead, z.shape[-1]), forced, read, inputs.rows(condition, lead))


def _with_inputs(
    model: nn.Module,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    control: Tensor | None,
    condition: Tensor | None,
    run: Callable[..., Rollout],
    with_energy: bool,
    which: str,
) -> Rollout:
    """One rollout where nothing changes on the way, else a step at a time."""
    n_steps = validation.as_count(n_steps, "n_steps")
    settings = run.keywords  # type: ignore[attr-defined]
    x = given(model, z0, settings["backend"], control, condition, n_steps, "z0")
    friction = isinstance(model, PortHNN) and model.kind is not None
    changes = control is not None and control.ndim > z0.ndim
    if not (friction or x.forced or (x.read and changes)):
        return run(x.under(control), x.z, dt, n_steps, energy=with_energy, states=which)
    validation.check_choice(which, ("all", "final"), "states")
    with_energy = validation.as_flag(with_energy, "energy")
    in_kicks = isinstance(model, PortHNN) and model.splitting == "kicks" and (friction or x.forced)
    if in_kicks and n_steps:
        _check_kicks(x, settings)
    if _can_be_driven(x, settings, n_steps):
        return _driven(model, x, dt, n_steps, control, changes, run, with_energy, which)
    for what, refused in (("memory", ("checkpoint", "reversible")), ("integrator", ("tao",))):
        if settings[what] in refused:
            raise ValueError(
                f'{what}="{settings[what]}" is not there for a rollout with friction, or a control that changes or is a force'
            )
    lead = x.z.shape[:-1]
    steps = validation.as_step_sizes(dt, x.z, n_steps).to(x.z.dtype)
    steps = steps.reshape(*(lead if len(steps) > 1 else [1] * len(lead)), -1)
    controls = [control[..., t, :] if control is not None and changes else control for t in range(n_steps)]
    each = [x.under(u) for u in controls] if x.read and changes else [x.under(control)] * n_steps
    path, solves = [x.z], []
    for t, H in enumerate(each):
        h = steps[..., min(t, steps.shape[-1] - 1), None]

        def one_step(z: Tensor, H: hamiltonian.Hamiltonian = H, h: Tensor = h) -> Tensor:
            found = run(H, z, h, 1, energy=False, states="final")
            solves.append(found.solve)
            return found.states

        if isinstance(model, PortHNN):
            force = model.force(controls[t]) if x.forced else None  # type: ignore[arg-type]
            path.append(ports.step(model, path[-1], h, force, one_step, _gradient_of(x, controls[t], settings["backend"])))
        else:
            path.append(one_step(path[-1]))
    states = torch.stack(path, dim=-2)
    solved = [one for one in solves if one is not None]
    solve = Solve(*(torch.cat(parts, dim=-1) for parts in zip(*solved, strict=True))) if solved else None
    if with_energy and x.read and changes and not n_steps:
        raise ValueError("the energy of H(z, u) at no step takes a control that is held, [..., m]")
    energies = _energies(x, states, control, changes) if with_energy else None
    return Rollout(states if which == "all" else path[-1], energies, solve)


def _can_be_driven(x: Given, settings: dict[str, Any], n_steps: int) -> bool:
    """Whether friction, force and control can be lines of the rollout's program."""
    if not isinstance(x.H, SumHamiltonian) or settings["backend"] == "reference" or settings["memory"] == "reversible":
        return False
    validation.check_choice(settings["integrator"], INTEGRATORS, "integrator")
    forms = tuple([ops.form_of(term) for term in x.H.terms])
    return n_steps > 0 and covers(forms, stages_of(settings["integrator"], forms))


def _check_kicks(x: Given, settings: dict[str, Any]) -> None:
    integrator = settings["integrator"]
    mixes = any(stage.mix for stage in SCHEMES[integrator].stages) if integrator in SCHEMES else False
    if mixes or not _can_be_driven(x, settings, 1):
        raise ValueError(
            'splitting="kicks" takes an explicit integrator without mixed gradients, a fused backend, an H that can be read '
            f'and memory other than "reversible"; found integrator="{integrator}", backend="{settings["backend"]}", '
            f'memory="{settings["memory"]}" and a {type(x.H).__name__}'
        )


def _driven(
    model: nn.Module,
    x: Given,
    dt: float | Tensor,
    n_steps: int,
    control: Tensor | None,
    changes: bool,
    run: Callable[..., Rollout],
    with_energy: bool,
    which: str,
) -> Rollout:
    """One rollout whose program has lines for friction, force and control."""
    assert isinstance(x.H, SumHamiltonian)
    lead, d = x.z.shape[:-1], x.z.shape[-1] // 2
    steps = validation.as_step_sizes(dt, x.z, n_steps)
    u = None if control is None else inputs.steps(control, lead, changes)
    externals: list[Tensor] = []
    friction = ""
    if isinstance(model, PortHNN) and model.kind is not None:
        friction = model.kind
        externals.append(ports.friction_of_steps(model, steps.to(x.z.dtype), d))
    if x.forced and isinstance(model, PortHNN) and u is not None:
        externals.append(model.force(u))
    changing: list[int] = []
    if x.read and u is not None and u.shape[1] > 1:
        added = torch.cat((torch.zeros_like(u[:, :1]), u.diff(dim=1)), dim=1)
        for k, term in enumerate(x.H.terms):
            if term.control_dim:
                changing.append(k)
                externals.append(added @ term.columns_of_control().T)
    first = None if u is None else u[:, 0]
    H = x.H.given(first if first is None or len(first) != 1 else first[0], x.condition) if x.H.takes_inputs else x.H
    drive = Drive(friction, x.forced, tuple(changing), isinstance(model, PortHNN) and model.splitting == "kicks")
    out = run(
        H, x.z, dt, n_steps, energy=False, states="all" if with_energy else which, drive=drive, externals=tuple(externals)
    )
    if not with_energy:
        return out
    energies = _energies(x, out.states, control, changes)
    return out._replace(states=out.states if which == "all" else out.states[..., -1, :], energy=energies)


def _energies(x: Given, states: Tensor, control: Tensor | None, changes: bool) -> Tensor:
    """At states [..., n, 2d]: under the step that starts there, and at the last under the last one."""
    n = states.shape[-2]
    rows = states.reshape(-1, n, states.shape[-1])
    if not (x.read and changes) or control is None:
        return x.under(control).energy(rows).reshape(states.shape[:-1])
    assert isinstance(x.H, SumHamiltonian)
    u = inputs.steps(control, states.shape[:-2], changes)
    u = torch.cat((u, u[:, -1:]), dim=1).expand(len(rows), n, -1).flatten(0, 1)
    c = None if x.condition is None else x.condition.expand(len(rows), -1).repeat_interleave(n, dim=0)
    return x.H.given(u, c).energy(rows.flatten(0, 1)).reshape(states.shape[:-1])


def _gradient_of(x: Given, control: Tensor | None, backend: str) -> Callable[[Tensor], Tensor]:
    def gradient(z: Tensor) -> Tensor:
        from .matching import of_hamiltonian  # which calls on this module

        u = inputs.rows(control, x.z.shape[:-1]) if x.read else None
        # friction takes Hp alone
        return of_hamiltonian(x.H, z, backend, False, u, x.condition, without="q").chunk(2, dim=-1)[1]

    return gradient


def _energy(H: hamiltonian.Hamiltonian, z: Tensor) -> Tensor:
    return H.energy(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])


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
    if backend == "reference" or not transforms.transformed(tensors):
        return backend
    what = "torch.func and forward mode cannot go through the fused operators of a mechanical system with M(q) or angles"
    if backend != "auto":
        raise RuntimeError(f'{what}: backend "{backend}" found; use backend="reference"')
    warn(f'{what}. Nested autograd is used instead, which is slower by a factor; backend="reference" takes this as it is')
    return "reference"


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


def available_backends(z0: Tensor | None = None) -> dict[str, str]:
    """Every backend's name, and "available" or what it lacks.

    Parameters
    ----------
    z0 : Tensor [..., 2d], optional
        Initial states, of which only shape and device count. Then a backend that cannot run them says so, and "auto" names
        the one that `rollout` would take.
    """
    if z0 is not None:
        if not isinstance(z0, Tensor) or z0.ndim == 0:
            raise TypeError(f"z0 must be a tensor [..., 2d], found {z0!r}")
        return {name: _state(name, z0.reshape(-1, z0.shape[-1])) for name in BACKENDS}
    optional = {
        name: "available" if module.available() else module.why_not()
        for name, module in (("cpp", cpp), ("triton", triton), ("cuda", cuda))
    }
    return {"reference": "available", "torch": "available", **optional}


def _state(backend: str, z0: Tensor) -> str:
    try:
        choice = choose_backend(backend, z0)
    except RuntimeError as error:
        return str(error)
    return choice if backend == "auto" else "available"


def leapfrog(
    hnn: nn.Module,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    control: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Leapfrog trajectory of an MLP Hamiltonian: kick, drift, kick (H-JEPA, Algorithm 1).

    p' = p - dt/2 Hq(q, p);  q+ = q + dt Hp(q, p');  p+ = p' - dt/2 Hq(q+, p').

    Arguments as for `rollout`. Returns the states [..., n_steps + 1, 2d], z0 first.
    """
    return rollout(hnn, z0, dt, n_steps, integrator="leapfrog", control=control, condition=condition).states


def energy(hnn: nn.Module, z: Tensor, *, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """H(z) of an MLP Hamiltonian: [..., 2d] to [...], differentiable; H(z, u, c) where it takes a control or a condition.

    Raises
    ------
    TypeError, ValueError
        As for `rollout`.
    """
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    x = given(hnn, z, "reference", control, condition)
    return _energy(x.under(control), x.z)
