"""PyTorch's function transforms, for which the fused operators have no rules, and code that torch.compile cannot take."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

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
    """Whether any level of torch.func, or of dual numbers, is open. In a graph of torch.compile PyTorch itself speaks up."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def transform_of(tensors: Iterable[Tensor]) -> str | None:
    """What transforms any of the tensors, in words, or None."""
    if not active():
        return None
    for t in tensors:
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            return " of ".join(f"torch.func.{level.key().name.lower()}" for level in _func_levels())
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            return "forward-mode differentiation (dual numbers)"
    return None


def _func_levels() -> list[torch._functorch.pyfunctorch.FuncTorchInterpreter]:
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return retrieve_all_functorch_interpreters()


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
