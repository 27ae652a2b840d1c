"""A rollout without its numbers: what runs it, what comes back, what is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..schemes import SubStep
from . import program, tao
from .network import tape_width
from .program import UNDRIVEN, Drive, Form, Key, Program, stages_of


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: states and sums of bfloat16 networks are kept in float32."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def kernel_stages(stages: tuple[SubStep, ...], with_energy: bool) -> tuple[SubStep, ...]:
    """With energies wanted and the first sub-step's point not the state, one before it that only looks at the energy."""
    return (SubStep(0.0, 0.0), *stages) if with_energy and stages and stages[0].implicit else stages


CHUNK, MOST_ANCHORS = 16, 8
"""Reversible: steps whose layer values are held at a time; states kept of a rollout, whatever its length."""


def segment_length(n_steps: int, memory: str) -> int:
    """Steps between two kept states: all in one segment; with checkpoints about sqrt(n), which needs the least memory; an
    eighth of them, in whole chunks, with reversal."""
    if memory == "checkpoint":
        return math.isqrt(max(n_steps - 1, 0)) + 1
    if memory == "reversible":
        return CHUNK * max(1, -(-n_steps // (CHUNK * MOST_ANCHORS)))
    return max(n_steps, 1)


@dataclass(frozen=True)
class Outline:
    """A rollout without its numbers: enough to know what comes back and what is kept."""

    forms: tuple[Form, ...]
    widths: tuple[tuple[int, ...], ...]
    """h_1, ..., h_L of each network (1 of a linear one); () of a quadratic form."""
    d: int
    integrator: str
    dense: bool
    every_state: bool
    with_energy: bool
    memory: str
    """"none", "store", "recompute", "checkpoint" or "reversible"; or "tiles", which keeps no tape: the backward pass runs a few
    rows forward again and back while what they leave is in the cache."""
    drive: Drive = UNDRIVEN

    @cached_property
    def stages(self) -> tuple[SubStep, ...]:
        return stages_of(self.integrator, self.forms)

    @cached_property
    def tao(self) -> bool:
        return self.integrator == "tao"

    @cached_property
    def in_kernel(self) -> bool:
        """Whether a `Kernel` runs it, not a program."""
        if not program.covers(self.forms, self.stages):
            return True
        mixes = any(s.mix for s in self.stages)
        return len(self.forms) == 1 and self.dense and self.forms[0].reads == "z" and not mixes

    @cached_property
    def program(self) -> Program:
        return program.compiled(self.forms, self.stages, self.dense, self.with_energy, self.drive)

    @cached_property
    def implicit(self) -> bool:
        return any(s.implicit for s in self.stages)

    @cached_property
    def stacked_widths(self) -> list[int]:
        """Of each term's share of a kernel's first layer."""
        return [self.d if form.quadratic else w[0] for form, w in zip(self.forms, self.widths, strict=True)]

    @cached_property
    def from_states(self) -> tuple[int, ...]:
        """Terms whose energies are those of the states."""
        if not self.with_energy or self.in_kernel:
            return ()
        return tuple(k for k in range(len(self.forms)) if k not in self.program.energies)

    @cached_property
    def energy_widths(self) -> list[int]:
        """Of the layers that are kept of every state, in the order of `from_states`: the way back then need not go forward."""
        if self.memory != "store":
            return []
        return [h for k in self.from_states if self.forms[k].n_layers > 1 for h in self.widths[k]]

    @cached_property
    def every_path(self) -> bool:
        """Whether what states are made of is wanted after every step."""
        return self.every_state or bool(self.from_states)

    def register_width(self, key: Key) -> int:
        name, *rest = key
        if name in ("C", "Z", "Y", "V", "F"):
            return 2 if name == "C" else self.d
        return self.widths[int(rest[1 if name in ("S", "G", "X") else 0])][0]

    @cached_property
    def register_widths(self) -> tuple[int, ...]:
        """Of every register of the program."""
        return tuple(self.register_width(key) for key in self.program.registers)

    @cached_property
    def by_pair(self) -> bool:
        """Whether the states themselves are registers."""
        return not self.in_kernel and not self.dense

    @cached_property
    def loop_writes_sums(self) -> bool:
        """Whether the adjoint of the loop writes every parameter's gradient before anything else is added to it."""
        return self.by_pair and not self.from_states and self.memory != "reversible"

    def state_widths(self) -> list[int]:
        """Of the registers that say where a rollout is."""
        if self.in_kernel:
            return [sum(self.stacked_widths)] * 3
        return [self.register_width(self.program.registers[i]) for i in self.program.state]

    def path_widths(self) -> list[int]:
        if self.in_kernel:
            return [sum(self.stacked_widths)] * 2
        return [self.register_width(self.program.registers[i]) for i in self.program.path]

    def tape_widths(self, n_steps: int, memory: str) -> int:
        """Numbers on a tape of this many steps, "store" or "recompute"."""
        if self.in_kernel:
            each = zip(self.forms, self.widths, self.stacked_widths, strict=True)
            width = sum(h if f.quadratic else tape_width(w, memory) for f, w, h in each)
            return n_steps * len(kernel_stages(self.stages, self.with_energy)) * width
        total = 0
        for item in self.program.items:
            key = self.program.registers[item.register]
            width = tape_width(self.widths[int(key[1])], memory) if item.network else self.register_width(key)
            total += item.slots(n_steps) * width
        return total

    def saved(self, n_steps: int) -> tuple[int, int]:
        """Numbers a sample that are kept for the backward pass: on the tape, and of the path."""
        if self.memory == "none" or not n_steps:
            return 0, 0
        if self.memory in ("checkpoint", "reversible") and not self.tao:
            return sum(self.state_widths()) * -(-n_steps // segment_length(n_steps, self.memory)), 0
        n_kept = n_steps if self.every_path else 1
        if self.tao:
            h = sum(self.stacked_widths)
            return tao.POINTS * h * n_steps, 2 * h * n_kept
        of_path = sum(self.path_widths())
        if not self.in_kernel and not self.dense and not self.from_states:
            n_kept = 1 if self.program.tracked else 0
        kept = n_kept * of_path + (n_steps + 1) * sum(self.energy_widths)
        return 0 if self.memory == "tiles" else self.tape_widths(n_steps, self.memory), kept
