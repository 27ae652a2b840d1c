"""The loop on states of mechanical systems as a C++ extension for CPUs: `state_space/loop.py`'s functions, one call each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..hidden_space.fixed_point import Solver
from ..schemes import SubStep
from ..state_space import loop
from ..state_space.equations import Sums
from ..state_space.loop import Rolled
from ..state_space.system import Form, System
from . import cpp

# as in csrc/cpu/problem.h
MASSES = {"identity": 0, "diagonal": 1, "cholesky": 2}
MAX_COORDINATES = 32

_FEWEST_STEPS = 16
"""Of a call: every call starts without the steps before it to extrapolate from."""


def _delegated(system: System, rows: int, n_steps: int = 1) -> bool:
    nets = [net for net in (system.potential, system.mass) if net]
    deep = any(len(net.weights) > cpp.MAX_LAYERS for net in nets)
    return not rows or not n_steps or deep or system.form.d > MAX_COORDINATES


@functools.lru_cache(maxsize=256)
def _numbers(form: Form, scheme: tuple[SubStep, ...], solver: Solver | None) -> Tensor:
    nets = (form.potential, form.mass_net)
    numbers: list[float] = [
        form.d, len(form.angles), MASSES[form.mass], form.diagonal == "softplus", form.epsilon,
        *[net[0] if net else 0 for net in nets], *form.angles,
    ]  # fmt: skip
    for n, activation in (net for net in nets if net):
        for name, beta, threshold in (activation.at(layer) for layer in range(n - 1)):
            numbers += [cpp.KINDS[name], beta, threshold]
    numbers += [*(solver or (0.0, 0)), len(scheme), *[x for stage in scheme for x in stage[:4]]]
    for stage in scheme:
        numbers += [*stage.mix, *[0.0] * (len(scheme) - len(stage.mix))]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _operands(system: System, scheme: Sequence[SubStep] = (), solver: Solver | None = None) -> tuple[list[Tensor], Tensor]:
    return [t.contiguous() for t in system.tensors], _numbers(system.form, tuple(scheme), solver)


def _options(like: Tensor) -> int:
    return torch.get_num_threads() | (cpp.isa + 1) << 16


def _chunks(system: System, rows: int, scheme: Sequence[SubStep], n_steps: int, factor: int) -> Iterator[tuple[int, int]]:
    """Ranges of steps, each about a second's work or a few steps."""
    nets = [net for net in (system.potential, system.mass) if net]
    products = sum(2 * w.numel() for net in nets for w in net.weights)
    steps = max(_FEWEST_STEPS, int(cpp.CHUNK / (factor * rows * len(scheme) * max(products, 1))))
    for begin in range(0, n_steps, steps):
        yield begin, min(begin + steps, n_steps)


def forward(
    system: System, z: Tensor, dt: Tensor, scheme: Sequence[SubStep], n_steps: int, memory: str, solver: Solver
) -> Rolled:
    """As `state_space.loop.forward`."""
    cpp.require()
    if _delegated(system, len(z), n_steps):
        return loop.forward(system, z, dt, scheme, n_steps, memory, solver)
    # everything is allocated before any work is done
    rows, width = z.shape
    states = z.new_empty(rows, n_steps + 1, width)
    states[:, 0] = z
    tape = z.new_empty(rows, n_steps, len(scheme), loop.tape_width(system, memory))
    solved = n_steps if any(stage.implicit for stage in scheme) else 0
    residual, evaluations = z.new_empty(rows, solved), z.new_empty(rows, solved, dtype=torch.int32)
    operands, steps = _operands(system, scheme, solver), dt.contiguous()
    for begin, end in _chunks(system, rows, scheme, n_steps, 1):
        torch.ops.hjepa_fast_cpp.states_forward(states, tape, residual, evaluations, *operands, steps, begin, end, _options(z))
    return Rolled(states, tape, residual, evaluations)


def backward(
    system: System,
    cotangent: Tensor,
    g_states: Tensor | None,
    tape: Tensor,
    dt: Tensor,
    scheme: Sequence[SubStep],
    solver: Solver,
    sums: Sums | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `state_space.loop.backward`."""
    cpp.require()
    rows, n_steps = tape.shape[:2]
    if _delegated(system, rows, n_steps):
        return loop.backward(system, cotangent, g_states, tape, dt, scheme, solver, sums)
    later = cotangent.clone(memory_format=torch.contiguous_format)
    gdt, residual = later.new_empty(rows, n_steps), later.new_zeros(rows)
    given = later.new_empty(0) if g_states is None else g_states.contiguous()
    operands, steps, tape = _operands(system, scheme, solver), dt.contiguous(), tape.contiguous()
    for begin, end in reversed([*_chunks(system, rows, scheme, n_steps, 3)]):
        torch.ops.hjepa_fast_cpp.states_backward(
            later, gdt, residual, [] if sums is None else sums.tensors, given, tape, *operands, steps, begin, end,
            _options(later),
        )  # fmt: skip
    return later, gdt, residual


def gradient(system: System, z: Tensor) -> Tensor:
    """As `state_space.loop.gradient`."""
    cpp.require()
    if _delegated(system, len(z)):
        return loop.gradient(system, z)
    found = z.new_empty(z.shape)
    torch.ops.hjepa_fast_cpp.states_gradient(found, z.contiguous(), *_operands(system), _options(z))
    return found


def gradient_backward(system: System, z: Tensor, v: Tensor | None, e: Tensor | None, sums: Sums | None) -> Tensor:
    """As `state_space.loop.gradient_backward`."""
    cpp.require()
    if _delegated(system, len(z)):
        return loop.gradient_backward(system, z, v, e, sums)
    found = z.new_empty(z.shape)
    given = [z.new_empty(0) if t is None else t.contiguous() for t in (v, e)]
    torch.ops.hjepa_fast_cpp.states_gradient_backward(
        found, [] if sums is None else sums.tensors, given, z.contiguous(), *_operands(system), _options(z)
    )
    return found
