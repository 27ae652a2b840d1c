"""Random calls of the public API, valid and invalid ones: `python tests/tools/fuzz.py 2000 --first 0`.

A call must return the numbers of an oracle in float64, or raise a TypeError, ValueError or RuntimeError (or one of their
subclasses in `hjepa_fast.errors`) by a `raise` of the library's own, with a message that shows what was found. A call with only
valid arguments must return, one with an invalid argument must raise. A crash or a call of more than 20 s is a fault as well:
calls are made in a process of their own, and go on in another one after that.

The oracle rolls out the module's own forward by automatic differentiation for "leapfrog" and "euler", and is
`backend="reference"` for other integrators. A call is a function of its seed: `fuzz.py 1 --first SEED` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import dis
import json
import math
import random
import select
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hjepa_fast as hf
from hjepa_fast.activations import Activation
from hjepa_fast.schemes import SCHEMES
from hjepa_fast.testing import BOUNDED_SLOPES

PACKAGE = str(Path(hf.__file__).parent)
DOCUMENTED = (TypeError, ValueError, RuntimeError)
LIMIT = 20.0
"""Seconds a call may take, and a process to start."""
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.1}
TOO_LARGE = ("can't allocate memory: you tried to allocate", "Storage size calculation overflowed")
"""PyTorch's messages that are clear enough."""
INF, NAN = math.inf, math.nan


class Given(NamedTuple):
    """An argument, and whether it is valid; None where the library may take it or refuse it."""

    value: Any
    valid: bool | None = True


def pick(
    rng: random.Random, valid: Sequence[Any], invalid: Sequence[Any], either: Sequence[Any] = (), odd: float = 0.06
) -> Given:
    """One of the valid ones; with probability `odd` one of the others."""
    if rng.random() >= odd:
        return Given(rng.choice(valid))
    index = rng.randrange(len(invalid) + len(either))
    return Given(invalid[index], False) if index < len(invalid) else Given(either[index - len(invalid)], None)


class Holder(nn.Module):
    """A user's module with a `.net`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


class Scaled(Holder):
    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__(net)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.net(z)


class Normalised(Holder):
    def __init__(self, net: nn.Module, d: int, width: float) -> None:
        super().__init__(net)
        self.register_buffer("width", torch.full((d,), width))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z / self.width)


class WithSquare(Holder):
    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) + 0.5 * (z * z).sum(-1, keepdim=True)


class OwnSequential(nn.Sequential):
    pass


class DoubledSequential(nn.Sequential):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class DoubledSeparable(hf.SeparableHNN):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


def double_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def double_input(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * given[0],)


class DoubledCall:
    """A forward to put in the place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = [module], type(module)

    def __call__(self, z: Tensor) -> Tensor:
        return 2 * self.kind.forward(self.module[0], z)


def mlp(d: int, hidden: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip((d, *hidden), hidden, strict=False):
        layers += [nn.Linear(fan_in, fan_out), Activation(activation).module()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1] if hidden else d, 1))


def draw_network(rng: random.Random) -> tuple[str, Callable[[], Any], int, bool | None]:
    """Its name, what makes it, its latent size, and whether it is valid."""
    d, act = rng.choice([2, 4, 6, 8, 12]), rng.choice(BOUNDED_SLOPES)
    hidden = rng.choice([(5,), (8, 3), (16, 16, 7), (), (1,), (33,)])
    kinetic, quadratic = rng.choice([None, (4,), ()]), rng.random() < 0.3
    tanh, linear = nn.Tanh, nn.Linear
    valid: dict[str, Callable[[], Any]] = {
        "LatentHNN": lambda: hf.LatentHNN(d, hidden, act),
        "SeparableHNN": lambda: hf.SeparableHNN(d, hidden, kinetic, act, quadratic=quadratic),
        "Sequential": lambda: mlp(d, hidden, act),
        "Sequential without biases": lambda: nn.Sequential(linear(d, 7, bias=False), tanh(), linear(7, 1, bias=False)),
        "Holder": lambda: Holder(mlp(d, hidden, act)),
        "LatentHNN in eval": lambda: hf.LatentHNN(d, hidden, act).eval(),
        "frozen LatentHNN": lambda: hf.LatentHNN(d, hidden, act).requires_grad_(False),
    }
    either: dict[str, Callable[[], Any]] = {
        "OwnSequential": lambda: OwnSequential(*mlp(d, hidden, act)),
        "nested Sequential": lambda: nn.Sequential(nn.Sequential(linear(d, 5), tanh()), nn.Sequential(linear(5, 1))),
        "Identity inside": lambda: nn.Sequential(linear(d, 5), nn.Identity(), tanh(), linear(5, 1), nn.Identity()),
        "Dropout in eval": lambda: nn.Sequential(linear(d, 5), tanh(), nn.Dropout(0.5), linear(5, 1)).eval(),
        "Dropout(0)": lambda: nn.Sequential(linear(d, 5), tanh(), nn.Dropout(0.0), linear(5, 1)),
        "two activations": lambda: nn.Sequential(linear(d, 4), tanh(), linear(4, 4), nn.SiLU(), linear(4, 1)),
        "no activation": lambda: nn.Sequential(linear(d, 4), linear(4, 1)),
        "Sigmoid": lambda: nn.Sequential(linear(d, 4), nn.Sigmoid(), linear(4, 1)),
        "ReLU": lambda: nn.Sequential(linear(d, 4), nn.ReLU(), linear(4, 1)),
        "Linear": lambda: linear(d, 1),
        "Softplus(2, 3)": lambda: nn.Sequential(linear(d, 4), nn.Softplus(2.0, 3.0), linear(4, 1)),
        "Softplus(-1)": lambda: nn.Sequential(linear(d, 4), nn.Softplus(-1.0), linear(4, 1)),
        "Scaled by 1": lambda: Scaled(mlp(d, hidden, act), 1.0),
        "Scaled by 3": lambda: Scaled(mlp(d, hidden, act), 3.0),
        "Normalised by 1": lambda: Normalised(mlp(d, hidden, act), d, 1.0),
        "Normalised by 2": lambda: Normalised(mlp(d, hidden, act), d, 2.0),
        "WithSquare": lambda: WithSquare(mlp(d, hidden, act)),
        "DoubledSequential": lambda: DoubledSequential(*mlp(d, hidden, act)),
        "DoubledSeparable": lambda: DoubledSeparable(d, hidden, kinetic, act),
        "DoubledLinear": lambda: nn.Sequential(DoubledLinear(d, 4), tanh(), linear(4, 1)),
        "hook": lambda: changed(hf.LatentHNN(d, hidden, act), lambda m: m.register_forward_hook(double_output)),
        "pre-hook": lambda: changed(hf.LatentHNN(d, hidden, act), lambda m: m.register_forward_pre_hook(double_input)),
        "hook on .net": lambda: changed(hf.LatentHNN(d, hidden, act), lambda m: m.net.register_forward_hook(double_output)),
        "hook on a layer": lambda: changed(hf.LatentHNN(d, (5,), act), lambda m: m.net[0].register_forward_hook(double_output)),
        "hook on .potential": lambda: changed(
            hf.SeparableHNN(d, (5,)), lambda m: m.potential.register_forward_hook(double_output)
        ),
        "forward replaced": lambda: changed(hf.LatentHNN(d, hidden, act), lambda m: setattr(m, "forward", DoubledCall(m))),
        "forward of .net replaced": lambda: changed(
            hf.LatentHNN(d, hidden, act), lambda m: setattr(m.net, "forward", DoubledCall(m.net))
        ),
        "forward of a layer replaced": lambda: changed(
            hf.LatentHNN(d, (5,), act), lambda m: setattr(m.net[0], "forward", DoubledCall(m.net[0]))
        ),
        "Holder of a LatentHNN": lambda: Holder(hf.LatentHNN(d, hidden, act)),
    }
    invalid: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "str": lambda: "net",
        "class": lambda: hf.LatentHNN,
        "function": lambda: torch.sum,
        "Identity": nn.Identity,
        "ZeroPad1d": lambda: nn.ZeroPad1d(1),
        "BaselineMLP": lambda: hf.BaselineMLP(d, (4,)),
        "empty Sequential": nn.Sequential,
        "odd input": lambda: mlp(3, hidden, act),
        "two outputs": lambda: nn.Sequential(linear(d, 4), tanh(), linear(4, 2)),
        "no last Linear": lambda: nn.Sequential(linear(d, 4), tanh()),
        "Dropout in training": lambda: nn.Sequential(linear(d, 4), tanh(), nn.Dropout(0.5), linear(4, 1)),
        "two dtypes": lambda: nn.Sequential(linear(d, 4).double(), tanh(), linear(4, 1).float()),
        "meta device": lambda: nn.Sequential(linear(d, 4, device="meta"), tanh(), linear(4, 1, device="meta")),
        "SymplecticIntegrator": lambda: hf.SymplecticIntegrator(hf.LatentHNN(d, (4,))),
        "width 0": lambda: nn.Sequential(linear(d, 0), tanh(), linear(0, 1)),
        "second width 0": lambda: nn.Sequential(linear(d, 4), tanh(), linear(4, 0), tanh(), linear(0, 1)),
        "input 0": lambda: nn.Sequential(linear(0, 4), tanh(), linear(4, 1)),
        "float16": lambda: hf.LatentHNN(d, (4,)).half(),
        "complex": lambda: hf.LatentHNN(d, (4,)).to(torch.complex64),
    }
    draw = rng.random()
    kinds, state = (valid, True) if draw < 0.7 else (either, None) if draw < 0.92 else (invalid, False)
    name = rng.choice([*valid, *("LatentHNN", "SeparableHNN") * 4]) if state else rng.choice([*kinds])
    return name, kinds[name], d, state


FIXED_DTYPE = ("two dtypes", "float16", "complex", "meta device")


def quiet(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about widths of 0
        return make()


def draw_state(rng: random.Random, d: int, dtype: torch.dtype) -> tuple[Given, bool]:
    """And whether its numbers are of usual size."""
    lead = rng.choice([(), (1,), (2,), (3,), (5,), (0,), (2, 3), (1, 1), (0, 2), (2, 0), (17,), (2, 1, 2)])
    z = torch.randn(*lead, d).to(dtype)
    draw = rng.random()
    if draw < 0.85:
        return Given(z.requires_grad_(rng.random() < 0.4)), True
    if draw < 0.9:
        return Given(rng.choice([torch.full_like(z, x) for x in (NAN, INF, 1e30, 1e-42)])), False
    if draw < 0.94:
        strided = [torch.randn(1, d).expand(4, d), torch.randn(8, d)[::2], torch.randn(d, *lead).movedim(0, -1)]
        return Given(rng.choice([nn.Parameter(z), *(x.to(dtype) for x in strided)])), True
    other = torch.float32 if dtype == torch.float64 else torch.float64
    invalid = [
        torch.randn(*lead, d + 1).to(dtype), torch.randn(*lead, 2 * d).to(dtype), torch.randn(d, 3).to(dtype),
        torch.tensor(1.0).to(dtype), z.to(torch.int64), z.half(), z.to(other), z.to(torch.complex64), z > 0,
        torch.empty(*lead, d, dtype=dtype, device="meta"), np.zeros((2, d), np.float32), [0.0] * d, None, "z", 1.0,
    ]  # fmt: skip
    return Given(rng.choice(invalid), False), True


def draw_steps(rng: random.Random) -> Given:
    invalid = [-1, True, 2.0, None, "3", torch.tensor(3), [1], np.float64(2), np.bool_(True), 1j, -(2**70), 2.5, NAN]
    return pick(rng, [0, 1, 1, 2, 3, 5, 17, np.int64(3), np.int32(2)], invalid, [np.array(3)])


def draw_step_size(rng: random.Random, z: Given, n_steps: Given) -> tuple[Given, bool]:
    """And whether it is of usual size."""

    def around(*shape: int) -> Tensor:
        return 0.1 + 0.05 * torch.rand(shape)

    numbers = [0.1, 1, -0.1, 0, 0.0, np.float64(0.1), np.float32(0.1), np.int64(1), np.float16(0.125)]
    if rng.random() < 0.06:
        odd = [1e300, -1e300, 1e-320, torch.tensor(NAN), torch.tensor(INF), torch.tensor(1e300, dtype=torch.float64)]
        return Given(rng.choice([*odd, np.array(0.1), np.array([0.1])]), None), False
    invalid = [
        True, False, "0.1", None, [0.1], (0.1,), 1j, 10**400, -(10**400), INF, -INF, NAN, np.float64(NAN), np.float32(INF),
        np.bool_(True), b"x", {}, object(), torch.tensor(1), torch.tensor(True), torch.tensor(1j),
        torch.empty((), device="meta"),
    ]  # fmt: skip
    if rng.random() < 0.06:
        return Given(rng.choice(invalid), False), True
    if rng.random() < 0.5 or not (z.valid and n_steps.valid):
        return Given(rng.choice(numbers)), True
    lead, n = tuple(z.value.shape[:-1]), int(n_steps.value)
    right = [(), (1,), (n,), (*lead, 1), (*lead, n), (*(1,) * len(lead), n)]
    shapes = right if rng.random() < 0.85 else [(n + 1,), (n + 1, 1), (3, *lead, n), (0,), (2, 2)]
    dt = around(*rng.choice(shapes)).to(rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    target = (*lead, n)
    fits = dt.ndim <= len(target) and all(
        size in (1, to) for size, to in zip(reversed(dt.shape), reversed(target), strict=False)
    )
    return Given(dt.requires_grad_(rng.random() < 0.4), fits), True


def draw_options(rng: random.Random, dtype: torch.dtype) -> dict[str, Given]:
    options: dict[str, Given] = {}

    def maybe(share: float, name: str, *choices: Sequence[Any]) -> None:
        if rng.random() < share:
            options[name] = pick(rng, *choices)

    maybe(0.8, "integrator", [*SCHEMES, "leapfrog", "leapfrog", "euler", "euler"], ["x", None, 3, "", ["leapfrog"], "LEAPFROG"])
    maybe(0.4, "energy", [True, False], [], [None, 1, "yes"])
    maybe(0.4, "states", ["all", "final"], ["last", None, 1, ("all",)])
    maybe(0.4, "memory", ["store", "recompute", "checkpoint", "reversible"], ["none", None, 0])
    maybe(0.4, "backend", ["auto", "cpp", "torch", "reference"], ["x", None, 0], ["triton", "cuda"])
    maybe(
        0.15,
        "tolerance",
        [1e-3, 1e-5, 0.5, None],
        [0, -1, 1, NAN, "x", 1e-20, [1e-3], 1j],
        [np.float32(1e-3), torch.tensor(1e-3)],
    )
    maybe(0.15, "max_evaluations", [1, 2, 50], [0, -1, 2.5, True, None, "x"], [np.int64(5), 2**31, 10**30])
    maybe(0.3, "unconverged", ["raise", "flag", "flag", "flag"], ["x", None, 1])
    maybe(0.15, "omega", [1.0, 0.0, -1.0, 20], [], [INF, NAN, "x", None, 1e30, True, np.float32(1), torch.tensor(1.0)])
    maybe(0.02, "foo", [1], [1])
    if "foo" in options:
        options["foo"] = Given(1, False)
    tao = options.get("integrator", Given("")).value == "tao"
    if tao and options.get("omega", Given(1.0)).value in (INF, "x", None):
        options["omega"] = options["omega"]._replace(valid=False)
    return options


FUNCTIONS = ["rollout"] * 12 + ["leapfrog", "energy", "SymplecticIntegrator", "EulerIntegrator", "jvp", "vmap", "grad"]


@dataclass
class Call:
    seed: int
    function: str
    network: str
    make: Callable[[], Any]
    dtype: torch.dtype
    z: Any
    dt: Any
    n_steps: Any
    options: dict[str, Any]
    valid: bool | None
    """Whether every argument is, None if that is not known; False if one is invalid."""
    comparable: bool
    """Whether an oracle in float64 tells what the numbers must be."""

    def __str__(self) -> str:
        def short(x: Any) -> str:
            if isinstance(x, Tensor):
                return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{' on meta' if x.is_meta else ''}"
            return f"{type(x).__name__} {x!r}"[:70]

        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return (
            f"{self.function}({self.network}, z {short(self.z)}, dt {short(self.dt)}, n_steps {short(self.n_steps)}, {options})"
        )

    def net(self, dtype: torch.dtype | None = None) -> Any:
        torch.manual_seed(self.seed)
        net = quiet(self.make)
        if isinstance(net, nn.Module) and self.network not in FIXED_DTYPE:
            net = net.to(self.dtype)
        return net if dtype is None else net.to(dtype)


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    function = rng.choice(FUNCTIONS)
    network, make, d, net_valid = draw_network(rng)
    z, usual_z = draw_state(rng, d, dtype)
    n_steps = draw_steps(rng)
    dt, usual_dt = draw_step_size(rng, z, n_steps)
    options = draw_options(rng, dtype) if function == "rollout" else {}
    if function in ("jvp", "vmap", "grad"):
        z, usual_z = Given(torch.randn(3, d).to(dtype)), True
        dt = Given(0.1)
        usual_dt = True
        options = {"integrator": Given(rng.choice(["leapfrog", "euler"])), "backend": Given(rng.choice(["auto", "torch"]))}
    if function in ("SymplecticIntegrator", "EulerIntegrator"):
        # outside of the published bounds of a learnable step size it may be refused
        dt, usual_dt = pick(rng, [0.1, 0.5, 1, 2.0], ["x", None, [0.1], NAN, 1j], [0.01, 3.0, 0, -1.0, np.float32(0.5)]), True
    if function == "leapfrog" and network == "Sequential without biases" and usual_z and z.valid and z.value.numel():
        n_steps, dt = Given(rng.choice([2**50, 2**62, 10**30]), False), Given(0.1)  # more numbers than there is memory for
    if SCHEMES.get(str(options.get("integrator", Given("")).value), SCHEMES["euler"]).implicit and n_steps.value == 17:
        options["integrator"] = Given("rk4")  # the oracle would take many seconds
    if net_valid is None and options.get("integrator", Given("leapfrog")).value not in ("leapfrog", "euler"):
        options["integrator"] = Given("leapfrog")
    given = [
        net_valid,
        z.valid,
        *([] if function == "energy" else [n_steps.valid, dt.valid]),
        *(x.valid for x in options.values()),
    ]
    valid = False if False in given else None if None in given else True
    values = {name: x.value for name, x in options.items()}
    if valid and (network == "SeparableHNN" or values.get("memory") == "reversible" or function in ("jvp", "vmap", "grad")):
        valid = None  # not every combination is there
    return Call(
        seed, function, network, make, dtype, z.value, dt.value, n_steps.value, values, valid,
        usual_z and usual_dt and dt.valid is True,
    )  # fmt: skip


class Values(NamedTuple):
    outputs: list[Tensor]
    grads: list[Tensor]
    """Of z0 and the parameters, as far as they require any, for the sum of the mean squares."""
    solved: bool = True


def with_gradients(outputs: list[Tensor], wrt: list[Tensor], solved: bool = True) -> Values:
    loss = sum((x.double().square().mean() if x.numel() else x.double().sum()) for x in outputs)
    grads = [torch.zeros_like(x) for x in wrt]
    if isinstance(loss, Tensor) and loss.requires_grad and wrt:
        grads = list(torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True))
    return Values([x.detach() for x in outputs], grads, solved)


def leaves(net: Any, z: Any) -> list[Tensor]:
    parameters = list(net.parameters()) if isinstance(net, nn.Module) else []
    return [x for x in (z, *parameters) if isinstance(x, Tensor) and x.requires_grad]


def made(call: Call) -> Values:
    """What the library makes of the call."""
    net, z = call.net(), call.z
    solved = True
    if call.function == "rollout":
        out = hf.rollout(net, z, call.dt, call.n_steps, **call.options)
        outputs = [out.states] if out.energy is None else [out.states, out.energy]
        solved = out.solve is None or bool(out.solve.converged.all())
    elif call.function == "leapfrog":
        outputs = [hf.leapfrog(net, z, call.dt, call.n_steps)]
    elif call.function == "energy":
        outputs = [hf.energy(net, z)]
    elif call.function in ("SymplecticIntegrator", "EulerIntegrator"):
        outputs = [getattr(hf, call.function)(net, call.dt).rollout(z, call.n_steps)]
    else:
        return Values([x.detach() for x in transformed(call.function, lambda x: final(net, x, call), z)], [])
    return with_gradients(outputs, leaves(net, z), solved)


def final(net: Any, z: Tensor, call: Call) -> Tensor:
    return hf.rollout(net, z, call.dt, call.n_steps, states="final", **call.options).states


def transformed(function: str, flow: Callable[[Tensor], Tensor], z: Tensor) -> list[Tensor]:
    z = z.detach()
    if function == "jvp":
        return list(torch.func.jvp(flow, (z,), (torch.ones_like(z),)))
    if function == "vmap":
        return [torch.func.vmap(flow)(z)]
    return [torch.func.grad(lambda x: flow(x).square().sum())(z)]


def hamiltonian(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda z: net(z).reshape(z.shape[:-1])


def rolled(H: Callable[[Tensor], Tensor], z: Tensor, dt: Tensor, n_steps: int, integrator: str) -> Tensor:
    """States [..., n_steps + 1, 2d] by automatic differentiation of H, as the methods are written down."""

    def field(z: Tensor) -> tuple[Tensor, Tensor]:
        """dH/dq, dH/dp."""
        z = z if z.requires_grad else z.detach().requires_grad_()
        (g,) = torch.autograd.grad(H(z).sum(), z, create_graph=True, allow_unused=True, materialize_grads=True)
        return g.chunk(2, dim=-1)

    steps = dt.expand(*z.shape[:-1], n_steps)
    path = [z]
    for t in range(n_steps):
        h = steps[..., t, None]
        q, p = path[-1].chunk(2, dim=-1)
        Hq, Hp = field(path[-1])
        if integrator == "euler":
            q, p = q + h * Hp, p - h * Hq
        else:
            p = p - h / 2 * Hq
            q = q + h * field(torch.cat((q, p), -1))[1]
            p = p - h / 2 * field(torch.cat((q, p), -1))[0]
        path.append(torch.cat((q, p), -1))
    return torch.stack(path, dim=-2)


def expected(call: Call) -> Values:
    """What the call must return, in float64."""
    net = call.net(torch.float64)
    z = call.z.detach().double().requires_grad_(call.z.requires_grad)
    H = hamiltonian(net)
    if call.function == "energy":
        return with_gradients([H(z)], leaves(net, z))
    dt = call.dt.detach().double() if isinstance(call.dt, Tensor) else torch.tensor(float(call.dt), dtype=torch.float64)
    n_steps = int(call.n_steps)
    integrator = call.options.get("integrator", "euler" if call.function == "EulerIntegrator" else "leapfrog")
    if call.function in ("SymplecticIntegrator", "EulerIntegrator"):
        dt = dt.clamp(0.1, 2.0)
    every = call.options.get("states", "all") == "all"
    if call.function in ("jvp", "vmap", "grad"):
        v, step = torch.ones_like(z), 1e-5
        flow = lambda x: rolled(H, x, dt, n_steps, integrator)[..., -1, :]  # noqa: E731
        if call.function == "jvp":
            return Values([flow(z).detach(), ((flow(z + step * v) - flow(z - step * v)) / (2 * step)).detach()], [])
        if call.function == "vmap":
            return Values([flow(z).detach()], [])
        z = z.detach().requires_grad_()
        return Values([torch.autograd.grad(flow(z).square().sum(), z)[0]], [])
    if integrator in ("leapfrog", "euler"):
        states = rolled(H, z, dt, n_steps, integrator)
    else:
        kept = {name: x for name, x in call.options.items() if name == "omega"}
        states = hf.rollout(net, z, dt, n_steps, integrator=integrator, backend="reference", **kept).states
    outputs = [states if every else states[..., -1, :]]
    if call.options.get("energy"):
        outputs.append(H(states))
    return with_gradients(outputs, leaves(net, z))


class Verdict(NamedTuple):
    outcome: str
    """ "right", "refused" or "returned", in order; anything else is a fault."""
    details: str = ""

    @property
    def in_order(self) -> bool:
        return self.outcome in ("right", "refused", "returned")


def judge(call: Call) -> Verdict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = made(call)
    except Exception as error:
        return judge_error(call, error)
    if call.valid is False:
        return Verdict("invalid arguments accepted")
    if not call.comparable:
        return Verdict("returned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = expected(call)
    if [x.shape for x in found.outputs] != [x.shape for x in exact.outputs]:
        return Verdict("wrong shape", f"{[list(x.shape) for x in found.outputs]}, not {[list(x.shape) for x in exact.outputs]}")
    if not found.solved:
        return Verdict("returned")
    tolerance = max(TOLERANCES[call.dtype], 100 * float(call.options.get("tolerance") or 0))
    pairs = [*zip(found.outputs, exact.outputs, strict=True)]
    if call.dtype != torch.bfloat16:
        if len(found.grads) != len(exact.grads):
            return Verdict("wrong gradient", f"{len(found.grads)} gradients, not {len(exact.grads)}")
        pairs += zip(found.grads, exact.grads, strict=True)
    for i, (x, y) in enumerate(pairs):
        if not y.numel() or not bool(y.isfinite().all()) or float(y.abs().max()) > 1e6:
            continue  # what overflows does so earlier in fewer bits
        off = float((x.double() - y).abs().max() / y.abs().max().clamp(min=1.0))
        if not off <= tolerance:
            return Verdict("wrong value" if i < len(found.outputs) else "wrong gradient", f"off by {off:.1e}")
    return Verdict("right")


def judge_error(call: Call, error: Exception) -> Verdict:
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, DOCUMENTED):
        return Verdict("undocumented class of error", text)
    if isinstance(error, TypeError) and "unexpected keyword argument 'foo'" in str(error):
        return Verdict("refused")
    if isinstance(error, hf.errors.ConvergenceError):
        return Verdict("refused")
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    assert at is not None
    code = at.tb_frame.f_code
    raised = dis.opname[code.co_code[at.tb_lasti]] == "RAISE_VARARGS"
    if not (raised and code.co_filename.startswith(PACKAGE)) and not any(x in str(error) for x in TOO_LARGE):
        return Verdict("not the library's own message", f"{text} (at {Path(code.co_filename).name}:{at.tb_lineno})")
    if len(str(error)) < 20:
        return Verdict("a message that shows nothing", text)
    if call.valid:
        return Verdict("valid arguments refused", text)
    return Verdict("refused")


def calls(count: int, first: int) -> None:
    """In the child: a line before each call and one after it."""
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        call = draw(seed)
        print(json.dumps({"seed": seed, "call": str(call)}), flush=True)
        verdict = judge(call)
        print(json.dumps({"seed": seed, **verdict._asdict()}), flush=True)


def fuzz(count: int, first: int, script: str = __file__) -> int:
    """The number of faults, each of which is printed. `script` is what the children run."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults, seed, last = 0, first, first + count

    def report(seed: int, outcome: str, details: str, call: str) -> None:
        nonlocal faults
        faults += 1
        print(f"seed {seed}: {outcome}\n    {call}\n    {details[:400]}\n    again: {__file__} 1 --first {seed}", flush=True)

    while seed < last:
        command = [sys.executable, script, str(last - seed), "--first", str(seed), "--in-this-process"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            call, pending = "", False
            while True:
                ready, _, _ = select.select([child.stdout], [], [], LIMIT if pending else 5 * LIMIT)
                line = child.stdout.readline() if ready else b""
                if not line:
                    break
                event = json.loads(line)
                seed, pending = event["seed"], "call" in event
                if pending:
                    call = event["call"]
                    continue
                outcomes[event["outcome"]] += 1
                if not Verdict(event["outcome"]).in_order:
                    report(seed, event["outcome"], event["details"], call)
                seed += 1
            if ready:
                code = child.wait()
            else:
                child.kill()
                code = child.wait()
            if pending or (code and seed < last):
                outcome = f"exit status {code}" if ready else f"more than {LIMIT:.0f} s"
                outcomes[outcome] += 1
                report(seed, outcome, "", call if pending else "drawing the call")
                seed += 1
    print(f"{count} calls from {first} on: {dict(outcomes.most_common())}; {faults} faults")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=2000, help="calls (default 2000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one (default 0)")
    parser.add_argument("--in-this-process", action="store_true", help="as the child does, or under a debugger")
    options = parser.parse_args()
    if options.in_this_process:
        calls(options.count, options.first)
        return 0
    return 1 if fuzz(options.count, options.first) else 0


if __name__ == "__main__":
    sys.exit(main())
