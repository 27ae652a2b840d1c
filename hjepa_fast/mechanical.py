"""Mechanical systems H(q, p) = p^T M^-1(q) p / 2 + V(q), whose coordinates may be angles.

    hjepa_fast.MechanicalHNN(V, mass=hjepa_fast.Cholesky(net), angles=(0, 2))

The energy is not linear in q before a first layer, so there is no hidden space: a rollout runs on the states, with the
gradient and its adjoint written out (see `state_space`). Symplectic ODE-Net (Zhong, Dey, Chakraborty, ICLR 2020) is this with a
control: see docs/hamiltonians.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import hamiltonian, reader, validation
from .activations import Activations
from .errors import NotFusedError
from .state_space import system
from .state_space.system import DIAGONALS, Form, Layers, System
from .terms import Term, as_term, column, layers_of, with_activations


class _Mass(nn.Module, ABC):
    """M^-1 from the entries y of a network of q's features, or of a parameter."""

    kind: str
    _is_part = True

    def __init__(
        self,
        net: int | nn.Module | Sequence[Any],
        activation: Any = None,
        *,
        diagonal: str = "softplus",
        epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        validation.check_choice(diagonal, DIAGONALS, "diagonal")
        self.diagonal, self.epsilon = diagonal, validation.as_number(epsilon, "epsilon")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, found {epsilon}")
        self.net: nn.Module | None = None
        self.heads: nn.Sequential | None = None
        self.entries: nn.Parameter | None = None
        if isinstance(net, (int, float)) or not isinstance(net, (nn.Module, Sequence)):
            if activation is not None:
                raise ValueError("a constant mass has no activation")
            d = validation.as_count(net, f"the size of {name}", least=1)
            start = torch.zeros(self._n_entries(d))
            start[:d] = math.log(math.expm1(1.0)) if diagonal == "softplus" else 1.0  # M^-1 = (1 + epsilon) I
            self.entries = nn.Parameter(start)
        elif isinstance(net, nn.Module):
            if activation is not None:
                raise ValueError("a network holds its activations, so none is to be given beside it")
            self.net = net
        else:
            layers = list(net)
            if layers and not isinstance(layers[-1], nn.Module):
                self.heads = nn.Sequential(*layers_of(layers.pop()))
                stand_in = nn.Linear(1, 1, device="meta")
                self.net = nn.Sequential(*with_activations([*layers_of(layers), stand_in], activation)[:-1])
            else:
                self.net = nn.Sequential(*with_activations(layers_of(layers), activation))

    @abstractmethod
    def _n_entries(self, d: int) -> int:
        """Entries of d coordinates."""

    @abstractmethod
    def _size(self, n: int) -> int:
        """d of n entries."""

    def _entries_at(self, x: Tensor) -> Tensor:
        """y of features x: [..., n] to [..., n_entries], or [n_entries]."""
        if self.entries is not None:
            return self.entries.to(x.dtype)
        assert self.net is not None
        y: Tensor = self.net(x)
        return y if self.heads is None else torch.cat([head(y) for head in self.heads], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """M^-1 of features x: [..., n] to [..., d, d], or [d, d] of a constant mass."""
        return system.inverse_mass(self.kind, self.diagonal, self.epsilon, self._entries_at(x))

    def read(self) -> tuple[int, Layers | None, Tensor | None]:
        """d, and the network's layers or the constant entries.

        Raises
        ------
        NotFusedError, TypeError, ValueError
            No network that can be read; a number of outputs that is none of M^-1's.
        """
        owner = type(self).__name__
        reader.prove(self)
        if type(self).forward is not _Mass.forward or type(self)._entries_at is not _Mass._entries_at:
            raise NotFusedError(
                f"{owner} has a forward of its own where that of hjepa_fast.{self.kind.capitalize()} gives M^-1"
            )
        if self.entries is not None:
            return self._size(self.entries.numel()), None, self.entries
        assert self.net is not None
        if self.heads is None:
            reader.prove(self.net)
            layers = Layers(*reader.read_layers(reader.sequential_of(self.net), owner))
        else:
            layers = self._with_heads(owner)
        return self._size(layers.weights[-1].shape[0]), layers, None

    def _with_heads(self, owner: str) -> Layers:
        """The layers, with the last ones side by side as one."""
        assert isinstance(self.net, nn.Sequential)
        assert self.heads is not None
        reader.prove_layers(self.net, owner)
        reader.prove_layers(self.heads, f"{owner}.heads")
        body = reader.layers_of(self.net, owner)
        found = [
            reader.read_listed([*body, (f"heads.{key}", head)], owner) for key, head in self.heads._modules.items() if head
        ]
        weights, biases, activation = found[0]
        last = torch.cat([own[0][-1] for own in found]), torch.cat([own[1][-1] for own in found])
        return Layers((*weights[:-1], last[0]), (*biases[:-1], last[1]), activation)


class Diagonal(_Mass):
    """M^-1(q) = diag(s(y) + epsilon), for entries y that a network of q gives, or constant ones.

    Parameters
    ----------
    net : int, nn.Module, or a sequence of layers
        d: a learned constant, M^-1 = (1 + epsilon) I at first. Or a network of q's features with d outputs, as `Term` takes it.
        The last of a sequence may be a sequence of Linear layers, whose outputs stand side by side.
    activation : as for `Hamiltonian`, for a sequence of layers
    diagonal : str
        s: "softplus", which keeps M^-1 positive, or "raw" for the identity, with which nothing does.
    epsilon : float
        >= 0.

    Raises
    ------
    TypeError, ValueError
        Another diagonal; a size or epsilon that cannot be used.
    """

    kind = "diagonal"

    def _n_entries(self, d: int) -> int:
        return d

    def _size(self, n: int) -> int:
        return n


class Cholesky(_Mass):
    """M^-1(q) = L(q) L(q)^T + epsilon I, for a lower triangular L of entries y that a network of q gives, or constant ones.

    The entries are L's diagonal, L_ii = s(y_i), then what is below it, row by row: L_21, L_31, L_32, L_41, ...

    Parameters
    ----------
    net : int, nn.Module, or a sequence of layers
        d: a learned constant, M^-1 = (1 + epsilon) I at first. Or a network of q's features with d (d + 1) / 2 outputs, as
        `Term` takes it. The last of a sequence may be a sequence of Linear layers, whose outputs stand side by side.
    activation : as for `Hamiltonian`, for a sequence of layers
    diagonal : str
        s: "softplus", which keeps M^-1 positive, or "raw" for the identity (Symplectic ODE-Net), with which it is
        where no y_i of the diagonal is zero, or epsilon is not.
    epsilon : float
        >= 0.

    Raises
    ------
    TypeError, ValueError
        Another diagonal; a size or epsilon that cannot be used.
    """

    kind = "cholesky"

    def _n_entries(self, d: int) -> int:
        return d * (d + 1) // 2

    def _size(self, n: int) -> int:
        d = (math.isqrt(8 * n + 1) - 1) // 2
        if d * (d + 1) // 2 != n:
            raise ValueError(
                f"a network of Cholesky has d (d + 1) / 2 outputs (1, 3, 6, 10, ...), found {n}; {d * (d + 1) // 2} for d = {d}"
            )
        return d


class MechanicalHNN(nn.Module):
    """H(q, p) = p^T M^-1(q) p / 2 + V(q).

    Parameters
    ----------
    V : nn.Module, Term, or a sequence of layers, or None
        The potential, a network of q's features with one output: what `Term` takes, or a term with an activation or a factor of
        its own. None for V = 0.
    mass : Cholesky, Diagonal or None
        None for M = I.
    angles : sequence of int
        Coordinates that are angles, from 0 on. The networks see features of q: the coordinates that are no angles, then the
        angles' cosines, then their sines, each in the order of the coordinates: [q_1, cos q_0, cos q_2, sin q_0,
        sin q_2] for three coordinates and angles (0, 2). Without angles, q.
    activation : as for `Hamiltonian`, of V where that is a sequence of layers

    Attributes
    ----------
    d : int
        Number of coordinates.

    Raises
    ------
    TypeError, ValueError
        Networks that cannot be read (`NotFusedError`) or do not fit each other; angles that are no coordinates.

    Notes
    -----
    Every function of the library takes it. Without angles, and with a constant diagonal mass or none, it is a sum of terms,
    with all that there is for those. Otherwise a rollout runs on the states: in C++ or in PyTorch operations, on a GPU always
    these, with every integrator but "tao", which nested autograd runs, and every `memory` but "reversible". "recompute" keeps
    4d numbers a sub-step and sample, and so does "store" in C++ where it takes no longer. H needs M's inverse alone.
    """

    def __init__(
        self,
        V: nn.Module | Sequence[nn.Module] | None,
        mass: Cholesky | Diagonal | None = None,
        angles: Sequence[int] = (),
        *,
        activation: Any = None,
    ) -> None:
        super().__init__()
        if mass is not None and not isinstance(mass, _Mass):
            raise TypeError(f"mass must be hjepa_fast.Cholesky, hjepa_fast.Diagonal or None, found {type(mass).__name__}")
        if activation is not None:
            if V is None or isinstance(V, nn.Module):
                raise ValueError("activation is for V as a sequence of layers; a network holds its own")
            V = Term(V, "q", activation)
        self.V = None if V is None else as_term(V, "q")
        self.mass = mass
        self.angles = _as_angles(angles)
        self.d = self._read().form.d

    def forward(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [..., 1]."""
        q, p = z.chunk(2, dim=-1)
        x = system.features(q, self.angles)
        u = p if self.mass is None else (self.mass(x) @ p[..., None]).squeeze(-1)
        H = 0.5 * (p * u).sum(-1, keepdim=True)
        return H if self.V is None else H + _potential(self.V, x)

    def inverse_mass(self, q: Tensor) -> Tensor:
        """M^-1(q): [..., d] to [..., d, d]."""
        if self.mass is None:
            return torch.eye(self.d, dtype=q.dtype, device=q.device).expand(*q.shape, self.d)
        found: Tensor = self.mass(system.features(q, self.angles))
        return found.expand(*q.shape, self.d)

    def momentum(self, q: Tensor, q_dot: Tensor) -> Tensor:
        """p = M(q) q', [..., d], for data that are velocities.

        Raises
        ------
        ValueError
            M^-1 is not positive definite somewhere; the message has its smallest pivot.
        """
        W = self.inverse_mass(q)
        L, failed = torch.linalg.cholesky_ex(W)
        pivots = L.diagonal(dim1=-2, dim2=-1)
        if bool(failed.any()) or not bool((pivots.isfinite() & (pivots > 0)).all()):
            where = failed.bool() | ~(pivots.isfinite() & (pivots > 0)).all(-1)
            smallest = torch.linalg.eigvalsh(W[where].nan_to_num()).amin().item()
            raise ValueError(
                f"M^-1(q) must be positive definite to have an inverse, found an eigenvalue of {smallest:.1e} or a number that "
                f'is not finite, in {int(where.sum())} of {where.numel()} states; diagonal="softplus" or an epsilon keeps it so'
            )
        return torch.cholesky_solve(q_dot[..., None], L).squeeze(-1)

    def velocity(self, q: Tensor, p: Tensor) -> Tensor:
        """q' = M^-1(q) p, [..., d]."""
        return (self.inverse_mass(q) @ p[..., None]).squeeze(-1)

    def hamiltonian_terms(self) -> list[hamiltonian.Term] | System:
        """A potential and a quadratic form, if it is these alone; else the system, for the loop on states."""
        found = self._read()
        form, entries = found.form, found.entries
        if found.potential is None or form.angles or form.mass_net is not None or form.mass == "cholesky":
            return found
        V = hamiltonian.Term("q", tuple(found.potential.weights), tuple(found.potential.biases), found.potential.activation)
        like = V.weights[0]
        k = like.new_ones(1) if entries is None else system.positive(form.diagonal, entries) + form.epsilon
        return [V, hamiltonian.Term("p", stiffness=k)]

    def _read(self) -> System:
        V: Layers | None = None
        if self.V is not None:
            reader.prove(self.V)
            if type(self.V).forward is not Term.forward:
                raise NotFusedError(f"V is a {reader.name_of(self.V)} with a forward of its own, which no rollout would run")
            (term,) = self.V.hamiltonian_terms()
            if term.n_inputs:
                raise ValueError("V of a MechanicalHNN is of q alone, found one that takes a control or a condition as well")
            assert term.activation is not None
            V = Layers(term.weights, term.biases, term.activation)
        kind, net, entries, d = "identity", None, None, None
        diagonal, epsilon = "softplus", 0.0
        if self.mass is not None:
            kind, diagonal, epsilon = self.mass.kind, self.mass.diagonal, self.mass.epsilon
            d, net, entries = self.mass.read()
        if d is None and V is None:
            raise ValueError("a MechanicalHNN without V has a mass, which says how many coordinates there are; found neither")
        if d is None:
            assert V is not None
            d = V.weights[0].shape[1] - len(self.angles)
        self._check(d, V, net, entries)
        return System(Form(d, self.angles, _shape_of(V), kind, _shape_of(net), diagonal, epsilon), V, net, entries)

    def _check(self, d: int, V: Layers | None, net: Layers | None, entries: Tensor | None) -> None:
        if d < 1 or any(i >= d for i in self.angles):
            raise ValueError(f"angles must be coordinates from 0 to d - 1, with d = {d} here; found {self.angles}")
        wanted = d + len(self.angles)
        for name, layers in (("V", V), ("the mass network", net)):
            if layers is not None and layers.weights[0].shape[1] != wanted:
                raise ValueError(
                    f"{name} must take {wanted} numbers, the features of {d} coordinates with {len(self.angles)} angles; found "
                    f"{layers.weights[0].shape[1]}"
                )
        tensors = [t for layers in (V, net) if layers for t in layers.tensors] + ([] if entries is None else [entries])
        for what in ("dtype", "device"):
            values = {str(getattr(t, what)) for t in tensors}
            if len(values) > 1:
                raise ValueError(f"V and the mass must share one {what}, found {', '.join(sorted(values))}")


def _shape_of(layers: Layers | None) -> tuple[int, Activations] | None:
    return None if layers is None else (len(layers.weights), layers.activation)


def _potential(V: Term, x: Tensor) -> Tensor:
    """V at features x: [..., n] to [..., 1]. The term itself would take them for z."""
    value = column(V.net(x), x)
    return value if V.factor is None else value * (V.factor.to(x.dtype) if isinstance(V.factor, Tensor) else V.factor)


def _as_angles(angles: Sequence[int]) -> tuple[int, ...]:
    if isinstance(angles, (int, str)) or not isinstance(angles, Sequence):
        raise TypeError(f"angles must be a sequence of coordinates such as (0, 2), found {angles!r}")
    found = tuple([validation.as_count(i, "an angle") for i in angles])
    if len(set(found)) != len(found):
        raise ValueError(f"angles must be different coordinates, found {found}")
    return tuple(sorted(found))
