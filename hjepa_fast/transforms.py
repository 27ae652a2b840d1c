"""PyTorch's function transforms: the rules of the fused operators for them; and code that torch.compile cannot take.

A fused operator takes rows, the samples, and parameters. Whatever is mapped over rows alone becomes more rows of one call.
Where it is mapped over parameters, or each of many samples has gradients of parameters to itself, there is a call for each. A
tangent is written out in plain PyTorch operations (`tangents.py`), and second derivatives are derived from that.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def outside_graphs(reason: str) -> Callable[[_F], _F]:
    """Like `torch.compiler.disable`, but torch._dynamo, which takes seconds to import, is left alone until it is there."""

    def decorate(function: _F) -> _F:
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not disabled and "torch._dynamo" in sys.modules:
                disabled.append(sys.modules["torch._dynamo"].disable(function))
            return (disabled[0] if disabled else function)(*args, **kwargs)

        run._torchdynamo_disable = True  # type: ignore[attr-defined]
        run._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def active() -> bool:
    """Whether any level of torch.func, or of dual numbers, is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether torch.func, or forward-mode differentiation, follows any of the tensors."""
    if not active():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    dual = forward_ad._current_level >= 0
    return any(wrapped(t) or (dual and forward_ad.unpack_dual(t).tangent is not None) for t in tensors)


def _levels(t: Tensor) -> list[Tensor]:
    """t, and what torch.func wraps in it on each level; in a graph, which is left before it matters, t alone."""
    found = [t]
    if torch.compiler.is_dynamo_compiling():
        return found
    while torch._C._are_functorch_transforms_active() and torch._C._functorch.is_functorch_wrapped_tensor(found[-1]):
        found.append(torch._C._functorch.get_unwrapped(found[-1]))
    return found


def bare(t: Tensor) -> Tensor:
    """The numbers themselves, all that is mapped over at once."""
    return _levels(t)[-1]


def requires_grad(t: Tensor) -> bool:
    """On any level."""
    return any([x.requires_grad for x in _levels(t)])


def mapped(t: Tensor) -> bool:
    """Whether torch.func.vmap maps over it."""
    return any([torch._C._functorch.is_batchedtensor(x) for x in _levels(t)])


def rows_of(z: Tensor) -> int:
    """Rows of z [B, n], and of all that is mapped over."""
    return bare(z).numel() // z.shape[1]


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing watches or rewrites operators: then a call may go past PyTorch's dispatcher, whose rules in Python take
    as long as a small network does."""
    legacy = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.jit.is_tracing()
        and all(type(t) in (Tensor, torch.nn.Parameter) and not legacy(t) for t in tensors)
        and tensors[0].device.type in ("cpu", "cuda")
        and not torch.is_autocast_enabled(tensors[0].device.type)
    )


class Fused(ABC):
    """A fused operator, and what PyTorch's transforms need to know of it.

    It takes tensors of rows, [B, ...] the first and [1 or B, ...] the others, then parameters, and gives two values
    that are differentiable, then what its backward pass needs, then what else there is, all of them [B, ...].
    """

    n_rowed: ClassVar[int]
    """Tensors of rows."""
    n_kept: ClassVar[int]
    """Tensors that the backward pass needs."""

    @abstractmethod
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        need_parameters: bool,
    ) -> tuple[Tensor, ...]:
        """Gradients of the tensors, or of those of rows alone."""

    def holds_rows(self, parameters: Sequence[Tensor]) -> bool:
        """Whether parameters hold something for each row, so that more rows take more of them too."""
        return False

    @abstractmethod
    def tangent(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Of the two values, in plain PyTorch operations."""

    def tangent_and_pull(
        self,
        cotangents: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        wrt: Sequence[int],
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """J c, where there is a g, and the gradient of g . (J c) with respect to these of the tensors."""
        given = [i for i, g in enumerate(cotangents) if g is not None]

        def tangent(*own: Tensor) -> tuple[Tensor, ...]:
            every = list(tensors)
            for i, x in zip(wrt, own, strict=True):
                every[i] = x
            found = self.tangent(every, tangents)
            return tuple(found[i] for i in given)

        vjp: Any = torch.func.vjp  # gives two or three things
        with _without_autocast(tensors):
            found, pull = vjp(tangent, *[tensors[i] for i in wrt])
            of_tensors = dict(zip(wrt, pull(tuple(cotangents[i] for i in given)), strict=True)) if wrt else {}
        by_value = dict(zip(given, found, strict=True))
        return [by_value.get(i) for i in range(len(cotangents))], of_tensors


class Forward(torch.autograd.Function):
    """A fused operator under a transform."""

    @staticmethod
    def forward(op: Fused, *tensors: Tensor) -> tuple[Tensor, ...]:
        return op.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, *tensors = inputs
        ctx.n_outputs = len(output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2 : 2 + ctx.op.n_kept], *tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        n_rowed, needs = ctx.op.n_rowed, ctx.needs_input_grad[1:]
        found = Backward.apply(ctx.op, any(needs[n_rowed:]), *cotangents[:2], *ctx.saved_tensors)
        found += (None,) * (len(needs) - len(found))
        return None, *[g if need else None for g, need in zip(found, needs, strict=True)]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True), _without_autocast(ctx.saved_tensors):
            found = ctx.op.tangent(_primals(ctx.saved_tensors), tangents)
        return *found, *[None] * (ctx.n_outputs - 2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Fused, *tensors: Tensor) -> tuple[Any, ...]:
        given = _Mapped(info.batch_size, tensors, in_dims[1:])
        if any(given.mapped[op.n_rowed :]) or op.holds_rows(given.tensors[op.n_rowed :]):
            found = _stacked([Forward.apply(op, *member) for member in given.members()])
        else:
            rows = given.rows_of(0)
            folded = [
                given.folded(i, rows) if i == 0 or given.mapped[i] or len(t) > 1 else t
                for i, t in enumerate(given.tensors[: op.n_rowed])
            ]
            outputs = Forward.apply(op, *folded, *given.tensors[op.n_rowed :])
            found = tuple(x.unflatten(0, (info.batch_size, rows)) for x in outputs)
        return found, (0,) * len(found)


class Backward(torch.autograd.Function):
    """Its backward pass, which can be transformed and differentiated like any other function."""

    @staticmethod
    def forward(op: Fused, need_parameters: bool, *given: Tensor | None) -> tuple[Tensor, ...]:
        if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in given):
            return _of_batched_gradients(op, need_parameters, given)
        kept = [t.contiguous() for t in given[2 : 2 + op.n_kept]]  # type: ignore[union-attr]
        return op.backward(given[:2], kept, given[2 + op.n_kept :], need_parameters)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.need_parameters, *given = inputs
        ctx.set_materialize_grads(False)
        # what was kept is a function of the tensors, and so are its derivatives
        ctx.save_for_backward(*given[:2], *given[2 + ctx.op.n_kept :])
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        """Of (J^T g) . c."""
        op, cotangents, tensors = ctx.op, ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        directions += (None,) * (len(tensors) - len(directions))
        wrt = [i for i, need in enumerate(ctx.needs_input_grad[4 + op.n_kept :]) if need]
        if all(c is None for c in directions):
            return (None,) * len(ctx.needs_input_grad)
        of_cotangents, of_tensors = op.tangent_and_pull(cotangents, tensors, directions, wrt)
        return None, None, *of_cotangents, *[None] * op.n_kept, *map(of_tensors.get, range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        op, need_parameters = ctx.op, ctx.need_parameters
        first = 2 + op.n_kept
        with forward_ad._set_fwd_grad_enabled(True):
            saved = _primals(ctx.saved_tensors)
            cotangents, kept, tensors = saved[:2], saved[2:first], saved[first:]
            wrt = range(len(tensors) if need_parameters else op.n_rowed)
            parts = []
            if any(t is not None for t in tangents[:2]):
                parts.append(Backward.apply(op, need_parameters, *tangents[:2], *kept, *tensors))
            if any(t is not None for t in tangents[first:]):
                parts.append([*op.tangent_and_pull(cotangents, tensors, tangents[first:], wrt)[1].values()])
            return tuple(functools.reduce(torch.add, x) for x in zip(*parts, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Fused, need: bool, *tensors: Tensor | None) -> tuple[Any, ...]:
        given = _Mapped(info.batch_size, tensors, in_dims[2:])
        first = 2 + op.n_kept
        last = first + op.n_rowed
        if need or any(given.mapped[last:]) or op.holds_rows(given.tensors[last:]):
            found = _stacked([Backward.apply(op, need, *member) for member in given.members()])
        else:
            rows = given.rows_of(first)
            folded = [given.folded(i, rows) for i in range(last)]
            outputs = Backward.apply(op, need, *folded, *given.tensors[last:])
            each = [x.unflatten(0, (info.batch_size, rows)) for x in outputs]
            found = tuple(x.sum(1, keepdim=True) if given.rows_of(first + i) != rows else x for i, x in enumerate(each))
        return found, (0,) * len(found)


def _of_batched_gradients(op: Fused, need_parameters: bool, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Of is_grads_batched=True and vectorize=True, for which PyTorch has another vmap, of one level and no rules in Python."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    mapped = [t is not None and legacy(t) for t in given]
    first: Any = given[mapped.index(True)]
    level = next((n for n in range(1, 65) if not legacy(torch._remove_batch_dim(first, n, 1, 0))), None)
    if level is None:
        raise RuntimeError(f"batches of gradients within batches of gradients are not supported: {first!r} found")
    bare: list[Any] = [
        torch._remove_batch_dim(t, level, 1, 0) if t is not None and own else t for t, own in zip(given, mapped, strict=True)
    ]
    info = SimpleNamespace(batch_size=len(bare[mapped.index(True)]))
    dims = [0 if own else None for own in mapped]
    found, _ = Backward.vmap(info, (None, None, *dims), op, need_parameters, *bare)
    return tuple(torch._add_batch_dim(x, 0, level) for x in found)


class _Mapped:
    """Tensors, some of which are mapped over, [size, ...]."""

    def __init__(self, size: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> None:
        self.size, self.mapped = size, [dim is not None for dim in dims]
        self.tensors: list[Any] = [
            t if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
        ]

    def rows_of(self, i: int) -> int:
        rows: int = self.tensors[i].shape[1 if self.mapped[i] else 0]
        return rows

    def folded(self, i: int, rows: int) -> Tensor | None:
        """[size rows, ...]."""
        t: Tensor | None = self.tensors[i]
        if t is None:
            return None
        shape = t.shape[2 if self.mapped[i] else 1 :]
        return t.expand(self.size, rows, *shape).reshape(self.size * rows, *shape)

    def members(self) -> list[tuple[Tensor | None, ...]]:
        """What is mapped over, one after the other."""
        if not self.size:
            raise ValueError("torch.func.vmap over parameters or their gradients takes one member at least, found none")
        parts = [
            t.unbind(0) if t is not None and mapped else (t,) * self.size
            for t, mapped in zip(self.tensors, self.mapped, strict=True)
        ]
        return list(zip(*parts, strict=True))


def _without_autocast(tensors: Sequence[Tensor]) -> torch.autocast:
    """Derivatives are of the dtype of what is differentiated."""
    return torch.autocast(tensors[0].device.type, enabled=False)


def _primals(saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What was saved for a jvp, without the tangents of its own level. Those of the levels around it are followed, if forward
    mode is switched on again: PyTorch switches it off around a jvp, and tangents of tangents would be lost without a word."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]


def _stacked(members: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*members, strict=True))


@outside_graphs("torch.func and forward mode go through the fused operators by rules in Python, which are not for graphs")
def apply(op: Fused, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All that the operator gives, under whatever transforms there are."""
    found: tuple[Tensor, ...] = Forward.apply(op, *tensors)
    return found
