"""The activations a Hamiltonian may use, each named once for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sin(nn.Module):
    """Elementwise sine, as used by sinusoidal networks (Sitzmann et al., 2020); PyTorch has no module for it."""

    def forward(self, a: Tensor) -> Tensor:
        return torch.sin(a)


class Activation(NamedTuple):
    """A smooth activation s: its name and, for softplus, its sharpness `beta` and linear `threshold`."""

    name: str
    beta: float = 1.0
    threshold: float = 20.0

    def __call__(self, a: Tensor) -> Tensor:
        """s(a), elementwise, any shape and floating dtype."""
        if self.name == "softplus":
            return F.softplus(a, self.beta, self.threshold)
        return _FUNCTIONS[self.name](a)

    def module(self) -> nn.Module:
        """A fresh module that computes s."""
        if self.name == "softplus":
            return nn.Softplus(self.beta, self.threshold)
        return _MODULES[self.name]()


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda a: F.gelu(a, approximate="tanh"),
    "sin": torch.sin,
}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "sin": Sin,
}
NAMES = ("softplus", *_FUNCTIONS)


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None if it is not one that a Hamiltonian may use."""
    if type(module) is nn.Softplus:
        return Activation("softplus", float(module.beta), float(module.threshold))
    if type(module) is nn.GELU:
        return Activation("gelu" if module.approximate == "none" else "gelu-tanh")
    simple: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.SiLU: "silu", Sin: "sin"}
    name = simple.get(type(module))
    return Activation(name) if name else None
