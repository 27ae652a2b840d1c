"""Controls, conditions and friction around a Hamiltonian that was read: what a call was given, and rollouts under it.

Where nothing changes on the way, a control and a condition are a bias of H, and the rollout is one as any other. Else friction,
force and control are lines of its program (`hidden_space.program.Drive`), or, under integrators that are no program, moves
between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import inputs, ops, ports, rolling, validation
from .hamiltonian import Hamiltonian, SumHamiltonian, of_any_module
from .hidden_space.program import Drive, covers, stages_of
from .ports import PortHNN
from .rolling import INTEGRATORS, Rollout, Solve
from .schemes import SCHEMES


class Given(NamedTuple):
    """A Hamiltonian and the states of a call that may come with a control and a condition, all checked."""

    H: Hamiltonian
    z: Tensor
    """[..., 2d], of the common leading shape."""
    forced: bool
    """Whether the control enters by a port."""
    read: bool
    """Whether H reads the control."""
    control: Tensor | None
    """[..., m] or [..., n_steps, m], as it was given."""
    condition: Tensor | None
    """[c] or [B, c]."""

    def under(self, control: Tensor | None) -> Hamiltonian:
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
        H = of_any_module(inner, z, backend)
        return Given(H, validation.as_state(z, H, name), False, False, None, None)
    H = of_any_module(inner, z, backend, with_inputs=True)
    forced, read = ports.places_of(model, H, control, condition)
    z = validation.as_state(z, H, name)
    leads = [z.shape[:-1]]
    if control is not None:
        size = model.control_dim if isinstance(model, PortHNN) and model.control_dim else H.control_dim
        control = inputs.checked(control, "control", size, z, n_steps)
        leads.append(control.shape[: -2 if n_steps is not None and control.ndim > z.ndim else -1])
    if condition is not None:
        condition = inputs.checked(condition, "condition", H.condition_dim, z)
        leads.append(condition.shape[:-1])
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"states, control and condition must agree in their leading sizes, found {', '.join(str(list(x)) for x in leads)}"
        ) from None
    return Given(H, z.expand(*lead, z.shape[-1]), forced, read, control, inputs.rows(condition, lead))


def with_inputs(
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
    control = x.control
    friction = isinstance(model, PortHNN) and ports.friction_of(model, x.z) is not None
    changes = control is not None and control.ndim > z0.ndim
    if not (friction or x.forced or (x.read and changes)):
        return run(x.under(control), x.z, dt, n_steps, energy=with_energy, states=which)
    validation.check_choice(which, ("all", "final"), "states")
    with_energy = validation.as_flag(with_energy, "energy")
    in_kicks = isinstance(model, PortHNN) and model.splitting == "kicks" and (friction or x.forced)
    if in_kicks and n_steps:
        _check_kicks(x, settings)
    if can_be_driven(x, settings, n_steps):
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

        def one_step(z: Tensor, H: Hamiltonian = H, h: Tensor = h) -> Tensor:
            found = run(H, z, h, 1, energy=False, states="final")
            solves.append(found.solve)
            return found.states

        if isinstance(model, PortHNN):
            force = ports.force_of(model, controls[t]) if x.forced else None  # type: ignore[arg-type]
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


def can_be_driven(x: Given, settings: dict[str, Any], n_steps: int) -> bool:
    """Whether friction, force and control can be lines of the rollout's program."""
    if not isinstance(x.H, SumHamiltonian) or settings["backend"] == "reference" or settings["memory"] == "reversible":
        return False
    validation.check_choice(settings["integrator"], INTEGRATORS, "integrator")
    forms = tuple([ops.form_of(term) for term in x.H.terms])
    return n_steps > 0 and covers(forms, stages_of(settings["integrator"], forms))


def _check_kicks(x: Given, settings: dict[str, Any]) -> None:
    integrator = settings["integrator"]
    mixes = any(stage.mix for stage in SCHEMES[integrator].stages) if integrator in SCHEMES else False
    if mixes or not can_be_driven(x, settings, 1):
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
        externals.append(ports.force_of(model, u))
    changing: list[int] = []
    if x.read and u is not None and u.shape[1] > 1:
        added = torch.cat((torch.zeros_like(u[:, :1]), u.diff(dim=1)), dim=1)
        for k, term in enumerate(x.H.terms):
            if term.control_dim:
                changing.append(k)
                externals.append(inputs.product(added, term.columns_of_control()))
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
        u = inputs.rows(control, x.z.shape[:-1]) if x.read else None
        # friction takes Hp alone
        return rolling.gradient(x.H, z, backend, False, u, x.condition, without="q").chunk(2, dim=-1)[1]

    return gradient
