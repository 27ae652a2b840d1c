"""The operators `hjepa_fast::states_rollout`, `hjepa_fast::states_gradient` and their backwards: schema, fake kernels, autograd
and autocast rules, as in `hjepa_fast.ops` and `hjepa_fast.gradient_ops`, for systems that run on their states.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hidden_space.fixed_point import Solver
from ..hidden_space.outline import segment_length, work_dtype
from ..hidden_space.rollout import check_adjoint, check_converged
from ..ops import save
from ..schemes import SCHEMES, SubStep
from ..transforms import is_plain
from .equations import Sums
from .loop import tape_width
from .system import System, energy, parse

# z0 is [B, 2d], dt [1 or B, 1 or n_steps], the parameters are `System.tensors`. These attributes follow the tensors in both.
_SCHEMA = (
    "SymInt n_steps, str form, float[] numbers, str integrator, bool every_state, bool with_energy, str memory, "
    "float tolerance, int max_evaluations, bool must_converge, str backend"
)
torch.library.define(
    "hjepa_fast::states_rollout",
    f"(Tensor z0, Tensor[] parameters, Tensor dt, {_SCHEMA}) -> "
    "(Tensor states, Tensor energy, Tensor tape, Tensor kept, Tensor residual, Tensor evaluations)",
)
torch.library.define(
    "hjepa_fast::states_rollout_backward",
    "(Tensor? g_states, Tensor? g_energy, Tensor tape, Tensor kept, Tensor z0, Tensor[] parameters, Tensor dt, "
    f"bool need_parameters, {_SCHEMA}) -> (Tensor g_z0, Tensor[] g_parameters, Tensor g_dt)",
)
torch.library.define(
    "hjepa_fast::states_gradient", "(Tensor z, Tensor[] parameters, str form, float[] numbers, str backend) -> Tensor"
)
torch.library.define(
    "hjepa_fast::states_gradient_backward",
    "(Tensor g, Tensor z, Tensor[] parameters, bool need_parameters, str form, float[] numbers, str backend) -> "
    "(Tensor g_z, Tensor[] g_parameters)",
)


class Attributes(NamedTuple):
    """What is not a tensor, in the schema's order."""

    n_steps: int
    form: str
    numbers: Sequence[float]
    integrator: str
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute" or "checkpoint"."""
    tolerance: float
    max_evaluations: int
    must_converge: bool
    backend: str

    @property
    def scheme(self) -> tuple[SubStep, ...]:
        return SCHEMES[self.integrator].stages

    @property
    def solver(self) -> Solver:
        return Solver(self.tolerance, self.max_evaluations)

    @property
    def n_kept(self) -> int:
        """States kept: each segment's first, with checkpoints; all of them where energies are wanted."""
        if self.memory == "checkpoint":
            return -(-self.n_steps // segment_length(self.n_steps, self.memory))
        return self.n_steps + 1 if self.with_energy and self.memory != "none" else 0

    @property
    def on_tape(self) -> str:
        """What of each sub-step is on the tape: see `loop.forward`."""
        return self.memory if self.memory in ("store", "recompute") else "none"


LONGEST_TAPE, NARROW = 2**29, 128
"""Bytes of a tape, and the widest layers: with a longer tape, or no wider layers, the C++ backend keeps no layer's values and
forms them again. To read them back took longer for layers of 50, and 9 to 14 % less time for layers of 200 and 300."""


def kept_of(memory: str, backend: str, system: System, batch: int, n_steps: int, integrator: str) -> str:
    """The `memory` of a call: "recompute" for "store" where that is better."""
    if memory != "store" or backend != "cpp":
        return memory
    widths = [n for net in (system.potential, system.mass) if net for n in net.widths]
    if max(widths, default=0) <= NARROW:
        return "recompute"
    if torch.compiler.is_compiling():
        return memory
    size = batch * n_steps * len(SCHEMES[integrator].stages) * tape_width(system, memory)
    return "recompute" if size * 8 > LONGEST_TAPE else memory


def loop_of(backend: str) -> ModuleType:
    """The GPU kernels have no such loop and leave it to PyTorch's operations."""
    return importlib.import_module("hjepa_fast.backends.cpp_states" if backend == "cpp" else "hjepa_fast.state_space.loop")


def system_of(form: str, numbers: Sequence[float], parameters: Sequence[Tensor], work: torch.dtype) -> System:
    return System.of(parse(form, tuple(numbers)), [p.to(work) for p in parameters])


def run(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, x: Attributes) -> tuple[Tensor, ...]:
    """States, energy, residual and evaluations: the operator, or past PyTorch's dispatcher where nothing can tell."""
    tensors = (z0, dt, *parameters)
    if not is_plain(tensors):
        found = torch.ops.hjepa_fast.states_rollout(z0, list(parameters), dt, *x)
    elif x.memory == "none":
        found = _forward(z0, parameters, dt, x)
    else:
        return _Direct.apply(x, *tensors)
    states, H, _, _, residual, evaluations = found
    return states, H, residual, evaluations


def _forward(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, x: Attributes) -> tuple[Tensor, ...]:
    work, n_steps = work_dtype(z0.dtype), x.n_steps
    system = system_of(x.form, x.numbers, parameters, work)
    start, steps = z0.to(work), dt.to(work).expand(-1, n_steps)
    rolled = loop_of(x.backend).forward(system, start, steps, x.scheme, n_steps, x.on_tape, x.solver)
    if x.must_converge and rolled.residual.numel():
        check_converged(x.solver, start, rolled.residual)
    H = energy(system, rolled.states) if x.with_energy else start.new_empty(len(start), 0)
    kept = rolled.states[:, : x.n_kept]
    if x.memory == "checkpoint":
        kept = rolled.states[:, : n_steps : segment_length(n_steps, x.memory)]
    # outputs of an operator must not be one another
    kept = kept.clone(memory_format=torch.contiguous_format)
    states = rolled.states if x.every_state else rolled.states[:, -1:].clone(memory_format=torch.contiguous_format)
    return states.to(z0.dtype), H.to(z0.dtype), rolled.tape, kept, rolled.residual, rolled.evaluations


def _backward(
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    dt: Tensor,
    need_parameters: bool,
    *attributes: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    x, work = Attributes(*attributes), work_dtype(z0.dtype)
    system, n_steps = system_of(x.form, x.numbers, parameters, work), x.n_steps
    sums = Sums(system) if need_parameters else None
    start, steps = z0.to(work), dt.to(work).expand(-1, n_steps)
    loop = loop_of(x.backend)
    g = None
    if g_states is not None:
        g = g_states.to(work)
        if not x.every_state and n_steps:
            g = torch.cat((torch.zeros_like(g).expand(-1, n_steps, -1), g), dim=1)
    length = segment_length(n_steps, x.memory)
    of_energy = None if g_energy is None else g_energy.to(work)
    later, gdt, worst = torch.zeros_like(start), [], start.new_zeros(len(start))

    def with_energies(states: Tensor, begin: int, end: int) -> Tensor | None:
        """The cotangents of states begin..end-1."""
        own = None if g is None else g[:, begin:end]
        if of_energy is None or begin == end:
            return own
        of_states = loop.gradient_backward(system, states.flatten(0, 1), None, of_energy[:, begin:end].flatten(), sums)
        of_states = of_states.unflatten(0, states.shape[:2])
        return of_states if own is None else own + of_states

    for begin in reversed(range(0, n_steps, length)):
        end = min(begin + length, n_steps)
        states, on_tape = kept, tape
        if x.memory == "checkpoint":
            again = loop.forward(
                system, kept[:, begin // length].contiguous(), steps[:, begin:end], x.scheme, end - begin, "store", x.solver
            )
            states, on_tape = again.states, again.tape
        given = with_energies(states[:, 1 : end - begin + 1], begin + 1, end + 1)
        later, own, residual = loop.backward(system, later, given, on_tape, steps[:, begin:end], x.scheme, x.solver, sums)
        gdt.append(own)
        worst = torch.maximum(worst, residual)
    first = with_energies(start[:, None], 0, 1)
    if first is not None:
        later = later + first[:, 0]
    if any(stage.implicit for stage in x.scheme):
        check_adjoint(x.solver, worst, x.must_converge)
    g_dt = torch.cat(gdt[::-1], dim=1) if gdt else steps.new_zeros(len(start), 0)
    found = [] if sums is None else [s.to(p.dtype) for s, p in zip(sums.tensors, parameters, strict=True)]
    return later.to(z0.dtype), found, g_dt.sum_to_size(dt.shape).to(dt.dtype) if n_steps else torch.zeros_like(dt)


def _rollout(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    return _forward(z0, parameters, dt, Attributes(*attributes))


torch.library.impl("hjepa_fast::states_rollout", "CompositeExplicitAutograd", _rollout)
torch.library.impl("hjepa_fast::states_rollout_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("hjepa_fast::states_rollout")
def _(z0: Tensor, parameters: list[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    x = Attributes(*attributes)
    batch, n_steps, work = z0.shape[0], x.n_steps, work_dtype(z0.dtype)
    implicit = n_steps if SCHEMES[x.integrator].implicit else 0
    return (
        z0.new_empty(batch, n_steps + 1 if x.every_state else 1, z0.shape[1]),
        z0.new_empty(batch, n_steps + 1 if x.with_energy else 0),
        z0.new_empty(
            batch, n_steps, len(x.scheme), tape_width(system_of(x.form, x.numbers, parameters, work), x.on_tape), dtype=work
        ),
        z0.new_empty(batch, x.n_kept, z0.shape[1], dtype=work),
        z0.new_empty(batch, implicit, dtype=work),
        z0.new_empty(batch, implicit, dtype=torch.int32),
    )


@torch.library.register_fake("hjepa_fast::states_rollout_backward")
def _(
    g_states: Tensor | None,
    g_energy: Tensor | None,
    tape: Tensor,
    kept: Tensor,
    z0: Tensor,
    parameters: list[Tensor],
    dt: Tensor,
    need_parameters: bool,
    *attributes: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    return z0.new_empty(z0.shape), _like(parameters) if need_parameters else [], dt.new_empty(dt.shape)


def _like(parameters: list[Tensor]) -> list[Tensor]:
    return [p.new_empty(p.shape) for p in parameters]


class _Direct(torch.autograd.Function):
    """The operator's own functions, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Attributes, z0: Tensor, dt: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        states, H, tape, kept, residual, evaluations = _forward(z0, parameters, dt, x)
        ctx.mark_non_differentiable(residual, evaluations)
        ctx.set_materialize_grads(False)
        ctx.attributes = x
        ctx.save_for_backward(tape, kept, z0, dt, *parameters)
        return states, H, residual, evaluations

    @staticmethod
    def backward(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
        tape, kept, z0, dt, *parameters = ctx.saved_tensors
        need_z0, need_dt, *needs = ctx.needs_input_grad[1:]
        # where the backward pass is itself watched or to be differentiated, the operator has the say
        given = [g for g in (g_states, g_energy) if g is not None]
        watched = torch.is_grad_enabled() or not is_plain(given or [z0])
        run: Any = torch.ops.hjepa_fast.states_rollout_backward if watched else _backward
        g_z0, found, g_dt = run(g_states, g_energy, tape, kept, z0, parameters, dt, any(needs), *ctx.attributes)
        return None, g_z0 if need_z0 else None, g_dt if need_dt else None, *_wanted(found, needs)


def _wanted(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [found[i] if need else None for i, need in enumerate(needs)]


def _differentiate(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
    tape, kept, z0, dt, *parameters = ctx.saved_tensors
    need_z0, needs, need_dt, *_rest = ctx.needs_input_grad
    g_z0, found, g_dt = torch.ops.hjepa_fast.states_rollout_backward(
        g_states, g_energy, tape, kept, z0, parameters, dt, any(needs), *ctx.attributes
    )
    return (
        g_z0 if need_z0 else None,
        _wanted(found, needs),
        g_dt if need_dt else None,
        *([] if x == [] else None for x in ctx.attributes),  # an empty list counts as one of tensors
    )


def _refuse_batches(*_: Any) -> None:
    raise RuntimeError(
        "hjepa_fast: the backward pass of a mechanical system has no rule for batches of gradients (torch.func.vmap, "
        'is_grads_batched, vectorize=True); take them one by one, or use backend="reference"'
    )


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "hjepa_fast: a second derivative through a rollout of a mechanical system, or a third through its gradient, is not "
        'supported by the fused operators; use backend="reference", which is differentiable any number of times'
    )


torch.library.register_autograd("hjepa_fast::states_rollout", _differentiate, setup_context=save)
torch.library.register_autograd("hjepa_fast::states_rollout_backward", _refuse_second_derivative)
torch.library.impl("hjepa_fast::states_rollout_backward", ("Batched", "FuncTorchBatched"), _refuse_batches)


# The gradient of H at given states


def gradient(z: Tensor, parameters: Sequence[Tensor], form: str, numbers: Sequence[float], backend: str) -> Tensor:
    """grad H at each row of z [B, 2d]: [B, 2d], differentiable once with respect to z and every parameter."""
    tensors = (z, *parameters)
    attributes = form, numbers, backend
    if not is_plain(tensors):
        found: Tensor = torch.ops.hjepa_fast.states_gradient(z, list(parameters), *attributes)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        found = _DirectGradient.apply(attributes, *tensors)
    else:
        found = _gradient(z, list(parameters), *attributes)
    return found


def _gradient(z: Tensor, parameters: Sequence[Tensor], form: str, numbers: Sequence[float], backend: str) -> Tensor:
    work = work_dtype(z.dtype)
    found: Tensor = loop_of(backend).gradient(system_of(form, numbers, parameters, work), z.to(work))
    return found.to(z.dtype)


def _gradient_backward(
    g: Tensor,
    z: Tensor,
    parameters: Sequence[Tensor],
    need_parameters: bool,
    form: str,
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    work = work_dtype(z.dtype)
    system = system_of(form, numbers, parameters, work)
    sums = Sums(system) if need_parameters else None
    g_z = loop_of(backend).gradient_backward(system, z.to(work), g.to(work), None, sums)
    return g_z.to(z.dtype), [] if sums is None else [s.to(p.dtype) for s, p in zip(sums.tensors, parameters, strict=True)]


torch.library.impl("hjepa_fast::states_gradient", "CompositeExplicitAutograd", _gradient)
torch.library.impl("hjepa_fast::states_gradient_backward", "CompositeExplicitAutograd", _gradient_backward)


@torch.library.register_fake("hjepa_fast::states_gradient")
def _(z: Tensor, parameters: list[Tensor], *attributes: Any) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.register_fake("hjepa_fast::states_gradient_backward")
def _(g: Tensor, z: Tensor, parameters: list[Tensor], need_parameters: bool, *attributes: Any) -> tuple[Tensor, list[Tensor]]:
    return z.new_empty(z.shape), _like(parameters) if need_parameters else []


class _DirectGradient(torch.autograd.Function):
    """The operators' own functions, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, attributes: tuple[Any, ...], z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.attributes = attributes
        ctx.save_for_backward(z, *parameters)
        return _gradient(z, parameters, *attributes)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        z, *parameters = ctx.saved_tensors
        need_z, *needs = ctx.needs_input_grad[1:]
        watched = torch.is_grad_enabled() or not is_plain((g,))
        run: Any = torch.ops.hjepa_fast.states_gradient_backward if watched else _gradient_backward
        g_z, found = run(g, z, parameters, any(needs), *ctx.attributes)
        return None, g_z if need_z else None, *_wanted(found, needs)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, parameters, *attributes = inputs
    ctx.attributes = tuple(attributes)
    ctx.save_for_backward(z, *parameters)


def _differentiate_gradient(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    z, *parameters = ctx.saved_tensors
    need_z, needs, *_rest = ctx.needs_input_grad
    g_z, found = torch.ops.hjepa_fast.states_gradient_backward(g, z, parameters, any(needs), *ctx.attributes)
    return g_z if need_z else None, _wanted(found, needs), *([] if x == [] else None for x in ctx.attributes)


torch.library.register_autograd("hjepa_fast::states_gradient", _differentiate_gradient, setup_context=_save_gradient)
torch.library.register_autograd("hjepa_fast::states_gradient_backward", _refuse_second_derivative)
torch.library.impl("hjepa_fast::states_gradient_backward", ("Batched", "FuncTorchBatched"), _refuse_batches)
for _device in ("cpu", "cuda"):
    # as every rollout: many small steps are added up in float32
    for _name in ("states_rollout", "states_rollout_backward", "states_gradient", "states_gradient_backward"):
        torch.library.register_autocast(f"hjepa_fast::{_name}", _device, torch.float32)
