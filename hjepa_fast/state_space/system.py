"""H(q, p) = p^T M^-1(q) p / 2 + V(q) as plain tensors, and what of it is no tensor.

The networks see features x of q: the coordinates that are no angles, then the angles' cosines, then their sines, each in the
order of the coordinates. A mass network gives numbers y(x), a constant mass has them as a parameter:

    diagonal    M^-1 = diag(s(y) + epsilon)
    cholesky    M^-1 = L L^T + epsilon I, L lower triangular: its diagonal s(y_1), ..., s(y_d), then what is below, by rows

with s = softplus or the identity.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..activations import Activation, Activations
from ..hidden_space.fixed_point import waits

DIAGONALS = ("softplus", "raw")
_SOFTPLUS = Activation("softplus")


class Layers(NamedTuple):
    """An MLP with any number of outputs."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: Activations

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    @property
    def widths(self) -> list[int]:
        """Of the hidden layers."""
        return [w.shape[0] for w in self.weights[:-1]]

    def to(self, dtype: torch.dtype) -> Layers:
        return Layers([w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases], self.activation)


class Form(NamedTuple):
    """What of a system is no tensor."""

    d: int
    angles: tuple[int, ...]
    potential: tuple[int, Activations] | None
    """V's number of layers and activations; None for V = 0."""
    mass: str
    """"identity", "diagonal" or "cholesky"."""
    mass_net: tuple[int, Activations] | None
    """The same of the mass network; None of a constant mass."""
    diagonal: str
    """s, one of `DIAGONALS`."""
    epsilon: float

    @property
    def others(self) -> list[int]:
        """The coordinates that are no angles."""
        return [i for i in range(self.d) if i not in self.angles]

    @property
    def n_features(self) -> int:
        return self.d + len(self.angles)

    @property
    def n_entries(self) -> int:
        """Numbers y that the mass is made of."""
        return {"identity": 0, "diagonal": self.d, "cholesky": self.d * (self.d + 1) // 2}[self.mass]

    def text(self) -> str:
        """All but numbers, for an operator's attribute; `parse` reads it and `numbers`."""
        nets = [f"{net[0]}:{activations.text_of(net[1])}" if net else "" for net in (self.potential, self.mass_net)]
        return "|".join([str(self.d), ",".join(map(str, self.angles)), nets[0], self.mass, nets[1], self.diagonal])

    def numbers(self) -> list[float]:
        nets = [net for net in (self.potential, self.mass_net) if net]
        return [self.epsilon, *[x for net in nets for x in activations.numbers_of(net[1])]]


@functools.lru_cache(maxsize=256)
def parse(text: str, numbers: tuple[float, ...]) -> Form:
    """The form that `Form.text` and `Form.numbers` wrote."""
    d, angles, V, mass, net, diagonal = text.split("|")
    epsilon, *rest = numbers
    left = iter(rest)

    def layers(text: str) -> tuple[int, Activations] | None:
        n, _, names = text.partition(":")
        return (int(n), activations.parse(names, left)) if text else None

    return Form(int(d), tuple([int(i) for i in angles.split(",") if i]), layers(V), mass, layers(net), diagonal, epsilon)


class System(NamedTuple):
    """A form with its tensors."""

    form: Form
    potential: Layers | None
    mass: Layers | None
    entries: Tensor | None
    """[n_entries] of a constant mass."""

    @classmethod
    def of(cls, form: Form, tensors: Sequence[Tensor]) -> System:
        """From `tensors`."""
        left = list(tensors)

        def layers(net: tuple[int, Activations] | None) -> Layers | None:
            if net is None:
                return None
            n = net[0]
            found = Layers(left[:n], left[n : 2 * n], net[1])
            del left[: 2 * n]
            return found

        return cls(form, layers(form.potential), layers(form.mass_net), left[0] if left else None)

    @property
    def tensors(self) -> list[Tensor]:
        """V's weights and biases, then the mass network's, or the entries of a constant mass."""
        nets = [net for net in (self.potential, self.mass) if net]
        return [*[t for net in nets for t in net.tensors], *([] if self.entries is None else [self.entries])]

    def saved_widths(self) -> list[int]:
        """Numbers of each part of what restores an evaluation: the gradient with respect to the features, a mass network's
        entries, and for each network every hidden layer's pre-activations, then the gradients with respect to its values."""
        nets = [net for net in (self.potential, self.mass) if net]
        n = 0 if self.mass is None else self.form.n_entries
        return [self.form.n_features, n, *[width for net in nets for _ in range(2) for width in net.widths]]

    def to(self, dtype: torch.dtype) -> System:
        return System.of(self.form, [t.to(dtype) for t in self.tensors])


_MOST_RUNS = 64
"""Slices that are taken for a list of places; for more the copy to the device should be the shorter wait."""


@functools.lru_cache(maxsize=256)
def _runs(places: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each run of consecutive places begins and ends."""
    starts = [k for k, i in enumerate(places) if not k or i != places[k - 1] + 1]
    return [(places[a], places[b - 1] + 1) for a, b in itertools.pairwise([*starts, len(places)])]


def picked(x: Tensor, places: Sequence[int]) -> Tensor:
    """x[..., places]; on a device by slices, because the host would wait until a list of places is copied there."""
    if not places:
        return x[..., :0]
    if waits(x) and len(_runs(tuple(places))) <= _MOST_RUNS:
        return torch.cat([x[..., begin:end] for begin, end in _runs(tuple(places))], dim=-1)
    return x[..., list(places)]


def features(q: Tensor, angles: Sequence[int]) -> Tensor:
    """What the networks see of q: [..., d] to [..., d + number of angles]."""
    if not angles:
        return q
    others = [i for i in range(q.shape[-1]) if i not in angles]
    of_angles = picked(q, angles)
    return torch.cat((picked(q, others), of_angles.cos(), of_angles.sin()), dim=-1)


def output(net: Layers, x: Tensor) -> Tensor:
    """[..., n] to [..., outputs]."""
    *hidden, (w_out, b_out) = zip(net.weights, net.biases, strict=True)
    for layer, (weight, bias) in enumerate(hidden):
        x = net.activation.at(layer)(F.linear(x, weight, bias))
    return F.linear(x, w_out, b_out)


def positive(diagonal: str, y: Tensor) -> Tensor:
    """s(y)."""
    return _SOFTPLUS(y) if diagonal == "softplus" else y


def positive_derivatives(diagonal: str, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s(y), s'(y), s''(y)."""
    return _SOFTPLUS.derivatives(y) if diagonal == "softplus" else (y, torch.ones_like(y), torch.zeros_like(y))


@functools.lru_cache(maxsize=64)
def places(d: int) -> tuple[int, ...]:
    """Where the entries of a Cholesky factor are in its d x d numbers: the diagonal, then what is below it, row by row."""
    return (*[i * d + i for i in range(d)], *[i * d + j for i in range(d) for j in range(i)])


def factor(d: int, diagonal: str, y: Tensor) -> Tensor:
    """The Cholesky factor L of entries y: [..., d (d + 1) / 2] to [..., d, d]."""
    values = torch.cat((positive(diagonal, y[..., :d]), y[..., d:], torch.zeros_like(y[..., :1])), dim=-1)
    where = {place: k for k, place in enumerate(places(d))}
    return picked(values, [where.get(i, y.shape[-1]) for i in range(d * d)]).unflatten(-1, (d, d))


def inverse_mass(mass: str, diagonal: str, epsilon: float, y: Tensor) -> Tensor:
    """M^-1 of entries y: [..., n_entries] to [..., d, d]."""
    if mass == "diagonal":
        return torch.diag_embed(positive(diagonal, y) + epsilon)
    d = int((8 * y.shape[-1] + 1) ** 0.5 - 1) // 2
    L = factor(d, diagonal, y)
    return L @ L.mT + epsilon * torch.eye(d, dtype=y.dtype, device=y.device)


def energy(system: System, z: Tensor) -> Tensor:
    """H(z): [..., 2d] to [...], differentiable any number of times."""
    form = system.form
    q, p = z.chunk(2, dim=-1)
    x = features(q, form.angles)
    if form.mass == "identity":
        H = 0.5 * (p * p).sum(-1)
    else:
        y = system.entries if system.mass is None else output(system.mass, x)
        assert y is not None
        W = inverse_mass(form.mass, form.diagonal, form.epsilon, y)
        H = 0.5 * (p * (W @ p[..., None]).squeeze(-1)).sum(-1)
    return H if system.potential is None else H + output(system.potential, x).squeeze(-1)
