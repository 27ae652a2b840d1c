"""Tao's explicit method for a non-separable H in the hidden space (Phys. Rev. E 94, 043303, 2016; order 2).

Two copies (q, p) and (x, y), bound by omega (|q - x|^2 + |p - y|^2) / 2; a step is

    A(dt/2) B(dt/2) C(dt) B(dt/2) A(dt/2)

A is the flow of H(q, y): it moves p and x; B that of H(x, p): it moves q and y; C turns the differences by 2 omega dt. In
the hidden space the copies are aA = a(q, y) and aB = a(x, p), and with M = K - K^T

    A(c)   aB <- aB + c delta(aA) M          B(c)   aA <- aA + c delta(aB) M

The differences are q - x = u1 Wp + u2 Wq and p - y = v1 Wq + v2 Wp. C needs them:

    aA - aB = (q - x) Wq^T - (p - y) Wp^T = u1 K + u2 Gq - v1 K^T - v2 Gp,    Gq = Wq Wq^T,  Gp = Wp Wp^T

What is shown as the state is the mean of the copies. PyTorch operations only, for every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .network import Gradients, Network, adjoint, energy, evaluate

POINTS = 9
"""Rows of h numbers kept a step: aA, aB, aB, aA where they are evaluated; u1, u2, v1, v2 after C; their mean at the end."""


class Grams(NamedTuple):
    """Products of the first layer's halves, [h, h] each: K = Wp Wq^T, Gq = Wq Wq^T, Gp = Wp Wp^T; or their gradients."""

    K: Tensor
    q: Tensor
    p: Tensor

    @classmethod
    def of(cls, Wq: Tensor, Wp: Tensor) -> Grams:
        return cls(Wp @ Wq.T, Wq @ Wq.T, Wp @ Wp.T)

    def difference(self, D: Sequence[Tensor]) -> Tensor:
        """aA - aB from u1, u2, v1, v2."""
        u1, u2, v1, v2 = D
        return u1 @ self.K + u2 @ self.q - v1 @ self.K.T - v2 @ self.p


def _turned(D: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The differences turned: q - x <- cos (q - x) + sin (p - y), p - y <- cos (p - y) - sin (q - x)."""
    u1, u2, v1, v2 = D
    return [cos * u1 + sin * v2, cos * u2 + sin * v1, cos * v1 - sin * u2, cos * v2 - sin * u1]


def forward(
    a: Tensor, grams: Grams, tail: Network, dt: Tensor, n_steps: int, omega: float, with_energy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Roll both copies from a [B, h]; dt [1 or B, n_steps].

    Returns
    -------
    a : Tensor [B, h], the mean of the copies' at the end
    sq, sp : Tensor [B, n_steps, h], of the mean after each step
    energy : Tensor [B, n_steps], F at the mean before each step; [B, 0] if not asked for
    tape : Tensor [B, n_steps, POINTS, h]
    """
    tail = tail.to(a.dtype)
    M = grams.K - grams.K.T
    copies = [a, a]
    sq = sp = torch.zeros_like(a)
    D = [torch.zeros_like(a)] * 4
    sqs, sps, energies, tape = [], [], [], []

    def flow(of: int, c: Tensor) -> None:
        nonlocal sq, sp
        _, delta, _ = evaluate(tail, copies[of])
        tape.append(copies[of])
        step = c * delta
        copies[1 - of] = copies[1 - of] + step @ M
        sq, sp = sq + step / 2, sp - step / 2
        sign = 1 if of else -1
        D[0], D[2] = D[0] + sign * step, D[2] + sign * step

    for t in range(n_steps):
        c, angle = dt[:, t, None] / 2, 2 * omega * dt[:, t, None]
        if with_energy:
            energies.append(energy(tail, (copies[0] + copies[1]) / 2))
        flow(0, c)
        flow(1, c)
        D = _turned(D, angle.cos(), angle.sin())
        turned = [*D]
        mean, half = (copies[0] + copies[1]) / 2, grams.difference(D) / 2
        copies = [mean + half, mean - half]
        flow(1, c)
        flow(0, c)
        tape += [*turned, (copies[0] + copies[1]) / 2]
        sqs.append(sq)
        sps.append(sp)
    return (
        (copies[0] + copies[1]) / 2,
        torch.stack(sqs, 1),
        torch.stack(sps, 1),
        torch.stack(energies, 1) if with_energy else a.new_empty(a.shape[0], 0),
        torch.stack(tape, 1).unflatten(1, (n_steps, POINTS)),
    )


def distance(Wq: Tensor, Wp: Tensor, tail: Network, dt: Tensor, tape: Tensor) -> Tensor:
    """|(q, p) - (x, y)| after each step, [B, n_steps], from a tape."""
    tail = tail.to(tape.dtype)
    _, _, aB, aA, u1, u2, v1, v2, _ = tape.unbind(2)
    shape = aB.shape
    later = evaluate(tail, aB.flatten(0, 1))[1] - evaluate(tail, aA.flatten(0, 1))[1]
    moved = (dt / 2)[:, :, None] * later.view(shape)
    u1, v1 = u1 + moved, v1 + moved
    return torch.cat((u1 @ Wp + u2 @ Wq, v1 @ Wq + v2 @ Wp), dim=2).norm(dim=2)


def backward(
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    a0: Tensor,
    tape: Tensor,
    grams: Grams,
    tail: Network,
    dt: Tensor,
    omega: float,
    sums: Gradients | None,
) -> tuple[Tensor, Grams | None, Tensor]:
    """The adjoint of `forward`.

    Parameters
    ----------
    gsq, gsp : Tensor [B, n_steps or 1, h], cotangents of sq, sp after every step, or the last
    gE : Tensor [B, n_steps + 1] or None, of the energies, the one at the end included
    a0 : Tensor [B, h], at the start
    sums : what gradients of F's parameters are added to, or None

    Returns
    -------
    la : Tensor [B, h], cotangent of a at the start; gradients of the Grams, None without `sums`; gdt [B, n_steps]
    """
    tail = tail.to(a0.dtype)
    n_steps = tape.shape[1]
    M = grams.K - grams.K.T
    zero = torch.zeros_like(a0)
    la = [zero, zero]
    lD = [zero] * 4
    lsq = lsp = zero
    gdt = a0.new_zeros(a0.shape[0], n_steps)
    g_grams = None if sums is None else Grams(*(torch.zeros_like(g) for g in grams))

    def add_energy(mean: Tensor, g: Tensor) -> None:
        nu = adjoint(tail, evaluate(tail, mean)[0], zero, g, sums) / 2
        la[0], la[1] = la[0] + nu, la[1] + nu

    def flow_back(of: int, at: Tensor, c: Tensor, t: int) -> None:
        point, delta, _ = evaluate(tail, at)
        other = la[1 - of]
        u = other @ M.T + (1 if of else -1) * (lD[0] + lD[2]) + (lsq - lsp) / 2
        gdt[:, t] += (u * delta).sum(1) / 2
        if g_grams is not None:
            outer = (c * delta).T @ other
            g_grams.K.add_(outer - outer.T)
        la[of] = la[of] + adjoint(tail, point, c * u, None, sums)

    for t in range(n_steps - 1, -1, -1):
        first, second, third, fourth, *D, mean = tape[:, t].unbind(1)
        from_end = n_steps - t
        if from_end <= gsq.shape[1]:
            lsq, lsp = lsq + gsq[:, -from_end], lsp + gsp[:, -from_end]
        if gE is not None:
            add_energy(mean, gE[:, t + 1])
        c, angle = dt[:, t, None] / 2, 2 * omega * dt[:, t, None]
        flow_back(0, fourth, c, t)
        flow_back(1, third, c, t)
        le, lm = (la[0] - la[1]) / 2, (la[0] + la[1]) / 2
        la = [lm, lm]
        u1, u2, v1, v2 = D
        if g_grams is not None:
            g_grams.K.add_(u1.T @ le - le.T @ v1)
            g_grams.q.add_(u2.T @ le)
            g_grams.p.sub_(v2.T @ le)
        back = (le @ grams.K.T, le @ grams.q, -(le @ grams.K), -(le @ grams.p))
        lD = [x + y for x, y in zip(lD, back, strict=True)]
        gdt[:, t] += 2 * omega * (lD[0] * v2 + lD[1] * v1 - lD[2] * u2 - lD[3] * u1).sum(1)
        lD = _turned(lD, angle.cos(), -angle.sin())
        flow_back(1, second, c, t)
        flow_back(0, first, c, t)
    if gE is not None:
        add_energy(a0, gE[:, 0])
    return la[0] + la[1], g_grams, gdt
