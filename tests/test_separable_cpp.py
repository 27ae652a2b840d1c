"""The C++ loop of a separable H against the PyTorch one in float64, for every instruction set that this processor has."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hjepa_fast.activations import NAMES, Activation
from hjepa_fast.backends import cpp, separable_cpp, separable_torch
from hjepa_fast.backends.separable_torch import Loop, State
from hjepa_fast.backends.torch import Gradients, Tail
from hjepa_fast.schemes import SCHEMES, SubStep, for_separable
from test_cpp import _built, _defaults, error, instruction_sets, poisoned, threads_for  # noqa: F401  (the first two apply to all)

N_STEPS = 4
# drift first and kick last, so that energies need gradients of their own; both moves at once; an idle one
DRIFT_FIRST = (SubStep(0.0, 0.5), SubStep(0.7, 0.0), SubStep(0.0, 0.0), SubStep(0.2, 0.3), SubStep(0.4, 0.0))
ALL_MOVES = {
    **{name: for_separable(SCHEMES[name]) for name in ("leapfrog", "euler", "symplectic-euler", "yoshida4")},
    "drift first": DRIFT_FIRST,
}
NETWORKS = [((1,), None), ((40,), (7,)), ((7, 5), None), ((33, 64), (64, 33, 20)), ((64, 33, 20), (9,)), ((9, 48, 31), None)]


class Case:
    """A loop's inputs and cotangents, of order one."""

    def __init__(self, batch, widths_V, widths_T, moves="leapfrog", names=("softplus", "tanh"), per_sample=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def network(widths, name) -> Tail:
            outputs = [*widths[1:], 1]
            weights = [random(m, n) * n**-0.5 for m, n in zip(outputs, widths, strict=True)]
            return Tail(weights, [random(m) * 0.3 for m in outputs], Activation(name))

        h_V, h_T = widths_V[0], (widths_T or widths_V)[0]
        self.V = network(widths_V, names[0])
        self.T = None if widths_T is None else network(widths_T, names[1])
        self.N = random(h_V, h_T) * h_V**-0.5
        self.dt = 0.1 + 0.05 * random(batch if per_sample else 1, N_STEPS)
        self.moves = ALL_MOVES[moves]
        self.start, self.cotangents = (State(*(random(batch, h) for h in (h_V, h_T, h_V, h_T))) for _ in range(2))
        self.of_states = random(batch, N_STEPS, h_V), random(batch, N_STEPS, h_T)
        self.of_aT, self.of_energy = random(batch, N_STEPS, h_T), random(batch, N_STEPS + 1)

    def to(self, dtype: torch.dtype) -> Case:
        new = object.__new__(Case)
        for key, value in self.__dict__.items():
            if isinstance(value, Tail):
                value = value.to(dtype)
            elif isinstance(value, State):
                value = State(*(x.to(dtype) for x in value))
            elif isinstance(value, Tensor):
                value = value.to(dtype)
            elif key == "of_states":
                value = tuple(x.to(dtype) for x in value)
            setattr(new, key, value)
        return new

    def loop(self, memory, with_energy, last) -> Loop:
        return Loop(self.V, self.T, self.N, self.dt, self.moves, with_energy, last, memory)

    def forward(self, backend, memory="store", every_state=True, with_energy=True, last=True):
        with threads_for(backend):
            out = backend.forward(self.loop(memory, with_energy, last), self.start, every_state, with_energy)
        return [*out.end, *out[1:]]

    def backward(self, backend, out, memory="store", every_state=True, with_energy=True, last=True, need_V=True, need_T=True):
        h_V, h_T = self.N.shape

        def sums(tail, h) -> Gradients:
            zeros = Gradients.zeros(self.N.new_zeros(h, h), tail)
            for x in (*zeros.weights, *zeros.biases):
                x.fill_(0.25)  # not zeros: the gradients are added
            return zeros

        sums_V = sums(self.V, h_V) if need_V else None
        sums_T = sums(self.T, h_T) if need_T and self.T is not None else None
        gN = torch.full_like(self.N, 0.25) if need_V or need_T else None
        with threads_for(backend):
            start, gdt = backend.backward(
                self.loop(memory, with_energy, last), self.cotangents, out[2], self.of_states if every_state else None,
                self.of_aT if with_energy else None, self.of_energy if with_energy else None, out[-1], sums_V, sums_T, gN,
            )  # fmt: skip
        added = [x for part in (sums_V, sums_T) if part for x in (*part.weights, *part.biases)]
        return [*start, gdt, *added, *([] if gN is None else [gN])]


@pytest.mark.parametrize("isa", range(4))
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_float64_equals_torch(isa, memory, monkeypatch, poisoned):  # noqa: F811
    if isa not in instruction_sets():
        pytest.skip(f"this processor has instruction sets {instruction_sets()}")
    monkeypatch.setattr(cpp, "isa", isa)
    for i, ((V, T), batch, moves) in enumerate(itertools.product(NETWORKS, (1, 5, 67), ALL_MOVES)):
        # every pair of the smaller options comes up many times over the cases
        names = NAMES[i % len(NAMES)], NAMES[(i // 2 + 1) % len(NAMES)]
        case = Case(batch, V, T, moves, names, per_sample=i % 2 == 0, seed=i)
        options = {"every_state": i % 3 > 0, "with_energy": i % 5 > 0, "last": i % 7 > 0}
        expected, found = (case.forward(backend, memory, **options) for backend in (separable_torch, separable_cpp))
        assert error(found, expected) < 1e-12, (V, T, batch, moves, names)
        options |= {"need_V": i % 4 > 0, "need_T": i % 8 > 1}
        expected = case.backward(separable_torch, expected, memory, **options)
        assert error(case.backward(separable_cpp, found, memory, **options), expected) < 1e-11, (V, T, batch, moves, names)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("T", [None, (96, 130)])
def test_float32_error_within_twice_torchs(isa, T, monkeypatch, poisoned):  # noqa: F811
    if isa not in instruction_sets():
        pytest.skip(f"this processor has instruction sets {instruction_sets()}")
    monkeypatch.setattr(cpp, "isa", isa)
    for i, (V, batch) in enumerate(itertools.product([(130,), (64, 33), (128, 96, 65)], (1, 5, 33))):
        case = Case(batch, V, T, seed=i).to(torch.float32)
        exact = case.to(torch.float64)
        expected, eager, found = exact.forward(separable_torch), case.forward(separable_torch), case.forward(separable_cpp)
        assert error(found, expected) <= 2 * error(eager, expected) + 5e-7, (V, batch)
        expected, eager = exact.backward(separable_torch, expected), case.backward(separable_torch, eager)
        assert error(case.backward(separable_cpp, found), expected) <= 2 * error(eager, expected) + 5e-7, (V, batch)


@pytest.mark.parametrize("T", [None, (33, 20)])
@pytest.mark.parametrize("activation", NAMES)
def test_not_a_number_and_infinity_stay_in_their_row(T, activation):
    case = Case(6, (40, 33), T, names=(activation, activation)).to(torch.float32)
    clean = case.forward(separable_cpp)
    case.start.aV[1, 3], case.start.aT[4, 7] = float("nan"), float("inf")
    out = case.forward(separable_cpp)
    others = [0, 2, 3, 5]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(out, clean, strict=True))
    assert out[1][1].isnan().all()
    options = {"need_V": False, "need_T": False}
    grads, clean_grads = (case.backward(separable_cpp, x, **options) for x in (out, clean))
    assert all(torch.equal(x[others], y[others]) for x, y in zip(grads, clean_grads, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("T", [None, (130, 72)])
def test_threads_do_not_matter(batch, T):
    case = Case(batch, (160, 130, 72), T).to(torch.float32)
    outs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = case.forward(separable_cpp)
        outs.append((out, case.backward(separable_cpp, out)))
    for out, grads in outs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(out, outs[0][0], strict=True))
        assert error(grads, outs[0][1]) < 4e-6
    assert all(torch.equal(x, y) for x, y in zip(outs[1][1], outs[3][1], strict=True)), "differs from run to run"


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("moves", ALL_MOVES)
@pytest.mark.parametrize("T", [None, (20, 33)])
def test_in_chunks_as_at_once(T, moves, steps, monkeypatch):
    for options in ({}, {"every_state": False, "with_energy": False}, {"last": False}):
        case = Case(5, (40, 33), T, moves)
        out = case.forward(separable_cpp, **options)
        grads = case.backward(separable_cpp, out, **options)
        pairs = [(begin, min(begin + steps, N_STEPS)) for begin in range(0, N_STEPS, steps)]
        monkeypatch.setattr(separable_cpp, "_chunks", lambda *_, pairs=pairs: iter(pairs))
        chunked = case.forward(separable_cpp, **options)
        assert all(torch.equal(x, y) for x, y in zip(chunked, out, strict=True))
        assert error(case.backward(separable_cpp, out, **options), grads) < 1e-13
        monkeypatch.undo()


def test_chunks_are_about_a_second(monkeypatch):
    """The ranges cover every step once, in order, and are shorter for more work."""
    case = Case(5, (40, 33), (20, 33))
    loop = case.loop("none", False, True)._replace(dt=torch.ones(1, 1000))
    monkeypatch.setattr(cpp, "CHUNK", 1e7)
    few, many = ([*separable_cpp._chunks(loop, 5, factor)] for factor in (1, 3))
    assert len(many) > len(few) > 1
    for ranges in (few, many):
        assert [t for begin, end in ranges for t in range(begin, end)] == [*range(1000)]


def test_strided_inputs():
    case = Case(6, (40, 33), (33, 20))
    expected = case.forward(separable_cpp)
    expected_grads = case.backward(separable_cpp, expected)
    before = [x.clone() for x in (*case.start, *case.cotangents)]
    case.start, case.cotangents = (State(*(x.T.contiguous().T for x in part)) for part in (case.start, case.cotangents))
    case.of_aT, case.of_energy, case.N = (x.mT.contiguous().mT for x in (case.of_aT, case.of_energy, case.N))
    out = case.forward(separable_cpp)
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(case.backward(separable_cpp, out), expected_grads, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*case.start, *case.cotangents), before, strict=True))


@pytest.mark.parametrize("batch", [1, 9, 70])
@pytest.mark.parametrize("T", [None, (130, 72)])
def test_bfloat16_weights(batch, T):
    case = Case(batch, (160, 130, 72), T, per_sample=False).to(torch.float32)
    low = case.to(torch.float32)
    low.V, low.T = (None if tail is None else tail.to(torch.bfloat16) for tail in (case.V, case.T))
    exact = case.to(torch.float64)
    exact.V, exact.T = (None if tail is None else tail.to(torch.float64) for tail in (low.V, low.T))
    expected, found = exact.forward(separable_torch), low.forward(separable_cpp)
    # bfloat16 has a relative precision of 2^-8; a rollout adds some dozen products of unit size
    assert error(found, expected) < 0.03
    case.V, case.T = (None if tail is None else tail.to(torch.float32) for tail in (low.V, low.T))
    torch.set_float32_matmul_precision("medium")
    medium = case.forward(separable_cpp)
    assert all(torch.equal(x, y) for x, y in zip(medium, found, strict=True))
    grads, exact_grads = case.backward(separable_cpp, medium), exact.backward(separable_torch, expected)
    assert error(grads, exact_grads) < 0.06
    assert all(x.dtype == torch.float32 for x in (*found, *grads))


def test_medium_precision_uses_bfloat16_only_where_there_is_any(monkeypatch):
    monkeypatch.setattr(cpp, "isa", 3)
    case = Case(32, (64, 40), (40, 20)).to(torch.float32)
    full = case.forward(separable_cpp)[0]
    torch.set_float32_matmul_precision("high")
    assert torch.equal(case.forward(separable_cpp)[0], full)
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(case.forward(separable_cpp)[0], full) == (torch.ops.hjepa_fast_cpp.isa() < 3)
