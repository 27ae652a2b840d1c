"""The networks of H-JEPA: a scalar Hamiltonian, and the unconstrained predictor it is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import inputs
from .activations import NAMES, Activation

GAIN = 0.5
"""Of a Hamiltonian's initial weights, as published."""


class LatentHNN(nn.Module):
    """Hamiltonian neural network H(z) on latents z = [q, p] (Greydanus et al., 2019).

    An MLP with one smooth activation after every hidden layer. Weights are Xavier-normal and biases zero, with the
    published gain of 0.5 by default. The layers are `.net`, an `nn.Sequential`, so state-dict keys are
    `net.0.weight`, `net.0.bias`, `net.2.weight`, ...

    Parameters
    ----------
    latent_dim : int
        Size of z, even: the first half is q, the second p.
    hidden_dims : sequence of int
        Widths of the hidden layers; empty gives a linear H.
    activation : str
        One of `activations.NAMES`.
    control_dim, condition_dim : int
        Sizes of a control u and a condition c, for H(z, u, c): the first layer reads [z, u, c].
    gain : float
        Of the initial weights, > 0.

    Raises
    ------
    ValueError
        An odd or non-positive size, a negative one of a control or condition, an unknown activation, or a gain that is not
        positive.
    """

    def __init__(
        self,
        latent_dim: int = 1024,
        hidden_dims: Sequence[int] = (512, 512, 256),
        activation: str = "softplus",
        control_dim: int = 0,
        condition_dim: int = 0,
        gain: float = GAIN,
    ) -> None:
        super().__init__()
        _check_hamiltonian(latent_dim, activation)
        if min(control_dim, condition_dim) < 0:
            raise ValueError(f"control_dim and condition_dim must be >= 0, found {control_dim} and {condition_dim}")
        self.latent_dim, self.control_dim, self.condition_dim = latent_dim, control_dim, condition_dim
        self.net = _hamiltonian_mlp((latent_dim + control_dim + condition_dim, *hidden_dims, 1), activation, gain)

    def forward(self, z: Tensor, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """H(z, u, c): states [..., latent_dim], with [..., control_dim] and [..., condition_dim], to [..., 1]."""
        if self.control_dim or self.condition_dim or control is not None or condition is not None:
            z = inputs.joined(self, z, control, condition)
        return self.net(z)


class SeparableHNN(nn.Module):
    """Hamiltonian T(p) + V(q), for which the leapfrog method is truly symplectic, reversible and of order 2.

    Initialised like `LatentHNN`.

    Parameters
    ----------
    latent_dim : int
        Size of z = [q, p], even.
    potential_dims : sequence of int
        Widths of the hidden layers of V, the `nn.Sequential` `.potential`.
    kinetic_dims : sequence of int or None
        The same for T, `.kinetic`; None for T(p) = |p|^2 / 2.
    activation : str
        As for `LatentHNN`.
    quadratic : bool
        Add sum_i k_i q_i^2 / 2 to V, with the learnable `.stiffness` k [latent_dim / 2], initially 1. It keeps q bounded.
    gain : float
        As for `LatentHNN`.

    Raises
    ------
    ValueError
        An odd or non-positive size, an unknown activation, or a gain that is not positive.
    """

    def __init__(
        self,
        latent_dim: int = 1024,
        potential_dims: Sequence[int] = (512, 512, 256),
        kinetic_dims: Sequence[int] | None = None,
        activation: str = "softplus",
        quadratic: bool = False,
        gain: float = GAIN,
    ) -> None:
        super().__init__()
        _check_hamiltonian(latent_dim, activation)
        d = latent_dim // 2
        self.latent_dim = latent_dim
        self.potential = _hamiltonian_mlp((d, *potential_dims, 1), activation, gain)
        self.kinetic = None if kinetic_dims is None else _hamiltonian_mlp((d, *kinetic_dims, 1), activation, gain)
        self.stiffness = nn.Parameter(torch.ones(d)) if quadratic else None

    def forward(self, z: Tensor) -> Tensor:
        """H(z): [..., latent_dim] to [..., 1]."""
        q, p = z.chunk(2, dim=-1)
        T = 0.5 * (p * p).sum(-1, keepdim=True) if self.kinetic is None else self.kinetic(p)
        V = self.potential(q)
        return T + (V if self.stiffness is None else V + 0.5 * (self.stiffness * q * q).sum(-1, keepdim=True))


class BaselineMLP(nn.Module):
    """Unconstrained next-latent predictor: z+ = f(z), or z + f(z) with `residual`.

    Parameters
    ----------
    latent_dim : int
        Size of z.
    hidden_dims : sequence of int
        Widths of the hidden layers, each followed by the activation.
    residual : bool
        Predict the change of z instead of z.
    activation : str
        "relu", or one of `activations.NAMES`.

    Raises
    ------
    ValueError
        A non-positive size, or an unknown activation.
    """

    def __init__(
        self,
        latent_dim: int = 1024,
        hidden_dims: Sequence[int] = (512, 512),
        residual: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.residual = residual
        if activation != "relu":
            _check_activation(activation)
        make = nn.ReLU if activation == "relu" else Activation(activation).module
        self.net = _mlp((latent_dim, *hidden_dims, latent_dim), make)

    def forward(self, z: Tensor) -> Tensor:
        """One step: [..., latent_dim] to [..., latent_dim]."""
        return z + self.net(z) if self.residual else self.net(z)

    def rollout(self, z0: Tensor, n_steps: int) -> Tensor:
        """`n_steps` steps from z0 [B, latent_dim]; returns [B, n_steps + 1, latent_dim], z0 first."""
        states = [z0]
        for _ in range(n_steps):
            states.append(self(states[-1]))
        return torch.stack(states, dim=-2)


def _check_hamiltonian(latent_dim: int, activation: str) -> None:
    if latent_dim < 2 or latent_dim % 2:
        raise ValueError(f"latent_dim must be even and positive (z = [q, p]), found {latent_dim}")
    _check_activation(activation)


def _check_activation(activation: str) -> None:
    if activation not in NAMES:
        raise ValueError(f"activation must be one of {', '.join(NAMES)}; found {activation!r}")


def _hamiltonian_mlp(widths: Sequence[int], activation: str, gain: float) -> nn.Sequential:
    """With the published initialisation: Xavier-normal weights, zero biases."""
    if not gain > 0:
        raise ValueError(f"gain must be positive, found {gain}")
    net = _mlp(widths, Activation(activation).module)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=gain)
            nn.init.zeros_(layer.bias)
    return net


def _mlp(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    if min(widths) < 1:
        raise ValueError(f"layer widths must be positive, found {tuple(widths)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])
