"""The operators `hjepa_fast::rollout` and its backward: schema, fake kernels, autograd and autocast rules.

Torch only: a backend supplies the loop and is imported when it first runs.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import hidden_space, separable, separable_hidden_space
from .activations import Activation
from .backends.torch import Solver
from .hamiltonian import Term
from .hidden_space import Problem
from .schemes import SCHEMES, SubStep, for_separable

# z0 is [B, 2d], dt [1 or B, 1 or n_steps]. These attributes follow the tensors in both operators.
_SCHEMA = (
    "SymInt n_steps, str integrator, str activation, float beta, float threshold, bool every_state, bool with_energy, "
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


def _refuse_batches(*_: Any) -> None:
    raise RuntimeError(
        "hjepa_fast: the backward pass of a rollout has no rule for batches of gradients (torch.func.vmap, is_grads_batched, "
        'vectorize=True); take them one by one, or use backend="reference"'
    )


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hjepa_fast: a second derivative through a rollout is not supported by the fused operators "
        '(hjepa_fast::rollout_backward has no derivative); use backend="reference", which is differentiable any number of times'
    )


torch.library.register_autograd("hjepa_fast::rollout", _differentiate, setup_context=_save)
torch.library.register_autograd("hjepa_fast::rollout_backward", _refuse_second_derivative)
torch.library.impl("hjepa_fast::rollout_backward", ("Batched", "FuncTorchBatched"), _refuse_batches)
for _device in ("cpu", "cuda"):
    # a rollout adds up many small steps: under autocast it runs in float32, like other reductions
    torch.library.register_autocast("hjepa_fast::rollout", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::rollout_backward", _device, torch.float32)


_SEPARABLE_ATTRIBUTES = (
    "SymInt n_steps, str integrator, str v_activation, float v_beta, float v_threshold, "
    "str t_activation, float t_beta, float t_threshold, bool every_state, bool with_energy, str memory, str backend"
)
_SEPARABLE_TENSORS = (
    "Tensor z0, Tensor[] v_weights, Tensor[] v_biases, Tensor[] t_weights, Tensor[] t_biases, "
    "Tensor? v_stiffness, Tensor? t_stiffness, Tensor dt"
)
torch.library.define(
    "hjepa_fast::rollout_separable",
    f"({_SEPARABLE_TENSORS}, {_SEPARABLE_ATTRIBUTES}) -> "
    "(Tensor states, Tensor energy, Tensor tape, Tensor sp, Tensor sq, Tensor aT)",
)
torch.library.define(
    "hjepa_fast::rollout_separable_backward",
    f"(Tensor? g_states, Tensor? g_energy, Tensor[] saved, bool need_v, bool need_t, {_SEPARABLE_TENSORS}, "
    f"{_SEPARABLE_ATTRIBUTES}) -> (Tensor g_z0, Tensor[] g_v, Tensor[] g_t, Tensor g_dt)",
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
    every_state: bool
    with_energy: bool
    memory: str
    backend: str

    @property
    def moves(self) -> tuple[SubStep, ...]:
        moves = for_separable(SCHEMES[self.integrator])
        assert moves is not None  # the caller has checked
        return moves

    @property
    def in_hidden_space(self) -> bool:
        return separable_hidden_space.covers(self.v_stiffness, self.t_weights, self.t_stiffness)

    @property
    def keeps_output(self) -> bool:
        """Whether the states themselves are all that the backward pass needs."""
        return self.every_state and not self.in_hidden_space

    def terms(self) -> tuple[Term, Term]:
        """V and T."""
        V = Term(
            tuple(self.v_weights), tuple(self.v_biases),
            Activation(self.v_activation, self.v_beta, self.v_threshold), self.v_stiffness,
        )  # fmt: skip
        T = Term(
            tuple(self.t_weights), tuple(self.t_biases),
            Activation(self.t_activation, self.t_beta, self.t_threshold), self.t_stiffness,
        )  # fmt: skip
        return V, T

    def in_states(self) -> tuple[Term, Term, Tensor, Tensor]:
        """V, T, z0 and dt, all in the dtype that is computed in."""
        work = hidden_space.work_dtype(self.z0.dtype)
        V, T = tree_map_only(Tensor, lambda t: t.to(work), self.terms())
        return V, T, self.z0.to(work), self.dt.to(work).expand(-1, self.n_steps)

    def problem(self) -> separable_hidden_space.Problem:
        work = hidden_space.work_dtype(self.z0.dtype)
        V, T = (
            term._replace(
                weights=tuple(w if i else w.to(work) for i, w in enumerate(term.weights)),
                biases=tuple(b if i else b.to(work) for i, b in enumerate(term.biases)),
                stiffness=None if term.stiffness is None else term.stiffness.to(work),
            )
            for term in self.terms()
        )
        dt = self.dt.to(work).expand(-1, self.n_steps)
        return separable_hidden_space.Problem(
            self.z0.to(work), V, T, dt, self.moves, self.every_state, self.with_energy, self.memory
        )

    def loop(self) -> ModuleType:
        """Of any backend but "cpp" that is PyTorch's."""
        return importlib.import_module(f"hjepa_fast.backends.separable_{'cpp' if self.backend == 'cpp' else 'torch'}")


@torch.library.impl("hjepa_fast::rollout_separable", "CompositeExplicitAutograd")
def _rollout_separable(*arguments: Any) -> tuple[Tensor, ...]:
    x = _Separable(*arguments)
    if x.in_hidden_space:
        out = separable_hidden_space.forward(x.loop(), x.problem())
        return out.states.to(x.z0.dtype), out.energy.to(x.z0.dtype), *out[2:]
    V, T, z0, dt = x.in_states()
    states, energy = separable.forward(V, T, z0, dt, x.moves, x.with_energy)
    kept = 0 if x.every_state or x.memory == "none" else x.n_steps + 1
    tape = states[:, :kept].flatten(1).clone()
    if not x.every_state:
        states = states[:, -1:].clone()
    none = (states.new_empty(z0.shape[0], 0, 0) for _ in range(3))
    return states.to(x.z0.dtype), energy.to(x.z0.dtype), tape, *none


@torch.library.impl("hjepa_fast::rollout_separable_backward", "CompositeExplicitAutograd")
def _rollout_separable_backward(
    g_states: Tensor | None, g_energy: Tensor | None, saved: list[Tensor], need_v: bool, need_t: bool, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    x = _Separable(*arguments)
    work = hidden_space.work_dtype(x.z0.dtype)
    g_states, g_energy = (None if g is None else g.to(work) for g in (g_states, g_energy))
    if x.in_hidden_space:
        g_z0, of_V, of_T, g_dt = separable_hidden_space.backward(
            x.loop(), x.problem(), g_states, g_energy, saved, need_v, need_t
        )
        parameters = [[*g.weights, *g.biases, *g.stiffness] for g in (of_V, of_T)]
    else:
        V, T, _, dt = x.in_states()
        states = saved[0].to(work) if x.every_state else saved[0].unflatten(1, (x.n_steps + 1, -1))
        if g_states is not None and not x.every_state:
            g_states = torch.cat((torch.zeros_like(states[:, 1:]), g_states), dim=1)
        g_z0, sums_V, sums_T, g_dt = separable.backward(V, T, g_states, g_energy, states, dt, x.moves)
        parameters = [
            [*g.weights, *g.biases, *([] if g.stiffness is None else [g.stiffness])] if need else []
            for g, need in ((sums_V, need_v), (sums_T, need_t))
        ]
    g_v, g_t = ([g.to(x.z0.dtype) for g in part] for part in parameters)
    return g_z0.to(x.z0.dtype), g_v, g_t, g_dt.sum_to_size(x.dt.shape).to(x.dt.dtype)


@torch.library.register_fake("hjepa_fast::rollout_separable")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x = _Separable(*arguments)
    batch, n, work = x.z0.shape[0], x.n_steps + 1, hidden_space.work_dtype(x.z0.dtype)
    if x.in_hidden_space:
        widths_V, widths_T = ([w.shape[0] for w in ws[:-1]] or [1] for ws in (x.v_weights, x.t_weights))
        saved = separable_hidden_space.saved_shapes(
            widths_V, widths_T if x.t_weights else None, x.moves, x.n_steps, x.every_state, x.with_energy, x.memory
        )
    else:
        n_kept = 0 if x.every_state or x.memory == "none" else n
        saved = ((n_kept * x.z0.shape[1],), (0, 0), (0, 0), (0, 0))
    return (
        x.z0.new_empty(batch, n if x.every_state else 1, x.z0.shape[1]),
        x.z0.new_empty(batch, n if x.with_energy else 0),
        *(x.z0.new_empty(batch, *shape, dtype=work) for shape in saved),
    )


@torch.library.register_fake("hjepa_fast::rollout_separable_backward")
def _(
    g_states: Tensor | None, g_energy: Tensor | None, saved: list[Tensor], need_v: bool, need_t: bool, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    x = _Separable(*arguments)
    V, T = x.terms()
    g_v, g_t = (
        [torch.empty_like(p, memory_format=torch.contiguous_format) for p in term.tensors] if need else []
        for term, need in ((V, need_v), (T, need_t))
    )
    return torch.empty_like(x.z0, memory_format=torch.contiguous_format), g_v, g_t, torch.empty_like(x.dt)


def _save_separable(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = _Separable(*inputs)
    saved = output[:1] if x.keeps_output else output[2:]
    tensors = [t for part in inputs[:8] for t in (part if isinstance(part, (list, tuple)) else [part]) if t is not None]
    ctx.layout = [len(part) if isinstance(part, (list, tuple)) else part is not None or None for part in inputs[:8]]
    ctx.attributes, ctx.n_saved = tuple(inputs[8:]), len(saved)
    ctx.save_for_backward(*saved, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate_separable(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved, rest = ctx.saved_tensors[: ctx.n_saved], iter(ctx.saved_tensors[ctx.n_saved :])
    arguments = [None if n is None else next(rest) if n is True else [next(rest) for _ in range(n)] for n in ctx.layout]
    need_z0, v_weights, v_biases, t_weights, t_biases, v_stiffness, t_stiffness, need_dt, *_ = ctx.needs_input_grad
    needs_V, needs_T = [*v_weights, *v_biases, v_stiffness], [*t_weights, *t_biases, t_stiffness]
    g_z0, g_v, g_t, g_dt = torch.ops.hjepa_fast.rollout_separable_backward(
        g_states, g_energy, list(saved), any(needs_V), any(needs_T), *arguments, *ctx.attributes
    )

    def divided(grads: list[Tensor], needs: list[bool], n_layers: int) -> tuple[Any, ...]:
        """Of weights, biases and stiffness."""
        given: list[Tensor | None] = [*grads, *[None] * (len(needs) - len(grads))]
        wanted = [g if need else None for g, need in zip(given, needs, strict=True)]
        return wanted[:n_layers], wanted[n_layers : 2 * n_layers], wanted[-1]

    gv_weights, gv_biases, gv_stiffness = divided(g_v, needs_V, len(v_weights))
    gt_weights, gt_biases, gt_stiffness = divided(g_t, needs_T, len(t_weights))
    return (
        g_z0 if need_z0 else None, gv_weights, gv_biases, gt_weights, gt_biases, gv_stiffness, gt_stiffness,
        g_dt if need_dt else None, *[None] * len(ctx.attributes),
    )  # fmt: skip


torch.library.register_autograd("hjepa_fast::rollout_separable", _differentiate_separable, setup_context=_save_separable)
torch.library.register_autograd("hjepa_fast::rollout_separable_backward", _refuse_second_derivative)
torch.library.impl("hjepa_fast::rollout_separable_backward", ("Batched", "FuncTorchBatched"), _refuse_batches)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("hjepa_fast::rollout_separable", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::rollout_separable_backward", _device, torch.float32)
