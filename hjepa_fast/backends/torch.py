"""The hidden-space loop in plain PyTorch operations: any device, any dtype, nothing to compile.

Row vectors, the batch in rows. H(z) = F(a) with a = z W^T + b, W = [Wq | Wp], and delta(a) = grad_a F. Since
Hq = delta Wq and Hp = delta Wp, with K = Wp Wq^T

    kick   p <- p - c Hq    is    a <- a - c delta K^T,    sp <- sp - c delta
    drift  q <- q + c Hp    is    a <- a + c delta K,      sq <- sq + c delta

and q = q0 + sq Wp, p = p0 + sp Wq at any time: the loop never touches the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation
from ..schemes import SubStep


class Tail(NamedTuple):
    """F, everything after the first pre-activation: `weights[i]` is W_{i+2}. Empty for a linear H, where F(a) = a."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: Activation

    @property
    def widths(self) -> list[int]:
        """h_1, ..., h_L, the sizes of the hidden pre-activations."""
        return [weight.shape[1] for weight in self.weights]

    def to(self, dtype: torch.dtype) -> Tail:
        """The same function with its parameters in `dtype`."""
        return Tail([w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases], self.activation)


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


def product(x: Tensor, W: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """x W, or base + x W.

    Parameters
    ----------
    x : Tensor [..., k]
    W : Tensor [k, m], of any strides
    out : Tensor [B, n, m], optional, of any strides; x is then [B, n, k]
    base : Tensor [B, m], optional, with `out`
    """
    if out is None:
        return x @ W
    if base is None:
        return torch.matmul(x, W, out=out)
    # a few samples at a time: a product then stays in the cache until it is added to where it belongs
    size = max(1, 1024 // max(x.shape[1], 1)) if x.device.type == "cpu" else max(x.shape[0], 1)
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        torch.add(base[rows, None], x[rows] @ W, out=out[rows])
    return out


def tape_width(widths: Sequence[int], memory: str) -> int:
    """Numbers kept a sub-step and sample: none, a_1 ("recompute"), or every a_l and g_l ("store")."""
    if memory == "none":
        return 0
    return widths[0] if memory == "recompute" else 2 * sum(widths) - widths[-1]


def energy(tail: Tail, a: Tensor) -> Tensor:
    """F(a): [..., h] to [...]."""
    for weight, bias in zip(tail.weights, tail.biases, strict=True):
        a = F.linear(tail.activation(a), weight, bias)
    return a.squeeze(-1)


def evaluate(tail: Tail, a: Tensor) -> tuple[Point, Tensor, Tensor]:
    """delta at a [B, h]: the point, delta [B, h], and F(a) [B], which costs nothing more."""
    if not tail.weights:
        return Point([a], [torch.ones_like(a[:1])]), torch.ones_like(a), a.squeeze(-1)
    pre, slopes = [a], []
    for weight, bias in zip(tail.weights, tail.biases, strict=True):
        z, slope, _ = tail.activation.derivatives(pre[-1])
        slopes.append(slope)
        pre.append(F.linear(z, weight, bias))
    H = pre.pop().squeeze(-1)
    g = [tail.weights[-1]]
    for weight, slope in zip(tail.weights[-2::-1], slopes[:0:-1], strict=True):
        g.append((g[-1] * slope) @ weight)
    g.reverse()
    return Point(pre, g), g[0] * slopes[0], H


def forward(
    a: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    n_steps: int,
    every_state: bool,
    with_energy: bool,
    memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the loop.

    Parameters
    ----------
    a : Tensor [B, h], the first pre-activation at the start; its dtype is computed in, whatever the parameters' own
    K : Tensor [h, h]
    dt : Tensor [1 or B, n_steps]
    memory : "none", "recompute" or "store", what to keep for `backward`

    Returns
    -------
    a : Tensor [B, h], at the end
    sq, sp : Tensor [B, n_steps, h] after each step, or [B, 1, h] at the end
    energy : Tensor [B, n_steps], F before each step; [B, 0] if not asked for
    tape : Tensor [B, n_steps, sub-steps, width]
    """
    tail = tail.to(a.dtype)
    sq, sp = torch.zeros_like(a), torch.zeros_like(a)
    sqs, sps, energies, tape = [], [], [], []
    for t in range(n_steps):
        dt_t = dt[:, t, None]
        for i, (kick, drift) in enumerate(scheme):
            point, delta, H = evaluate(tail, a)
            if i == 0:
                energies.append(H)
            if memory != "none":
                tape.append(a if memory == "recompute" else point.tape())
            step = dt_t * delta
            if kick:
                a, sp = a - kick * (step @ K.T), sp - kick * step
            if drift:
                a, sq = a + drift * (step @ K), sq + drift * step
        if every_state or t == n_steps - 1:
            sqs.append(sq)
            sps.append(sp)
    return (
        a,
        torch.stack(sqs, 1),
        torch.stack(sps, 1),
        torch.stack(energies, 1) if with_energy else a.new_empty(a.shape[0], 0),
        torch.stack(tape, 1).unflatten(1, (n_steps, len(scheme))) if tape else a.new_empty(a.shape[0], n_steps, len(scheme), 0),
    )


class Gradients(NamedTuple):
    """Sums over samples and sub-steps."""

    K: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def zeros(cls, K: Tensor, tail: Tail) -> Gradients:
        """In K's dtype, whatever the parameters' own."""
        weights, biases = ([torch.zeros_like(p, dtype=K.dtype) for p in part] for part in (tail.weights, tail.biases))
        return cls(torch.zeros_like(K), weights, biases)


def adjoint(tail: Tail, point: Point, v: Tensor, gE: Tensor | None, sums: Gradients | None) -> Tensor:
    """Gradient of v . delta(a) + gE F(a): returns that of a, [B, h], and adds those of W_l, b_l to `sums` if given.

    With gE = 0 the result is the Hessian of F times v: one tangent pass forward, one pass back.

    Parameters
    ----------
    v : Tensor [B, h], held constant
    gE : Tensor [B] or None
    """
    if not tail.weights:
        return torch.zeros_like(v) if gE is None else gE[:, None].expand_as(v)
    ad = v
    z, slope, curve, tangent = [], [], [], []
    for i, a in enumerate(point.a):
        s, s1, s2 = tail.activation.derivatives(a)
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


def backward(
    la: Tensor,
    lsq: Tensor,
    lsp: Tensor,
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    tape: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    memory: str,
    sums: Gradients | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of `forward`, from the last sub-step to the first.

    Parameters
    ----------
    la, lsq, lsp : Tensor [B, h]
        Cotangents of a, sq, sp after the last step, from whatever comes later.
    gsq, gsp : Tensor [B, n_steps or 1, h]
        Cotangents of what `forward` returned: of every step, or of the last.
    gE : Tensor [B, n_steps] or None
    tape, K, tail, dt, scheme, memory : as given to and returned by `forward`
    sums : Gradients or None
        What the gradients of K and of F's parameters are added to; None if they are not needed.

    Returns
    -------
    la, lsq, lsp : Tensor [B, h], cotangents before the first step
    gdt : Tensor [B, n_steps]
    """
    tail = tail.to(la.dtype)
    n_steps = tape.shape[1]
    gdt = la.new_zeros(la.shape[0], n_steps)
    for t in range(n_steps - 1, -1, -1):
        from_end = n_steps - t
        if from_end <= gsq.shape[1]:
            lsq, lsp = lsq + gsq[:, -from_end], lsp + gsp[:, -from_end]
        dt_t = dt[:, t, None]
        for i in range(len(scheme) - 1, -1, -1):
            kick, drift = scheme[i]
            saved = tape[:, t, i]
            point = evaluate(tail, saved)[0] if memory == "recompute" or not tail.weights else Point.from_tape(tail, saved)
            delta = point.g[0].expand_as(la) * (tail.activation.derivatives(point.a[0])[1] if tail.weights else 1.0)
            u = torch.zeros_like(la)
            if kick:
                u = u - kick * (lsp + la @ K)
                if sums is not None:
                    sums.K.addmm_(la.T, dt_t * delta, alpha=-kick)
            if drift:
                u = u + drift * (lsq + la @ K.T)
                if sums is not None:
                    sums.K.addmm_((dt_t * delta).T, la, alpha=drift)
            gdt[:, t] += (u * delta).sum(-1)
            la = la + adjoint(tail, point, dt_t * u, gE[:, t] if gE is not None and i == 0 else None, sums)
    return la, lsq, lsp, gdt
