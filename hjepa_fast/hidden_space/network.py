"""What follows a first pre-activation a: a function F(a), its gradient delta(a), and the adjoint of that.

F is the rest of a network (`Tail`), a quadratic form (`Quadratic`), or the sum of several, each of its own numbers (`Stack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activations
from ..hamiltonian import Term


class Tail(NamedTuple):
    """F, everything after the first pre-activation: `weights[i]` is W_{i+2}. Empty for a linear H, where F(a) = a."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: Activations

    @property
    def widths(self) -> list[int]:
        """h_1, ..., h_L, the sizes of the hidden pre-activations."""
        return [weight.shape[1] for weight in self.weights]

    def to(self, dtype: torch.dtype) -> Tail:
        """The same function with its parameters in `dtype`."""
        return Tail([w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases], self.activation)


class Quadratic(NamedTuple):
    """F(a) = (k a) . a / 2."""

    weights: Sequence[Tensor]
    """k alone, [h] or [1]."""
    width: int
    biases: Sequence[Tensor] = ()

    @property
    def widths(self) -> list[int]:
        return [self.width]

    def to(self, dtype: torch.dtype) -> Quadratic:
        return self._replace(weights=[w.to(dtype) for w in self.weights])


class Stack(NamedTuple):
    """F(a_1, a_2, ...) = F_1(a_1) + F_2(a_2) + ..., for a = (a_1, a_2, ...)."""

    parts: Sequence[Tail | Quadratic]
    first_widths: Sequence[int]
    """Of a_1, a_2, ..."""

    @property
    def weights(self) -> list[Tensor]:
        return [w for part in self.parts for w in part.weights]

    @property
    def biases(self) -> list[Tensor]:
        return [b for part in self.parts for b in part.biases]

    def to(self, dtype: torch.dtype) -> Stack:
        return self._replace(parts=[part.to(dtype) for part in self.parts])

    def sums_of(self, sums: Gradients | None) -> list[Gradients | None]:
        """Each part's share of the sums."""
        if sums is None:
            return [None] * len(self.parts)
        weights, biases = iter(sums.weights), iter(sums.biases)
        return [
            Gradients(sums.K, [next(weights) for _ in part.weights], [next(biases) for _ in part.biases]) for part in self.parts
        ]


Network = Tail | Quadratic | Stack


class Points(NamedTuple):
    """What an evaluation of a `Stack` leaves behind, a point each part."""

    points: list[Point]

    @property
    def a(self) -> list[Tensor]:
        return [torch.cat([point.a[0] for point in self.points], dim=-1)]

    def tape(self) -> Tensor:
        return torch.cat([point.tape() for point in self.points], dim=-1)


class Point(NamedTuple):
    """What an evaluation of delta leaves behind, an entry a hidden layer l = 1..L."""

    a: list[Tensor]
    """Pre-activations a_l, [B, h_l]."""
    g: list[Tensor]
    """g_l = dF/dz_l, [B, h_l]; g_L is the output weights, [1, h_L]."""

    def tape(self) -> Tensor:
        """a_1, ..., a_L, g_1, ..., g_{L-1} side by side."""
        return torch.cat((*self.a, *self.g[:-1]), dim=-1)

    @classmethod
    def from_tape(cls, tail: Tail, tape: Tensor) -> Point:
        values = tape.split([*tail.widths, *tail.widths[:-1]], dim=-1)
        n_layers = len(tail.weights)
        return cls(list(values[:n_layers]), [*values[n_layers:], tail.weights[-1]])


def tape_width_of(F: Network, width: int, memory: str) -> int:
    """`tape_width` of a function of a [B, width]."""
    if isinstance(F, Stack):
        return sum(tape_width_of(part, n, memory) for part, n in zip(F.parts, F.first_widths, strict=True))
    return tape_width(F.widths or [width], memory)


def tape_width(widths: Sequence[int], memory: str) -> int:
    """Numbers kept a sub-step and sample: none, a_1 ("recompute"), or every a_l and g_l ("store")."""
    if memory == "none":
        return 0
    return widths[0] if memory == "recompute" else 2 * sum(widths) - widths[-1]


def energy(tail: Network, a: Tensor) -> Tensor:
    """F(a): [..., h] to [...]."""
    if isinstance(tail, Stack):
        values = [energy(part, x) for part, x in zip(tail.parts, a.split(list(tail.first_widths), dim=-1), strict=True)]
        return torch.stack(values).sum(0)
    if isinstance(tail, Quadratic):
        return 0.5 * (tail.weights[0] * a * a).sum(-1)
    for layer, (weight, bias) in enumerate(zip(tail.weights, tail.biases, strict=True)):
        a = F.linear(tail.activation.at(layer)(a), weight, bias)
    return a.squeeze(-1)


def evaluate(tail: Network, a: Tensor) -> tuple[Point | Points, Tensor, Tensor]:
    """delta at a [B, h]: the point, delta [B, h], and F(a) [B], which costs nothing more."""
    if isinstance(tail, Stack):
        found = [evaluate(part, x) for part, x in zip(tail.parts, a.split(list(tail.first_widths), dim=-1), strict=True)]
        points, deltas, values = zip(*found, strict=True)
        return Points(list(points)), torch.cat([x.expand(len(a), -1) for x in deltas], dim=-1), torch.stack(values).sum(0)
    if isinstance(tail, Quadratic):
        k = tail.weights[0]
        return Point([a], [k]), k * a, 0.5 * (k * a * a).sum(-1)
    if not tail.weights:
        return Point([a], [torch.ones_like(a[:1])]), torch.ones_like(a), a.squeeze(-1)
    pre, slopes = [a], []
    for layer, (weight, bias) in enumerate(zip(tail.weights, tail.biases, strict=True)):
        z, slope, _ = tail.activation.at(layer).derivatives(pre[-1])
        slopes.append(slope)
        pre.append(F.linear(z, weight, bias))
    H = pre.pop().squeeze(-1)
    g = [tail.weights[-1]]
    for weight, slope in zip(tail.weights[-2::-1], slopes[:0:-1], strict=True):
        g.append((g[-1] * slope) @ weight)
    g.reverse()
    return Point(pre, g), g[0] * slopes[0], H


class Gradients(NamedTuple):
    """Sums over samples and sub-steps."""

    K: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def zeros(cls, K: Tensor, tail: Network) -> Gradients:
        """In K's dtype, whatever the parameters' own."""
        weights, biases = ([torch.zeros_like(p, dtype=K.dtype) for p in part] for part in (tail.weights, tail.biases))
        return cls(torch.zeros_like(K), weights, biases)


def adjoint(tail: Network, point: Point | Points, v: Tensor, gE: Tensor | None, sums: Gradients | None) -> Tensor:
    """Gradient of v . delta(a) + gE F(a): returns that of a, [B, h], and adds those of W_l, b_l to `sums` if given.

    With gE = 0 the result is the Hessian of F times v: one tangent pass forward, one pass back.

    Parameters
    ----------
    v : Tensor [B, h], held constant
    gE : Tensor [B] or None
    """
    if isinstance(tail, Stack):
        assert isinstance(point, Points)
        each = zip(tail.parts, point.points, v.split(list(tail.first_widths), dim=-1), tail.sums_of(sums), strict=True)
        return torch.cat([adjoint(part, x, w, gE, own) for part, x, w, own in each], dim=-1)
    assert isinstance(point, Point)
    if isinstance(tail, Quadratic):
        a, k = point.a[0], tail.weights[0]
        if sums is not None:
            share = v * a if gE is None else v * a + 0.5 * gE[:, None] * a * a
            sums.weights[0].add_(share.sum_to_size(k.shape))
        return k * (v if gE is None else v + gE[:, None] * a)
    if not tail.weights:
        return torch.zeros_like(v) if gE is None else gE[:, None].expand_as(v)
    ad = v
    z, slope, curve, tangent = [], [], [], []
    for i, a in enumerate(point.a):
        s, s1, s2 = tail.activation.at(i).derivatives(a)
        z.append(s)
        slope.append(s1)
        curve.append(s2 * ad)
        tangent.append(s1 * ad)
        if i + 1 < len(point.a):
            ad = tangent[-1] @ tail.weights[i].T
    r = point.g[-1] * curve[-1]
    if sums is not None:
        sums.weights[-1].add_(tangent[-1].sum(0))
    if gE is not None:
        r = r + gE[:, None] * point.g[-1] * slope[-1]
        if sums is not None:
            sums.weights[-1].add_(gE @ z[-1])
            sums.biases[-1].add_(gE.sum())
    for i in range(len(point.a) - 2, -1, -1):
        if sums is not None:
            e = point.g[i + 1] * slope[i + 1]
            sums.weights[i].addmm_(e.T, tangent[i]).addmm_(r.T, z[i])
            sums.biases[i].add_(r.sum(0))
        r = (r @ tail.weights[i]) * slope[i] + point.g[i] * curve[i]
    return r


def energy_adjoint(tail: Network, a: Tensor, gE: Tensor, sums: Gradients | None) -> Tensor:
    """Gradient of gE F(a): returns that of a, [B, h], and adds those of F's parameters to `sums` if given."""
    if not isinstance(tail, Tail) or not tail.weights:
        return adjoint(tail, evaluate(tail, a)[0], torch.zeros_like(a), gE, sums)
    pre, values = [a], []
    for layer, (weight, bias) in enumerate(zip(tail.weights, tail.biases, strict=True)):
        if sums is not None or layer + 1 < len(tail.weights):
            values.append(tail.activation.at(layer)(pre[-1]))
        if layer + 1 < len(tail.weights):
            pre.append(F.linear(values[-1], weight, bias))
    e = gE[:, None]
    for i in range(len(pre) - 1, -1, -1):
        if sums is not None:
            sums.weights[i].addmm_(e.T, values[i])
            sums.biases[i].add_(e.sum(0))
        e = tail.activation.at(i).pull(pre[i], e @ tail.weights[i])
    return e


def restore(tail: Network, saved: Tensor, memory: str) -> Point | Points:
    """The point of an evaluation from what is on the tape."""
    if isinstance(tail, Stack):
        sizes = [tape_width_of(part, n, memory) for part, n in zip(tail.parts, tail.first_widths, strict=True)]
        each = zip(tail.parts, saved.split(sizes, dim=-1), strict=True)
        points = [restore(part, x, memory) for part, x in each]
        return Points([x for x in points if isinstance(x, Point)])
    if isinstance(tail, Quadratic) or memory == "recompute" or not tail.weights:
        return evaluate(tail, saved)[0]
    return Point.from_tape(tail, saved)


def delta_at(tail: Network, point: Point | Points) -> Tensor:
    """delta, [B, h] or of one row where it is the same for all."""
    if isinstance(tail, Stack):
        assert isinstance(point, Points)
        each = [delta_at(part, x) for part, x in zip(tail.parts, point.points, strict=True)]
        return torch.cat([x.expand(len(point.points[0].a[0]), -1) for x in each], dim=-1)
    assert isinstance(point, Point)
    if isinstance(tail, Quadratic):
        return tail.weights[0] * point.a[0]
    return point.g[0] * (tail.activation.at(0).derivatives(point.a[0])[1] if tail.weights else 1.0)


def tail_of(term: Term) -> Tail:
    """What follows the first layer of a network."""
    assert term.activation is not None
    return Tail(term.weights[1:], term.biases[1:], term.activation)


class TermSums:
    """Sums of the gradients of a term's parameters."""

    def __init__(self, term: Term, work: torch.dtype) -> None:
        self.weights = [torch.empty_like(w, dtype=work, memory_format=torch.contiguous_format) for w in term.weights]
        self.biases = [torch.empty_like(b, dtype=work) for b in term.biases]
        self.stiffness = None if term.stiffness is None else torch.empty_like(term.stiffness, dtype=work)

    def to_fill(self, fresh: bool) -> list[Tensor]:
        """What must be zeros at the start: not large ones that a loop writes, as that takes as long as a step of a small
        network."""
        return [*([] if fresh else self.weights), *self.biases, *([] if self.stiffness is None else [self.stiffness])]

    def tail(self) -> Gradients:
        return Gradients(self.biases[0] if self.biases else torch.empty(0), self.weights[1:], self.biases[1:])

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases, *([] if self.stiffness is None else [self.stiffness])]


class Evaluation(NamedTuple):
    """A term's gradient [B, n] and value [B]."""

    gradient: Tensor
    value: Tensor


def evaluate_term(term: Term, x: Tensor) -> Evaluation:
    """Gradient and value of a term at what it reads, x [B, n]."""
    if term.stiffness is not None:
        return Evaluation(term.stiffness * x, 0.5 * (term.stiffness * x * x).sum(-1))
    _, delta, value = evaluate(tail_of(term), torch.addmm(term.biases[0], x, term.weights[0].T))
    return Evaluation(delta @ term.weights[0], value)


def pre_activations(term: Term, x: Tensor) -> list[Tensor]:
    """Those of a network's hidden layers, [B, h_i], at what it reads, x [B, n]."""
    assert term.activation is not None
    found: list[Tensor] = []
    for layer, (weight, bias) in enumerate(zip(term.weights[:-1], _biases_of_rows(term, len(x))[:-1], strict=True)):
        found.append(torch.addmm(bias, term.activation.at(layer - 1)(found[-1]) if found else x, weight.T))
    return found


def value_at(term: Term, x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """The value [B] of a network whose hidden layers have these pre-activations."""
    assert term.activation is not None
    last = term.activation.at(len(layers) - 1)(layers[-1]) if layers else x
    return torch.addmm(_biases_of_rows(term, len(x))[-1], last, term.weights[-1].T)[:, 0]


def _biases_of_rows(term: Term, n_rows: int) -> list[Tensor]:
    """With the first layer's for each of [B n] rows, where it is one for each of B samples."""
    first, *rest = term.biases
    return [first if first.ndim == 1 else first.repeat_interleave(n_rows // max(len(first), 1), dim=0), *rest]


def value_adjoint(term: Term, x: Tensor, gE: Tensor, sums: TermSums | None, layers: Sequence[Tensor] | None = None) -> Tensor:
    """Gradient of gE value(x), of a network at what it reads, x [B, n]: returns that of x, and adds those of the parameters.

    `layers` are its pre-activations, where they are known.
    """
    assert term.activation is not None
    values, slopes = [x], []
    for layer, a in enumerate(pre_activations(term, x) if layers is None else layers):
        z, slope, _ = term.activation.at(layer).derivatives(a)
        values.append(z)
        slopes.append(slope)
    e = gE[:, None]
    for i in range(len(values) - 1, -1, -1):
        if sums is not None:
            sums.weights[i].addmm_(e.T, values[i])
            own = sums.biases[i]
            own.add_(e.sum(0) if own.ndim == 1 else e.unflatten(0, (len(own), -1)).sum(1))
        e = e @ term.weights[i]
        if i:
            e = e * slopes[i - 1]
    return e
