"""The activations a Hamiltonian may use, each named once for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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

    def derivatives(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s(a), s'(a), s''(a), elementwise. Where PyTorch's softplus is linear, so is this one."""
        if self.name == "softplus":
            sigma = torch.sigmoid(self.beta * a)
            linear = self.beta * a > self.threshold
            return self(a), sigma.masked_fill(linear, 1.0), (self.beta * sigma * (1 - sigma)).masked_fill(linear, 0.0)
        return _DERIVATIVES[self.name](a)

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


def _tanh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(a)
    slope = 1 - t * t
    return t, slope, -2 * t * slope


def _silu(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigma = torch.sigmoid(a)
    slope = sigma * (1 - sigma)
    return a * sigma, sigma + a * slope, slope * (2 + a * (1 - 2 * sigma))


def _gelu(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return a * cdf, cdf + a * pdf, pdf * (2 - a * a)


def _gelu_tanh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (a + cubic * a**3))
    u1, u2 = scale * (1 + 3 * cubic * a * a), 6 * scale * cubic * a
    slope = 1 - t * t
    return (
        0.5 * a * (1 + t),
        0.5 * (1 + t) + 0.5 * a * slope * u1,
        slope * u1 + 0.5 * a * slope * (u2 - 2 * t * u1 * u1),
    )


def _sin(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sin(a)
    return s, torch.cos(a), -s


_DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "tanh": _tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu-tanh": _gelu_tanh,
    "sin": _sin,
}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "sin": Sin,
}
NAMES = ("softplus", *_FUNCTIONS)


_SIMPLE: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.SiLU: "silu", Sin: "sin"}


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None if it is not one that a Hamiltonian may use."""
    if type(module) is nn.Softplus:
        return Activation("softplus", float(module.beta), float(module.threshold))
    if type(module) is nn.GELU:
        return Activation("gelu" if module.approximate == "none" else "gelu-tanh")
    name = _SIMPLE.get(type(module))
    return Activation(name) if name else None


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What else than its type decides about what an activation computes."""
    kind = type(module)
    return (module.beta, module.threshold) if kind is nn.Softplus else (module.approximate,) if kind is nn.GELU else ()
