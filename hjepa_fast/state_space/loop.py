"""Steps on states z = (q, p) and their adjoints, in PyTorch operations: any device, any dtype.

With the vector field f = (Hp, -Hq), a sub-step of `schemes.py` is, for c = dt,

    y  = z + c b f(y),     b = implicit drift on q, implicit kick on p
    z <- z + c a f(y),     a = drift on q, kick on p

and with mixes f(y) in the second line has the earlier ones added. Its adjoint, with S the Hessian of H at y and
J f = (f_p, -f_q): a cotangent w of f(y) gives y that of nu = -S J w. From l of the new z it is w = c (a l + b nu), which is
solved in w as the point is solved in y, and z gets l + nu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..hidden_space.fixed_point import EXTRAPOLATION, Solver, fixed_point
from ..schemes import SubStep
from .equations import Point, Saved, Sums
from .system import System


class Rolled(NamedTuple):
    """What `forward` returns."""

    states: Tensor
    """[B, n_steps + 1, 2d], z0 first."""
    tape: Tensor
    """[B, n_steps, sub-steps, width]: each point and f there, 4d numbers, and with "store" what `equations.Saved` has; none
    unless kept."""
    residual: Tensor
    """[B, n_steps], the largest of each step, and `evaluations` of the gradient in its implicit sub-steps, int32; [B, 0] if
    there are none."""
    evaluations: Tensor


def coefficients(stage: SubStep, like: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of a sub-step, [2d]."""
    d = like.shape[1] // 2

    def both(of_q: float, of_p: float) -> Tensor:
        # made on the device: a copy of the host's numbers would wait for it
        return torch.cat((like.new_full((d,), of_q), like.new_full((d,), of_p)))

    return both(stage.drift, stage.kick), both(stage.implicit_drift, stage.implicit_kick)


def _field(stage: SubStep, mixes: bool, point: Point) -> tuple[Point, Tensor]:
    """The point, and what of f a sub-step needs there, [B, 2d], with zeros for the rest."""
    both, zero = stage.implicit or mixes, torch.zeros_like(point.p)
    of_p = point.of_p if both or stage.drift else zero
    return point, torch.cat((of_p, -point.of_q() if both or stage.kick else zero), dim=1)


def forward(
    system: System, z: Tensor, dt: Tensor, scheme: Sequence[SubStep], n_steps: int, memory: str, solver: Solver
) -> Rolled:
    """Roll z [B, 2d] forward; dt is [1 or B, n_steps], memory "none", "recompute" or "store"."""
    states, tape, residuals, evaluations = [z], [], [], []
    moves: list[list[Tensor]] = [[] for _ in scheme]  # of each sub-step's point, in the last few steps
    moved = [coefficients(stage, z) for stage in scheme]
    mixes = any(stage.mix for stage in scheme)
    for t in range(n_steps):
        c = dt[:, t, None]
        fields: list[Tensor] = []
        for i, (stage, (a, b)) in enumerate(zip(scheme, moved, strict=True)):
            if stage.implicit:
                start = z + sum(k * move for k, move in zip(EXTRAPOLATION[len(moves[i])], moves[i], strict=True))
                follow = partial(_follow, system, stage, z, c * b)
                (y, point, f, move), residual, count = fixed_point(follow, start, 1.0, solver)
                moves[i] = [move, *moves[i]][: len(EXTRAPOLATION) - 1]
                residuals.append(residual)
                evaluations.append(count)
            else:
                y, (point, f) = z, _field(stage, mixes, Point(system, z))
            if memory != "none":
                tape += [y, f, *([point.tape()] if memory == "store" else [])]
            z = z + c * a * mixed(stage, f, fields)
            fields.append(f)
        states.append(z)
    none, by_step = z.new_empty(len(z), 0), (n_steps, -1)
    width = tape_width(system, memory)
    return Rolled(
        torch.stack(states, 1),
        torch.cat(tape, dim=1).unflatten(1, (n_steps, len(scheme), width))
        if tape
        else z.new_empty(len(z), n_steps, len(scheme), width),
        torch.stack(residuals, 1).unflatten(1, by_step).amax(2) if residuals else none,
        torch.stack(evaluations, 1).unflatten(1, by_step).sum(2, dtype=torch.int32) if evaluations else none.int(),
    )


def _follow(
    system: System, stage: SubStep, z: Tensor, cb: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Tensor, Point, Tensor, Tensor]]:
    """z + c b f(y); y, the point there, f(y) and c b f(y)."""
    point, f = _field(stage, False, Point(system, y))
    move = cb * f
    return z + move, (y, point, f, move)


def tape_width(system: System, memory: str) -> int:
    """Numbers kept a sub-step and sample."""
    return {"none": 0, "recompute": 4 * system.form.d, "store": 4 * system.form.d + sum(system.saved_widths())}[memory]


def mixed(stage: SubStep, f: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    for weight, other in zip(stage.mix, earlier, strict=False):
        f = f + weight * other
    return f


def _divided(system: System, tape: Tensor) -> tuple[Tensor, Tensor, Saved | None]:
    """A point, f there, and what restores the rest, of one sub-step's tape."""
    width = 2 * system.form.d
    y, f, rest = tape.split([width, width, tape.shape[1] - 2 * width], dim=1)
    return y, f, Saved.on(system, rest) if rest.shape[1] else None


def turned(w: Tensor) -> tuple[Tensor, Tensor]:
    """-J w as its halves: the cotangent of (Hq, Hp) from that of f."""
    of_q, of_p = w.chunk(2, dim=1)
    return -of_p, of_q


def backward(
    system: System,
    cotangent: Tensor,
    g_states: Tensor | None,
    tape: Tensor,
    dt: Tensor,
    scheme: Sequence[SubStep],
    solver: Solver,
    sums: Sums | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `forward`.

    Parameters
    ----------
    cotangent : Tensor [B, 2d], of the last state from whatever comes later
    g_states : Tensor [B, n_steps, 2d] or None, of the states after each step
    sums : what the parameters' gradients are added to, or None

    Returns
    -------
    The cotangent of the first state; gdt [B, n_steps]; residual [B], the largest of the implicit sub-steps' equations
    """
    n_steps = tape.shape[1]
    later = cotangent
    gdt, worst = later.new_zeros(len(later), n_steps), later.new_zeros(len(later))
    moved = [coefficients(stage, later) for stage in scheme]
    mixes = any(stage.mix for stage in scheme)
    for t in range(n_steps - 1, -1, -1):
        if g_states is not None:
            later = later + g_states[:, t]
        c = dt[:, t, None]
        points, fields, saved = zip(*[_divided(system, tape[:, t, i]) for i in range(len(scheme))], strict=True)
        given: list[tuple[SubStep, Tensor]] = []
        for i in range(len(scheme) - 1, -1, -1):
            stage, (a, b), f = scheme[i], moved[i], fields[i]
            u = a * later
            gdt[:, t] += (u * mixed(stage, f, fields[:i])).sum(1)
            w = own = c * u
            for other, v in given:
                if i < len(other.mix):
                    w = w + other.mix[i] * v
            given.append((stage, own))
            point, _ = _field(stage, mixes, Point(system, points[i], saved[i]))
            if stage.implicit:

                def follow(x: Tensor, w: Tensor = w, cb: Tensor = c * b, point: Point = point) -> tuple[Tensor, Tensor]:
                    return w + cb * point.adjoint(*turned(x), None, None), x

                w, residual, _ = fixed_point(follow, w, torch.finfo(w.dtype).tiny, solver)
                worst = torch.maximum(worst, residual)
            of_q, of_p = turned(w)
            whole = stage.implicit or mixes
            nu = point.adjoint(of_q if whole or stage.kick else None, of_p if whole or stage.drift else None, None, sums)
            if stage.implicit:
                gdt[:, t] += (b * nu * f).sum(1)
            later = later + nu
    return later, gdt, worst


def gradient(system: System, z: Tensor) -> Tensor:
    """grad H at z, [B, 2d]."""
    point = Point(system, z)
    return torch.cat((point.of_q(), point.of_p), dim=1)


def gradient_backward(system: System, z: Tensor, v: Tensor | None, e: Tensor | None, sums: Sums | None) -> Tensor:
    """The adjoint of `gradient`, for cotangents [B, 2d] and [B]: that of z; the parameters' is added to `sums`."""
    point = Point(system, z)
    if v is None:
        return point.adjoint(None, None, e, sums)
    point.of_q()
    vq, vp = v.chunk(2, dim=1)
    return point.adjoint(vq, vp, e, sums)
