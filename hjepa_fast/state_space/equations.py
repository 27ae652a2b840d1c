"""The gradient of H(q, p) = p^T M^-1(q) p / 2 + V(q) and its adjoint, written out in PyTorch operations.

With the features x(q), a mass network's entries y(x), T(y, p) the kinetic energy and c = dT/dy (see `system.py`):

    Hp = M^-1 p        Hq = x'(q)^T (V'(x) + y'(x)^T c)

Both networks' gradients are one pass through the layers and one back, from a cotangent of the outputs: 1 for V, c for y.

Second derivatives are symmetric. So the adjoint of the gradient, and of H itself with cotangent e, is the tangent of the
gradient along its cotangents v, plus e times the gradient: in z that is the Hessian times v, and in a network's parameters

    d(e_{l+1} z_l^T) = r_{l+1} z_l^T + e_{l+1} z'_l^T

with e_l the gradient of H with respect to the l-th pre-activation, z_l the layer values, r_l and z'_l their tangents.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .system import Form, Layers, System, factor, features, picked, places, positive_derivatives


class Ran(NamedTuple):
    """What running a network leaves behind; lists have an entry a hidden layer."""

    a: list[Tensor]
    values: list[Tensor]
    """x, z_1, ..., z_L."""
    slopes: list[Tensor]
    curves: list[Tensor]
    output: Tensor


class Pulled(NamedTuple):
    """What a network's gradient leaves behind."""

    g: list[Tensor]
    """With respect to z_l; `e` with respect to a_l."""
    e: list[Tensor]


def run(net: Layers, x: Tensor, known: Sequence[Tensor] | None = None) -> Ran:
    """The network at x [B, n]; `known` has the pre-activations and the output if they are."""
    pre, values, slopes, curves = [], [x], [], []
    *hidden, (w_out, b_out) = zip(net.weights, net.biases, strict=True)
    for layer, (weight, bias) in enumerate(hidden):
        pre.append(F.linear(values[-1], weight, bias) if known is None else known[layer])
        z, slope, curve = net.activation.at(layer).derivatives(pre[-1])
        values.append(z)
        slopes.append(slope)
        curves.append(curve)
    return Ran(pre, values, slopes, curves, F.linear(values[-1], w_out, b_out) if known is None else known[-1])


def pull(net: Layers, ran: Ran, c: Tensor) -> tuple[Pulled, Tensor]:
    """The gradient of c . output, c [B, outputs], with respect to every layer's values, and to x."""
    g, e = [], []
    back = c @ net.weights[-1]
    for layer in range(len(ran.slopes) - 1, -1, -1):
        g.append(back)
        e.append(back * ran.slopes[layer])
        back = e[-1] @ net.weights[layer]
    return Pulled(g[::-1], e[::-1]), back


def push(net: Layers, ran: Ran, x: Tensor) -> list[Tensor]:
    """Tangents along x [B, n]: x, then for each hidden layer those of a_l and z_l, then of the output."""
    found = [x]
    for layer, slope in enumerate(ran.slopes):
        found.append(found[-1] @ net.weights[layer].T)
        found.append(slope * found[-1])
    return [*found, found[-1] @ net.weights[-1].T]


def pull_tangent(
    net: Layers,
    ran: Ran,
    pulled: Pulled | None,
    pushed: list[Tensor] | None,
    c: Tensor,
    c_tangent: Tensor | None,
    sums: Layers | None,
) -> Tensor:
    """The tangent of `pull`'s gradient with respect to x; adds that with respect to the parameters to `sums`.

    `pushed` is None along x = 0, and then `pulled` may be; `c_tangent` is None of a constant c.
    """
    L = len(ran.slopes)
    w_out = net.weights[-1]
    back = torch.zeros_like(c @ w_out) if c_tangent is None else c_tangent @ w_out
    if sums is not None:
        if pushed is not None:
            sums.weights[-1].addmm_(c.T, pushed[-2])
        if c_tangent is not None:
            sums.weights[-1].addmm_(c_tangent.T, ran.values[-1])
            sums.biases[-1].add_(c_tangent.sum(0))
    for layer in range(L - 1, -1, -1):
        r = back * ran.slopes[layer]
        if pushed is not None and pulled is not None:
            r = torch.addcmul(r, pulled.g[layer] * ran.curves[layer], pushed[2 * layer + 1])
        if sums is not None:
            sums.weights[layer].addmm_(r.T, ran.values[layer])
            if pushed is not None and pulled is not None:
                # z'_0 is x, then every second one
                sums.weights[layer].addmm_(pulled.e[layer].T, pushed[2 * layer])
            sums.biases[layer].add_(r.sum(0))
        back = r @ net.weights[layer]
    return back


def _restored(ran: Ran, saved: list[Tensor]) -> Pulled:
    g = saved[len(saved) // 2 :]
    return Pulled(g, [own * slope for own, slope in zip(g, ran.slopes, strict=True)])


class Kinetic(NamedTuple):
    """T, and its derivatives with respect to p and to the entries."""

    value: Tensor
    of_p: Tensor
    of_entries: Tensor
    """[B, n_entries]."""
    kept: tuple[Tensor, ...]


def kinetic(form: Form, y: Tensor | None, p: Tensor) -> Kinetic:
    """Of entries y [B or 1, n_entries]."""
    if y is None:
        return Kinetic(0.5 * (p * p).sum(-1), p, p[:, :0], ())
    d = form.d
    s, s1, s2 = positive_derivatives(form.diagonal, y[:, :d])
    if form.mass == "diagonal":
        u = (s + form.epsilon) * p
        return Kinetic(0.5 * (u * p).sum(-1), u, 0.5 * s1 * p * p, (s + form.epsilon, s1, s2))
    L = factor(d, form.diagonal, y)
    w = _times(L.mT, p)
    u = _times(L, w)
    of_L = picked((p[:, :, None] * w[:, None, :]).flatten(1), places(d))
    of_y = torch.cat((of_L[:, :d] * s1, of_L[:, d:]), dim=1)
    value = 0.5 * ((w * w).sum(-1) + form.epsilon * (p * p).sum(-1))
    return Kinetic(value, u + form.epsilon * p, of_y, (L, w, s1, s2, of_L))


def kinetic_tangent(form: Form, at: Kinetic, p: Tensor, y_tangent: Tensor | None, p_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of `of_p` and `of_entries`; y_tangent is None along y = 0."""
    d = form.d
    if form.mass == "identity":
        return p_tangent, p_tangent[:, :0]
    if form.mass == "diagonal":
        w, s1, s2 = at.kept
        u, c = w * p_tangent, s1 * p * p_tangent
        if y_tangent is not None:
            u, c = u + s1 * y_tangent * p, c + 0.5 * s2 * y_tangent * p * p
        return u, c
    L, w, s1, s2, of_L = at.kept
    w_tangent = _times(L.mT, p_tangent)
    u = form.epsilon * p_tangent
    if y_tangent is not None:
        own = torch.cat((s1 * y_tangent[:, :d], y_tangent[:, d:]), dim=1)
        L_tangent = factor(d, "raw", own)
        w_tangent = w_tangent + _times(L_tangent.mT, p)
        u = u + _times(L_tangent, w)
    u = u + _times(L, w_tangent)
    both = p_tangent[:, :, None] * w[:, None, :] + p[:, :, None] * w_tangent[:, None, :]
    of_L_tangent = picked(both.flatten(1), places(d))
    of_diagonal = of_L_tangent[:, :d] * s1
    if y_tangent is not None:
        of_diagonal = of_diagonal + of_L[:, :d] * s2 * y_tangent[:, :d]
    return u, torch.cat((of_diagonal, of_L_tangent[:, d:]), dim=1)


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A * x[:, None, :]).sum(-1)


class Angles:
    """The features of q and the products with their derivatives."""

    def __init__(self, form: Form, q: Tensor) -> None:
        self.x = features(q, form.angles)
        self.angles, self.others = list(form.angles), form.others
        n, k = len(self.others), len(self.angles)
        self.sizes = [n, k, k]
        self.cos: Tensor
        self.sin: Tensor
        _, self.cos, self.sin = self.x.split(self.sizes, dim=1) if k else (None, self.x[:, :0], self.x[:, :0])

    def push(self, q_tangent: Tensor) -> Tensor:
        """x'(q) times the tangent."""
        if not self.angles:
            return q_tangent
        a = picked(q_tangent, self.angles)
        return torch.cat((picked(q_tangent, self.others), -self.sin * a, self.cos * a), dim=1)

    def pull(self, of_x: Tensor) -> Tensor:
        """x'(q)^T times the cotangent."""
        if not self.angles:
            return of_x
        of_others, of_cos, of_sin = of_x.split(self.sizes, dim=1)
        return self._joined(of_others, self.cos * of_sin - self.sin * of_cos)

    def pull_tangent(self, of_x: Tensor, of_x_tangent: Tensor, q_tangent: Tensor) -> Tensor:
        """The tangent of `pull`."""
        found = self.pull(of_x_tangent)
        if not self.angles:
            return found
        _, of_cos, of_sin = of_x.split(self.sizes, dim=1)
        turned = -(self.cos * of_cos + self.sin * of_sin) * picked(q_tangent, self.angles)
        return found + self._joined(torch.zeros_like(of_x[:, : self.sizes[0]]), turned)

    def _joined(self, of_others: Tensor, of_angles: Tensor) -> Tensor:
        order = sorted(range(len(self.others) + len(self.angles)), key=lambda i: [*self.others, *self.angles][i])
        return picked(torch.cat((of_others, of_angles), dim=1), order)


class Sums:
    """Sums over samples and sub-steps of the gradients of a system's tensors."""

    def __init__(self, system: System) -> None:
        self.tensors = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in system.tensors]
        _, self.potential, self.mass, self.entries = System.of(system.form, self.tensors)


class Saved(NamedTuple):
    """What a point that was evaluated before is restored from."""

    of_x: Tensor
    entries: Tensor
    V: list[Tensor]
    """Pre-activations, then gradients with respect to the values, of each hidden layer; `N` likewise, of the mass network."""
    N: list[Tensor]

    @classmethod
    def on(cls, system: System, tape: Tensor) -> Saved:
        """From `Point.tape`."""
        of_x, entries, *rest = tape.split(system.saved_widths(), dim=1)
        n = 0 if system.potential is None else 2 * len(system.potential.widths)
        return cls(of_x, entries, rest[:n], rest[n:])


class Point:
    """The gradient of H at z [B, 2d], and its adjoint there."""

    def __init__(self, system: System, z: Tensor, saved: Saved | None = None) -> None:
        self.system, self.saved, form = system, saved, system.form
        q, self.p = z.split(form.d, dim=1)
        self.angles = Angles(form, q)
        known = None if saved is None else [*saved.N[: len(saved.N) // 2], saved.entries]
        self.N = None if system.mass is None else run(system.mass, self.angles.x, known)
        self.of_x = torch.zeros_like(self.angles.x)
        """The gradient with respect to the features, once `of_q` was asked for."""
        self.pulled_V: Pulled | None = None
        self.pulled_N: Pulled | None = None
        y = system.entries[None] if system.entries is not None else None if self.N is None else self.N.output
        self.T = kinetic(form, y, self.p)
        self.one = z.new_ones(1, 1).expand(len(z), 1)

    @functools.cached_property
    def V(self) -> Ran | None:
        if self.system.potential is None:
            return None
        # its output is read at a point that is evaluated alone
        known = None if self.saved is None else [*self.saved.V[: len(self.saved.V) // 2], self.one]
        return run(self.system.potential, self.angles.x, known)

    @property
    def value(self) -> Tensor:
        """H, [B]."""
        return self.T.value if self.V is None else self.T.value + self.V.output.squeeze(1)

    def of_q(self) -> Tensor:
        """Hq, [B, d]; leaves what `adjoint` needs."""
        system, saved, of_x = self.system, self.saved, self.of_x
        if saved is not None:
            of_x = saved.of_x
            self.pulled_V = None if self.V is None else _restored(self.V, saved.V)
            self.pulled_N = None if self.N is None else _restored(self.N, saved.N)
        else:
            if self.V is not None and system.potential is not None:
                self.pulled_V, own = pull(system.potential, self.V, self.one)
                of_x = of_x + own
            if self.N is not None and system.mass is not None:
                self.pulled_N, own = pull(system.mass, self.N, self.T.of_entries)
                of_x = of_x + own
        self.of_x = of_x
        return self.angles.pull(of_x)

    def tape(self) -> Tensor:
        """What `Saved` divides, [B, width]; zeros for what was not asked for."""
        system, rows, x = self.system, len(self.p), self.angles.x
        parts = [self.of_x, x[:, :0] if self.N is None else self.N.output]
        for net, name in ((system.potential, "V"), (system.mass, "N")):
            pulled: Pulled | None = getattr(self, f"pulled_{name}")
            if net is None:
                continue
            if pulled is None and name == "V":
                parts.append(x.new_zeros(rows, 2 * sum(net.widths)))
                continue
            parts += getattr(self, name).a
            parts += [x.new_zeros(rows, n) for n in net.widths] if pulled is None else [g.expand(rows, -1) for g in pulled.g]
        return torch.cat(parts, dim=1)

    @property
    def of_p(self) -> Tensor:
        """Hp, [B, d]."""
        return self.T.of_p

    def adjoint(self, vq: Tensor | None, vp: Tensor | None, e: Tensor | None, sums: Sums | None) -> Tensor:
        """Gradient of vq . Hq + vp . Hp + e H with respect to z [B, 2d], and to the parameters, added to `sums`.

        vq and vp are [B, d], e [B]; None for zeros. With vq the point must have been asked for `of_q`.
        """
        system, form, p = self.system, self.system.form, self.p
        x_tangent = None if vq is None else self.angles.push(vq)
        p_tangent = torch.zeros_like(p) if vp is None else vp
        pushed_N = None
        if self.N is not None and system.mass is not None and x_tangent is not None:
            pushed_N = push(system.mass, self.N, x_tangent)
        u, c = kinetic_tangent(form, self.T, p, None if pushed_N is None else pushed_N[-1], p_tangent)
        if e is not None:
            u, c = u + e[:, None] * self.T.of_p, c + e[:, None] * self.T.of_entries
        if sums is not None and sums.entries is not None:
            sums.entries.add_(c.sum(0))
        of_x = torch.zeros_like(self.angles.x)
        if self.V is not None and system.potential is not None and (x_tangent is not None or e is not None):
            pushed = None if x_tangent is None else push(system.potential, self.V, x_tangent)
            pulled = self.pulled_V if x_tangent is not None else None
            of_x = of_x + pull_tangent(
                system.potential, self.V, pulled, pushed, self.one, None if e is None else e[:, None],
                None if sums is None else sums.potential,
            )  # fmt: skip
        if self.N is not None and system.mass is not None:
            pulled = self.pulled_N if x_tangent is not None else None
            of_x = of_x + pull_tangent(
                system.mass, self.N, pulled, pushed_N, self.T.of_entries, c, None if sums is None else sums.mass
            )
        of_q = self.angles.pull(of_x) if vq is None else self.angles.pull_tangent(self.of_x, of_x, vq)
        return torch.cat((of_q, u), dim=1)
