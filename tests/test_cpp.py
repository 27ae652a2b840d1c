"""The C++ loop against the PyTorch one in float64, for every instruction set that this processor has."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from hjepa_fast.activations import NAMES, Activation
from hjepa_fast.backends import cpp
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.backends.torch import Gradients, Solver, Tail
from hjepa_fast.hidden_space.outline import kernel_stages
from hjepa_fast.schemes import SCHEMES, SubStep
from hjepa_fast.testing import BOUNDED_SLOPES

N_STEPS = 3
ROWS, FEATURES, CREW = 1, 2, 3
# more sub-steps than any real scheme; with both moves, one, the other, none
MANY = (SubStep(0.3, 0.2), SubStep(0.0, 0.5), SubStep(0.4, 0.0), SubStep(0.0, 0.0), SubStep(-0.2, 0.3))
# with energies, so that one list serves both; a composition only repeats its base
ALL_SCHEMES = {
    **{
        name: kernel_stages(SCHEMES[name].stages, True)
        for name in ("leapfrog", "euler", "implicit-leapfrog", "implicit-midpoint")
    },
    "many": MANY,
}
SOLVER = Solver(4 * torch.finfo(torch.float64).eps, 50)
SOLVER_32 = Solver(4 * torch.finfo(torch.float32).eps, 50)


@pytest.fixture(autouse=True, scope="module")
def _built():
    assert cpp.available(), cpp.why_not()


@pytest.fixture(autouse=True)
def _defaults(monkeypatch):
    monkeypatch.setattr(cpp, "isa", -1)
    monkeypatch.setattr(cpp, "path", 0)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def poisoned(monkeypatch):
    """Tensors made by torch.empty and the like are full of NaN."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def instruction_sets() -> list[int]:
    return list(range(torch.ops.hjepa_fast_cpp.isa() + 1)) if cpp.available() else [0]


@contextlib.contextmanager
def threads_for(backend):
    """One thread for the oracle, whose many small operations suffer most where other processes want the cores."""
    threads = torch.get_num_threads()
    if backend is torch_backend:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """A loop's inputs and cotangents, of order one."""

    def __init__(self, batch, widths, activation="softplus", scheme="leapfrog", per_sample=True, n_steps=N_STEPS, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        activation = activation if isinstance(activation, Activation) else Activation(activation)
        outputs = [*widths[1:], 1]
        weights = [random(m, n) * n**-0.5 for m, n in zip(outputs, widths, strict=True)]
        self.h, self.batch, self.n_steps = widths[0], batch, n_steps
        self.tail = Tail(weights, [random(m) * 0.3 for m in outputs], activation)
        self.a, self.K = random(batch, self.h), random(self.h, self.h) * self.h**-0.5
        self.dt = 0.1 + 0.05 * random(batch if per_sample else 1, n_steps)
        self.scheme = ALL_SCHEMES[scheme]
        self.cotangents = [random(batch, self.h) for _ in range(3)]
        self.of_states, self.of_energy = random(2, batch, n_steps, self.h), random(batch, n_steps)

    def to(self, dtype: torch.dtype) -> Case:
        new = object.__new__(Case)
        new.__dict__.update({k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        new.cotangents = [x.to(dtype) for x in self.cotangents]
        new.tail = Tail([w.to(dtype) for w in self.tail.weights], [b.to(dtype) for b in self.tail.biases], self.tail.activation)
        return new

    def forward(self, backend, memory="store", every_state=True, with_energy=True):
        with threads_for(backend):
            out = backend.forward(
                self.a, self.K, self.tail, self.dt, self.scheme, self.n_steps, every_state, with_energy, memory, self.solver
            )
        self.solved = out.residual, out.evaluations
        return out[:5]

    @property
    def solver(self) -> Solver:
        return SOLVER if self.a.dtype == torch.float64 else SOLVER_32

    def backward(self, backend, tape, memory="store", every_state=True, with_energy=True, with_sums=True):
        sums = None
        if with_sums:  # not zeros: the gradients are added
            sums = Gradients.zeros(self.K, self.tail)
            for x in (sums.K, *sums.weights, *sums.biases):
                x.fill_(0.25)
        gsq, gsp = self.of_states if every_state else self.of_states[:, :, -1:]
        gE = self.of_energy if with_energy else None
        with threads_for(backend):
            out = backend.backward(
                *self.cotangents, gsq, gsp, gE, tape, self.K, self.tail, self.dt, self.scheme, memory, sums, self.solver
            )
        return [*out, *([] if sums is None else [sums.K, *sums.weights, *sums.biases])]


def error(found, exact) -> float:
    """Largest error of any of the tensors, each relative to its own largest number or 1."""
    found, exact = list(found), list(exact)
    assert [x.shape for x in found] == [x.shape for x in exact]
    errors = [0.0]
    for x, y in zip(found, exact, strict=True):
        if y.numel():
            errors.append(float((x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1.0)))
    return float("nan") if any(e != e for e in errors) else max(errors)


WIDTHS = [(1,), (40,), (7, 5), (33, 64), (64, 33, 20), (9, 48, 31, 17)]


@pytest.mark.parametrize("isa", range(4))
@pytest.mark.parametrize("path", [ROWS, FEATURES, CREW])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_float64_equals_torch(isa, path, memory, monkeypatch, poisoned):
    if isa not in instruction_sets():
        pytest.skip(f"this processor has instruction sets {instruction_sets()}")
    monkeypatch.setattr(cpp, "isa", isa)
    monkeypatch.setattr(cpp, "path", path)
    cases = itertools.product(WIDTHS, (1, 2, 3, 5, 8, 33, 67), ALL_SCHEMES)
    for i, (widths, batch, scheme) in enumerate(cases):
        if path == FEATURES and any(stage.implicit for stage in ALL_SCHEMES[scheme]):
            continue  # always by rows
        # every pair of the smaller options comes up many times over the cases
        case = Case(batch, widths, BOUNDED_SLOPES[i % len(BOUNDED_SLOPES)], scheme, per_sample=i % 2 == 0, seed=i)
        options = {"every_state": i % 3 > 0, "with_energy": i % 5 > 0}
        expected, found = case.forward(torch_backend, memory, **options), case.forward(cpp, memory, **options)
        assert error(found, expected) < 1e-12, (widths, batch, scheme, case.tail.activation)
        options["with_sums"] = i % 4 > 0
        expected = case.backward(torch_backend, expected[-1], memory, **options)
        assert error(case.backward(cpp, found[-1], memory, **options), expected) < 1e-11, (widths, batch, scheme)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("path", [ROWS, FEATURES, CREW])
@pytest.mark.parametrize("name", BOUNDED_SLOPES)
def test_float32_error_within_twice_torchs(isa, path, name, monkeypatch, poisoned):
    if isa not in instruction_sets():
        pytest.skip(f"this processor has instruction sets {instruction_sets()}")
    monkeypatch.setattr(cpp, "isa", isa)
    monkeypatch.setattr(cpp, "path", path)
    # of several problems the largest and the mean: that of one is a matter of luck
    errors: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
    for i, (widths, batch) in enumerate(itertools.product([(130,), (64, 33), (128, 96, 65)], 3 * (1, 5, 33))):
        exact = Case(batch, widths, name, seed=i)
        case = exact.to(torch.float32)
        exact = case.to(torch.float64)
        expected, eager, found = exact.forward(torch_backend), case.forward(torch_backend), case.forward(cpp)
        errors["forward"].append((error(found, expected), error(eager, expected)))
        expected, eager = exact.backward(torch_backend, expected[-1]), case.backward(torch_backend, eager[-1])
        errors["backward"].append((error(case.backward(cpp, found[-1]), expected), error(eager, expected)))
    for direction, pairs in errors.items():
        found, eager = zip(*pairs, strict=True)
        assert max(found) <= 2 * max(eager), (direction, pairs)
        assert sum(found) <= 2 * sum(eager), (direction, pairs)


def one_unit(a: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """s, s', s'' of the kernels at each row of a: the network F(a) = s(a) with K = 0."""
    one, zero = a.new_ones(1, 1), a.new_zeros(1, 1)
    tail, scheme = Tail([one], [a.new_zeros(1)], activation), (SubStep(0.0, 1.0),)
    a = a[:, None]
    _, sq, _, energy, tape, *_ = cpp.forward(a, zero, tail, one, scheme, 1, False, True, "store", SOLVER)
    nothing = torch.zeros_like(a)
    # with K = 0 the tangent is lsq
    la, *_ = cpp.backward(
        nothing,
        torch.ones_like(a),
        nothing,
        nothing[:, None],
        nothing[:, None],
        None,
        tape,
        zero,
        tail,
        one,
        scheme,
        "store",
        None,
        SOLVER,
    )
    return energy[:, 0], sq[:, 0, 0], la[:, 0]


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [*map(Activation, NAMES), Activation("softplus", 2.5, 3.0)], ids=str)
def test_activations_to_rounding(isa, dtype, activation, monkeypatch):
    if isa not in instruction_sets():
        pytest.skip(f"this processor has instruction sets {instruction_sets()}")
    monkeypatch.setattr(cpp, "isa", isa)
    monkeypatch.setattr(cpp, "path", ROWS)
    a = torch.cat((torch.linspace(-30, 30, 4001, dtype=dtype), torch.linspace(-1, 1, 1001, dtype=dtype)))
    found, eager, exact = one_unit(a, activation), activation.derivatives(a), activation.derivatives(a.double())
    eps = torch.finfo(dtype).eps
    for order in range(3):
        wrong, eagers_wrong = ((x[order].double() - exact[order]).abs() / (exact[order].abs() + 1) for x in (found, eager))
        # the formulas for gelu-tanh cancel; the oracle in float64 is one of them
        assert wrong.max() <= (2 * eagers_wrong.max() + 2 * eps if dtype == torch.float32 else 20 * eps), order
        if activation.name in ("softplus", "tanh", "silu", "sin") and order == 0 and activation.beta == 1:
            assert ((found[0].double() - exact[0]).abs() / exact[0].abs().clamp(min=1e-30)).max() <= 4 * eps

    far = torch.tensor([1e-30, 1e-8, 90.0, 105.0, 3e3, 5e3, 1e5, 1e9, float("inf"), float("nan")], dtype=dtype)
    far = torch.cat((far, -far))
    for x, y in zip(one_unit(far, activation), activation.derivatives(far), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=4 * eps, atol=1e-30)


@pytest.mark.parametrize("path", [ROWS, FEATURES, CREW])
@pytest.mark.parametrize("activation", NAMES)
def test_not_a_number_and_infinity_stay_in_their_row(path, activation, monkeypatch):
    monkeypatch.setattr(cpp, "path", path)
    case = Case(6, (40, 33), activation).to(torch.float32)
    clean = case.forward(cpp)
    case.a[1, 3], case.a[4, 7] = float("nan"), float("inf")
    out = case.forward(cpp)
    others = [0, 2, 3, 5]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(out, clean, strict=True))
    assert out[0][1].isnan().all()
    expected = case.forward(torch_backend)
    assert torch.equal(out[0][4].isfinite(), expected[0][4].isfinite())
    grads, clean_grads = (case.backward(cpp, x[-1], with_sums=False) for x in (out, clean))
    assert all(torch.equal(x[others], y[others]) for x, y in zip(grads, clean_grads, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 8, 70])
@pytest.mark.parametrize("path", [ROWS, FEATURES, CREW])
def test_threads_do_not_matter(batch, path, monkeypatch):
    monkeypatch.setattr(cpp, "path", path)
    case = Case(batch, (160, 130, 72)).to(torch.float32)
    outs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = case.forward(cpp)
        outs.append((out, case.backward(cpp, out[-1])))
    for out, grads in outs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(out, outs[0][0], strict=True))
        assert error(grads, outs[0][1]) < 2e-6
    assert all(torch.equal(x, y) for x, y in zip(outs[1][1], outs[3][1], strict=True)), "differs from run to run"


@pytest.mark.parametrize("scheme", ["leapfrog", "many", "implicit-midpoint"])
@pytest.mark.parametrize("widths", [(130,), (64, 33)], ids=str)
def test_a_crew_of_any_size_gives_the_same_bits(widths, scheme):
    """Threads that share a tile meet between products, and come in when they are there: a wrong meeting shows now and then."""
    cpp.path = CREW
    for i, (batch, memory) in enumerate(itertools.product((2, 17), ("store", "recompute"))):
        case = Case(batch, widths, scheme=scheme, n_steps=8, seed=i).to(torch.float32)
        outs = []
        for threads in (1, *(2, 3) * 15):
            torch.set_num_threads(threads)
            out = case.forward(cpp, memory)
            outs.append([*out, *case.backward(cpp, out[-1], memory)])
        for out in outs[1:]:
            assert all(torch.equal(x, y) for x, y in zip(out, outs[0], strict=True)), (batch, memory)


@pytest.mark.parametrize("batch", [3, 40])
def test_two_callers_at_once(batch):
    case = Case(batch, (160, 130, 72), n_steps=20).to(torch.float32)
    out = case.forward(cpp)
    expected = [*out, *case.backward(cpp, out[-1])]
    wrong: list[object] = []

    def caller() -> None:
        for _ in range(20):
            out = case.forward(cpp)
            found = [*out, *case.backward(cpp, out[-1])]
            if not all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)):
                wrong.append(found)

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def _in_child(queue, case) -> None:
    queue.put(case.forward(cpp)[0].tolist())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("batch", [2, 8, 40])
def test_fork_after_use(batch):
    torch.set_num_threads(2)
    case = Case(batch, (160, 130, 72)).to(torch.float32)
    expected = case.forward(cpp)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, case))
    child.start()
    found = torch.tensor(queue.get(timeout=30))
    child.join(timeout=30)
    assert child.exitcode == 0
    assert torch.equal(found, expected)
    assert torch.equal(case.forward(cpp)[0], expected)


def test_other_threads_run_meanwhile():
    """The interpreter's lock is not held: another thread counts on while one call of the extension lasts."""
    case = Case(64, (256, 256), n_steps=1).to(torch.float32)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-4)

    thread = threading.Thread(target=count)
    thread.start()
    # two operators at most are called, so a lock held by them would leave no more than a few turns
    a, K, tail = case.a, case.K, case.tail
    dt = torch.full((1, 400), 1e-3)
    before = counted[0]
    cpp.forward(a, K, tail, dt, ALL_SCHEMES["leapfrog"], 400, False, False, "none", SOLVER_32)
    during = counted[0] - before
    stop.set()
    thread.join(timeout=60)
    assert during > 20


_ENDLESS = """
import torch, hjepa_fast as hf
from hjepa_fast.models import LatentHNN
print("started", flush=True)
try:
    with torch.no_grad():
        hf.rollout(LatentHNN(), torch.randn(256, 1024), 1e-3, 100_000, states="final", backend="cpp")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_interrupts_a_long_rollout():
    """100,000 steps of 256 samples would take a quarter of an hour."""
    # tests that a shell runs in the background ignore Ctrl-C, and so would what they start
    listening = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{_ENDLESS}"
    process = subprocess.Popen([sys.executable, "-c", listening], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "started\n"
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "interrupted\n"
    assert process.returncode == 0


def test_busy_machine():
    """Threads that find their cores taken are sent away and called in again; the numbers stay the same."""
    torch.set_num_threads(2)
    case = Case(1, (512, 512, 256), n_steps=60).to(torch.float32)
    expected = case.forward(cpp)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for _ in range(40):
            assert all(torch.equal(x, y) for x, y in zip(case.forward(cpp), expected, strict=True))
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@pytest.mark.parametrize("path", [ROWS, FEATURES, CREW])
@pytest.mark.parametrize("every_state", [True, False])
def test_in_chunks_as_at_once(path, every_state, monkeypatch):
    monkeypatch.setattr(cpp, "path", path)
    case = Case(5, (40, 33), n_steps=7)
    out = case.forward(cpp, every_state=every_state)
    grads = case.backward(cpp, out[-1], every_state=every_state)
    monkeypatch.setattr(cpp, "CHUNK", 5 * 3 * (40 * 40 + 2 * 40 * 33) * 2)
    chunked = case.forward(cpp, every_state=every_state)
    assert all(torch.equal(x, y) for x, y in zip(chunked, out, strict=True))
    assert error(case.backward(cpp, out[-1], every_state=every_state), grads) < 1e-13


def test_strided_inputs_and_sums():
    case = Case(6, (40, 33))
    expected = case.forward(cpp)
    expected_grads = case.backward(cpp, expected[-1])
    case.a, case.K = case.a.T.contiguous().T, case.K.T.contiguous().T
    case.tail = case.tail._replace(weights=[w.T.contiguous().T for w in case.tail.weights])
    case.of_states, case.of_energy = case.of_states.mT.contiguous().mT, case.of_energy.T.contiguous().T
    before = case.a.clone()
    out = case.forward(cpp)
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(case.backward(cpp, out[-1]), expected_grads, strict=True))
    assert torch.equal(case.a, before)


@pytest.mark.parametrize("memory", ["none", "recompute", "store"])
@pytest.mark.parametrize(("batch", "n_hidden", "n_steps"), [(0, 2, 3), (4, 0, 3), (0, 0, 1)])
def test_what_is_left_to_torch(memory, batch, n_hidden, n_steps):
    case = Case(batch, (12, 8)[:n_hidden] or (1,), n_steps=n_steps)
    if not n_hidden:
        case.tail = Tail([], [], Activation("tanh"))
    expected, found = (case.forward(backend, memory) for backend in (torch_backend, cpp))
    assert error(found, expected) == 0
    if memory != "none":
        assert error(case.backward(cpp, found[-1], memory), case.backward(torch_backend, found[-1], memory)) == 0


@pytest.mark.parametrize("isa", [-1, 3])
@pytest.mark.parametrize("batch", [1, 9, 70])
def test_bfloat16_weights(batch, isa, monkeypatch):
    monkeypatch.setattr(cpp, "isa", isa)
    case = Case(batch, (160, 130, 72), per_sample=False).to(torch.float32)
    low = [w.bfloat16() for w in case.tail.weights]
    rounded = case.to(torch.float32)
    rounded.tail = case.tail._replace(weights=[w.float() for w in low])
    exact = rounded.to(torch.float64)
    case.tail = case.tail._replace(weights=low, biases=[b.bfloat16() for b in case.tail.biases])
    exact.tail = exact.tail._replace(biases=[b.double() for b in case.tail.biases])
    expected, found = exact.forward(torch_backend), case.forward(cpp)
    # bfloat16 has a relative precision of 2^-8; a rollout adds some dozen products of unit size
    assert error(found, expected) < 0.03
    sums = Gradients.zeros(case.K, rounded.tail)
    gsq, gsp = case.of_states
    args = (*case.cotangents, gsq, gsp, case.of_energy)
    grads = cpp.backward(*args, found[-1], case.K, case.tail, case.dt, case.scheme, "store", sums, SOLVER_32)
    exact_sums = Gradients.zeros(exact.K, exact.tail)
    exact_args = (*exact.cotangents, *exact.of_states, exact.of_energy)
    exact_grads = torch_backend.backward(
        *exact_args, expected[-1], exact.K, exact.tail, exact.dt, exact.scheme, "store", exact_sums, SOLVER
    )
    assert error([*grads, sums.K, *sums.weights], [*exact_grads, exact_sums.K, *exact_sums.weights]) < 0.05
    assert all(x.dtype == torch.float32 for x in (*found, *grads))


def test_medium_precision_uses_bfloat16_only_where_there_is_any(monkeypatch):
    monkeypatch.setattr(cpp, "isa", 3)
    case = Case(32, (64, 40)).to(torch.float32)
    full = case.forward(cpp)[0]
    torch.set_float32_matmul_precision("high")
    assert torch.equal(case.forward(cpp)[0], full)
    torch.set_float32_matmul_precision("medium")
    low = case.forward(cpp)[0]
    assert torch.equal(low, full) == (torch.ops.hjepa_fast_cpp.isa() < 3)
    assert error([low], [full]) < 0.03


def test_missing_extension_is_named(tmp_path):
    code = (
        "from hjepa_fast.backends import cpp\n"
        f"cpp.__file__ = {str(tmp_path / 'hjepa_fast' / 'backends' / 'cpp.py')!r}\n"
        "cpp._problem = cpp._load()\n"
        "assert not cpp.available()\n"
        "assert 'HJEPA_FAST_BUILD=1' in cpp.why_not()\n"
        "try:\n"
        "    cpp.forward(*[None] * 10)\n"
        "except RuntimeError as error:\n"
        "    assert 'HJEPA_FAST_BUILD=1' in str(error)\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "n", "inner", "columns"), [(5, 15, 33, 31), (70, 1, 16, 64), (3, 40, 512, 100), (2, 2, 8, 8)]
)
def test_product(dtype, batch, n, inner, columns, poisoned):
    """Into a strided target, with and without a base, W as it is and transposed, for every instruction set."""
    generator = torch.Generator().manual_seed(1)
    x, W, base = (
        torch.randn(*s, generator=generator, dtype=dtype) for s in ((batch, n, inner), (inner, columns), (batch, columns))
    )
    expected = base[:, None].double() + x.double() @ W.double()
    for isa in instruction_sets():
        cpp.isa = isa
        for given in (W, W.T.contiguous().T, torch.cat((W, W), dim=1)[:, columns:]):
            states = torch.full((batch, n + 1, 2 * columns), 7.0, dtype=dtype)
            cpp.product(x, given, states[:, 1:, columns:], base)
            assert (states[:, 0] == 7).all()
            assert (states[:, :, :columns] == 7).all()
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(states[:, 1:, columns:].double(), expected, rtol=tolerance, atol=tolerance * inner**0.5)
            torch.testing.assert_close(cpp.product(x, given), x @ given, rtol=tolerance, atol=tolerance * inner**0.5)
