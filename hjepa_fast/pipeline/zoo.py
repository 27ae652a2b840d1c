"""The models of the comparison, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..integrators import EulerIntegrator, SymplecticIntegrator
from ..models import BaselineMLP, LatentHNN

Model = SymplecticIntegrator | BaselineMLP
"""A trainable model: `.rollout(z0 [B, d], n_steps)` gives [B, n_steps + 1, d]."""


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table that is trained. `integrator` is None for an unconstrained predictor."""

    title: str
    integrator: str | None = None
    energy_loss: bool = False
    residual: bool = False


MODELS = {
    "hnn": ModelSpec("HNN (full)", integrator="leapfrog", energy_loss=True),
    "hnn-no-energy": ModelSpec("HNN (no energy loss)", integrator="leapfrog"),
    "hnn-euler": ModelSpec("HNN (Euler)", integrator="euler", energy_loss=True),
    "baseline": ModelSpec("Baseline MLP"),
    "baseline-residual": ModelSpec("Residual MLP", residual=True),
}
FULL_MODEL = "hnn"
"""The model whose H measures the energy of predictors that have none of their own."""


def check_models(names: tuple[str, ...]) -> None:
    """Every name must be a known model, and at least one given.

    Raises
    ------
    UsageError
        It is not; the message lists the known ones.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise UsageError(f"unknown model {', '.join(unknown) or '(none given)'}; known: {', '.join(MODELS)}")


def build(name: str, latent_dim: int, dt: float, seed: int, backend: str = "auto") -> Model:
    """A fresh model; models of one kind get the same initial weights from one seed.

    Raises
    ------
    UsageError
        An unknown name, or an odd latent size for a Hamiltonian.
    """
    check_models((name,))
    spec = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.integrator is None:
            return BaselineMLP(latent_dim, residual=spec.residual)
        if latent_dim % 2:
            raise UsageError(f"a Hamiltonian needs latents of even size (z = [q, p]), found {latent_dim}")
        hnn = LatentHNN(latent_dim)
        if spec.integrator == "euler":
            return EulerIntegrator(hnn, dt, backend=backend)
        return SymplecticIntegrator(hnn, dt, integrator=spec.integrator, backend=backend)
