"""Models as well-known public repositories lay them out, with the loss that each is trained with, computed twice.

`textbook` computes it as the repository does: nested autograd, a loop over the steps, the repository's order of q and p.
`fused` is what a user of this library writes in its place, for the same batch. Sizes, layouts, losses and batches were read in
the files that the docstrings name; the code is our own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hjepa_fast as hf

Batch = tuple[Tensor, ...]


class Replica(nn.Module, ABC):
    """A model of some repository."""

    @abstractmethod
    def batch(self, rows: int, n_steps: int) -> Batch:
        """Random inputs and targets in the shapes that the repository's training loop gets."""

    @abstractmethod
    def hamiltonian(self) -> nn.Module:
        """What this library is given, made once."""

    @abstractmethod
    def textbook(self, *batch: Tensor) -> Tensor:
        """The training loss by nested autograd."""

    @abstractmethod
    def fused(self, H: nn.Module, *batch: Tensor, backend: str = "auto") -> Tensor:
        """The same by this library, H being `hamiltonian()`."""


def differentiated(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a scalar function at each row of x, itself differentiable."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]


def rotation(dim: int) -> Tensor:
    """J of J (Hq, Hp) = (Hp, -Hq)."""
    return torch.eye(dim).roll(-(dim // 2), 0) * torch.ones(dim).index_fill(0, torch.arange(dim // 2, dim), -1.0)[:, None]


def swapped(x: Tensor) -> Tensor:
    """[p, q] of [q, p], and back."""
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def linears(sizes: Sequence[int], last_bias: bool = True) -> list[nn.Linear]:
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    if not last_bias:
        layers[-1] = nn.Linear(*sizes[-2:], bias=False)
    return layers


def mlp(sizes: Sequence[int], activation: type[nn.Module], last_bias: bool = True) -> nn.Sequential:
    first, *rest = linears(sizes, last_bias)
    return nn.Sequential(first, *(layer for linear in rest for layer in (activation(), linear)))


class HamiltonianNN(Replica):
    """hamiltonian-nn: a tanh network with two outputs, of which the second is the energy of the solenoidal field; q before p,
    no bias at the end; the mean squared difference of time derivatives (`hnn.py`, `nn_models.py`, `experiment-*/train.py`)."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.linear1, self.linear2, self.linear3 = linears((dim, *hidden, 2), last_bias=False)
        self.register_buffer("M", rotation(dim))

    def batch(self, rows: int, n_steps: int) -> Batch:
        return torch.randn(rows, self.linear1.in_features), torch.randn(rows, self.linear1.in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear3(torch.tanh(self.linear2(torch.tanh(self.linear1(x))))).split(1, 1)

    def hamiltonian(self) -> nn.Module:
        return hf.Hamiltonian([self.linear1, self.linear2, self.linear3], torch.tanh, output=1)

    def textbook(self, x: Tensor, x_dot: Tensor) -> Tensor:
        return (x_dot - differentiated(lambda x: self(x)[1], x) @ self.M.T).square().mean()

    def fused(self, H: nn.Module, x: Tensor, x_dot: Tensor, backend: str = "auto") -> Tensor:
        return (x_dot - hf.vector_field(H, x, backend=backend)).square().mean()


class SRNN(Replica):
    """SRNN: H(p, q) = K(p) + P(q), two tanh networks; trajectories [T, B, 2d] with p before q by leapfrog, whose last kick's
    gradient is the next step's first; their mean squared error, the given state included (`src/model.py`,
    `src/run_experiments.py`, `src/script_3body_new`)."""

    dt = 0.1

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.d = dim // 2
        self.K, self.P = (nn.ModuleList(linears((self.d, *hidden, 1))) for _ in range(2))

    def batch(self, rows: int, n_steps: int) -> Batch:
        return (torch.randn(n_steps + 1, rows, 2 * self.d),)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        for layer in self.K[:-1]:
            p = layer(p).tanh_()
        for layer in self.P[:-1]:
            q = layer(q).tanh_()
        return self.K[-1](p) + self.P[-1](q)

    def hamiltonian(self) -> nn.Module:
        return hf.Separable(V=self.P, T=self.K)

    def textbook(self, data: Tensor) -> Tensor:
        p, q = (x.detach().requires_grad_() for x in data[0].split(self.d, dim=1))
        states, dt = torch.empty_like(data), self.dt
        (Hq,) = torch.autograd.grad(self(p, q).sum(), q, create_graph=True)
        for t in range(len(data)):
            states[t, :, : self.d], states[t, :, self.d :] = p, q
            p = p - dt / 2 * Hq
            q = q + dt * torch.autograd.grad(self(p, q).sum(), p, create_graph=True)[0]
            (Hq,) = torch.autograd.grad(self(p, q).sum(), q, create_graph=True)
            p = p - dt / 2 * Hq
        return F.mse_loss(states, data)

    def fused(self, H: nn.Module, data: Tensor, backend: str = "auto") -> Tensor:
        data = swapped(data).transpose(0, 1)
        return F.mse_loss(hf.rollout(H, data[:, 0], self.dt, data.shape[1] - 1, backend=backend).states, data)


class HamJEPA(Replica):
    """HamJEPA: |p|^2 / 2 + c |q|^2 / 2 + s f(q), f a GELU network; leapfrog carries one view on to the other, and with -dt the
    other back; the squared error of q and 0.2 times that of p (`hamjepa/hamiltonian.py`, `hamjepa/integrators.py`,
    `hamjepa/losses.py`, `configs/cifar100_hjepa_mv.yaml`)."""

    dt, base, scale, p_weight = 0.05, 0.1, 0.02, 0.2

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.d = dim // 2
        self.residual_V = mlp((self.d, *hidden, 1), nn.GELU)

    def batch(self, rows: int, n_steps: int) -> Batch:
        return torch.randn(rows, 2 * self.d), torch.randn(rows, 2 * self.d), torch.empty(n_steps)

    def potential(self, q: Tensor) -> Tensor:
        return 0.5 * self.base * q.square().sum(dim=-1) + self.scale * self.residual_V(q).squeeze(-1)

    def hamiltonian(self) -> nn.Module:
        return hf.Separable(V=hf.Term(self.residual_V, "q", factor=self.scale), quadratic=self.base)

    def missed(self, z: Tensor, target: Tensor) -> Tensor:
        q, p = (z - target).split(self.d, dim=1)
        return q.square().mean() + self.p_weight * p.square().mean()

    def textbook(self, a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
        def carried(z: Tensor, dt: float) -> Tensor:
            q, p = z.split(self.d, dim=1)
            for _ in steps:
                p = p - dt / 2 * differentiated(self.potential, q)
                q = q + dt * p
                p = p - dt / 2 * differentiated(self.potential, q)
            return torch.cat((q, p), dim=1)

        return 0.5 * (self.missed(carried(a, self.dt), b) + self.missed(carried(b, -self.dt), a))

    def fused(self, H: nn.Module, a: Tensor, b: Tensor, steps: Tensor, backend: str = "auto") -> Tensor:
        def carried(z: Tensor, dt: float) -> Tensor:
            return hf.rollout(H, z, dt, len(steps), states="final", backend=backend).states

        return 0.5 * (self.missed(carried(a, self.dt), b) + self.missed(carried(b, -self.dt), a))


class Torchdyn(Replica):
    """torchdyn's HNN: a forward that is the vector field of `.net`, here a tanh network; q before p; the sum of squared
    differences of time derivatives (`torchdyn/models/energy.py`, `tutorials/module4-model/m4d_hamiltonian_nets.ipynb`)."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp((dim, *hidden, 1), nn.Tanh)

    def batch(self, rows: int, n_steps: int) -> Batch:
        return torch.randn(rows, self.net[0].in_features), torch.randn(rows, self.net[0].in_features)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(True):
            n, x = x.shape[1] // 2, x.requires_grad_(True)
            (g,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return torch.cat((g[:, n:], -g[:, :n]), 1)

    def hamiltonian(self) -> nn.Module:
        return self.net

    def textbook(self, x: Tensor, x_dot: Tensor) -> Tensor:
        return (self(x.detach()) - x_dot).square().sum()

    def fused(self, H: nn.Module, x: Tensor, x_dot: Tensor, backend: str = "auto") -> Tensor:
        return (hf.vector_field(H, x.detach(), backend=backend) - x_dot).square().sum()


class HNKO(Replica):
    """The HNN beside the Hamiltonian neural Koopman operator, which has no Hamiltonian itself but an orthogonal matrix: a tanh
    `.net` without bias at the end, q before p, in float64, on one trajectory; the norms of q' - Hp and of p' + Hq, summed over
    all of it but its ends (`kepler/hnn.py`, `15body/hnn.py`)."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp((dim, *hidden, 1), nn.Tanh, last_bias=False)

    def batch(self, rows: int, n_steps: int) -> Batch:
        return torch.randn(rows, self.net[0].in_features), torch.randn(rows - 2, self.net[0].in_features)

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)

    def hamiltonian(self) -> nn.Module:
        return self

    def missed(self, g: Tensor, y_dot: Tensor) -> Tensor:
        (Hq, Hp), (q_dot, p_dot) = g[1:-1].chunk(2, dim=1), y_dot.chunk(2, dim=1)
        return (Hp - q_dot).square().sum(1).sqrt().sum() + (Hq + p_dot).square().sum(1).sqrt().sum()

    def textbook(self, y: Tensor, y_dot: Tensor) -> Tensor:
        return self.missed(differentiated(self, y), y_dot)

    def fused(self, H: nn.Module, y: Tensor, y_dot: Tensor, backend: str = "auto") -> Tensor:
        return self.missed(hf.gradient(H, y, backend=backend), y_dot)


class SympNets(Replica):
    """The HNN of SympNets and learner: layers under names in a `ModuleDict`, tanh, p before q; the mean squared difference of
    (x1 - x0) / h and the vector field at the middle (`learner/nn/hnn.py`, `learner/nn/fnn.py`, `pendulum.py`,
    `three_body.py`)."""

    h = 0.1

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.ms = nn.ModuleDict({f"LinM{i}": layer for i, layer in enumerate(linears((dim, *hidden, 1)), 1)})
        self.register_buffer("J", rotation(dim))

    def batch(self, rows: int, n_steps: int) -> Batch:
        dim = self.ms["LinM1"].in_features
        return torch.randn(rows, dim), torch.randn(rows, dim), torch.full((rows, 1), self.h)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.ms.values()
        for layer in hidden:
            x = torch.tanh(layer(x))
        return last(x)

    def hamiltonian(self) -> nn.Module:
        return hf.Hamiltonian(list(self.ms.values()), torch.tanh, order="pq")

    def textbook(self, x0: Tensor, x1: Tensor, h: Tensor) -> Tensor:
        return F.mse_loss((x1 - x0) / h, differentiated(self, (x0 + x1) / 2) @ self.J)

    def fused(self, H: nn.Module, x0: Tensor, x1: Tensor, h: Tensor, backend: str = "auto") -> Tensor:
        return (hf.step_residual(H, swapped(x0), swapped(x1), h, backend=backend) / h).square().mean()


class SymplecticHNN(Replica):
    """symplectic-hnn: tanh, p before q, no bias at the end; the mean squared difference of (y1 - y0) / h and the vector field
    at the middle, or at (p1, q0) for symplectic Euler (`model/hnn.py`, `model/loss.py`, `model/data.py`, `model/args.py`)."""

    h = 0.1

    def __init__(self, dim: int, hidden: Sequence[int], scheme: str) -> None:
        super().__init__()
        self.layers, self.scheme = nn.ModuleList(linears((dim, *hidden, 1), last_bias=False)), scheme
        self.register_buffer("J", rotation(dim))

    def batch(self, rows: int, n_steps: int) -> Batch:
        return (torch.randn(rows, 2, self.layers[0].in_features),)

    def forward(self, y: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            y = torch.tanh(layer(y))
        return self.layers[-1](y).squeeze(-1)

    def hamiltonian(self) -> nn.Module:
        return hf.Hamiltonian(self.layers, torch.tanh, order="pq")

    def textbook(self, y: Tensor) -> Tensor:
        y0, y1 = y[:, :-1], y[:, 1:]
        if self.scheme == "implicit-midpoint":
            where = (y0 + y1) / 2
        else:
            where = torch.cat((y1.chunk(2, dim=-1)[0], y0.chunk(2, dim=-1)[1]), dim=-1)
        field = torch.einsum("ij,aj->ai", self.J.T, differentiated(self, where.flatten(0, 1))).view(where.shape)
        return F.mse_loss(field, (y1 - y0) / self.h)

    def fused(self, H: nn.Module, y: Tensor, backend: str = "auto") -> Tensor:
        z0, z1 = swapped(y).unbind(1)
        return (hf.step_residual(H, z0, z1, self.h, scheme=self.scheme, backend=backend) / self.h).square().mean()


class Actions(nn.Module):
    """What the models of physics-world-models share: damping exp(g) Hp, and a force G e + c of an embedding e of the action."""

    def __init__(self, d: int, n_actions: int = 3, size: int = 8, log_damping: float = -1.0) -> None:
        super().__init__()
        self.act_emb, self.G_net = nn.Embedding(n_actions, size), nn.Linear(size, d)
        self.log_damping = nn.Parameter(torch.tensor(log_damping))

    @property
    def damping(self) -> Tensor:
        return self.log_damping.exp()

    def force(self, actions: Tensor) -> Tensor:
        return self.G_net(self.act_emb(actions))


class PortHamiltonian(Replica):
    """physics-world-models on states of two numbers: a softplus network with damping and a force of the action; one step of the
    3/8 rule, which is torchdiffeq's "rk4", from every frame of a sequence, and its mean squared error
    (`src/models/hamiltonian.py`, `src/models/wrappers.py`, `train.py`)."""

    dt = 0.1

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.H_net, self.actions = mlp((dim, *hidden, 1), nn.Softplus), Actions(dim // 2)

    def batch(self, rows: int, n_steps: int) -> Batch:
        dim = self.H_net[0].in_features
        return torch.randn(rows, dim), torch.randn(rows, dim), torch.randint(3, (rows,))

    def hamiltonian(self) -> nn.Module:
        return self.H_net

    def missed(self, gradient: Callable[[Tensor], Tensor], y: Tensor, target: Tensor, actions: Tensor) -> Tensor:
        damping, force, h = self.actions.damping, self.actions.force(actions), self.dt

        def slope(y: Tensor) -> Tensor:
            Hq, Hp = gradient(y).chunk(2, dim=-1)
            return torch.cat((Hp, -Hq - damping * Hp + force), dim=-1)

        k1 = slope(y)
        k2 = slope(y + h * k1 / 3)
        k3 = slope(y + h * (k2 - k1 / 3))
        k4 = slope(y + h * (k1 - k2 + k3))
        return F.mse_loss(y + h * (k1 + 3 * (k2 + k3) + k4) / 8, target)

    def textbook(self, *batch: Tensor) -> Tensor:
        return self.missed(partial(differentiated, self.H_net), *batch)

    def fused(self, H: nn.Module, *batch: Tensor, backend: str = "auto") -> Tensor:
        return self.missed(partial(hf.gradient, H, backend=backend), *batch)


class Port(hf.PortHNN):
    """The damping and the force of physics-world-models in this library's model."""

    def __init__(self, H: nn.Module, actions: Actions, splitting: str) -> None:
        super().__init__(H, control_dim=actions.act_emb.embedding_dim, friction="rayleigh", splitting=splitting)
        self.raw_friction, self.port, self.actions = None, None, actions

    @property
    def friction(self) -> Tensor:
        return self.actions.damping

    def force(self, control: Tensor) -> Tensor:
        return self.actions.G_net(control)


class LatentHamiltonian(Replica):
    """physics-world-models in latent space: softplus T(p) and V(q) with damping and a force of the action; kick, drift, kick,
    with -Hq - exp(g) Hp + G e + c in both kicks, of which the second takes Hp at the momentum between the two. Here sequences
    are rolled out and compared (`src/models/predictors.py`, `src/models/visual.py`,
    `configs/predictor/latent_hamiltonian.yaml`)."""

    dt = 0.1

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.d = dim // 2
        self.T_net, self.V_net = (mlp((self.d, *hidden, 1), nn.Softplus) for _ in range(2))
        self.actions = Actions(self.d)

    def batch(self, rows: int, n_steps: int) -> Batch:
        return torch.randn(rows, n_steps + 1, 2 * self.d), torch.randint(3, (rows, n_steps))

    splitting = "kicks"

    def hamiltonian(self) -> nn.Module:
        return Port(hf.Separable(V=self.V_net, T=self.T_net), self.actions, self.splitting)

    def textbook(self, data: Tensor, actions: Tensor) -> Tensor:
        def gradient(q: Tensor, p: Tensor) -> Sequence[Tensor]:
            return differentiated(self.V_net, q), differentiated(self.T_net, p)

        damping, dt = self.actions.damping, self.dt
        q, p = data[:, 0].chunk(2, dim=-1)
        states = []
        for force in self.actions.force(actions).unbind(1):
            Hq, Hp = gradient(q, p)
            p = p + dt / 2 * (-Hq - damping * Hp + force)
            q = q + dt * gradient(q, p)[1]
            Hq, Hp = gradient(q, p)
            p = p + dt / 2 * (-Hq - damping * Hp + force)
            states.append(torch.cat((q, p), dim=-1))
        return F.mse_loss(torch.stack(states, dim=1), data[:, 1:])

    def fused(self, H: nn.Module, data: Tensor, actions: Tensor, backend: str = "auto") -> Tensor:
        control = self.actions.act_emb(actions)
        states = hf.rollout(H, data[:, 0], self.dt, actions.shape[1], control=control, backend=backend).states
        return F.mse_loss(states[:, 1:], data[:, 1:])


class LatentPort(LatentHamiltonian):
    """The same networks, damping and force by `PortHNN`, which takes friction before the first kick and after the second:
    another number than the repository's, of the same order. `textbook` is that scheme."""

    splitting = "symmetric"

    def textbook(self, data: Tensor, actions: Tensor) -> Tensor:
        damping, dt = self.actions.damping, self.dt
        q, p = data[:, 0].chunk(2, dim=-1)
        states = []
        for force in self.actions.force(actions).unbind(1):
            p = p - dt / 2 * (damping * differentiated(self.T_net, p) - force)
            p = p - dt / 2 * differentiated(self.V_net, q)
            q = q + dt * differentiated(self.T_net, p)
            p = p - dt / 2 * (differentiated(self.V_net, q) - force)
            p = p - dt / 2 * damping * differentiated(self.T_net, p)
            states.append(torch.cat((q, p), dim=-1))
        return F.mse_loss(torch.stack(states, dim=1), data[:, 1:])


class Phlearn(Replica):
    """phlearn on a forced and damped spring: H a network of tanh, then ReLU; dissipation |r| on p, a force on p of state and
    time by another such network; the mean squared difference of (x1 - x0) / dt and the field at the middle
    (`phnns/ode_models.py`, `phnns/pseudo_hamiltonian_neural_network.py`, `utils/derivatives.py`,
    `example_scripts/train_model.py`)."""

    dt = 1 / 30

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.H_net, self.F_net = self._network(dim, hidden, 1), self._network(dim + 1, hidden, dim // 2)
        self.rs = nn.Parameter(torch.full((dim // 2,), -0.3))

    @staticmethod
    def _network(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
        first, second, last = linears((inputs, *hidden, outputs))
        return nn.Sequential(first, nn.Tanh(), second, nn.ReLU(), last)

    def batch(self, rows: int, n_steps: int) -> Batch:
        dim = self.H_net[0].in_features
        return torch.randn(rows, dim), torch.randn(rows, dim), torch.rand(rows, 1)

    def hamiltonian(self) -> nn.Module:
        return self.H_net

    def missed(self, gradient: Callable[[Tensor], Tensor], x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        where = (x0 + x1) / 2
        Hq, Hp = gradient(where).chunk(2, dim=-1)
        force = self.F_net(torch.cat((where, t + self.dt / 2), dim=-1))
        return F.mse_loss(torch.cat((Hp, -Hq - self.rs.abs() * Hp + force), dim=-1), (x1 - x0) / self.dt)

    def textbook(self, *batch: Tensor) -> Tensor:
        return self.missed(partial(differentiated, self.H_net), *batch)

    def fused(self, H: nn.Module, *batch: Tensor, backend: str = "auto") -> Tensor:
        return self.missed(partial(hf.gradient, H, backend=backend), *batch)


@dataclass(frozen=True)
class Entry:
    """A replica in a size and with a batch that its repository trains."""

    make: Callable[[int, Sequence[int]], Replica]
    dim: int
    """2d."""
    hidden: tuple[int, ...]
    rows: int
    n_steps: int = 1
    activation: str = "tanh"
    dtype: str = "float32"


_MIDPOINT = partial(SymplecticHNN, scheme="implicit-midpoint")
_EULER = partial(SymplecticHNN, scheme="symplectic-euler")
ZOO = {
    "hamiltonian-nn-spring": Entry(HamiltonianNN, 2, (200, 200), 750),
    "hamiltonian-nn-2body": Entry(HamiltonianNN, 8, (200, 200), 200),
    "hamiltonian-nn-3body": Entry(HamiltonianNN, 12, (200, 200), 600),
    "srnn-chain": Entry(SRNN, 40, (256, 256), 32, 9),
    "srnn-3body": Entry(SRNN, 12, (512, 512, 512), 32, 4),
    "hamjepa-cifar100": Entry(HamJEPA, 2048, (256, 256), 512, 2, "gelu"),
    "torchdyn": Entry(Torchdyn, 2, (64,), 100),
    "hnko-kepler": Entry(HNKO, 4, (100, 100), 50, dtype="float64"),
    "hnko-15body": Entry(HNKO, 60, (64,) * 4, 160, dtype="float64"),
    "sympnets-pendulum": Entry(SympNets, 2, (30,) * 3, 40),
    "sympnets-3body": Entry(SympNets, 12, (50,) * 5, 40_000),
    "symplectic-hnn-midpoint": Entry(_MIDPOINT, 2, (200, 200), 1200),
    "symplectic-hnn-euler": Entry(_EULER, 8, (200, 200), 1200),
    "physics-world-models-states": Entry(PortHamiltonian, 2, (64, 64), 960, activation="softplus"),
    "physics-world-models-latent": Entry(LatentHamiltonian, 32, (128,), 32, 30, "softplus"),
    "physics-world-models-port": Entry(LatentPort, 32, (128,), 32, 30, "softplus"),
    "phlearn-spring": Entry(Phlearn, 2, (100, 100), 32, activation="tanh-relu"),
}
"""By the repository's name and what it learns there."""


@dataclass(frozen=True)
class Training:
    """A replica, what this library is given of it, and a batch."""

    replica: Replica
    H: nn.Module
    batch: Batch
    training = True

    @classmethod
    def of(cls, name: str, rows: int | None = None, n_steps: int | None = None) -> Training:
        """Of an entry of `ZOO`, in float32, with its own batch or another size of it."""
        entry = ZOO[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            replica = entry.make(entry.dim, entry.hidden)
            batch = replica.batch(rows or entry.rows, n_steps or entry.n_steps)
        return cls(replica, replica.hamiltonian(), batch)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.replica.parameters())

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Training:
        """A copy."""
        replica = copy.deepcopy(self.replica).to(device, dtype)
        batch = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in self.batch)
        return Training(replica, replica.hamiltonian(), batch)

    def textbook(self) -> Tensor:
        return self.replica.textbook(*self.batch)

    def fused(self, backend: str = "auto") -> Tensor:
        return self.replica.fused(self.H, *self.batch, backend=backend)
