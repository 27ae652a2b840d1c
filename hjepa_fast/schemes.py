"""Integrators as lists of sub-steps; every backend runs the same lists.

A sub-step evaluates one gradient, at a point of its own, and moves the state with it. In the hidden space, where
a = z W^T + b, delta = grad F and K = Wp Wq^T (see `backends/torch.py`), with c = dt:

    y  = a + c delta(y) (id K - ik K^T)                 the point; y = a where both are zero
    a <- a + c delta(y) (drift K - kick K^T)            that is, p <- p - kick c Hq(y) and q <- q + drift c Hp(y)

This covers every one-stage symplectic method and all their compositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class SubStep(NamedTuple):
    """One gradient evaluation and the moves made with it, in units of dt."""

    kick: float
    drift: float
    implicit_kick: float = 0.0
    """ik: how far the point itself is kicked by its own gradient."""
    implicit_drift: float = 0.0
    """id: how far the point itself drifts by its own gradient."""
    mix: tuple[float, ...] = ()
    """Weights of the gradients before this one in the same step, the first one first: the moves are made with delta(y) plus
    these (Runge-Kutta methods)."""

    @property
    def implicit(self) -> bool:
        return self.implicit_kick != 0 or self.implicit_drift != 0

    def scaled(self, factor: float) -> SubStep:
        return SubStep(
            factor * self.kick, factor * self.drift, factor * self.implicit_kick, factor * self.implicit_drift, self.mix
        )


class Properties(NamedTuple):
    """What is known of a method, `order` being that of its global error."""

    order: int
    symplectic: bool
    reversible: bool
    """A step by -dt undoes a step by dt."""


class Scheme(NamedTuple):
    """An integrator."""

    stages: tuple[SubStep, ...]
    general: Properties
    """For any H."""
    separable: Properties
    """For H = T(p) + V(q)."""
    source: str

    @property
    def implicit(self) -> bool:
        return any(stage.implicit for stage in self.stages)

    @property
    def mixes(self) -> bool:
        return any(stage.mix for stage in self.stages)


def compose(base: Scheme, factors: Sequence[float], order: int, source: str) -> Scheme:
    """Steps of `base` by factors[i] dt, one after the other (Hairer, Lubich, Wanner, Geometric Numerical Integration, II.4)."""
    stages = tuple(stage.scaled(factor) for factor in factors for stage in base.stages)
    general = base.general._replace(order=order)
    return Scheme(stages, general, base.separable._replace(order=order), source)


def inverse(stages: Sequence[SubStep]) -> tuple[SubStep, ...]:
    """The stages that undo these when run with -dt: the same points in reverse order."""
    return tuple(
        SubStep(s.kick, s.drift, s.kick - s.implicit_kick, s.drift - s.implicit_drift, s.mix) for s in reversed(stages)
    )


_LEAPFROG = Scheme(
    (SubStep(0.5, 0.0), SubStep(0.0, 1.0), SubStep(0.5, 0.0)),
    general=Properties(1, symplectic=False, reversible=False),
    separable=Properties(2, symplectic=True, reversible=True),
    source="H-JEPA, Algorithm 1: kick, drift, kick. Stormer-Verlet if H = T(p) + V(q)",
)
_IMPLICIT_LEAPFROG = Scheme(
    (SubStep(0.5, 0.5, implicit_kick=0.5), SubStep(0.5, 0.5, implicit_drift=0.5)),
    general=Properties(2, symplectic=True, reversible=True),
    separable=Properties(2, symplectic=True, reversible=True),
    source="Stormer-Verlet for any H: Hairer, Lubich, Wanner, Geometric Numerical Integration, VI.3, (3.4)",
)
_IMPLICIT_MIDPOINT = Scheme(
    (SubStep(1.0, 1.0, 0.5, 0.5),),
    general=Properties(2, symplectic=True, reversible=True),
    separable=Properties(2, symplectic=True, reversible=True),
    source="the implicit midpoint rule: Hairer, Lubich, Wanner, Geometric Numerical Integration, VI.4",
)
_TRIPLE = 1 / (2 - 2 ** (1 / 3))
YOSHIDA_4 = (_TRIPLE, 1 - 2 * _TRIPLE, _TRIPLE)
_QUINTUPLE = 1 / (4 - 4 ** (1 / 3))
SUZUKI_4 = (_QUINTUPLE, _QUINTUPLE, 1 - 4 * _QUINTUPLE, _QUINTUPLE, _QUINTUPLE)
_A = (0.78451361047755726382, 0.23557321335935813368, -1.17767998417887100695)
YOSHIDA_6 = (*_A, 1 - 2 * sum(_A), *reversed(_A))
_COMPOSITIONS = {
    "yoshida4": (YOSHIDA_4, 4, "Yoshida, Phys. Lett. A 150, 262 (1990), the triple jump"),
    "suzuki4": (SUZUKI_4, 4, "Suzuki, Phys. Lett. A 146, 319 (1990): five steps, none longer than 0.66 dt"),
    "yoshida6": (YOSHIDA_6, 6, "Yoshida, Phys. Lett. A 150, 262 (1990), order 6, solution A"),
}

SCHEMES: dict[str, Scheme] = {
    "leapfrog": _LEAPFROG,
    "implicit-leapfrog": _IMPLICIT_LEAPFROG,
    "implicit-midpoint": _IMPLICIT_MIDPOINT,
    "symplectic-euler": Scheme(
        (SubStep(1.0, 1.0, implicit_kick=1.0),),
        general=Properties(1, symplectic=True, reversible=False),
        separable=Properties(1, symplectic=True, reversible=False),
        source="implicit in p: Hairer, Lubich, Wanner, Geometric Numerical Integration, VI.3, (3.1)",
    ),
    **{
        name: compose(_IMPLICIT_LEAPFROG, factors, order, f"{source}, of implicit-leapfrog steps")
        for name, (factors, order, source) in _COMPOSITIONS.items()
    },
    **{
        f"{name}-midpoint": compose(_IMPLICIT_MIDPOINT, factors, order, f"{source}, of implicit midpoint steps")
        for name, (factors, order, source) in _COMPOSITIONS.items()
    },
    "tao": Scheme(
        (),
        general=Properties(2, symplectic=False, reversible=False),
        separable=Properties(2, symplectic=False, reversible=False),
        source="Tao, Phys. Rev. E 94, 043303 (2016), explicit; symplectic and reversible for two coupled copies of (q, p), "
        "which start equal and whose mean is the state",
    ),
    "euler": Scheme(
        (SubStep(1.0, 1.0),),
        general=Properties(1, symplectic=False, reversible=False),
        separable=Properties(1, symplectic=False, reversible=False),
        source="forward Euler, z + dt J grad H",
    ),
    "rk4": Scheme(
        (
            SubStep(1 / 2, 1 / 2),
            SubStep(1 / 2, 1 / 2, mix=(-1.0,)),
            SubStep(1.0, 1.0, mix=(0.0, -1 / 2)),
            SubStep(1 / 6, 1 / 6, mix=(1.0, 2.0, -4.0)),
        ),
        general=Properties(4, symplectic=False, reversible=False),
        separable=Properties(4, symplectic=False, reversible=False),
        source="the classical Runge-Kutta method of order 4",
    ),
}


def for_separable(scheme: Scheme) -> tuple[SubStep, ...] | None:
    """The same method as explicit kicks and drifts where H = T(p) + V(q), or None if it stays implicit there."""
    return explicit_moves(scheme.stages)


def explicit_moves(stages: Sequence[SubStep]) -> tuple[SubStep, ...] | None:
    """These sub-steps as explicit ones where H = T(p) + V(q), or None if they stay implicit there.

    Hq then knows nothing of p nor Hp of q, so a point that is kicked as far as the state is needs no equation: the kick
    comes first and the drift follows; and the other way round.
    """
    moves: list[SubStep] = []
    for s in stages:
        if s.mix:
            return None
        if not s.implicit:
            moves.append(s)
        elif s.implicit_drift == 0 and s.implicit_kick == s.kick:
            moves += [SubStep(s.kick, 0.0), SubStep(0.0, s.drift)]
        elif s.implicit_kick == 0 and s.implicit_drift == s.drift:
            moves += [SubStep(0.0, s.drift), SubStep(s.kick, 0.0)]
        else:
            return None
    merged: list[SubStep] = []
    for s in moves:
        last = merged[-1] if merged else None
        if last and s.kick == last.kick == 0:
            merged[-1] = SubStep(0.0, last.drift + s.drift)
        elif last and s.drift == last.drift == 0:
            merged[-1] = SubStep(last.kick + s.kick, 0.0)
        else:
            merged.append(s)
    return tuple(merged) or None
