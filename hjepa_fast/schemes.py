"""Explicit integrators as lists of kicks and drifts; every backend runs the same lists."""

from __future__ import annotations

from typing import NamedTuple


class SubStep(NamedTuple):
    """One gradient evaluation at (q, p), then p <- p - kick dt Hq and q <- q + drift dt Hp, both with that gradient."""

    kick: float
    drift: float


SCHEMES: dict[str, tuple[SubStep, ...]] = {
    # H-JEPA, Algorithm 1. Stormer-Verlet if H = T(p) + V(q): then symplectic, reversible, order 2. For any other H
    # it is neither symplectic nor reversible, and of order 1.
    "leapfrog": (SubStep(0.5, 0.0), SubStep(0.0, 1.0), SubStep(0.5, 0.0)),
    # Forward Euler, z + dt J grad H. Order 1, not symplectic, not reversible.
    "euler": (SubStep(1.0, 1.0),),
}
