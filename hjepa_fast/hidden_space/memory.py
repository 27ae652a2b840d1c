"""What is kept for the way back, and the way back through it: all in one, from checkpoints, or by stepping back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import warn
from . import outline as outlines
from .fixed_point import refuse_in_capture
from .loops import Kernel, Problem, Sweep, of_energy_of_states
from .outline import segment_length

_LOST = 1000
"""Reversal may be off by this many units of rounding."""


class Backwards:
    """The adjoint's way through the segments, from the last step to the first."""

    def __init__(self, problem: Problem, sums: Sweep, g_states: Tensor | None, g_energy: Tensor | None) -> None:
        self.problem, self.sums, self.loop = problem, sums, problem.loop()
        self.outline, self.n_steps = problem.outline, problem.n_steps
        self.loop.new_sums(sums)
        self.g_energy, self.g_states = g_energy, g_states
        if g_energy is not None and self.outline.from_states and g_states is not None and not self.outline.every_state:
            self.g_states = torch.cat((torch.zeros_like(g_states).expand(-1, self.n_steps, -1), g_states), dim=1)
        widths, batch = self.outline.state_widths(), len(problem.z0)
        zeros = problem.z0.new_zeros(batch * sum(widths)).split([batch * width for width in widths])
        self.cotangents = [x.view(batch, width) for x, width in zip(zeros, widths, strict=True)]
        self.layers: list[Tensor] = []
        """[B, n_steps + 1, h], the kept ones of `Outline.energy_widths`."""

    def run(self, tape: Tensor, kept: Tensor) -> None:
        loop, outline, n_steps = self.loop, self.outline, self.n_steps
        if outline.memory == "checkpoint":
            self.from_checkpoints(tape)
        elif outline.memory == "reversible":
            self.by_reversal(loop.start(), tape)
        else:
            memory = "store" if outline.memory == "tiles" else outline.memory
            widths = [(n_steps + 1) * h for h in outline.energy_widths]
            kept, *layers = kept.split([kept.shape[1] - sum(widths), *widths], dim=1)
            self.layers = [x.unflatten(1, (n_steps + 1, -1)) for x in layers]
            self.segment(0, n_steps, self.values(kept), self.path_of(kept), tape, memory)
        first = self.first_states()
        if first is not None:
            self.sums.z0 += first
        loop.of_start(self.sums, self.cotangents)
        loop.of_matrices(self.sums)

    def first_states(self) -> Tensor | None:
        """The cotangent of z0 as the first of the states."""
        extra = None
        if self.g_states is not None and (self.outline.every_state or self.g_states.shape[1] > 1):
            extra = self.g_states[:, 0]
        if self.g_energy is not None and self.outline.from_states:
            more = self.of_energies(self.problem.z0[:, None], 0, 1)[:, 0]
            extra = more if extra is None else extra + more
        return extra

    def of_energies(self, states: Tensor, begin: int, end: int) -> Tensor:
        """The cotangent of the states begin..end-1 by the energies that are theirs."""
        assert self.g_energy is not None
        gE, terms = self.g_energy[:, begin:end], self.outline.from_states
        layers = [x[:, begin:end].flatten(0, 1) for x in self.layers]
        return of_energy_of_states(self.problem, self.sums, states, gE, terms, layers)

    def path_of(self, kept: Tensor) -> list[Tensor]:
        """The path's registers, [B, n, width], from what was kept; [B, 0, width] where nothing was."""
        widths = self.outline.path_widths()
        n = kept.shape[1] // sum(widths)
        return [x.unflatten(1, (n, -1)) for x in kept.split([n * width for width in widths], dim=1)] if n else []

    def values(self, kept: Tensor) -> list[Tensor]:
        """The state's registers at the end, as far as they are known from the path."""
        path = dict(zip(self.loop.path, self.path_of(kept), strict=False))
        if isinstance(self.loop, Kernel):
            if self.g_energy is None:
                return []
            sq, sp = (path[key][:, -1] for key in self.loop.path)
            K = self.loop.K
            return [torch.addmm(torch.addmm(self.loop.a_at_start(), sq, K), sp, K.T), sq, sp]
        start = self.loop.start()
        return [path[key][:, -1] if key in path else x for key, x in zip(self.loop.state, start, strict=True)]

    def segment(
        self,
        begin: int,
        end: int,
        values: Sequence[Tensor],
        path: Sequence[Tensor],
        tape: Tensor,
        memory: str,
    ) -> None:
        """Steps begin..end-1: values of the registers at the end, the path of these steps, their tape."""
        loop, outline, sums = self.loop, self.outline, self.sums
        every = outline.every_path
        G = None
        if self.g_states is not None and (every or end == self.n_steps):
            G = self.g_states[:, begin + 1 : end + 1] if self.g_states.shape[1] > 1 or every else self.g_states
        gE = None
        if self.g_energy is not None:
            gE = self.g_energy[:, begin : end + 1]
            if outline.from_states:
                states = self.problem.z0.new_empty(len(gE), end - begin, 2 * outline.d)
                loop.to_states(path, states)
                more = self.of_energies(states, begin + 1, end + 1)
                G = more if G is None else G + more
            if end < self.n_steps:
                # the energy after these steps is the one before the next
                gE = torch.cat((gE[:, :-1], torch.zeros_like(gE[:, -1:])), dim=1)
        g_path = None if G is None else loop.of_states(sums, G, path)
        self.cotangents = loop.run_back(sums, self.cotangents, values, g_path, gE, tape, begin, end, memory, every)

    def from_checkpoints(self, tape: Tensor) -> None:
        """Every segment forward again from its kept state, the last one first."""
        length = segment_length(self.n_steps, self.outline.memory)
        starts = range(0, self.n_steps, length)
        widths = self.outline.state_widths()
        checkpoints = tape.unflatten(1, (len(starts), -1))
        for index in reversed(range(len(starts))):
            state = list(checkpoints[:, index].split(widths, dim=1))
            self.again(starts[index], min(starts[index] + length, self.n_steps), state)

    def again(self, begin: int, end: int, state: Sequence[Tensor]) -> None:
        """Steps begin..end-1 from this state: forward, keeping everything, and back."""
        run = self.loop.run(state, begin, end, "store", self.outline.every_path)
        self.segment(begin, end, run.state, run.path, run.tape, "store")

    def by_reversal(self, start: Sequence[Tensor], tape: Tensor) -> None:
        """States rebuilt from the last one backwards, a chunk at a time; and from the kept ones where that went wrong."""
        n_steps = self.n_steps
        length = segment_length(n_steps, self.outline.memory)
        widths = self.outline.state_widths()
        ends = tape.unflatten(1, (-(-n_steps // length), -1))
        anchors: list[Sequence[Tensor]] = [start, *(x.split(widths, dim=1) for x in ends.unbind(1))]
        for index in reversed(range(len(anchors) - 1)):
            first, last = index * length, min((index + 1) * length, n_steps)
            state: Sequence[Tensor] = anchors[index + 1]
            cotangents, saved = [x.clone() for x in self.cotangents], self.sums.snapshot()
            for begin in reversed(range(first, last, outlines.CHUNK)):
                end = min(begin + outlines.CHUNK, last)
                before, run = self.loop.rebuilt(state, begin, end, self.outline.every_path)
                self.segment(begin, end, state, run.path, run.tape, "store")
                state = before
            refuse_in_capture(self.problem.z0, 'memory="reversible"', '"checkpoint"')
            error = self.distance(state, anchors[index])
            limit = _LOST * torch.finfo(self.problem.z0.dtype).eps
            if error > limit:
                warn(
                    f'memory="reversible" rebuilt step {first} of {n_steps} only to {error:.1e} (limit {limit:.1e}): '
                    f"steps {first} to {last} are computed again from a kept state, as with checkpoints"
                )
                self.cotangents = cotangents
                self.sums.restore(saved)
                self.repeat(first, last, anchors[index])

    def distance(self, state: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """The largest difference of what the networks read, relative to its size."""
        worst = self.problem.z0.new_zeros(())
        for key, a, a0 in zip(self.loop.state, state, kept, strict=True):
            if key[0] != "A" or not len(a):
                continue
            error = ((a - a0).abs().amax(1) / a0.abs().amax(1).clamp_min(1)).nan_to_num(math.inf)
            worst = torch.maximum(worst, torch.where(a0.isfinite().all(1), error, 0).amax())
        return worst

    def repeat(self, first: int, last: int, start: Sequence[Tensor]) -> None:
        """Steps first..last-1 with checkpoints every chunk."""
        checkpoints = [start]
        for begin in range(first, last - outlines.CHUNK, outlines.CHUNK):
            checkpoints.append(self.loop.run(checkpoints[-1], begin, begin + outlines.CHUNK, "none", False).state)
        for index in reversed(range(len(checkpoints))):
            begin = first + index * outlines.CHUNK
            self.again(begin, min(begin + outlines.CHUNK, last), checkpoints[index])
