"""The activations a Hamiltonian may use, each named once for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sin(nn.Module):
    """Elementwise sine, as used by sinusoidal networks (Sitzmann et al., 2020); PyTorch has no module for it."""

    def forward(self, a: Tensor) -> Tensor:
        return torch.sin(a)


class Square(nn.Module):
    """Elementwise square; PyTorch has no module for it."""

    def forward(self, a: Tensor) -> Tensor:
        return a * a


class Activation(NamedTuple):
    """A smooth activation s: its name and, for softplus, its sharpness `beta` and linear `threshold`; `beta` is elu's alpha."""

    name: str
    beta: float = 1.0
    threshold: float = 20.0

    @property
    def layers(self) -> tuple[Activation, ...]:
        return (self,)

    def at(self, layer: int) -> Activation:
        """That of a hidden layer, from 0 on."""
        return self

    def __call__(self, a: Tensor) -> Tensor:
        """s(a), elementwise, any shape and floating dtype."""
        if self.name == "softplus":
            return F.softplus(a, self.beta, self.threshold)
        if self.name == "elu":
            return F.elu(a, self.beta)
        return _FUNCTIONS[self.name](a)

    def derivatives(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s(a), s'(a), s''(a), elementwise. Where PyTorch's softplus is linear, so is this one."""
        if self.name == "softplus":
            sigma = torch.sigmoid(self.beta * a)
            linear = self.beta * a > self.threshold
            return self(a), sigma.masked_fill(linear, 1.0), (self.beta * sigma * (1 - sigma)).masked_fill(linear, 0.0)
        if self.name == "elu":
            linear, e = a > 0, self.beta * torch.exp(a.clamp_max(0))
            return self(a), e.masked_fill(linear, 1.0), e.masked_fill(linear, 0.0)
        return _DERIVATIVES[self.name](a)

    def pull(self, a: Tensor, g: Tensor) -> Tensor:
        """s'(a) g, elementwise, in one operation where PyTorch has one."""
        if self.name == "softplus":
            return torch.ops.aten.softplus_backward(g, a, self.beta, self.threshold)
        known = _PULLS.get(self.name)
        return self.derivatives(a)[1] * g if known is None else known(g, a)

    def module(self) -> nn.Module:
        """A fresh module that computes s."""
        if self.name == "softplus":
            return nn.Softplus(self.beta, self.threshold)
        if self.name == "elu":
            return nn.ELU(self.beta)
        return _MODULES[self.name]()


class Mixed(NamedTuple):
    """An activation for each hidden layer."""

    layers: tuple[Activation, ...]

    def at(self, layer: int) -> Activation:
        return self.layers[layer]


Activations = Activation | Mixed


def of_layers(layers: Sequence[Activation]) -> Activations:
    """One activation if they are all the same; that of a network without hidden layers is never used."""
    distinct = tuple(dict.fromkeys(layers))
    return distinct[0] if len(distinct) == 1 else Mixed(tuple(layers)) if distinct else Activation("tanh")


def text_of(activation: Activations) -> str:
    """The names, for an operator's attribute; `numbers_of` has the rest, and `parse` reads both."""
    return ",".join([own.name for own in activation.layers])


def numbers_of(activation: Activations) -> list[float]:
    return [x for own in activation.layers for x in own[1:]]


def parse(text: str, numbers: Iterator[float]) -> Activations:
    return of_layers([Activation(name, float(next(numbers)), float(next(numbers))) for name in text.split(",")])


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda a: F.gelu(a, approximate="tanh"),
    "sin": torch.sin,
    "sigmoid": torch.sigmoid,
    "quadratic": torch.square,
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


def _sigmoid(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(a)
    slope = s * (1 - s)
    return s, slope, slope * (1 - 2 * s)


def _quadratic(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a * a, 2 * a, torch.full_like(a, 2.0)


_DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "tanh": _tanh,
    "silu": _silu,
    "gelu": _gelu,
    "gelu-tanh": _gelu_tanh,
    "sin": _sin,
    "sigmoid": _sigmoid,
    "quadratic": _quadratic,
}
_PULLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda g, a: torch.ops.aten.tanh_backward(g, torch.tanh(a)),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu-tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "sigmoid": lambda g, a: torch.ops.aten.sigmoid_backward(g, torch.sigmoid(a)),
}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "sin": Sin,
    "sigmoid": nn.Sigmoid,
    "quadratic": Square,
}
NAMES = ("softplus", "elu", *_FUNCTIONS)


_BY_FUNCTION: dict[Any, str] = {
    torch.tanh: "tanh", F.tanh: "tanh", F.softplus: "softplus", F.silu: "silu", F.gelu: "gelu", torch.sin: "sin",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.elu: "elu", torch.square: "quadratic",
}  # fmt: skip


def name_of(activation: Any) -> str | None:
    """The activation that a name or one of PyTorch's functions says, or None."""
    if isinstance(activation, str):
        return activation if activation in NAMES else None
    try:
        return _BY_FUNCTION.get(activation)
    except TypeError:
        return None


_SIMPLE: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh", nn.SiLU: "silu", Sin: "sin", nn.Sigmoid: "sigmoid", Square: "quadratic",
}  # fmt: skip


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None if it is not one that a Hamiltonian may use, if only beside others."""
    if type(module) is nn.Softplus:
        return Activation("softplus", float(module.beta), float(module.threshold))
    if type(module) is nn.ELU:
        return Activation("elu", float(module.alpha))
    if type(module) is nn.ReLU:  # whose values and slopes are elu's of alpha 0, also at 0
        return Activation("elu", 0.0)
    if type(module) is nn.GELU:
        return Activation("gelu" if module.approximate == "none" else "gelu-tanh")
    name = _SIMPLE.get(type(module))
    return Activation(name) if name else None


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What else than its type decides about what an activation computes."""
    kind = type(module)
    if kind is nn.Softplus:
        return module.beta, module.threshold
    return (module.approximate,) if kind is nn.GELU else (module.alpha,) if kind is nn.ELU else ()
