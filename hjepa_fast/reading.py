"""What was read of a module, remembered for as long as nothing about it has changed.

Reading a module takes as long as a step of a small network does. What is remembered belongs to one module, never to its class,
and holds only while every part is the very object that was read: layers, parameters with their shapes, forwards, no hooks, and
the settings of activations and terms. A module with anything else about it (dropout, parametrizations, a factor, a forward that
must be followed at every call, terms that a user's own class says) is read anew each time.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import activations, reader
from .models import SeparableHNN

_CALL = nn.Module.__call__
_EVERYWHERE = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class _Part(NamedTuple):
    """A module as it was, but for the module itself."""

    kind: type[nn.Module]
    forward: Any
    children: list[nn.Module | None]
    tensors: list[tuple[Tensor | None, Any, Any, Any]]
    """Each parameter with its shape, dtype and device."""
    asked: bool
    """Whether it may be asked for its terms, as no layer of PyTorch's is."""
    terms: Any
    """The class's method that says its terms."""
    settings: tuple[Any, ...] | None
    """Of an activation or a term; None of what is not to be remembered."""

    @classmethod
    def of(cls, module: nn.Module) -> _Part:
        tensors = [(t, *((t.shape, t.dtype, t.device) if t is not None else (None,) * 3)) for t in module._parameters.values()]
        kind, terms = type(module), getattr(type(module), "hamiltonian_terms", None)
        asked = not kind.__module__.startswith("torch.nn.")
        return cls(kind, kind.forward, list(module._modules.values()), tensors, asked, terms, _settings_of(module))

    def holds(self, module: nn.Module) -> bool:
        own = module.__dict__
        if (
            type(module) is not self.kind
            or self.kind.forward is not self.forward
            or self.kind.__call__ is not _CALL
            or "forward" in own
            or (self.asked and ("hamiltonian_terms" in own or getattr(self.kind, "hamiltonian_terms", None) is not self.terms))
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return False
        parameters = own["_parameters"]
        if len(parameters) != len(self.tensors) or list(own["_modules"].values()) != self.children:
            return False
        for now, (t, shape, dtype, device) in zip(parameters.values(), self.tensors, strict=True):
            if now is not t or (t is not None and (t.shape != shape or t.dtype is not dtype or t.device != device)):
                return False
        return not self.settings or _settings_of(module) == self.settings


_TERMS = f"{__package__}.terms"


def _says_settings(module: nn.Module) -> bool:
    """Whether it is of a class of `terms.py`. A subclass may compute something else, so it does not count."""
    return type(module).__module__ == _TERMS


def _settings_of(module: nn.Module) -> tuple[Any, ...] | None:
    if _says_settings(module):
        found: tuple[Any, ...] | None = module._settings()  # type: ignore[operator]
        return found
    if type(module) is SeparableHNN:  # a tensor in place of the parameter may become another one
        return None if isinstance(vars(module).get("stiffness"), Tensor) else ("stiffness",)
    return activations.settings_of(module)


class _Reading(NamedTuple):
    found: Any
    root: _Part
    parts: list[tuple[nn.Module, _Part]]
    named: bool
    """Whether the layers are the root's `.net`."""


_readings: weakref.WeakKeyDictionary[nn.Module, _Reading] = weakref.WeakKeyDictionary()


def recall(module: nn.Module) -> Any:
    """What was remembered of a module, or None."""
    reading = _readings.get(module)
    if reading is None or any(_EVERYWHERE):
        return None
    if not reading.root.holds(module) or not all(part.holds(m) for m, part in reading.parts):
        return None
    if reading.named and ("net" in module.__dict__ or not reader.is_net(module)):
        return None
    return reading.found


def remember(module: nn.Module, found: Any, tensors: tuple[Tensor, ...]) -> bool:
    """Remember `found`, which was read of the module and holds these tensors, if that is safe; whether it was."""
    _readings.pop(module, None)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    # zeros in place of a bias, made in inference mode, could not be trained through later; what functional_call puts in a
    # parameter's place may hold a graph
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() or wrapped(t) or t.grad_fn for t in tensors):
        return False
    if reader.says_terms(module):
        return _says_settings(module) and _keep(module, found, list(module.modules())[1:], named=False)
    if found.takes_inputs:
        return False
    nets = [net for net in (module.potential, module.kinetic) if net] if type(module) is SeparableHNN else [module]
    named = type(module) is not SeparableHNN and not isinstance(module, nn.Sequential)
    if not (reader.is_net(module) if named else type(module) in (nn.Sequential, SeparableHNN)):
        return False
    parts: list[nn.Module] = []
    if named:
        parts.append(module.net)  # type: ignore[arg-type]
    if nets != [module]:
        parts += nets
    pending: list[nn.Module] = [x for net in (parts[:1] if named else nets) for x in net.children()]
    while pending:
        layer = pending.pop()
        if type(layer) is nn.Sequential:
            pending += layer
        parts.append(layer)
    return _keep(module, found, parts, named)


def _keep(module: nn.Module, found: Any, parts: list[nn.Module], named: bool) -> bool:
    if not all(_is_plain(part) for part in parts):
        return False
    snapshots = [(part, _Part.of(part)) for part in parts]
    root = _Part.of(module)
    if any(part.settings is None for part in (root, *(part for _, part in snapshots))):
        return False
    if any(m is module for m, _ in snapshots) or not root.holds(module) or not all(p.holds(m) for m, p in snapshots):
        return False
    _readings[module] = _Reading(found, root, snapshots, named)
    return True


def _is_plain(part: nn.Module) -> bool:
    """Whether it computes what its parts, parameters and settings say."""
    if type(part) is nn.Linear:  # whose weight may have become another attribute
        return part._parameters.keys() == {"weight", "bias"}
    plain = type(part) in (nn.Identity, nn.Sequential, nn.ModuleList)
    return plain or _says_settings(part) or activations.from_module(part) is not None
