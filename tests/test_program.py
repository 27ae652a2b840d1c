"""One loop for every Hamiltonian: sums of terms, both couplings, every integrator and memory mode, against nested autograd."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from hjepa_fast import ops
from hjepa_fast.activations import Activation
from hjepa_fast.backends import cpp, reference
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.hamiltonian import SumHamiltonian, Term
from hjepa_fast.hidden_space import coupling, program
from hjepa_fast.hidden_space.machine import Job, Sums
from hjepa_fast.hidden_space.network import Gradients, Tail
from hjepa_fast.schemes import SCHEMES
from hjepa_fast.testing import make_states

D = 3
SHAPES = {
    "general": ["z 7 5"],
    "general, one layer": ["z 37"],
    "linear": ["z"],
    "T(p) + V(q)": ["q 7 5", "p 4"],
    "|p|^2/2 + V": ["q 7", "p one"],
    "|p|^2/2 + k|q|^2/2 + V": ["q 7 17", "q one", "p one"],
    "|p|^2/2 + k_i q_i^2/2 + V": ["q 7", "q each", "p one"],
    "T + k|q|^2/2 + V": ["q 7 4", "q one", "p 5"],
    "T + s|p|^2/2 + k|q|^2/2 + V": ["q 7", "q one", "p 5", "p one"],
    "H + V": ["z 7 4", "q 5"],
    "H + V + s_i p_i^2/2": ["z 6", "q 5", "p each"],
    "V + V + T": ["q 5", "q 4 3", "p 6"],
    "an oscillator": ["q each", "p one"],
}
MEMORY = ("store", "recompute", "checkpoint", "reversible")


def make_term(text, generator, dtype=torch.float64):
    reads, *rest = text.split()

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    if rest and rest[0] in ("one", "each"):
        return Term(reads, stiffness=(random(1 if rest[0] == "one" else D).detach().abs() + 0.5).requires_grad_())
    widths = [2 * D if reads == "z" else D, *map(int, rest), 1]
    weights = [(random(n, m).detach() / m**0.5).requires_grad_() for m, n in itertools.pairwise(widths)]
    return Term(reads, tuple(weights), tuple(random(n) for n in widths[1:]), Activation("tanh" if reads == "q" else "softplus"))


def make(name, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return SumHamiltonian(tuple(make_term(text, generator, dtype) for text in SHAPES[name]), 2 * D)


def couplings(H, integrator):
    return coupling.possible(ops.forms_of(ops.text_of(H.terms), tuple(ops.softplus_of(H.terms))), integrator)


def roll(H, z0, dt, n, integrator, how, every, energy, memory, backend, tolerance=1e-13):
    return torch.ops.hjepa_fast.rollout(
        z0, H.tensors, dt, n, ops.text_of(H.terms), ops.softplus_of(H.terms), integrator, how, every, energy, memory, tolerance,
        50, True, 1.0, backend, "",
    )[: 1 + energy]  # fmt: skip


def cotangents(outputs):
    return [make_states(*x.shape, seed=6 + i).to(x) for i, x in enumerate(outputs)]


def derivatives(outputs, leaves):
    found = torch.autograd.grad(outputs, leaves, cotangents(outputs), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def assert_close(found, expected, rtol, atol):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def cases(H, integrator):
    scheme = SCHEMES[integrator]
    able = (scheme.separable if H.separable else scheme.general).reversible
    return itertools.product(couplings(H, integrator), MEMORY if able else MEMORY[:3], (True, False))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("integrator", ["leapfrog", "euler", "symplectic-euler", "rk4"])
def test_values_and_gradients(name, integrator):
    """Of states and energies, for all states and the final one, in float64: to 1e-11."""
    H, n = make(name), 5
    z0, dt = make_states(4, 2 * D).requires_grad_(), (make_states(4, n, seed=4) * 0.05 + 0.15).requires_grad_()
    leaves = [z0, dt, *H.tensors]
    path = reference.rollout(H, z0, dt, n, integrator, 1.0)
    implicit = program.stages_of(integrator, ops.forms_of(ops.text_of(H.terms), tuple(ops.softplus_of(H.terms))))
    rtol = 1e-9 if any(s.implicit for s in implicit) else 1e-11
    for every in (True, False):
        outputs = [path if every else path[:, -1:], H.energy(path)]
        expected = {energy: derivatives(outputs[: 1 + energy], leaves) for energy in (True, False)}
        for how, memory, energy in cases(H, integrator):
            for backend in ("torch", "cpp"):
                found = roll(H, z0, dt, n, integrator, how, every, energy, memory, backend)
                assert_close(found, outputs[: 1 + energy], rtol, rtol)
                assert_close(derivatives(found, leaves), expected[energy], rtol, rtol)


@pytest.mark.parametrize("name", ["T(p) + V(q)", "|p|^2/2 + k_i q_i^2/2 + V", "H + V"])
@pytest.mark.parametrize("integrator", ["implicit-midpoint", "yoshida4", "tao"])
def test_a_sum_has_every_integrator(name, integrator):
    H, n = make(name), 2
    z0, dt = make_states(3, 2 * D).requires_grad_(), torch.full((1, 1), 0.2, dtype=torch.float64, requires_grad=True)
    leaves = [z0, dt, *H.tensors]
    path = reference.rollout(H, z0, dt, n, integrator, 1.0)
    outputs = [path, H.energy(path)]
    expected = derivatives(outputs, leaves)
    for how, memory, energy in cases(H, integrator):
        if energy:
            found = roll(H, z0, dt, n, integrator, how, True, True, memory, "cpp")
            assert_close(found, outputs, 1e-9, 1e-9)
            assert_close(derivatives(found, leaves), expected, 1e-8, 1e-8)


def form(reads, n_layers=2):
    return program.Form(reads, n_layers, Activation("tanh"))


QUADRATIC = program.Form("p", 0, None, True)


@pytest.mark.parametrize(
    ("forms", "integrator", "counted"),
    [
        ([form("z")], "leapfrog", {0: 30}),
        ([form("q"), form("p")], "leapfrog", {0: 11, 1: 10}),
        ([form("q"), QUADRATIC], "leapfrog", {0: 11}),
        ([form("z"), form("q")], "leapfrog", {0: 30, 1: 11}),
        ([form("q"), form("p")], "symplectic-euler", {0: 10, 1: 10}),
        ([form("q"), form("p")], "euler", {0: 10, 1: 10}),
        ([form("z")], "rk4", {0: 40}),
        ([form("q"), form("p")], "yoshida4", {0: 31, 1: 30}),
    ],
)
def test_evaluations_of_ten_steps(forms, integrator, counted):
    """A gradient is evaluated when a move needs it and what it reads has moved; counted by hand."""
    stages = program.stages_of(integrator, forms)
    for dense in (True, False):
        made = program.compiled(tuple(forms), stages, dense, False)
        assert made.evaluations(10) == counted


def test_products_of_a_step():
    """Of a general H, by hand: dense one h x h product a move; a pair two of h x d, whatever is evaluated."""
    for dense, expected in ((True, {"K": 3}), (False, {"W": 6})):
        made = program.compiled((form("z"),), SCHEMES["leapfrog"].stages, dense, False)
        kinds = [made.matrices[x.matrix][0] for x in made.later if x.op == program.ADD and x.matrix >= 0]
        assert {kind: kinds.count(kind) for kind in set(kinds)} == expected


def test_the_coupling_follows_the_work():
    """Small networks and single steps take a pair, long rollouts of wide latents K."""
    one = (form("z"),)
    assert coupling.choose(one, (200,), 1, "leapfrog", 1000, 15, True, True) == "pair"
    assert coupling.choose(one, (512,), 512, "leapfrog", 32, 1, True, True) == "pair"
    assert coupling.choose(one, (512,), 512, "leapfrog", 1024, 15, False, True) == "dense"
    assert coupling.choose(one, (512,), 8192, "leapfrog", 32, 100, False, True) == "dense"
    # a diagonal quadratic form leaves no choice, nor does an equation to be solved
    assert (
        coupling.choose((form("q"), QUADRATIC._replace(scalar=False)), (512, 1), 512, "leapfrog", 1024, 99, False, True)
        == "pair"
    )
    assert coupling.choose(one, (200,), 1, "implicit-midpoint", 1, 1, True, True) == "dense"


class Inputs:
    """A program's numbers, of order one, and cotangents of everything that it gives."""

    def __init__(self, name, how, batch=5, n_steps=3, integrator="leapfrog", dtype=torch.float64, h=(19, 33), memory="store"):
        H = make(name)
        forms = ops.forms_of(ops.text_of(H.terms), tuple(ops.softplus_of(H.terms)))
        made = program.compiled(forms, program.stages_of(integrator, forms), how == "dense", True)
        generator = torch.Generator().manual_seed(5)
        self.dtype = dtype

        def random(*shape):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4).to(dtype)

        def width(key):
            return {"C": 2, "Z": D, "Y": D}.get(key[0]) or h[int(key[{"S": 2, "G": 2, "X": 2}.get(key[0], 1)]) % 2]

        self.widths = tuple(width(key) for key in made.registers)
        sizes = {key: (width(("A", key[1])), width(("A", key[3]))) for key in made.matrices if key[0] == "K"}
        sizes |= {
            key: (D if key[2] == "d" else 2 if key[2] == 2 else width(("A", key[3])),) for key in made.matrices if key[0] == "k"
        }
        given = [random(*sizes[key]) for key in made.matrices if key[0] != "W"]
        firsts = [
            (random(width(("A", k)), 2 * D if reads == "z" else D), random(width(("A", k))))
            for k, reads in zip(made.networks, made.reads, strict=True)
        ]
        tails = []
        for k in made.networks:
            widths = [width(("A", k)), 21, 1]
            weights = [random(n, m) for m, n in itertools.pairwise(widths)]
            tails.append(Tail(weights, [random(n) for n in widths[1:]], Activation("gelu" if k else "softplus")))
        dt = random(batch, n_steps).abs() + 0.1
        self.job = Job(made, random(batch, 2 * D), firsts, given, tails, dt, True, True, memory, self.widths)
        self.start = [random(batch, self.widths[i]) for i in made.state]
        self.cotangents = [random(batch, self.widths[i]) for i in made.state]
        self.g_path = [random(batch, n_steps, self.widths[i]) for i in made.path]
        self.g_energy = random(batch, n_steps + 1)

    def sums(self):
        networks = [
            Gradients(torch.empty(0), [torch.zeros_like(w) for w in F.weights], [torch.zeros_like(b) for b in F.biases])
            for F in self.job.networks
        ]
        return Sums([torch.zeros_like(M) for M in self.job.matrices], networks)

    def run(self, backend, with_sums=True, from_z0=False):
        out = backend.run(self.job, None if from_z0 else self.start)
        sums = self.sums() if with_sums else None
        back, gdt = backend.run_back(
            self.job, [x.clone() for x in self.cotangents], out.state, self.g_path, self.g_energy, out.tape, sums
        )
        totals = [] if sums is None else [*sums.matrices, *(x for g in sums.networks for x in (*g.weights, *g.biases))]
        return [*out.state, *out.path, out.energy, out.tape, *back, gdt, *totals]


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(cpp, "isa", -1)
    monkeypatch.setattr(cpp, "path", 0)
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)


KINDS = [
    ("general", "dense"), ("general", "pair"), ("T(p) + V(q)", "dense"), ("T(p) + V(q)", "pair"),
    ("|p|^2/2 + k|q|^2/2 + V", "dense"), ("T + s|p|^2/2 + k|q|^2/2 + V", "dense"), ("H + V + s_i p_i^2/2", "pair"),
]  # fmt: skip


@functools.cache
def oracle(name, how, batch, memory, with_sums):
    return Inputs(name, how, batch, memory=memory).run(torch_backend, with_sums)


@pytest.mark.parametrize("isa", range(torch.ops.hjepa_fast_cpp.isa() + 1) if cpp.available() else [0])
@pytest.mark.parametrize("path", [0, 3])
@pytest.mark.parametrize(("name", "how"), KINDS)
def test_cpp_equals_torch(name, how, path, isa, settings):
    """Rows by themselves and shared by a crew, in few and many tiles, with and without sums, every instruction set."""
    settings.setattr(cpp, "isa", isa)
    settings.setattr(cpp, "path", path)
    for batch, memory, with_sums in ((1, "store", True), (5, "recompute", True), (61, "store", True), (7, "store", False)):
        found = Inputs(name, how, batch, memory=memory).run(cpp, with_sums)
        assert_close(found, oracle(name, how, batch, memory, with_sums), 1e-10, 1e-11)


@pytest.mark.parametrize(("name", "how"), KINDS)
def test_the_start_is_made_of_z0(name, how, settings):
    for batch in (1, 5, 61):
        inputs = Inputs(name, how, batch)
        assert_close(inputs.run(cpp, from_z0=True), inputs.run(torch_backend, from_z0=True), 1e-10, 1e-11)
        again = backward_of(inputs, cpp, inputs.job.z0.new_empty(batch, 0))
        assert_close(again, backward_of(inputs, torch_backend, torch_backend.run(inputs.job).tape), 1e-10, 1e-11)


def backward_of(inputs, backend, tape):
    """The adjoint alone, from what is on this tape, or without one."""
    state = torch_backend.run(inputs.job).state
    back, gdt = backend.run_back(
        inputs.job, [x.clone() for x in inputs.cotangents], state, inputs.g_path, inputs.g_energy, tape, inputs.sums()
    )
    return [*back, gdt]


@pytest.mark.parametrize(("name", "how"), KINDS)
def test_float32_is_as_accurate_as_torchs(name, how, settings):
    exact = oracle(name, how, 13, "store", True)
    errors = []
    for backend in (cpp, torch_backend):
        found = Inputs(name, how, 13, dtype=torch.float32).run(backend)
        errors.append(
            [((x.double() - y).abs().max() / y.abs().max().clamp_min(1)).item() for x, y in zip(found, exact, strict=True)]
        )
    for ours, torchs in zip(*errors, strict=True):
        assert ours < 2 * torchs + 1e-6


@pytest.mark.parametrize(("name", "how"), KINDS)
def test_in_chunks_and_with_any_number_of_threads(name, how, settings):
    """Bits do not depend on how often Python looks for Ctrl-C, nor those of a row on how many threads share it."""
    whole = Inputs(name, how, 6, n_steps=4).run(cpp)
    settings.setattr(cpp, "_program_chunks", lambda *_: [(0, 1), (1, 3), (3, 4)])
    assert_close(Inputs(name, how, 6, n_steps=4).run(cpp), whole, 1e-13, 1e-13)
    settings.undo()
    settings.setattr(cpp, "path", 3)
    one, two = [], []
    for threads, found in ((1, one), (2, two), (2, two)):
        torch.set_num_threads(threads)
        found.append(Inputs(name, how, 6, n_steps=4, h=(300, 270)).run(cpp))
    for x, y, z in zip(one[0], two[0], two[1], strict=True):
        assert torch.equal(x, y)
        assert torch.equal(y, z)


def test_not_a_number_stays_in_its_row(settings):
    for name, how in KINDS:
        inputs = Inputs(name, how, 5)
        clean = inputs.run(cpp, with_sums=False)
        inputs.start[0][2] = torch.nan
        for x, y in zip(inputs.run(cpp, with_sums=False), clean, strict=True):
            rows = [0, 1, 3, 4]
            assert torch.equal(x[rows], y[rows])


def test_bfloat16_weights_are_computed_in_float32(settings):
    for name in ("general", "|p|^2/2 + k_i q_i^2/2 + V", "T(p) + V(q)"):
        low = make(name, torch.bfloat16)
        wide = SumHamiltonian(
            tuple(
                t._replace(
                    weights=tuple(w.double() for w in t.weights),
                    biases=tuple(b.double() for b in t.biases),
                    stiffness=None if t.stiffness is None else t.stiffness.double(),
                )
                for t in low.terms
            ),
            2 * D,
        )
        z0, dt = make_states(40, 2 * D, dtype=torch.bfloat16), torch.full((1, 1), 0.1, dtype=torch.float64)
        for how in couplings(low, "leapfrog"):
            found = roll(low, z0, dt.bfloat16(), 3, "leapfrog", how, True, False, "none", "torch")[0]
            exact = roll(wide, z0.double(), dt.bfloat16().double(), 3, "leapfrog", how, True, False, "none", "torch")[0]
            torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8)
