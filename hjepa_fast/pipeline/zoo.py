"""The models of the comparison, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from ..api import choose_backend
from ..errors import UsageError
from ..integrators import DT_BOUNDS, Bounds, EulerIntegrator, SymplecticIntegrator
from ..models import BaselineMLP, LatentHNN, SeparableHNN
from ..schemes import SCHEMES
from .config import OWN_INTEGRATOR

Model = SymplecticIntegrator | BaselineMLP
"""A trainable model: `.rollout(z0 [B, d], n_steps)` gives [B, n_steps + 1, d]."""

MLP, SEPARABLE = "mlp", "separable"
"""Kinds of H: any H(z), or T(p) + V(q)."""


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table that is trained. `hamiltonian` and `integrator` are None for an unconstrained predictor."""

    title: str
    hamiltonian: str | None = None
    integrator: str | None = None
    energy_loss: bool = False
    residual: bool = False


MODELS = {
    "hnn": ModelSpec("HNN (full)", MLP, "leapfrog", energy_loss=True),
    "hnn-no-energy": ModelSpec("HNN (no energy loss)", MLP, "leapfrog"),
    "hnn-euler": ModelSpec("HNN (Euler)", MLP, "euler", energy_loss=True),
    "hnn-implicit": ModelSpec("HNN (implicit leapfrog)", MLP, "implicit-leapfrog", energy_loss=True),
    "hnn-separable": ModelSpec("Separable HNN", SEPARABLE, "leapfrog", energy_loss=True),
    "baseline": ModelSpec("Baseline MLP"),
    "baseline-residual": ModelSpec("Residual MLP", residual=True),
}
FULL_MODEL = "hnn"
"""The model whose H measures the energy of predictors that have none of their own, and whose integrator can be chosen."""
SEPARABLE_WIDTHS = (384, 384, 192)
"""Hidden layers of T and of V: two networks, together within a tenth of a `LatentHNN`'s number of parameters."""


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


def spec_of(name: str, integrator: str = OWN_INTEGRATOR) -> ModelSpec:
    """What a model is; the full model with another integrator than its own, if one is named.

    Raises
    ------
    UsageError
        An unknown model or integrator.
    """
    check_models((name,))
    if integrator != OWN_INTEGRATOR and integrator not in SCHEMES:
        raise UsageError(f"integrator must be {OWN_INTEGRATOR} or one of {', '.join(SCHEMES)}; found {integrator!r}")
    own = MODELS[name]
    if name != FULL_MODEL or integrator in (OWN_INTEGRATOR, own.integrator):
        return own
    return dataclasses.replace(own, title=f"HNN (full, {integrator})", integrator=integrator)


def title(name: str, model: Model) -> str:
    """A model's name for people, which says what the full model's integrator is if it is not its own."""
    return spec_of(name, model.integrator if isinstance(model, SymplecticIntegrator) else OWN_INTEGRATOR).title


def build(name: str, latent_dim: int, dt: float, seed: int, backend: str = "auto", integrator: str = OWN_INTEGRATOR) -> Model:
    """A fresh model; models of one kind get the same initial weights from one seed.

    Raises
    ------
    UsageError
        An unknown name, or what `assemble` refuses.
    """
    return assemble(spec_of(name, integrator), latent_dim, dt, seed, backend)


def check_backend(backend: str, device: torch.device | str) -> None:
    """A backend that is asked for by name must be there for the device.

    Raises
    ------
    UsageError
        It is not; the message says why.
    """
    try:
        choose_backend(backend, torch.empty(1, 2, device=device))
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def assemble(
    spec: ModelSpec, latent_dim: int, dt: float, seed: int, backend: str = "auto", dt_bounds: Bounds | None = DT_BOUNDS
) -> Model:
    """A fresh model of a specification.

    Raises
    ------
    UsageError
        An odd latent size for a Hamiltonian, an unknown kind of H, an integrator that is not there for it, or a step size
        outside its bounds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.integrator is None:
            return BaselineMLP(latent_dim, residual=spec.residual)
        if latent_dim % 2:
            raise UsageError(f"a Hamiltonian needs latents of even size (z = [q, p]), found {latent_dim}")
        usable = _usable(spec.hamiltonian)
        if spec.integrator not in usable:
            raise UsageError(
                f"{spec.title}: integrator {spec.integrator!r} is not there for a {spec.hamiltonian} H; "
                f"expected one of {', '.join(usable)}"
            )
        hnn: nn.Module
        if spec.hamiltonian == SEPARABLE:
            hnn = SeparableHNN(latent_dim, SEPARABLE_WIDTHS, SEPARABLE_WIDTHS)
        else:
            hnn = LatentHNN(latent_dim)
        try:
            if spec.integrator == "euler":
                return EulerIntegrator(hnn, dt, dt_bounds=dt_bounds, backend=backend)
            return SymplecticIntegrator(hnn, dt, dt_bounds=dt_bounds, integrator=spec.integrator, backend=backend)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _usable(hamiltonian: str | None) -> list[str]:
    """Integrators that a kind of H can be rolled out with."""
    if hamiltonian not in (MLP, SEPARABLE):
        raise UsageError(f"unknown kind of Hamiltonian {hamiltonian!r}; known: {MLP}, {SEPARABLE}")
    return list(SCHEMES)
