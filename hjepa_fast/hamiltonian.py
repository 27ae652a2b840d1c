"""A Hamiltonian as plain tensors: what every backend computes with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reader
from .activations import Activation
from .errors import NotFusedError, warn
from .models import SeparableHNN


class MLPHamiltonian(NamedTuple):
    """H(z) = W_{L+1} s(... s(W_1 z + b_1) ...) + b_{L+1}, a scalar.

    `weights[l]` is [width_{l+1}, width_l], `biases[l]` is [width_{l+1}]; the last width is 1.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Activation

    @property
    def latent_dim(self) -> int:
        return self.weights[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        *hidden, (w_out, b_out) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            z = self.activation(F.linear(z, weight, bias))
        return F.linear(z, w_out, b_out).squeeze(-1)


class Term(NamedTuple):
    """A function of q or of p alone: an MLP (no layers: zero) plus the quadratic form (k . x^2) / 2 (None: zero)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Activation
    stiffness: Tensor | None
    """k, [d] or [1]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases, *(() if self.stiffness is None else (self.stiffness,)))

    def value(self, x: Tensor) -> Tensor:
        """[..., d] to [...]."""
        value = MLPHamiltonian(self.weights, self.biases, self.activation).energy(x) if self.weights else x.new_zeros(())
        return value if self.stiffness is None else value + 0.5 * (self.stiffness * x * x).sum(-1)


class SeparableHamiltonian(NamedTuple):
    """H(q, p) = T(p) + V(q)."""

    V: Term
    T: Term
    latent_dim: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.V.tensors, *self.T.tensors)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        q, p = z.chunk(2, dim=-1)
        return self.T.value(p) + self.V.value(q)


class ModuleHamiltonian:
    """H(z) = module(z), whatever the module computes. Only backend="reference" runs it, by nested autograd."""

    def __init__(self, module: nn.Module, latent_dim: int) -> None:
        self.module, self.latent_dim = module, latent_dim

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.module.parameters(), *self.module.buffers())

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...].

        Raises
        ------
        TypeError, ValueError
            The module gives something else than one number a state.
        """
        rows = z.reshape(-1, z.shape[-1])
        # a graph made by module.compile() has no second derivative
        call = self.module if self.module._compiled_call_impl is None else self.module._call_impl
        try:
            H = call(rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            found = f"{list(rows.shape)} {rows.dtype}"
            raise ValueError(f"{reader.name_of(self.module)} cannot be called with states {found}: {error}") from error
        if not isinstance(H, Tensor):
            raise TypeError(f"a Hamiltonian gives a tensor, {reader.name_of(self.module)} gives {type(H).__name__}")
        if H.shape not in (rows.shape[:1], (len(rows), 1)):
            raise ValueError(
                f"a Hamiltonian gives one number a state, {reader.name_of(self.module)} gives {list(H.shape)} for states "
                f"{list(rows.shape)}"
            )
        return H.reshape(z.shape[:-1])


Hamiltonian = MLPHamiltonian | SeparableHamiltonian | ModuleHamiltonian


def of_any_module(module: nn.Module, z: Tensor, backend: str) -> Hamiltonian:
    """What `from_module` reads, or else the module itself with its own forward, where `backend` leaves that open.

    With "auto" a warning says why nothing faster can be taken.

    Raises
    ------
    TypeError, ValueError
        As for `from_module`, and `NotFusedError` where another backend is asked for by name.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    try:
        return from_module(module)
    except NotFusedError as why:
        if backend not in ("auto", "reference"):
            raise NotFusedError(f'{why}, so backend "{backend}" would compute something else; {_REMEDIES}') from None
        reader.check_takes_z(module)
        if backend == "auto":
            warn(
                f"{why}. Its own forward is differentiated by nested autograd instead, which is exact, and slower by a "
                f'factor; {_REMEDIES}; or pass backend="reference" to take this as it is'
            )
        return ModuleHamiltonian(module, z.shape[-1] if isinstance(z, Tensor) and z.ndim else 0)


_REMEDIES = (
    "for the fused backends let forward return self.net(z) unchanged, with scales and shifts in its Linear layers, or pass the "
    ".net itself, or set forward_is_net = True on the class if the two are equal whatever happens"
)


def from_module(module: nn.Module) -> MLPHamiltonian | SeparableHamiltonian:
    """Read the tensors out of a `SeparableHNN`, or out of any module that is, or holds as `.net`, an MLP Hamiltonian.

    The module's forward is never run on states, so it must be known to compute what the tensors do: see `reader`.

    Raises
    ------
    NotFusedError
        The module is no such network, or computes something else than the layers that were found.
    TypeError, ValueError
        It is no Hamiltonian at all.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    reader.prove(module)
    if not isinstance(module, SeparableHNN):
        return MLPHamiltonian(*reader.read_mlp(module, even=True))
    V = reader.read_mlp(module.potential, even=False)
    T = None if module.kinetic is None else reader.read_mlp(module.kinetic, even=False)
    return SeparableHamiltonian(
        V=Term(*V, module.stiffness),
        T=Term((), (), V[2], V[0][0].new_ones(1)) if T is None else Term(*T, None),
        latent_dim=2 * V[0][0].shape[1],
    )
