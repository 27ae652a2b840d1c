"""Random rollouts of the C++ backend, each held against the PyTorch one in float64.

    python tests/tools/stress.py --seconds 60 --first 0

Rounds are numbered from `--first`. A round's number fixes its threads, instruction set, loop and rollouts, of which some are
made by three callers at once; `--rounds 1 --first N` repeats round N. Exits 1 on a wrong value or an error.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import random
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hjepa_fast as hf
from hjepa_fast import ops
from hjepa_fast.activations import Activation
from hjepa_fast.backends import cpp
from hjepa_fast.hidden_space import coupling
from hjepa_fast.schemes import SCHEMES
from hjepa_fast.testing import BOUNDED_SLOPES

ACTIVATIONS = [Activation(name).module for name in BOUNDED_SLOPES]
UNITS = 3000
"""Largest error, in units of rounding of the dtype that is computed in, relative to the largest number or to 1."""


def layers(rng: random.Random, inputs: int, depth: int, widest: int) -> nn.Sequential:
    activation, modules = rng.choice(ACTIVATIONS), []
    for _ in range(depth):
        width = rng.randint(1, rng.choice([20, widest]))
        modules += [nn.Linear(inputs, width, bias=rng.random() < 0.9), activation()]
        inputs = width
    return nn.Sequential(*modules, nn.Linear(inputs, 1, bias=rng.random() < 0.9))


def strided(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers with other strides; or, of a batch, its first sample again and again."""
    options = [lambda: x, lambda: torch.cat((x, x), dim=-1)[..., : x.shape[-1]], lambda: torch.stack((x, x), dim=-1)[..., 0]]
    if x.ndim > 1:
        options.append(lambda: x.mT.contiguous().mT)
        options.append(lambda: x[:1].expand_as(x) if x.shape[0] else x)
    return rng.choice(options)() if x.ndim else x


@dataclass
class Case:
    net: nn.Module
    z0: Tensor
    dt: float | Tensor
    n_steps: int
    options: dict[str, Any]
    memory: str
    control: Tensor | None = None

    def __str__(self) -> str:
        dt = list(self.dt.shape) if isinstance(self.dt, Tensor) else self.dt
        shapes = [list(p.shape) for p in self.net.parameters()]
        return (
            f"{type(self.net).__name__} {shapes} z0 {list(self.z0.shape)} {self.z0.dtype} dt {dt} n_steps {self.n_steps} "
            f"memory {self.memory} {self.options}"
        )

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        separable = rng.random() < 0.25
        d = rng.randint(1, rng.choice([3, 40, 150]))
        depth, widest = rng.randint(0, 6), rng.choice([8, 40, 130])
        integrator = rng.choice(list(SCHEMES))
        n_steps = rng.choice([0, 1, 2, rng.randint(0, 20 if len(SCHEMES[integrator].stages) < 6 else 3)])
        batch = rng.choice([0, 1, 2, 3, 5, 8, 16, 17, 33, rng.randint(0, 70)])
        dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        net: nn.Module
        if separable:
            hidden = [rng.randint(1, widest) for _ in range(max(depth, 1))]
            kinetic = rng.choice([None, [rng.randint(1, widest) for _ in range(rng.randint(1, 4))]])
            net = hf.SeparableHNN(2 * d, hidden, kinetic, rng.choice(BOUNDED_SLOPES), quadratic=rng.random() < 0.2)
        else:
            net = layers(rng, 2 * d, depth, widest)
        # friction and control become lines of the program; what steps one by one is run by the same operators
        explicit = not any(stage.implicit for stage in SCHEMES[integrator].stages) and integrator != "tao"
        control_dim = rng.randint(0, 3) if explicit and n_steps else 0
        if explicit and n_steps and rng.random() < 0.4:
            splitting = rng.choice(["symmetric", "kicks"]) if integrator in ("leapfrog", "symplectic-euler") else "symmetric"
            friction = rng.choice([None, "conformal", "rayleigh"])
            net = hf.PortHNN(net, control_dim, friction, rng.random() < 0.5, splitting=splitting)
        net = net.to(dtype)
        lead = rng.choice([(batch,), (batch,), (batch, 1), (1, batch), *([()] if batch == 1 else [])])
        work = torch.promote_types(dtype, torch.float32)
        z0 = strided(rng, torch.randn(*lead, 2 * d, dtype=work)).to(dtype)
        base = 0.05 + 0.1 * rng.random()
        shape = rng.choice([(), (n_steps,), (*lead, 1), (*lead, n_steps)])
        step_sizes = base * (1 + 0.1 * torch.randn(shape, dtype=work))
        dt: float | Tensor = base if rng.random() < 0.2 else strided(rng, step_sizes) if shape else step_sizes
        if rng.random() < 0.7:
            z0.requires_grad_(rng.random() < 0.8)
            if isinstance(dt, Tensor):
                dt = dt.detach().requires_grad_(rng.random() < 0.7)
            for p in net.parameters():
                if dtype != torch.bfloat16 and rng.random() < 0.3:
                    p.data = strided(rng, p.data)
                p.requires_grad_(rng.random() < 0.9)
        else:
            net.requires_grad_(False)
        memories = ["store", "recompute", "checkpoint"]
        control = None
        if isinstance(net, hf.PortHNN):
            memories = ["store", "recompute"]
            if net.control_dim:
                shape = rng.choice([(net.control_dim,), (*lead, net.control_dim), (*lead, n_steps, net.control_dim)])
                control = strided(rng, torch.randn(shape, dtype=work)).to(dtype)
                control.requires_grad_(z0.requires_grad)
        elif separable or SCHEMES[integrator].general.reversible:
            memories.append("reversible")
        options = {"integrator": integrator, "energy": rng.random() < 0.5, "states": rng.choice(["all", "final"])}
        return cls(net, z0, dt, n_steps, options, rng.choice(memories), control)

    def exact(self) -> Case:
        """The same in float64."""

        def up(x: float | Tensor | None) -> Any:
            return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

        return Case(
            copy.deepcopy(self.net).double(), up(self.z0), up(self.dt), self.n_steps, self.options, "store", up(self.control)
        )

    def run(self, backend: str, seed: int) -> list[Tensor]:
        """States, energies and, for random cotangents of both, the gradients of all that requires them."""
        out = hf.rollout(
            self.net,
            self.z0,
            self.dt,
            self.n_steps,
            memory=self.memory,
            backend=backend,
            unconverged="flag",
            control=self.control,
            **self.options,
        )
        found = [out.states] if out.energy is None else [out.states, out.energy]
        wanted = [
            x for x in (self.z0, self.dt, self.control, *self.net.parameters()) if isinstance(x, Tensor) and x.requires_grad
        ]
        generator = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found]
        if any(x.requires_grad for x in found):
            found += torch.autograd.grad(found, wanted, cotangents, allow_unused=True, materialize_grads=True)
        return [x.detach() for x in found]


def error(case: Case, found: list[Tensor], exact: list[Tensor], precision: str) -> float:
    """The largest, in units of rounding."""
    work = torch.bfloat16 if case.z0.dtype == torch.float32 and precision == "medium" else case.z0.dtype
    worst = 0.0
    for x, y in zip(found, exact, strict=True):
        assert x.shape == y.shape, f"shape {list(x.shape)}, expected {list(y.shape)}"
        if y.numel():
            off = float((x.double() - y).abs().max() / y.abs().max().clamp(min=1.0))
            worst = max(worst, off / torch.finfo(work).eps) if off == off else float("inf")
    return worst


def set_up(threads: int, isa: int, path: int, precision: str) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    cpp.isa, cpp.path = isa, path


def play(number: int) -> tuple[int, float, list[str]]:
    """A round: its rollouts, the largest error in units of rounding, and what went wrong."""
    rng = random.Random(number)
    torch.manual_seed(number)
    sets = range(torch.ops.hjepa_fast_cpp.isa() + 1)
    precision = rng.choice(["highest", "highest", "high", "medium"])
    settings = rng.randint(1, 4), rng.choice([-1, *sets]), rng.choice([0, 0, 0, 1, 2, 3]), precision
    callers = rng.choice([1, 1, 1, 3])
    cases = [Case.draw(rng) for _ in range(callers)]
    set_up(1, -1, 0, "highest")
    coupling.forced, ops.LONGEST_TAPE = None, 2**29
    exact = [case.exact().run("torch", number) for case in cases]
    set_up(*settings)
    coupling.forced, ops.LONGEST_TAPE = rng.choice([None, "dense", "pair"]), rng.choice([2**29, 2**29, 0])
    settings = *settings, coupling.forced, ops.LONGEST_TAPE
    worst, wrong = 0.0, []

    def call(i: int) -> None:
        nonlocal worst
        try:
            for _ in range(1 if callers == 1 else 3):
                off = error(cases[i], cases[i].run("cpp", number), exact[i], precision)
                worst = max(worst, off)
                if not off < UNITS:
                    wrong.append(f"off by {off:.3g} units of rounding: {settings} {cases[i]}")
        except Exception:
            wrong.append(f"{settings} {cases[i]}\n{traceback.format_exc()}")

    others = [threading.Thread(target=call, args=(i,)) for i in range(1, callers)]
    for thread in others:
        thread.start()
    call(0)
    for thread in others:
        thread.join()
    return callers, worst, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="no round starts later (default 60)")
    parser.add_argument("--rounds", type=int, default=sys.maxsize, help="nor more of them than this")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (default 0)")
    options = parser.parse_args()
    assert cpp.available(), cpp.why_not()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    start, made, worst, failures = time.monotonic(), 0, 0.0, 0
    number = options.first
    while time.monotonic() - start < options.seconds and number - options.first < options.rounds:
        rollouts, off, wrong = play(number)
        made, worst, failures = made + rollouts, max(worst, off), failures + len(wrong)
        for what in wrong:
            print(f"round {number}: {what}", flush=True)
        number += 1
    seconds = time.monotonic() - start
    print(
        f"{number - options.first} rounds from {options.first} on, {made} rollouts, {failures} failures, largest error "
        f"{worst:.0f} units of rounding; instruction sets 0 to {torch.ops.hjepa_fast_cpp.isa()}; {seconds:.0f} s"
    )
    return 1 if failures or not made else 0


if __name__ == "__main__":
    sys.exit(main())
