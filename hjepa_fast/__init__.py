"""Fast Hamiltonian world models in PyTorch: whole rollouts of an MLP Hamiltonian, and the H-JEPA system around them."""

from . import waiting as waiting  # before torch is loaded

# isort: split
from . import diagnostics
from .api import Rollout, Solve, available_backends, energy, leapfrog, rollout
from .bit_reversible import BitReversible
from .integrators import EulerIntegrator, SymplecticIntegrator
from .matching import gradient, step_residual, vector_field
from .mechanical import Cholesky, Diagonal, MechanicalHNN
from .models import BaselineMLP, LatentHNN, SeparableHNN
from .ports import PortHNN
from .sharding import replicated_scalars
from .terms import Hamiltonian, Held, Quadratic, Separable, SumHNN, Term
from .times import odeint

__version__ = "0.1.0"
__all__ = [
    "BaselineMLP",
    "BitReversible",
    "Cholesky",
    "Diagonal",
    "EulerIntegrator",
    "Hamiltonian",
    "Held",
    "LatentHNN",
    "MechanicalHNN",
    "PortHNN",
    "Quadratic",
    "Rollout",
    "Separable",
    "SeparableHNN",
    "Solve",
    "SumHNN",
    "SymplecticIntegrator",
    "Term",
    "available_backends",
    "diagnostics",
    "energy",
    "gradient",
    "leapfrog",
    "odeint",
    "replicated_scalars",
    "rollout",
    "step_residual",
    "vector_field",
]
