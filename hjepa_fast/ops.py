"""The operators `hjepa_fast::rollout` and its backward: schema, fake kernels, autograd and autocast rules.

Torch only: a backend supplies the loop and is imported when it first runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import hidden_space, separable
from .activations import Activation
from .backends.torch import Solver
from .hamiltonian import Term
from .hidden_space import Problem
from .schemes import SCHEMES, SubStep, for_separable

# z0 is [B, 2d], dt [1 or B, 1 or n_steps]. These attributes follow the tensors in both operators.
_SCHEMA = (
    "int n_steps, str integrator, str activation, float beta, float threshold, bool every_state, bool with_energy, "
    "str memory, float tolerance, int max_evaluations, bool must_converge, float omega, str backend"
)
torch.library.define(
    "hjepa_fast::rollout",
    f"(Tensor z0, Tensor[] weights, Tensor[] biases, Tensor dt, {_SCHEMA}) -> "
    "(Tensor states, Tensor energy, Tensor tape, Tensor kept, Tensor residual, Tensor evaluations)",
)
torch.library.define(
    "hjepa_fast::rollout_backward",
    "(Tensor? g_states, Tensor? g_energy, Tensor tape, Tensor kept, Tensor z0, Tensor[] weights, Tensor[] biases, Tensor dt, "
    f"bool need_weights, {_SCHEMA}) -> (Tensor, Tensor[], Tensor)",
)


class Attributes(NamedTuple):
    """What is not a tensor, in the schema's order."""

    n_steps: int
    integrator: str
    activation: str
    beta: float
    threshold: float
    every_state: bool
    with_energy: bool
    memory: str
    tolerance: float
    max_evaluations: int
    must_converge: bool
    omega: float
    backend: str

    @property
    def stages(self) -> tuple[SubStep, ...]:
        return hidden_space.stages_of(SCHEMES[self.integrator], self.with_energy)

    def loop(self) -> ModuleType:
        return importlib.import_module(f"hjepa_fast.backends.{self.backend}")


def _problem(z0: Tensor, weights: list[Tensor], biases: list[Tensor], dt: Tensor, x: Attributes) -> Problem:
    work = hidden_space.work_dtype(z0.dtype)
    return Problem(
        z0=z0.to(work),
        weights=[weights[0].to(work), *weights[1:]],
        biases=[biases[0].to(work), *biases[1:]],
        dt=dt.to(work).expand(-1, x.n_steps),
        activation=Activation(x.activation, x.beta, x.threshold),
        stages=x.stages,
        every_state=x.every_state,
        with_energy=x.with_energy,
        memory=x.memory,
        solver=Solver(x.tolerance, x.max_evaluations),
        must_converge=x.must_converge,
        omega=x.omega if x.integrator == "tao" else None,
    )


@torch.library.impl("hjepa_fast::rollout", "CompositeExplicitAutograd")
def _rollout(z0: Tensor, weights: list[Tensor], biases: list[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    x = Attributes(*attributes)
    out = hidden_space.forward(x.loop(), _problem(z0, weights, biases, dt, x))
    return out.states.to(z0.dtype), out.energy.to(z0.dtype), *out[2:]


@torch.library.impl("hjepa_fast::rollout_backward", "CompositeExplicitAutograd")
def _rollout_backward(
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    z0: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dt: Tensor,
    need_weights: bool,
    *attributes: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    x = Attributes(*attributes)
    problem = _problem(z0, weights, biases, dt, x)
    g_states, g_energy = (None if g is None else g.to(tape.dtype) for g in (g_states, g_energy))
    g_z0, g_weights, g_biases, g_dt = hidden_space.backward(x.loop(), problem, g_states, g_energy, tape, kept, need_weights)
    return g_z0.to(z0.dtype), [g.to(z0.dtype) for g in (*g_weights, *g_biases)], g_dt.sum_to_size(dt.shape).to(dt.dtype)


@torch.library.register_fake("hjepa_fast::rollout")
def _(z0: Tensor, weights: list[Tensor], biases: list[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    x = Attributes(*attributes)
    batch, n_steps, work = z0.shape[0], x.n_steps, hidden_space.work_dtype(z0.dtype)
    widths = [w.shape[0] for w in weights[:-1]] or [1]
    tape, kept = hidden_space.saved_widths(widths, n_steps, len(x.stages), x.memory, x.every_state)
    implicit = SCHEMES[x.integrator].implicit
    return (
        z0.new_empty(batch, n_steps + 1 if x.every_state else 1, z0.shape[1]),
        z0.new_empty(batch, n_steps + 1 if x.with_energy else 0),
        z0.new_empty(batch, tape, dtype=work),
        z0.new_empty(batch, kept, dtype=work),
        z0.new_empty(batch, n_steps if implicit or x.integrator == "tao" else 0, dtype=work),
        z0.new_empty(batch, n_steps if implicit else 0, dtype=torch.int32),
    )


@torch.library.register_fake("hjepa_fast::rollout_backward")
def _(
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    z0: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dt: Tensor,
    need_weights: bool,
    *attributes: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    parameters = [torch.empty_like(p) for p in (*weights, *biases)] if need_weights else []
    return torch.empty_like(z0), parameters, torch.empty_like(dt)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z0, weights, biases, dt, *attributes = inputs
    _, _, tape, kept, residual, evaluations = output
    ctx.mark_non_differentiable(residual, evaluations)
    ctx.attributes, ctx.n_layers = tuple(attributes), len(weights)
    ctx.save_for_backward(tape, kept, z0, dt, *weights, *biases)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
    tape, kept, z0, dt, *parameters = ctx.saved_tensors
    n = ctx.n_layers
    need_z0, need_weights, need_biases, need_dt, *_ = ctx.needs_input_grad
    need_parameters = any(need_weights) or any(need_biases)
    g_z0, g_parameters, g_dt = torch.ops.hjepa_fast.rollout_backward(
        g_states, g_energy, tape, kept, z0, parameters[:n], parameters[n:], dt, need_parameters, *ctx.attributes
    )
    return (
        g_z0 if need_z0 else None,
        [g if need else None for g, need in zip(g_parameters[:n] or [None] * n, need_weights, strict=True)],
        [g if need else None for g, need in zip(g_parameters[n:] or [None] * n, need_biases, strict=True)],
        g_dt if need_dt else None,
        *([None] * len(ctx.attributes)),
    )


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hjepa_fast: a second derivative through a rollout is not supported by the fused operators "
        '(hjepa_fast::rollout_backward has no derivative); use backend="reference", which is differentiable any number of times'
    )


torch.library.register_autograd("hjepa_fast::rollout", _differentiate, setup_context=_save)
torch.library.register_autograd("hjepa_fast::rollout_backward", _refuse_second_derivative)
for _device in ("cpu", "cuda"):
    # a rollout adds up many small steps: under autocast it runs in float32, like other reductions
    torch.library.register_autocast("hjepa_fast::rollout", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::rollout_backward", _device, torch.float32)


_SEPARABLE_ATTRIBUTES = (
    "int n_steps, str integrator, str v_activation, float v_beta, float v_threshold, "
    "str t_activation, float t_beta, float t_threshold, bool with_energy"
)
_SEPARABLE_TENSORS = (
    "Tensor z0, Tensor[] v_weights, Tensor[] v_biases, Tensor[] t_weights, Tensor[] t_biases, "
    "Tensor? v_stiffness, Tensor? t_stiffness, Tensor dt"
)
torch.library.define("hjepa_fast::rollout_separable", f"({_SEPARABLE_TENSORS}, {_SEPARABLE_ATTRIBUTES}) -> (Tensor, Tensor)")
torch.library.define(
    "hjepa_fast::rollout_separable_backward",
    f"(Tensor? g_states, Tensor? g_energy, Tensor states, {_SEPARABLE_TENSORS}, {_SEPARABLE_ATTRIBUTES}) -> Tensor[]",
)


class _Separable(NamedTuple):
    z0: Tensor
    v_weights: list[Tensor]
    v_biases: list[Tensor]
    t_weights: list[Tensor]
    t_biases: list[Tensor]
    v_stiffness: Tensor | None
    t_stiffness: Tensor | None
    dt: Tensor
    n_steps: int
    integrator: str
    v_activation: str
    v_beta: float
    v_threshold: float
    t_activation: str
    t_beta: float
    t_threshold: float
    with_energy: bool

    @property
    def moves(self) -> tuple[SubStep, ...]:
        moves = for_separable(SCHEMES[self.integrator])
        assert moves is not None  # the caller has checked
        return moves

    def terms(self, dtype: torch.dtype) -> tuple[Term, Term]:
        """V and T, their tensors in `dtype`."""
        V = Term(
            tuple(self.v_weights), tuple(self.v_biases),
            Activation(self.v_activation, self.v_beta, self.v_threshold), self.v_stiffness,
        )  # fmt: skip
        T = Term(
            tuple(self.t_weights), tuple(self.t_biases),
            Activation(self.t_activation, self.t_beta, self.t_threshold), self.t_stiffness,
        )  # fmt: skip
        return tree_map_only(Tensor, lambda t: t.to(dtype), (V, T))


@torch.library.impl("hjepa_fast::rollout_separable", "CompositeExplicitAutograd")
def _rollout_separable(*arguments: Any) -> tuple[Tensor, Tensor]:
    x = _Separable(*arguments)
    work = hidden_space.work_dtype(x.z0.dtype)
    dt = x.dt.to(work).expand(-1, x.n_steps)
    states, energy = separable.forward(*x.terms(work), x.z0.to(work), dt, x.moves, x.with_energy)
    return states.to(x.z0.dtype), energy.to(x.z0.dtype)


@torch.library.impl("hjepa_fast::rollout_separable_backward", "CompositeExplicitAutograd")
def _rollout_separable_backward(
    g_states: Tensor | None, g_energy: Tensor | None, states: Tensor, *arguments: Any
) -> list[Tensor]:
    x = _Separable(*arguments)
    work = hidden_space.work_dtype(x.z0.dtype)
    g_states, g_energy = (None if g is None else g.to(work) for g in (g_states, g_energy))
    dt = x.dt.to(work).expand(-1, x.n_steps)
    g_z0, V, T, g_dt = separable.backward(*x.terms(work), g_states, g_energy, states.to(work), dt, x.moves)
    stiffness = [g for g in (V.stiffness, T.stiffness) if g is not None]
    parameters = [*V.weights, *V.biases, *T.weights, *T.biases, *stiffness]
    return [g_z0.to(x.z0.dtype), *[g.to(x.z0.dtype) for g in parameters], g_dt.sum_to_size(x.dt.shape).to(x.dt.dtype)]


@torch.library.register_fake("hjepa_fast::rollout_separable")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x = _Separable(*arguments)
    batch, n = x.z0.shape[0], x.n_steps + 1
    return x.z0.new_empty(batch, n, x.z0.shape[1]), x.z0.new_empty(batch, n if x.with_energy else 0)


@torch.library.register_fake("hjepa_fast::rollout_separable_backward")
def _(g_states: Tensor | None, g_energy: Tensor | None, states: Tensor, *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _flat(arguments)]


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, lists opened, in order."""
    lists = (value if isinstance(value, (list, tuple)) else [value] for value in arguments)
    return [t for values in lists for t in values if isinstance(t, Tensor)]


def _save_separable(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = _flat(inputs)
    ctx.layout = [len(v) if isinstance(v, (list, tuple)) else isinstance(v, Tensor) or None for v in inputs[:8]]
    ctx.attributes = inputs[8:]
    ctx.save_for_backward(output[0], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate_separable(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None) -> tuple[Any, ...]:
    states, *tensors = ctx.saved_tensors
    arguments = _unflat(tensors, ctx.layout)
    grads = torch.ops.hjepa_fast.rollout_separable_backward(g_states, g_energy, states, *arguments, *ctx.attributes)
    return (*_unflat(grads, ctx.layout), *([None] * len(ctx.attributes)))


def _unflat(tensors: Sequence[Tensor], layout: Sequence[int | bool | None]) -> list[Any]:
    rest = iter(tensors)
    return [None if entry is None else next(rest) if entry is True else [next(rest) for _ in range(entry)] for entry in layout]


torch.library.register_autograd("hjepa_fast::rollout_separable", _differentiate_separable, setup_context=_save_separable)
torch.library.register_autograd("hjepa_fast::rollout_separable_backward", _refuse_second_derivative)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("hjepa_fast::rollout_separable", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::rollout_separable_backward", _device, torch.float32)
