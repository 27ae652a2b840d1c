"""Fast Hamiltonian world models in PyTorch: whole rollouts of an MLP Hamiltonian, and the H-JEPA system around them."""

from .api import Rollout, backends, energy, leapfrog, rollout
from .integrators import EulerIntegrator, SymplecticIntegrator
from .models import BaselineMLP, LatentHNN, SeparableHNN

__version__ = "0.1.0"
__all__ = [
    "BaselineMLP",
    "EulerIntegrator",
    "LatentHNN",
    "Rollout",
    "SeparableHNN",
    "SymplecticIntegrator",
    "backends",
    "energy",
    "leapfrog",
    "rollout",
]
