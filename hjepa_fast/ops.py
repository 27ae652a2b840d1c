"""The operators `hjepa_fast::rollout` and its backward: schema, fake kernels, autograd and autocast rules.

Torch only: a backend supplies the loop and is imported when it first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import activations, backends, transforms
from .hamiltonian import Term
from .hidden_space import coupling, rollout
from .hidden_space.fixed_point import Solver
from .hidden_space.loops import Problem
from .hidden_space.outline import Outline, work_dtype
from .hidden_space.program import Form, drive_of, stages_of
from .plan import Plan
from .tangents import Driven, Dual, DualTerm
from .tangents import rollout as tangents_of_rollout
from .transforms import is_plain

# z0 is [B, 2d], dt [1 or B, 1 or n_steps], the parameters are those of every term in turn: weights and biases, or k; and after
# them the externals of what drives the rollout (`hidden_space.program.Drive`). These attributes follow the tensors in both
# operators.
_SCHEMA = (
    "SymInt n_steps, str terms, float[] softplus, str integrator, str coupling, bool every_state, bool with_energy, "
    "str memory, float tolerance, int max_evaluations, bool must_converge, float omega, str backend, str drive"
)
torch.library.define(
    "hjepa_fast::rollout",
    f"(Tensor z0, Tensor[] parameters, Tensor dt, {_SCHEMA}) -> "
    "(Tensor states, Tensor energy, Tensor tape, Tensor kept, Tensor residual, Tensor evaluations)",
)
torch.library.define(
    "hjepa_fast::rollout_backward",
    "(Tensor? g_states, Tensor? g_energy, Tensor tape, Tensor kept, Tensor z0, Tensor[] parameters, Tensor dt, "
    f"bool need_parameters, {_SCHEMA}) -> (Tensor g_z0, Tensor[] g_parameters, Tensor g_dt)",
)


def text_of(terms: Sequence[Term]) -> str:
    """The forms of terms as an attribute: of each what it reads, and its layers and activation, or whether k is one number."""
    return ";".join([_text_of(term) for term in terms])


def _text_of(term: Term) -> str:
    if term.stiffness is not None:
        return f"{term.reads}:{'one' if term.stiffness.numel() == 1 else 'each'}"
    assert term.activation is not None
    return f"{term.reads}:{len(term.weights)}:{activations.text_of(term.activation)}"


def softplus_of(terms: Sequence[Term]) -> list[float]:
    """beta and threshold of each network's activations."""
    return [x for term in terms if term.activation is not None for x in activations.numbers_of(term.activation)]


def form_of(term: Term) -> Form:
    return Form(term.reads, len(term.weights), term.activation, term.stiffness is not None and term.stiffness.numel() == 1)


@functools.lru_cache(maxsize=256)
def forms_of(text: str, softplus: tuple[float, ...]) -> tuple[Form, ...]:
    """What `text_of` and `softplus_of` wrote."""
    forms, numbers = [], iter(softplus)
    for reads, *rest in (part.split(":") for part in text.split(";")):
        if len(rest) == 1:
            forms.append(Form(reads, 0, None, rest[0] == "one"))
        else:
            forms.append(Form(reads, int(rest[0]), activations.parse(rest[1], numbers)))
    return tuple(forms)


def choose_coupling(
    terms: Sequence[Term],
    integrator: str,
    z0: Tensor,
    n_steps: int,
    every_state: bool,
    differentiate: bool,
    backend: str,
) -> str:
    """ "dense" or "pair": see `hidden_space.coupling`; "usual" in a graph, where the batch and the number of steps may be
    symbols, on whose values nothing should depend. The GPU kernels know the dense one alone."""
    if len(terms) == 1 and backend in ("triton", "cuda"):
        return "dense"
    if torch.compiler.is_compiling():
        return "usual"
    forms = forms_of(text_of(terms), tuple(softplus_of(terms)))
    widths = tuple(1 if term.stiffness is not None else int(term.weights[0].shape[0]) for term in terms)
    rows = transforms.rows_of(z0)
    return coupling.choose(forms, widths, z0.shape[1] // 2, integrator, rows, n_steps, every_state, differentiate)


_USUAL_BATCH, _USUAL_STEPS = 64, 15


class Attributes(NamedTuple):
    """What is not a tensor, in the schema's order."""

    n_steps: int
    terms: str
    softplus: Sequence[float]
    integrator: str
    coupling: str
    every_state: bool
    with_energy: bool
    memory: str
    tolerance: float
    max_evaluations: int
    must_converge: bool
    omega: float
    backend: str
    drive: str

    @property
    def forms(self) -> tuple[Form, ...]:
        return forms_of(self.terms, tuple(self.softplus))

    def divided(self, parameters: Sequence[Tensor], work: torch.dtype) -> list[Term]:
        """The terms, with what stands around the loop in the dtype that is computed in."""
        terms, at = [], 0
        for form in self.forms:
            n = form.n_layers
            if form.quadratic:
                terms.append(Term(form.reads, stiffness=parameters[at].to(work)))
                at += 1
                continue
            weights, biases = parameters[at : at + n], parameters[at + n : at + 2 * n]
            at += 2 * n
            terms.append(
                Term(form.reads, (weights[0].to(work), *weights[1:]), (biases[0].to(work), *biases[1:]), form.activation)
            )
        return terms

    def externals(self, parameters: Sequence[Tensor], work: torch.dtype) -> list[Tensor]:
        n = drive_of(self.drive).n_externals
        return [x.to(work) for x in parameters[len(parameters) - n :]]

    def outline(self, terms: Sequence[Term], latent_dim: int) -> Outline:
        widths = tuple([tuple([int(w.shape[0]) for w in t.weights[:-1]]) or ((1,) if t.weights else ()) for t in terms])
        return _outline(
            self.forms, widths, int(latent_dim) // 2, self.integrator, self.coupling, self.every_state, self.with_energy,
            self.memory, self.drive,
        )  # fmt: skip


LONGEST_TAPE = 2**29
"""Bytes. A longer one is not written: the C++ backend goes forward again, a few rows at a time, which took 2 to 9 % longer
where a gigabyte was kept before."""


def with_tiles(x: Attributes, terms: Sequence[Term], z0: Tensor) -> Attributes:
    """With memory "tiles" for "store" where the tape would be longer than `LONGEST_TAPE`."""
    if x.memory != "store" or x.backend != "cpp" or torch.compiler.is_compiling() or not x.n_steps or x.drive:
        return x
    outline = x.outline(terms, z0.shape[1])
    size = transforms.rows_of(z0) * work_dtype(z0.dtype).itemsize
    by_row = any(t.biases and t.biases[0].ndim > 1 for t in terms)  # a tile starts with one bias for all samples
    if outline.in_kernel or by_row or size * outline.tape_widths(x.n_steps, "store") <= LONGEST_TAPE:
        return x
    return x._replace(memory="tiles")


@functools.lru_cache(maxsize=1024)
def _outline(
    forms: tuple[Form, ...],
    widths: tuple[tuple[int, ...], ...],
    d: int,
    integrator: str,
    how: str,
    every_state: bool,
    with_energy: bool,
    memory: str,
    drive: str,
) -> Outline:
    if how == "usual":
        firsts = tuple(w[0] if w else 1 for w in widths)
        how = coupling.choose(forms, firsts, d, integrator, _USUAL_BATCH, _USUAL_STEPS, every_state, memory != "none")
    return Outline(forms, widths, d, integrator, how == "dense", every_state, with_energy, memory, drive_of(drive))


def run_plan(plan: Plan, z0: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """States and energies."""
    if plan.attributes.memory == "none":
        return plan.forward(z0, dt)[:2]
    states, energy, _, _ = _Direct.apply(plan.attributes, plan, z0, dt, *plan.parameters)
    return states, energy


def run(z0: Tensor, parameters: tuple[Tensor, ...], dt: Tensor, x: Attributes) -> tuple[Tensor, ...]:
    """States, energy, residual and evaluations: the operator, or past PyTorch's dispatcher where nothing can tell."""
    tensors = (z0, dt, *parameters)
    if transforms.active():
        states, energy, _, _, residual, evaluations = transforms.apply(_Rollout(x), *tensors)
        return states, energy, residual, evaluations
    if not is_plain(tensors):
        states, energy, _, _, residual, evaluations = torch.ops.hjepa_fast.rollout(z0, list(parameters), dt, *x)
        return states, energy, residual, evaluations
    if x.memory == "none":
        states, energy, _, _, residual, evaluations = _forward(z0, parameters, dt, x)
        return states, energy, residual, evaluations
    return _Direct.apply(x, None, *tensors)


def _problem(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, x: Attributes) -> Problem:
    work = work_dtype(z0.dtype)
    terms = x.divided(parameters, work)
    return Problem(
        x.outline(terms, z0.shape[1]),
        z0.to(work),
        terms,
        dt.to(work).expand(-1, x.n_steps),
        Solver(x.tolerance, x.max_evaluations),
        x.must_converge,
        x.omega,
        backends.of(x.backend),
        x.externals(parameters, work),
    )


def _forward(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, x: Attributes) -> tuple[Tensor, ...]:
    out = rollout.forward(_problem(z0, parameters, dt, x))
    return out.states.to(z0.dtype), out.energy.to(z0.dtype), *out[2:]


def _rollout_backward(
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
    problem = _problem(z0, parameters, dt, Attributes(*attributes))
    g_states, g_energy = (None if g is None else g.to(problem.z0.dtype) for g in (g_states, g_energy))
    g_z0, g_parameters, g_dt = rollout.backward(problem, g_states, g_energy, tape, kept, need_parameters)
    return g_z0.to(z0.dtype), [g.to(z0.dtype) for g in g_parameters], g_dt.sum_to_size(dt.shape).to(dt.dtype)


def _rollout(z0: Tensor, parameters: Sequence[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    # outputs of an operator must not be one another: empty ones are made anew
    found = _forward(z0, parameters, dt, Attributes(*attributes))
    return tuple([x if x.numel() else x.new_empty(x.shape) for x in found])


torch.library.impl("hjepa_fast::rollout", "CompositeExplicitAutograd", _rollout)
torch.library.impl("hjepa_fast::rollout_backward", "CompositeExplicitAutograd", _rollout_backward)


@torch.library.register_fake("hjepa_fast::rollout")
def _(z0: Tensor, parameters: list[Tensor], dt: Tensor, *attributes: Any) -> tuple[Tensor, ...]:
    x = Attributes(*attributes)
    batch, n_steps, work = z0.shape[0], x.n_steps, work_dtype(z0.dtype)
    outline = x.outline(x.divided(parameters, work), z0.shape[1])
    tape, kept = outline.saved(n_steps)
    implicit = outline.implicit
    return (
        z0.new_empty(batch, n_steps + 1 if x.every_state else 1, z0.shape[1]),
        z0.new_empty(batch, n_steps + 1 if x.with_energy else 0),
        z0.new_empty(batch, tape, dtype=work),
        z0.new_empty(batch, kept, dtype=work),
        z0.new_empty(batch, n_steps if implicit or outline.tao else 0, dtype=work),
        z0.new_empty(batch, n_steps if implicit else 0, dtype=torch.int32),
    )


@torch.library.register_fake("hjepa_fast::rollout_backward")
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
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters] if need_parameters else []
    return torch.empty_like(z0, memory_format=torch.contiguous_format), grads, torch.empty_like(dt)


class _Rollout(transforms.Fused):
    """The operator with these attributes; of its tensors z0 and dt are rows."""

    n_rowed = 2
    n_kept = 2

    def __init__(self, x: Attributes) -> None:
        self.x = x

    def holds_rows(self, parameters: Sequence[Tensor]) -> bool:
        terms = self.x.divided(parameters, parameters[0].dtype)
        return bool(self.x.drive) or any(term.biases[0].ndim > 1 for term in terms if term.biases)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        z0, dt, *parameters = tensors
        run: Any = _rollout if is_plain(tensors) else torch.ops.hjepa_fast.rollout
        found: tuple[Tensor, ...] = run(z0, parameters, dt, *self.x)
        return found

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        need_parameters: bool,
    ) -> tuple[Tensor, ...]:
        z0, dt, *parameters = tensors
        given = [g for g in cotangents if g is not None]
        run: Any = _rollout_backward if is_plain([*given, *tensors]) else torch.ops.hjepa_fast.rollout_backward
        g_z0, g_parameters, g_dt = run(*cotangents, *kept, z0, parameters, dt, need_parameters, *self.x)
        return g_z0, g_dt, *g_parameters

    def tangent(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        x, dtype = self.x, tensors[0].dtype
        z0, dt, *parameters = (Dual(v, t).to(work_dtype(dtype)) for v, t in zip(tensors, tangents, strict=True))
        given = iter(parameters)
        terms = [DualTerm.of(form, given) for form in x.forms]
        stages = stages_of(x.integrator, x.forms)
        driven = Driven(drive_of(x.drive), list(given))
        states, energy = tangents_of_rollout(terms, z0, dt, x.n_steps, stages, x.omega, x.every_state, x.with_energy, driven)
        return states.to(dtype), energy.to(dtype)


class _Direct(torch.autograd.Function):
    """The operator's own functions, without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Attributes, plan: Plan | None, z0: Tensor, dt: Tensor, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        residual = evaluations = None
        if plan is not None:
            states, energy, tape, kept = plan.forward(z0, dt)
        else:
            states, energy, tape, kept, residual, evaluations = _forward(z0, parameters, dt, x)
            ctx.mark_non_differentiable(residual, evaluations)
        ctx.set_materialize_grads(False)
        ctx.attributes, ctx.plan = x, plan
        ctx.save_for_backward(tape, kept, z0, dt, *parameters)
        return states, energy, residual, evaluations

    @staticmethod
    def backward(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
        tape, kept, z0, dt, *parameters = ctx.saved_tensors
        need_z0, need_dt, *needs = ctx.needs_input_grad[2:]
        given = [g for g in (g_states, g_energy) if g is not None]
        if torch.is_grad_enabled() or transforms.active() or not is_plain(given or [z0]):
            # the backward pass is itself watched, or to be differentiated
            g_z0, g_dt, *found = transforms.Backward.apply(
                _Rollout(ctx.attributes), any(needs), g_states, g_energy, tape, kept, z0, dt, *parameters
            )
        elif ctx.plan is not None and ctx.plan.reads(parameters):
            g_z0, found, g_dt = ctx.plan.backward(g_states, g_energy, tape, kept, z0, dt, any(needs))
        else:
            g_z0, found, g_dt = _rollout_backward(
                g_states, g_energy, tape, kept, z0, parameters, dt, any(needs), *ctx.attributes
            )
        wanted = [g if need else None for g, need in zip(found or [None] * len(needs), needs, strict=True)]
        return None, None, g_z0 if need_z0 else None, g_dt if need_dt else None, *wanted


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z0, parameters, dt, *attributes = inputs
    _, _, tape, kept, residual, evaluations = output
    ctx.mark_non_differentiable(residual, evaluations)
    ctx.attributes = tuple(attributes)
    ctx.save_for_backward(tape, kept, z0, dt, *parameters)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g_states: Tensor | None, g_energy: Tensor | None, *_: None) -> tuple[Any, ...]:
    tape, kept, z0, dt, *parameters = ctx.saved_tensors
    need_z0, needs, need_dt, *_rest = ctx.needs_input_grad
    g_z0, g_dt, *found = transforms.Backward.apply(
        _Rollout(Attributes(*ctx.attributes)), any(needs), g_states, g_energy, tape, kept, z0, dt, *parameters
    )
    return (
        g_z0 if need_z0 else None,
        [g if need else None for g, need in zip(found or [None] * len(needs), needs, strict=True)],
        g_dt if need_dt else None,
        *([] if x == [] else None for x in ctx.attributes),  # an empty list counts as one of tensors
    )


torch.library.register_autograd("hjepa_fast::rollout", _differentiate, setup_context=save)
for _device in ("cpu", "cuda"):
    # a rollout adds up many small steps: under autocast it runs in float32, like other reductions
    torch.library.register_autocast("hjepa_fast::rollout", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::rollout_backward", _device, torch.float32)
