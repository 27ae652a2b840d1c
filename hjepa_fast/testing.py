"""Inputs for tests and benchmarks, made the same way everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .activations import NAMES
from .mechanical import Cholesky, MechanicalHNN
from .models import LatentHNN, SeparableHNN

BOUNDED_SLOPES = tuple(name for name in NAMES if name != "quadratic")
"""Activations whose networks do not overflow however deep they are and however far a rollout goes."""


def make_hnn(
    latent_dim: int,
    hidden_dims: Sequence[int],
    activation: str = "softplus",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> LatentHNN:
    """A random Hamiltonian whose weights and biases are all of order one, so that no term of a gradient is negligible."""
    hnn = LatentHNN(latent_dim, hidden_dims, activation)
    _fill(hnn, seed)
    return hnn.to(dtype)


def make_two_networks(
    latent_dim: int,
    potential_dims: Sequence[int],
    kinetic_dims: Sequence[int],
    activation: str = "softplus",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> SeparableHNN:
    """A random V(q) + T(p), filled like `make_hnn`."""
    hnn = SeparableHNN(latent_dim, potential_dims, kinetic_dims, activation)
    _fill(hnn, seed)
    return hnn.to(dtype)


def make_mechanical(
    d: int, hidden_dims: Sequence[int], activation: str = "tanh", dtype: torch.dtype = torch.float64, seed: int = 0
) -> MechanicalHNN:
    """A random p^T L L^T p / 2 + V of d angles, filled like `make_hnn`."""
    V = [nn.Linear(m, n) for m, n in pairwise((2 * d, *hidden_dims, 1))]
    L = [nn.Linear(m, n) for m, n in pairwise((2 * d, *hidden_dims, d * (d + 1) // 2))]
    model = MechanicalHNN(V, Cholesky(L, activation, diagonal="raw"), range(d), activation=activation)
    _fill(model, seed)
    return model.to(dtype)


def _fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                scale = layer.in_features**-0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.3)


def make_separable_hnn(d: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> LatentHNN:
    """An MLP Hamiltonian that is T(p) + V(q): each of its `2 width` hidden units reads either q or p, of size d."""
    hnn = make_hnn(2 * d, (2 * width,), "softplus", dtype, seed)
    first = hnn.net[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight[:width, d:] = 0
        first.weight[width:, :d] = 0
    return hnn


def make_states(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Standard normal states of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
