"""The names that arguments take, for type checkers: a misspelt one is seen before anything runs."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Backend = Literal["auto", "reference", "torch", "cpp", "triton", "cuda"]
Integrator = Literal[
    "leapfrog", "implicit-leapfrog", "implicit-midpoint", "symplectic-euler", "yoshida4", "suzuki4", "yoshida6",
    "yoshida4-midpoint", "suzuki4-midpoint", "yoshida6-midpoint", "tao", "euler", "rk4",
]  # fmt: skip
Memory = Literal["store", "recompute", "checkpoint", "reversible"]
States = Literal["all", "final"]
StepScheme = Literal["implicit-midpoint", "symplectic-euler", "leapfrog", "euler"]
"""Of `step_residual`."""
Unconverged = Literal["raise", "flag"]


class TrajectoryOptions(TypedDict, total=False):
    """What `hjepa_fast.rollout` takes by name, but for what a `SymplecticIntegrator` has itself, and `energy`."""

    states: States
    memory: Memory
    tolerance: float | None
    max_evaluations: int
    unconverged: Unconverged
    omega: float
    control: Tensor | None
    condition: Tensor | None


class Options(TrajectoryOptions, total=False):
    """What `hjepa_fast.rollout` takes by name, but for `energy`, which decides what it returns."""

    integrator: Integrator
    backend: Backend
