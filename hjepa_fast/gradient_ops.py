"""The operators `hjepa_fast::gradient` and its backward: grad F of one MLP at given points, differentiable any number of times.

With the first layer a = x W^T + b and delta(a) = grad_a F of everything after it, the gradient is g = delta W. A cotangent G of
g gives v = G W^T for delta, and the adjoint of delta (`backends/torch.py`) turns v into that of a, nu = Hessian v: then

    x: nu W        W: delta^T G + nu^T x        b: sum nu

No loop, no coupling, one evaluation and one adjoint. What lies deeper is derived from tangents (`tangents.py`).
Torch only, like `ops`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import activations, transforms
from .activations import Activations
from .hidden_space.network import Tail
from .hidden_space.outline import work_dtype
from .tangents import Dual, DualTerm
from .tangents import gradient as tangents_of_gradient
from .transforms import is_plain

_ATTRIBUTES = "str activation, float[] softplus, str backend"
torch.library.define(
    "hjepa_fast::gradient",
    f"(Tensor x, Tensor[] weights, Tensor[] biases, bool keep, {_ATTRIBUTES}) -> (Tensor gradient, Tensor value, Tensor tape)",
)
torch.library.define(
    "hjepa_fast::gradient_backward",
    "(Tensor? g_gradient, Tensor? g_value, Tensor tape, Tensor x, Tensor[] weights, Tensor[] biases, bool need_weights, "
    f"{_ATTRIBUTES}) -> (Tensor g_x, Tensor[] g_parameters)",
)


def gradient(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    activation: Activations,
    backend: str,
    rotated: bool = False,
) -> Tensor:
    """grad F at each row of x [B, n]: [B, n], differentiable with respect to x and every parameter.

    If `rotated`, J grad F: its second half, then its first half negated.
    """
    tensors = (x, *weights, *biases)
    attributes = activations.text_of(activation), activations.numbers_of(activation), backend
    if transforms.active():
        keep = torch.is_grad_enabled() and any(transforms.requires_grad(t) for t in tensors)
        found = transforms.apply(_Gradient(attributes, len(weights), keep), *tensors)[0]
        return rotate(found) if rotated else found
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = is_plain(tensors)
    if plain and keep:
        return _Direct.apply(attributes, rotated, len(weights), *tensors)
    run = _gradient if plain else torch.ops.hjepa_fast.gradient
    found = run(x, list(weights), list(biases), keep, *attributes)[0]
    return rotate(found) if rotated else found


def rotate(g: Tensor) -> Tensor:
    """J g, g [..., 2d]: its second half, then its first half negated."""
    Hq, Hp = g.chunk(2, dim=-1)
    return torch.cat((Hp, -Hq), dim=-1)


class _Gradient(transforms.Fused):
    """The operator with these attributes, of a network of n layers."""

    n_rowed = n_kept = 1

    def __init__(self, attributes: tuple[Any, ...], n: int, keep: bool = True) -> None:
        self.attributes, self.n, self.keep = attributes, n, keep

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *parameters = tensors
        run: Any = _gradient if is_plain(tensors) else torch.ops.hjepa_fast.gradient
        found: tuple[Tensor, ...] = run(x, parameters[: self.n], parameters[self.n :], self.keep, *self.attributes)
        return found

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        need_parameters: bool,
    ) -> tuple[Tensor, ...]:
        x, *parameters = tensors
        given = [g for g in cotangents if g is not None]
        run: Any = _gradient_backward if is_plain([*given, *tensors]) else torch.ops.hjepa_fast.gradient_backward
        g_x, g_parameters = run(
            *cotangents, *kept, x, parameters[: self.n], parameters[self.n :], need_parameters, *self.attributes
        )
        return g_x, *g_parameters

    def tangent(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        dtype, (name, softplus, _) = tensors[0].dtype, self.attributes
        x, *parameters = (Dual(v, t).to(work_dtype(dtype)) for v, t in zip(tensors, tangents, strict=True))
        activation = activations.parse(name, iter(softplus))
        found, value = tangents_of_gradient(DualTerm("z", parameters[: self.n], parameters[self.n :], activation, None), x)
        return found.to(dtype), value.to(dtype)


class _Direct(torch.autograd.Function):
    """The operators' own functions, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, attributes: tuple[Any, ...], rotated: bool, n: int, x: Tensor, *parameters: Tensor) -> Tensor:
        found, _, tape = _gradient(x, list(parameters[:n]), list(parameters[n:]), True, *attributes)
        ctx.attributes, ctx.rotated, ctx.n = attributes, rotated, n
        ctx.save_for_backward(tape, x, *parameters)
        return rotate(found) if rotated else found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        tape, x, *parameters = ctx.saved_tensors
        if ctx.rotated:
            g = -rotate(g)  # J^T = -J
        need_x, *needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or transforms.active() or not is_plain((g,)):
            # the backward pass is itself watched, or to be differentiated
            g_x, *g_parameters = transforms.Backward.apply(
                _Gradient(ctx.attributes, ctx.n), any(needs), g, None, tape, x, *parameters
            )
        else:
            weights, biases = parameters[: ctx.n], parameters[ctx.n :]
            g_x, g_parameters = _gradient_backward(g, None, tape, x, weights, biases, any(needs), *ctx.attributes)
        wanted = [g if need else None for g, need in zip(g_parameters or [None] * len(needs), needs, strict=True)]
        return None, None, None, g_x if need_x else None, *wanted


@functools.cache
def _loop(backend: str) -> ModuleType:
    """The GPU kernels have no such operator and leave it to PyTorch's."""
    return importlib.import_module(f"hjepa_fast.backends.{'cpp' if backend == 'cpp' else 'torch'}")


def _in_work_dtype(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], name: str, softplus: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tail]:
    work = work_dtype(x.dtype)
    tail = Tail(weights[1:], biases[1:], activations.parse(name, iter(softplus)))
    if all([t.dtype is work for t in (x, *weights, *biases)]):  # a cast to the same takes its time too
        return x, weights[0], biases[0], tail
    return x.to(work), weights[0].to(work), biases[0].to(work), tail.to(work)


def _gradient(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], keep: bool, name: str, softplus: Sequence[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    found, value, tape = _loop(backend).gradient(*_in_work_dtype(x, weights, biases, name, softplus), keep)
    return (found, value, tape) if found.dtype is x.dtype else (found.to(x.dtype), value.to(x.dtype), tape)


def _gradient_backward(
    g_gradient: Tensor | None,
    g_value: Tensor | None,
    tape: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    need_weights: bool,
    name: str,
    softplus: Sequence[float],
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    inputs = _in_work_dtype(x, weights, biases, name, softplus)
    g_gradient, g_value = (None if g is None else g.to(tape.dtype) for g in (g_gradient, g_value))
    g_x, g_parameters = _loop(backend).gradient_backward(g_gradient, g_value, tape, *inputs, need_weights)
    return (g_x, g_parameters) if g_x.dtype is x.dtype else (g_x.to(x.dtype), [g.to(x.dtype) for g in g_parameters])


torch.library.impl("hjepa_fast::gradient", "CompositeExplicitAutograd", _gradient)
torch.library.impl("hjepa_fast::gradient_backward", "CompositeExplicitAutograd", _gradient_backward)


@torch.library.register_fake("hjepa_fast::gradient")
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], keep: bool, name: str, softplus: list[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    widths = [w.shape[0] for w in weights[:-1]] or [1]
    width = 2 * sum(widths) - widths[-1] if keep else 0
    return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(x.shape[0], width, dtype=work_dtype(x.dtype))


@torch.library.register_fake("hjepa_fast::gradient_backward")
def _(
    g_gradient: Tensor | None,
    g_value: Tensor | None,
    tape: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    need_weights: bool,
    *attributes: Any,
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), [p.new_empty(p.shape) for p in (*weights, *biases)] if need_weights else []


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, biases, _, *attributes = inputs
    ctx.attributes, ctx.n_layers = tuple(attributes), len(weights)
    ctx.save_for_backward(output[2], x, *weights, *biases)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g_gradient: Tensor | None, g_value: Tensor | None, _: None) -> tuple[Any, ...]:
    tape, x, *parameters = ctx.saved_tensors
    n = ctx.n_layers
    need_x, need_weights, need_biases, *_rest = ctx.needs_input_grad
    g_x, *g_parameters = transforms.Backward.apply(
        _Gradient(ctx.attributes, n), any(need_weights) or any(need_biases), g_gradient, g_value, tape, x, *parameters
    )
    given = [*g_parameters, *[None] * (2 * n - len(g_parameters))]
    return (
        g_x if need_x else None,
        [g if need else None for g, need in zip(given[:n], need_weights, strict=True)],
        [g if need else None for g, need in zip(given[n:], need_biases, strict=True)],
        None,
        *([] if x == [] else None for x in ctx.attributes),  # an empty list counts as one of tensors
    )


torch.library.register_autograd("hjepa_fast::gradient", _differentiate, setup_context=_save)
for _device in ("cpu", "cuda"):
    # derivatives of a network that was trained in float32 are wanted in float32, as in a rollout
    torch.library.register_autocast("hjepa_fast::gradient", _device, torch.float32)
    torch.library.register_autocast("hjepa_fast::gradient_backward", _device, torch.float32)
