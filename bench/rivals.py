"""The contestants: what a user would pick instead of hjepa_fast, and hjepa_fast. Same weights, same inputs.

Each is a function of a `Problem` that returns a `Contestant`, and is built only when its turn comes.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hjepa_fast as hf
from hjepa_fast import api
from hjepa_fast.backends import cuda
from hjepa_fast.testing import make_hnn, make_mechanical, make_states, make_two_networks

from .cases import Case
from .zoo import Training

ENERGY_WEIGHT = 100.0
"""So large that the energy term has a visible share in every gradient."""
OUTPUT_SCALE = 10.0
"""Of the last layer: the latent then moves by about its own size in 15 steps, as with a trained network."""
STIFFNESS = 0.05
"""Of the quadratic term of HamJEPA's H."""
DISTINCT_ROWS = 61
"""Of a batch with gradients: the others repeat them, so that the float64 reference of so many gives the loss and gradients of
the whole batch. A prime, so that a contestant that takes one row for another eight or sixteen further on is found."""


@dataclass(frozen=True)
class Problem:
    """Weights and inputs of a case."""

    case: Case
    hnn: nn.Module
    baseline: hf.BaselineMLP
    z0: Tensor
    """[B, 2d]."""
    target: Tensor
    """[B, n_steps + 1, 2d], or [B, 1, 2d] where there is no rollout; read only in training. Of "matching" what the vector field
    should be, of "residual" the states one step later."""
    dt: Tensor
    """0-d; requires grad in training."""

    @property
    def training(self) -> bool:
        """Whether there are gradients."""
        return self.case.kind != "rollout"

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.hnn.parameters(), *([] if self.case.kind == "matching" else [self.dt])]

    def to(self, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Problem:
        """A copy in another dtype, of some samples."""
        return replace(
            self,
            hnn=copy.deepcopy(self.hnn).to(dtype),
            baseline=copy.deepcopy(self.baseline).to(dtype),
            z0=self.z0[rows].to(dtype),
            target=self.target[rows].to(dtype),
            dt=self.dt.detach().to(dtype).requires_grad_(self.training),
        )


def make_problem(case: Case, device: torch.device | str = "cpu") -> Any:
    """A `Problem`, or of a "zoo" case a `zoo.Training`."""
    dtype = getattr(torch, case.dtype)
    if case.kind == "zoo":
        return Training.of(case.replica, case.batch, case.n_steps).to(dtype, device)
    hnn = _make_network(case)
    torch.manual_seed(0)
    baseline = hf.BaselineMLP(case.latent_dim, case.hidden_dims[:2])
    training = case.kind != "rollout"
    n_targets = 0 if not training else 1 if case.matches else case.n_steps + 1
    rows = torch.arange(case.batch)
    if training:
        rows %= DISTINCT_ROWS
    distinct = int(rows.max()) + 1
    return Problem(
        case,
        hnn.to(device, dtype),
        baseline.to(device, dtype),
        make_states(distinct, case.latent_dim, dtype=dtype)[rows].to(device),
        make_states(distinct, n_targets, case.latent_dim, dtype=dtype, seed=2)[rows].to(device),
        torch.tensor(case.dt, dtype=dtype, device=device, requires_grad=training),
    )


def _make_network(case: Case) -> nn.Module:
    hnn: nn.Module
    if case.mechanical:
        return make_mechanical(case.latent_dim // 2, case.hidden_dims, case.activation)
    if case.separable:
        hnn = make_two_networks(case.latent_dim, case.hidden_dims, case.hidden_dims, case.activation)
        outputs = [hnn.potential[-1], hnn.kinetic[-1]]
    else:
        hnn = make_hnn(case.latent_dim, case.hidden_dims, case.activation)
        outputs = [hnn.net[-1]]
    with torch.no_grad():
        for layer in outputs:
            layer.weight.mul_(OUTPUT_SCALE)
    if not case.quadratic:
        return hnn
    sum_of_squares = hf.SeparableHNN(case.latent_dim, case.hidden_dims, activation=case.activation, quadratic=True).double()
    sum_of_squares.potential.load_state_dict(hnn.potential.state_dict())
    with torch.no_grad():
        sum_of_squares.stiffness.fill_(STIFFNESS)
    return sum_of_squares


def loss(states: Tensor, energy: Tensor | None, target: Tensor) -> Tensor:
    """Mean squared error and mean (H(z_t) - H(z_1))^2: the published loss, but with a square where it has an absolute value.

    Rounding may change the sign of H(z_t) - H(z_1), and with it a gradient of |.| by more than a check should allow.
    """
    mse = (states - target[:, -1]).square().mean() if states.ndim == 2 else (states[:, 1:] - target[:, 1:]).square().mean()
    return mse if energy is None else mse + ENERGY_WEIGHT * (energy[:, 1:] - energy[:, 1:2]).square().mean()


def objective(problem: Problem, states: Tensor, energy: Tensor | None) -> Tensor:
    """What is differentiated in a case with gradients, of what its contestants compute: the loss, or the mean squared
    residual."""
    return states.square().mean() if problem.case.kind == "residual" else loss(states, energy, problem.target)


Roll = Callable[[], tuple[Tensor, Tensor | None]]
"""A rollout: states [B, n_steps + 1, 2d] or, if only the final one is asked for, [B, 2d]; energies in training. Without a
rollout the vector field or the residual, [B, 2d]."""


@dataclass(frozen=True)
class Contestant:
    """What is timed is `run`: it returns [states], or in training [loss, gradients...]."""

    name: str
    run: Callable[[], list[Any]]
    ours: bool = False
    predicts: str = "hamiltonian:leapfrog"
    """What the results must agree with: the problem's "baseline", its Hamiltonian under an integrator, or of the "zoo" the
    repository's way."""
    roll: Roll | None = None
    """The rollout alone, for counting what it keeps for the backward pass."""
    time_first: bool = False
    """Whether states are [n_steps + 1, B, 2d]."""

    def values(self, outputs: list[Any]) -> list[Tensor]:
        """What `run` returned as tensors, the batch first."""
        tensors = [x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in outputs]
        return [x.transpose(0, 1) if self.time_first and x.ndim == 3 else x for x in tensors]


def _contestant(name: str, problem: Problem, roll: Roll, **kwargs: Any) -> Contestant:
    """Of a rollout in torch: under no_grad, or with the loss and every gradient by autograd."""
    parameters = kwargs.pop("parameters", problem.parameters)
    loss_of = kwargs.pop("loss_of", lambda: objective(problem, *roll()))

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [roll()[0]]

    def train() -> list[Tensor]:
        value = loss_of()
        return [value.detach(), *torch.autograd.grad(value, parameters, materialize_grads=True)]

    if problem.case.kind == "backward":
        value = loss_of()

        def back() -> list[Tensor]:
            return [value.detach(), *torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)]

        return Contestant(name, back, roll=roll, **kwargs)
    return Contestant(name, train if problem.training else infer, roll=roll, **kwargs)


def _leapfrog(problem: Problem, gradient: Callable[..., tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Kick, drift, kick with `gradient(q, p, half)`, which may return H at (q, p) too."""
    d = problem.z0.shape[-1] // 2
    in_q, in_p = slice(0, d), slice(d, 2 * d)
    dt, every_state = problem.dt, problem.case.states == "all"
    q, p = problem.z0[:, in_q], problem.z0[:, in_p]
    states, energies = [problem.z0], []
    for _ in range(problem.case.n_steps):
        Hq, H = gradient(q, p, in_q)
        energies.append(H)
        p = p - dt / 2 * Hq
        q = q + dt * gradient(q, p, in_p)[0]
        p = p - dt / 2 * gradient(q, p, in_q)[0]
        if every_state:
            states.append(torch.cat((q, p), dim=-1))
    path = torch.stack(states, dim=1) if every_state else torch.cat((q, p), dim=-1)
    if not problem.training:
        return path, None
    if energies[0] is None:
        return path, problem.hnn(path).squeeze(-1)
    final = problem.hnn(path[:, -1]).squeeze(-1)
    return path, torch.stack([*(H for H in energies if H is not None), final], dim=1)


def _matched(problem: Problem, gradient: Callable[[Tensor], Tensor]) -> tuple[Tensor, None]:
    """With `gradient(z)` = grad H: the vector field, or the residual of the implicit midpoint rule, which needs one gradient
    since both ends of the step are known."""
    z0, z1, d = problem.z0, problem.target[:, -1], problem.z0.shape[-1] // 2
    residual = problem.case.kind == "residual"
    g = gradient((z0 + z1) / 2 if residual else z0)
    field = torch.cat((g[:, d:], -g[:, :d]), dim=-1)
    return z1 - z0 - problem.dt * field if residual else field, None


def eager_rollout(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """As published: three full input gradients a step by autograd, with their graph in training."""

    def gradient(z: Tensor) -> Tensor:
        with torch.enable_grad():
            if not z.requires_grad:
                z = z.detach().requires_grad_()
            return torch.autograd.grad(problem.hnn(z).sum(), z, create_graph=problem.training)[0]

    if problem.case.matches:
        return _matched(problem, gradient)
    return _leapfrog(problem, lambda q, p, half: (gradient(torch.cat((q, p), dim=-1))[:, half], None))


def mechanical_rollout(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The classical Runge-Kutta method on the field of a class like Symplectic ODE-Net's: M^-1(q) built by batched products, H
    differentiated by autograd at each of its four points."""
    hnn, dt = problem.hnn, problem.dt
    d = problem.z0.shape[-1] // 2
    below = torch.tril_indices(d, d, -1, device=problem.z0.device)

    def field(z: Tensor) -> Tensor:
        with torch.enable_grad():
            if not z.requires_grad:
                z = z.detach().requires_grad_()
            q, p = z.chunk(2, dim=1)
            x = torch.cat((q.cos(), q.sin()), dim=1)
            entries = hnn.mass.net(x)
            L = torch.diag_embed(entries[:, :d])
            L[:, below[0], below[1]] = entries[:, d:]
            W = torch.bmm(L, L.transpose(1, 2))
            H = 0.5 * torch.bmm(p[:, None], torch.bmm(W, p[:, :, None])).reshape(-1, 1) + hnn.V.net(x)
            Hq, Hp = torch.autograd.grad(H.sum(), z, create_graph=problem.training)[0].chunk(2, dim=1)
        return torch.cat((Hp, -Hq), dim=1)

    states = [problem.z0]
    for _ in range(problem.case.n_steps):
        z = states[-1]
        k1 = field(z)
        k2 = field(z + dt / 2 * k1)
        k3 = field(z + dt / 2 * k2)
        states.append(z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(z + dt * k3)))
    path = torch.stack(states, dim=1)
    return path, hnn(path).squeeze(-1) if problem.training else None


def func_rollout(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """torch.func.grad, only with respect to the half that is needed."""
    if problem.case.matches:
        return _matched(problem, torch.func.grad(lambda z: problem.hnn(z).sum()))
    grads = [torch.func.grad(lambda q, p: problem.hnn(torch.cat((q, p), dim=-1)).sum(), argnums=i) for i in (0, 1)]
    return _leapfrog(problem, lambda q, p, half: (grads[half.start > 0](q, p), None))


def manual_rollout(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """A hand-written gradient of the MLP, only the half that is needed; H costs nothing more."""
    case, hnn = problem.case, problem.hnn
    if case.separable:
        return _matched(problem, partial(_separable_gradient, hnn, case)) if case.matches else _separable_leapfrog(problem)
    if case.matches:
        return _matched(problem, lambda z: _mlp_gradient(hnn.net, case.activation, z)[0])

    def gradient(q: Tensor, p: Tensor, half: slice) -> tuple[Tensor, Tensor | None]:
        return _mlp_gradient(hnn.net, case.activation, torch.cat((q, p), dim=-1), half, problem.training)

    return _leapfrog(problem, gradient)


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "softplus": (F.softplus, lambda g, a, x: torch.ops.aten.softplus_backward(g, a, 1.0, 20.0)),
    "tanh": (torch.tanh, lambda g, a, x: torch.ops.aten.tanh_backward(g, x)),
    "gelu": (F.gelu, lambda g, a, x: torch.ops.aten.gelu_backward(g, a)),
}
"""s, and g s'(a) where x = s(a), in one pass over memory each."""


def _mlp_gradient(
    net: nn.Sequential, activation: str, x: Tensor, columns: slice = slice(None), value: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Some columns of an MLP's gradient, and its value."""
    act, back = _ACTIVATIONS[activation]
    *hidden, out = [layer for layer in net if isinstance(layer, nn.Linear)]
    kept = []
    for layer in hidden:
        a = layer(x)
        x = act(a)
        kept.append((a, x))
    g = out.weight.expand_as(x)
    for layer, (a, s) in zip(hidden[:0:-1], kept[:0:-1], strict=True):
        g = back(g, a, s) @ layer.weight
    return back(g, *kept[0]) @ hidden[0].weight[:, columns], out(x).squeeze(-1) if value else None


def _separable_gradient(hnn: nn.Module, case: Case, z: Tensor) -> Tensor:
    q, p = z.chunk(2, dim=-1)
    Vq = _mlp_gradient(hnn.potential, case.activation, q)[0]
    if case.quadratic:
        return torch.cat((Vq + hnn.stiffness * q, p), dim=-1)
    return torch.cat((Vq, _mlp_gradient(hnn.kinetic, case.activation, p)[0]), dim=-1)


def _separable_leapfrog(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """H = T(p) + V(q): the last kick of a step is the first of the next, so that grad V is taken once a step; the value of
    V's network comes with it."""
    case, hnn, dt = problem.case, problem.hnn, problem.dt
    every_state = case.states == "all"

    def grad_V(q: Tensor) -> tuple[Tensor, Tensor | None]:
        g, V = _mlp_gradient(hnn.potential, case.activation, q, value=problem.training)
        return (g + hnn.stiffness * q if case.quadratic else g), V

    def grad_T(p: Tensor) -> Tensor:
        return p if case.quadratic else _mlp_gradient(hnn.kinetic, case.activation, p)[0]

    q, p = problem.z0.chunk(2, dim=-1)
    Vq, V = grad_V(q)
    states, potential = [problem.z0], [V]
    for _ in range(case.n_steps):
        p = p - dt / 2 * Vq
        q = q + dt * grad_T(p)
        Vq, V = grad_V(q)
        p = p - dt / 2 * Vq
        if every_state or problem.training:
            states.append(torch.cat((q, p), dim=-1))
            potential.append(V)
    if not problem.training:
        return torch.stack(states, dim=1) if every_state else torch.cat((q, p), dim=-1), None
    path = torch.stack(states, dim=1)
    q, p = path.chunk(2, dim=-1)
    H = torch.stack([V for V in potential if V is not None], dim=1)
    rest = 0.5 * (p * p + hnn.stiffness * q * q).sum(-1) if case.quadratic else hnn.kinetic(p).squeeze(-1)
    return path if every_state else path[:, -1], H + rest


def baseline_rollout(problem: Problem) -> Tensor:
    """States of the unconstrained MLP."""
    states = problem.baseline.rollout(problem.z0, problem.case.n_steps)
    return states if problem.case.states == "all" else states[:, -1]


def _of_zoo(name: str, problem: Training, loss_of: Callable[[], Tensor], ours: bool = False) -> Contestant:
    def train() -> list[Tensor]:
        value = loss_of()
        return [value.detach(), *torch.autograd.grad(value, problem.parameters, materialize_grads=True)]

    return Contestant(name, train, ours, predicts="zoo")


def _eager(problem: Problem | Training) -> Contestant:
    if isinstance(problem, Training):
        return _of_zoo("eager", problem, problem.textbook)
    if problem.case.mechanical:
        return _contestant("eager", problem, lambda: mechanical_rollout(problem), predicts="hamiltonian:rk4")
    return _contestant("eager", problem, lambda: eager_rollout(problem))


def _eager_float32(problem: Problem) -> Contestant:
    wide = problem.to(torch.float32)
    return _contestant("eager-float32", wide, lambda: eager_rollout(wide))


def _func(problem: Problem) -> Contestant:
    # torch.func works under no saved-tensor hook, so what it keeps cannot be counted
    return replace(_contestant("func", problem, lambda: func_rollout(problem)), roll=None)


def _manual(problem: Problem) -> Contestant:
    return _contestant("manual", problem, lambda: manual_rollout(problem))


def _baseline(problem: Problem) -> Contestant:
    def roll() -> tuple[Tensor, None]:
        return baseline_rollout(problem), None

    parameters = list(problem.baseline.parameters())
    return _contestant("baseline", problem, roll, predicts="baseline", parameters=parameters)


def _ours(problem: Problem | Training, backend: str, memory: str, integrator: str) -> Contestant:
    if isinstance(problem, Training):
        return _of_zoo(backend, problem, lambda: problem.fused(backend), ours=True)

    def roll() -> tuple[Tensor, Tensor | None]:
        if problem.case.kind == "matching":
            return hf.vector_field(problem.hnn, problem.z0, backend=backend), None
        if problem.case.kind == "residual":
            return hf.step_residual(problem.hnn, problem.z0, problem.target[:, -1], problem.dt, backend=backend), None
        return hf.rollout(
            problem.hnn, problem.z0, problem.dt, problem.case.n_steps, energy=problem.training, integrator=integrator,
            states=problem.case.states, memory=memory, backend=backend,
        )[:2]  # fmt: skip

    name = _our_name(problem.case, backend, memory, integrator)
    return _contestant(name, problem, roll, ours=True, predicts=f"hamiltonian:{integrator}")


def _our_name(case: Case, backend: str, memory: str, integrator: str) -> str:
    own = integrator == "leapfrog" or case.mechanical
    return ":".join([backend, *([] if own else [integrator]), *([memory] if memory != "store" else [])])


def _compiled(problem: Problem, mode: str = "default") -> Contestant:
    """The hand-written gradient, every step unrolled; in training with the loss."""
    if mode == "default":
        # each case is another shape of the same code, and the compile time is part of what is measured
        torch.compiler.reset()
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # which is what was asked for, once a case
    roll = torch.compile(lambda: manual_rollout(problem), mode=mode, dynamic=False)
    loss_of = torch.compile(lambda: objective(problem, *manual_rollout(problem)), mode=mode, dynamic=False)
    name = "compiled" if mode == "default" else f"compiled-{mode}"
    return replace(_contestant(name, problem, roll, loss_of=loss_of), roll=None)


def _graphed(build: Callable[[Problem], Contestant], problem: Problem) -> Contestant:
    """A contestant's whole call captured as one CUDA graph; of ours the name says so as it does of other variants."""
    eager = build(problem)
    name = f"{eager.name}:graphed" if eager.ours else f"{eager.name}-graphed"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = eager.run()

    def replay() -> list[Any]:
        graph.replay()
        return outputs

    return replace(eager, name=name, run=replay, roll=None)


def _jax(problem: Problem) -> Contestant:
    """jax.jit of a lax.scan over jax.grad steps; states are kept time first, as scan stacks them."""
    jax = _import_jax()
    case = problem.case
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if case.precision == "high" else "highest")
    jnp, d, every_state = jax.numpy, problem.z0.shape[-1] // 2, case.states == "all"
    gelu = partial(jax.nn.gelu, approximate=False)
    activation = {"tanh": jnp.tanh, "softplus": jax.nn.softplus, "gelu": gelu}[case.activation]
    layers = {name: len(net) for name, net in problem.hnn.named_children() if isinstance(net, nn.Sequential)}

    def array(x: Tensor) -> Any:
        return jnp.asarray(x.detach().cpu().numpy())

    def layer(x: Tensor) -> Any:
        # JAX's own layout, [in, out]: with [out, in] its products of one row were 13 times slower
        return array(x.T.contiguous() if x.ndim == 2 else x)

    def mlp(params: Any, name: str, x: Any) -> Any:
        last = layers[name] - 1
        for i in range(0, last, 2):  # an activation stands between
            x = activation(x @ params[f"{name}.{i}.weight"] + params[f"{name}.{i}.bias"])
        return (x @ params[f"{name}.{last}.weight"] + params[f"{name}.{last}.bias"])[..., 0]

    def V(params: Any, q: Any) -> Any:
        potential = mlp(params, "potential", q)
        return potential + 0.5 * (params["stiffness"] * q * q).sum(-1) if case.quadratic else potential

    def T(params: Any, p: Any) -> Any:
        return 0.5 * (p * p).sum(-1) if case.quadratic else mlp(params, "kinetic", p)

    def H(params: Any, z: Any) -> Any:
        return V(params, z[..., :d]) + T(params, z[..., d:]) if case.separable else mlp(params, "net", z)

    def grad(function: Any, params: Any, x: Any) -> Any:
        return jax.grad(lambda x: function(params, x).sum())(x)

    def step(params: Any, dt: Any, z: Any) -> Any:
        def half(i: int, q: Any, p: Any) -> Any:
            return jax.grad(lambda *qp: H(params, jnp.concatenate(qp, -1)).sum(), argnums=i)(q, p)

        q, p = z[:, :d], z[:, d:]
        p = p - dt / 2 * half(0, q, p)
        q = q + dt * half(1, q, p)
        p = p - dt / 2 * half(0, q, p)
        return jnp.concatenate((q, p), -1)

    def separable_step(params: Any, dt: Any, z: Any, Vq: Any) -> Any:
        p = z[:, d:] - dt / 2 * Vq
        q = z[:, :d] + dt * grad(T, params, p)
        Vq = grad(V, params, q)
        return jnp.concatenate((q, p - dt / 2 * Vq), -1), Vq

    def roll(params: Any, dt: Any, z0: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            z, Vq = carry
            z, Vq = separable_step(params, dt, z, Vq) if case.separable else (step(params, dt, z), None)
            return (z, Vq), z if every_state else None

        # the last kick of a step of a separable H is the first of the next
        Vq = grad(V, params, z0[:, :d]) if case.separable else None
        (final, _), path = jax.lax.scan(body, (z0, Vq), None, length=case.n_steps)
        return jnp.concatenate((z0[None], path)) if every_state else final

    def matched(params: Any, dt: Any, z0: Any, target: Any) -> Any:
        g = grad(H, params, z0 if case.kind == "matching" else (z0 + target) / 2)
        field = jnp.concatenate((g[:, d:], -g[:, :d]), -1)
        return ((field - target if case.kind == "matching" else target - z0 - dt * field) ** 2).mean()

    def loss_of(params: Any, dt: Any, z0: Any, target: Any) -> Any:
        states = roll(params, dt, z0)
        energy = H(params, states)
        mse = ((states[1:] - target[1:]) ** 2).mean()
        return mse + ENERGY_WEIGHT * ((energy[1:] - energy[1:2]) ** 2).mean()

    params = {name: layer(p) for name, p in problem.hnn.named_parameters()}
    names, dt, z0 = list(params), array(problem.dt), array(problem.z0)
    if problem.training:
        of_dt = case.kind != "matching"
        target = array(problem.target[:, -1] if case.matches else problem.target.transpose(0, 1))
        differentiated = matched if case.matches else loss_of
        gradients = jax.jit(jax.value_and_grad(differentiated, argnums=(0, 1) if of_dt else (0,)))

        def run() -> list[Any]:
            value, (g_params, *g_dt) = jax.block_until_ready(gradients(params, dt, z0, target))
            return [value, *(g_params[n].T if g_params[n].ndim == 2 else g_params[n] for n in names), *g_dt]
    else:
        rollout = jax.jit(roll)

        def run() -> list[Any]:
            return [rollout(params, dt, z0).block_until_ready()]

    return Contestant("jax", run, time_first=True)


def _import_jax() -> Any:
    """JAX with torch's number of threads."""
    os.environ["NPROC"] = str(torch.get_num_threads())
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax


Builder = Callable[[Any], Contestant]
"""Of what `make_problem` gives."""
_BUILDERS: dict[str, Builder] = {
    "eager": _eager,
    "eager-float32": _eager_float32,
    "func": _func,
    "manual": _manual,
    "compiled": _compiled,
    "jax": _jax,
    "baseline": _baseline,
}
EAGER = ("eager", "eager-float32", "func", "manual", "baseline")
"""Rivals whose steps each take the same time from the first call on."""


def is_ours(name: str) -> bool:
    """Whether a contestant's name is that of one of the library's backends, under whatever integrator or memory."""
    return name.partition(":")[0] in api.BACKENDS


def entrants(case: Case, device: torch.device, compile: bool = False) -> tuple[dict[str, Builder], dict[str, str]]:
    """Builders by name, ours first, and the reason for each one that is left out."""
    builders: dict[str, Builder] = {}
    left_out = {}
    auto = api.choose_backend("auto", torch.empty(case.batch, 0, device=device)) if case.backends == "auto" else None
    for backend, state in api.available_backends().items():
        if backend == "reference" or backend != (auto or backend):
            continue
        try:
            if state == "available":
                api.choose_backend(backend, torch.empty(0, device=device))
        except RuntimeError as error:
            state = str(error)
        if backend == "cuda" and case.batch > cuda.MOST_SAMPLES:
            state = f"leaves batches of more than {cuda.MOST_SAMPLES} to another backend"
        if state != "available":
            left_out[backend] = state
            continue
        for memory, integrator in itertools.product(case.memory, case.integrators):
            options = {"backend": backend, "memory": memory, "integrator": integrator}
            builders[_our_name(case, **options)] = partial(_ours, **options)
            kinds = memory == "store" and integrator == "leapfrog" and case.kind not in ("backward", "zoo")
            plain = kinds and backend != "torch"
            if device.type == "cuda" and plain:
                builders[f"{_our_name(case, **options)}:graphed"] = partial(_graphed, partial(_ours, **options))
    for name in case.rivals:
        reason = _why_not(name, device, compile)
        if reason:
            left_out[name] = reason
        else:
            builders.update(_variants(name, case, device))
    return builders, left_out


def _variants(name: str, case: Case, device: torch.device) -> Iterator[tuple[str, Builder]]:
    yield name, _BUILDERS[name]
    if device.type == "cuda" and case.kind != "backward":  # a graph captures the whole call, which has its forward outside
        if name == "compiled":
            yield "compiled-reduce-overhead", partial(_compiled, mode="reduce-overhead")
        elif name in ("manual", "baseline"):
            yield f"{name}-graphed", partial(_graphed, _BUILDERS[name])


def _why_not(name: str, device: torch.device, compile: bool) -> str | None:
    if name == "compiled":
        if not compile:
            return "compiles for minutes; asked for with --compile"
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            return "torch.compile needs a C++ compiler, g++ or $CXX"
    if name == "jax":
        if importlib.util.find_spec("jax") is None:
            return "not installed: pip install jax"
        try:
            platform = _import_jax().devices()[0].platform
        except Exception as error:  # what it needs of the processor, its driver or its other packages
            return f"JAX does not start: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if (platform == "cpu") != (device.type == "cpu"):
            return f"JAX runs on {platform}, the benchmark on {device.type}"
    return None
