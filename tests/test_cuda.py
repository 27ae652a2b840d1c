"""The CUDA kernel against the PyTorch loop in float64: on a GPU where there is one, and without one on the CPU.

There the same source is compiled with g++ against a few lines that do what the kernel takes from the machine
(csrc/cuda/emulate.h), together with the operator. What nvcc makes of it for the GPUs is looked at without a GPU too.
"""

from __future__ import annotations

import collections
import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.activations import Activation
from hjepa_fast.api import choose_backend
from hjepa_fast.backends import cpp
from hjepa_fast.backends import cuda as cuda_backend
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.backends import triton as triton_backend
from hjepa_fast.testing import make_hnn, make_states
from test_cpp import Case, error
from test_gpu_paths import Watched
from test_ops import assert_all_close, gradients
from tools import check_kernel

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
CLUSTER, GRID = 1, 2
KINDS = tuple(cuda_backend._KINDS)
"""Activations that the kernel has."""
VARIANTS = pytest.mark.parametrize("variant", [CLUSTER, GRID], ids=["cluster", "grid"])
PAPER = (512, 512, 256)

# where another backend runs instead, nothing here would be tested
pytestmark = pytest.mark.filterwarnings("error:the device does not take a launch")
on_gpu = pytest.mark.skipif(not cuda_backend.available(), reason=cuda_backend.why_not())


@pytest.fixture(autouse=True)
def _defaults():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


class Emulator:
    """The backend's operator on the CPU, and the machine that it runs on."""

    def __init__(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.monkeypatch = ctypes.CDLL(str(file)), monkeypatch
        self.library.set_emulated.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_long]
        monkeypatch.setattr(cuda_backend, "_operators", lambda: torch.ops.hjepa_fast_cuda_emulated)
        monkeypatch.setattr(cuda_backend, "require", lambda a: None)

    def set(self, variant, team, rows, n_teams=0, threads=64, order=0, shared=227 << 10, refuse=()) -> None:
        self.library.set_emulated(threads, n_teams, order, shared)
        self.library.refuse(CLUSTER in refuse, GRID in refuse)
        for name, value in (("variant", variant), ("team", team), ("rows", rows)):
            self.monkeypatch.setattr(cuda_backend, name, value)


@pytest.fixture(scope="module")
def _library(tmp_path_factory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        pytest.skip("needs a C++ compiler, g++ or $CXX")
    file = tmp_path_factory.mktemp("cuda") / "emulated.so"
    folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-g0", "-fno-strict-aliasing", "-shared", "-fPIC"]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-DHJEPA_LIBRARY=hjepa_fast_cuda_emulated"]
    sources = [str(SOURCES / name) for name in ("emulate.cpp", "ops.cpp")]
    libraries = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [compiler, *flags, *macros, f"-I{folder / 'include'}", *sources, "-o", str(file), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    torch.ops.load_library(file)
    return file


@pytest.fixture
def emulator(_library, monkeypatch) -> Emulator:
    return Emulator(_library, monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Tensors made by torch.empty and the like are full of NaN."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(case: Case, memory: str = "store", with_sums: bool = True, **options: bool) -> None:
    """Everything that both directions return, to rounding."""
    single = case.to(torch.float32)
    exact = single.to(torch.float64)
    expected, found = exact.forward(torch_backend, memory, **options), single.forward(cuda_backend, memory, **options)
    assert error(found, expected) < 3e-6
    if memory != "none":
        expected = exact.backward(torch_backend, expected[-1], memory, with_sums=with_sums, **options)
        assert error(single.backward(cuda_backend, found[-1], memory, with_sums=with_sums, **options), expected) < 3e-5


WIDTHS = [(1,), (40,), (7, 5), (33, 20), (20, 33, 18), (9, 18, 31, 17)]


@VARIANTS
@pytest.mark.parametrize("team", [1, 2, 5])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_equals_torch(widths, team, variant, emulator, monkeypatch):
    """Widths that blocks share evenly, unevenly and not at all; samples that fill a team's rows and not, in turns."""
    i = WIDTHS.index(widths) + 2 * team + variant
    rows = (1, 4, 8)[(i + team) % 3]
    batch = (1, 3, rows, 2 * rows + 1)[i // 2 % 4]
    scheme = ("leapfrog", "euler", "many")[i % 3]
    emulator.set(variant, team, rows, n_teams=i % 3, order=i % 5)
    case = Case(batch, widths, KINDS[i % len(KINDS)], scheme, per_sample=i % 2 == 0, n_steps=2, seed=i)
    memory = ("store", "recompute", "none")[i // 3 % 3]
    if i % 4 == 0:
        monkeypatch.setattr(cuda_backend, "bound", 1)  # a step at a time
    compare(case, memory, with_sums=i % 4 < 3, every_state=i % 5 > 1, with_energy=i % 7 > 2)


@VARIANTS
@pytest.mark.parametrize("scheme", ["leapfrog", "euler", "many"])
@pytest.mark.parametrize("batch", [1, 64])
def test_schemes(batch, scheme, variant, emulator):
    emulator.set(variant, team=3, rows=8, n_teams=2 if batch > 1 else 1)
    case = Case(batch, (18, 11, 13), scheme=scheme, n_steps=1)
    compare(case, "store", every_state=True, with_energy=True)


@VARIANTS
def test_the_order_of_threads_does_not_matter(variant, emulator):
    """A barrier that is missing would let some order find numbers that are not there yet, or no longer."""
    case = Case(5, (33, 20, 18), scheme="many", n_steps=2).to(torch.float32)
    results = []
    for order in range(6):
        emulator.set(variant, team=4, rows=4, n_teams=1, order=order)
        out = case.forward(cuda_backend)
        results.append([*out, *case.backward(cuda_backend, out[-1])])
    assert all(torch.equal(x, y) for other in results for x, y in zip(other, results[0], strict=True))
    assert all(x.isfinite().all() for x in results[0])


@VARIANTS
@pytest.mark.parametrize("shared", ["none", "some"])
def test_matrices_that_do_not_fit_are_read_where_they_are(shared, variant, emulator):
    case = Case(3, (33, 40, 18), n_steps=1)
    emulator.set(variant, team=2, rows=4)
    compare(case)
    assert emulator.library.matrices_in_shared() == 3
    everything, K = emulator.library.emulated_shared(), 18 * 40 * 4
    emulator.set(variant, team=2, rows=4, shared=everything - (K if shared == "some" else K + (20 * 40 + 10 * 40) * 4))
    compare(case)
    assert emulator.library.matrices_in_shared() == (2 if shared == "some" else 0)


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("steps", [1, 2])
def test_back_a_few_steps_at_a_time(steps, memory, emulator, monkeypatch):
    case = Case(3, (20, 18, 11), n_steps=3)
    numbers = 2 * (20 + 18) + 11 if memory == "recompute" else 0
    monkeypatch.setattr(
        cuda_backend, "bound", steps * 4 * 3 * len(case.scheme) * (cuda_backend._factors((20, 18, 11))[0] + numbers)
    )
    emulator.set(CLUSTER, team=2, rows=4)
    compare(case, memory, every_state=True, with_energy=True)


@VARIANTS
@pytest.mark.parametrize("team", [3, 5, 7])
def test_one_sample_and_an_odd_number_of_blocks(team, variant, emulator):
    """Whose buffers would not end at an address that the next could start at."""
    emulator.set(variant, team=team, rows=1)
    compare(Case(2, (7, 5), scheme="euler", n_steps=2), "store", every_state=True, with_energy=True)


@VARIANTS
def test_eight_layers(variant, emulator):
    emulator.set(variant, team=3, rows=4)
    compare(Case(3, (9, 8, 7, 6, 5, 4, 3, 2), n_steps=1), "store", every_state=True, with_energy=True)


@pytest.mark.parametrize(("variant", "threads", "rows"), [(CLUSTER, 256, 1), (CLUSTER, 256, 8), (GRID, 256, 4)])
def test_blocks_as_large_as_on_the_gpu(variant, threads, rows, emulator):
    emulator.set(variant, team=2, rows=rows, threads=threads)
    compare(Case(rows, (130, 70), n_steps=1), "store", every_state=True, with_energy=True)


@VARIANTS
@pytest.mark.parametrize("how", ["weights", "medium"])
def test_bfloat16_weights(how, variant, emulator):
    """Weights and K are rounded once; nothing else is."""
    case = Case(3, (33, 20, 18), n_steps=2).to(torch.float32)
    case.K = case.K.bfloat16().float()
    rounded = [w.bfloat16() for w in case.tail.weights]
    case.tail = case.tail._replace(weights=[*rounded[:-1], case.tail.weights[-1].bfloat16()])
    case.tail = case.tail._replace(weights=[w.float() for w in case.tail.weights])
    expected = case.to(torch.float64).forward(torch_backend)
    if how == "medium":
        torch.set_float32_matmul_precision("medium")
    else:
        biases = [b.bfloat16() for b in case.tail.biases]
        exact = case.to(torch.float64)
        exact.tail = exact.tail._replace(biases=[b.double() for b in biases])
        expected = exact.forward(torch_backend)
        case.tail = case.tail._replace(weights=rounded, biases=biases)
    emulator.set(variant, team=3, rows=4)
    assert error(case.forward(cuda_backend), expected) < 3e-6


@pytest.mark.parametrize("activation", [*map(Activation, KINDS), Activation("softplus", 2.5, 3.0)], ids=str)
def test_activations(activation, emulator):
    """The network F(a) = s(a) with K = 0 at numbers small, large and in between: s is its energy, s' moves sq."""
    emulator.set(CLUSTER, team=1, rows=8, threads=32)
    numbers = [0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.34, 0.35, 1.0, 2.9, 7.0, 19.9, 20.1, 30.0, 90.0]
    a = torch.tensor([*numbers, *(-x for x in numbers)])
    case = Case(len(a), (1,), activation, "euler", n_steps=1).to(torch.float32)
    case.a, case.K, case.dt = a[:, None], torch.zeros(1, 1), torch.ones(1, 1)
    case.tail = case.tail._replace(weights=[torch.ones(1, 1)], biases=[torch.zeros(1)])
    out = case.forward(cuda_backend)
    eps = torch.finfo(torch.float32).eps
    for found, exact in zip((out[3][:, 0], out[1][:, 0, 0]), activation.derivatives(a.double()), strict=False):
        torch.testing.assert_close(found.double(), exact, rtol=32 * eps, atol=32 * eps)
    if activation.name in ("softplus", "tanh", "silu", "sin") and activation.beta == 1:
        torch.testing.assert_close(out[3][:, 0].double(), activation(a.double()), rtol=16 * eps, atol=1e-36)


@VARIANTS
def test_not_a_number_stays_in_its_row(variant, emulator):
    emulator.set(variant, team=3, rows=4)
    case = Case(6, (20, 17, 11), n_steps=2).to(torch.float32)
    clean = case.forward(cuda_backend)
    case.a[1, 3] = float("nan")
    out = case.forward(cuda_backend)
    others = [0, 2, 3, 4, 5]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(out, clean, strict=True))
    assert out[0][1].isnan().all()


def test_operands_of_any_layout(emulator):
    """Transposed, at odd addresses and with gaps."""
    emulator.set(CLUSTER, team=2, rows=4)
    case = Case(2, (16, 24), n_steps=1).to(torch.float32)
    expected = case.forward(cuda_backend)
    case.K = case.K.T.contiguous().T
    case.a = torch.cat((case.a, case.a), dim=1)[:, :16]
    odd = torch.empty(24 * 16 + 1)[1:].view(24, 16)
    odd.copy_(case.tail.weights[0])
    case.tail = case.tail._replace(weights=[odd, case.tail.weights[1]])
    assert all(torch.equal(x, y) for x, y in zip(case.forward(cuda_backend), expected, strict=True))


def test_what_it_does_not_do_is_another_backends(emulator, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_operators", lambda: pytest.fail("the kernel was asked for"))
    single = torch.float32
    cases = [Case(2, (5, 4), scheme="implicit-midpoint").to(single), Case(2, (4,) * 9).to(single)]
    cases += [Case(cuda_backend.MOST_SAMPLES + 1, (5, 4)).to(single)]
    cases += [Case(2, (5, 4)), Case(2, (5, 4), n_steps=1).to(single)]
    cases[-1].a, cases[-1].dt = cases[-1].a[:0], cases[-1].dt[:0]
    for case in cases:
        found, expected = case.forward(cuda_backend), case.forward(torch_backend)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@VARIANTS
def test_teams_take_turns(variant, emulator):
    """A sample's numbers do not depend on how many teams there are, nor on what its team took before it."""
    case = Case(13, (9, 7, 5), n_steps=1, per_sample=False).to(torch.float32)
    results = []
    for n_teams, turns in ((4, 1), (1, 4)):
        emulator.set(variant, team=2, rows=4, n_teams=n_teams, threads=32, order=2)
        out = case.forward(cuda_backend)
        assert emulator.library.turns_of_a_team() == turns
        results.append([*out, *case.backward(cuda_backend, out[-1])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(x.isfinite().all() for x in results[0])


@pytest.mark.parametrize("refuse", [(CLUSTER,), (CLUSTER, GRID), ()], ids=["clusters", "both", "no room"])
def test_what_the_device_does_not_take_runs_elsewhere(refuse, emulator, monkeypatch):
    """Without clusters on a grid, without that in another backend, which a warning tells once."""
    monkeypatch.setattr(cuda_backend, "_told", set())
    emulator.set(0, team=2, rows=4, refuse=refuse, shared=227 << 10 if refuse else 1000)
    single, exact = Case(3, (9, 8, 7), n_steps=2).to(torch.float32), Case(3, (9, 8, 7), n_steps=2).to(torch.float32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = single.forward(cuda_backend)
        single.forward(cuda_backend)
        back = single.backward(cuda_backend, found[-1])
    expected = exact.forward(torch_backend)
    expected_back = exact.backward(torch_backend, expected[-1])
    by_torch = all(torch.equal(x, y) for x, y in zip([*found, *back], [*expected, *expected_back], strict=True))
    assert error(found, expected) < 3e-6
    assert error(back, expected_back) < 3e-5
    if refuse == (CLUSTER,):
        assert (len(told), by_torch) == (0, False)
        return
    assert by_torch
    reason = "no clusters today; no grid today" if refuse else "too little shared memory"
    assert [str(x.message) for x in told] == [
        f'the device does not take a launch of the CUDA kernel ({reason}); backend "torch" runs instead'
    ]


def test_barriers_are_counted_past_the_largest_number(emulator):
    """A grid meets some twenty times a step: 2^32 times in the longest rollouts."""
    reached, last = emulator.library.counter_reached, 2**32 - 1
    assert [bool(reached(seen, 7)) for seen in (6, 7, 8, last)] == [False, True, True, False]
    assert [bool(reached(seen, last)) for seen in (last - 1, last, 0, 5)] == [False, True, True, True]


def test_the_most_samples_can_be_chosen():
    def found(value: str) -> subprocess.CompletedProcess[str]:
        code = "from hjepa_fast.backends import cuda; print(cuda.MOST_SAMPLES)"
        environment = {**os.environ, "HJEPA_FAST_CUDA_SAMPLES": value, "PYTHONPATH": str(SOURCES.parent.parent)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert found("96").stdout.strip() == "96"
    assert "HJEPA_FAST_CUDA_SAMPLES must be a number of samples, 0 or more; found '-3'" in found("-3").stderr


@VARIANTS
@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
def test_through_the_operators(memory, variant, emulator):
    """Forward by the kernel, back from its tape by another backend."""
    emulator.set(variant, team=2, rows=4)
    hnn, z0 = make_hnn(6, (5, 4)).float(), make_states(3, 6).float().requires_grad_()
    dt = torch.full((5,), 0.3, requires_grad=True)
    expected = gradients(hnn.double(), z0.double().detach().requires_grad_(), dt.double().detach().requires_grad_(), 5)
    found = gradients(hnn.float(), z0, dt, 5, backend="cuda", memory=memory)
    assert_all_close([x.double() for x in found], expected, rtol=1e-4, atol=1e-4)


def test_one_call_launches_few_kernels(emulator):
    """The kernel, the products before and after it, one packing of vectors; no matrix of zeros that nothing reads, no copy."""
    emulator.set(CLUSTER, team=2, rows=4)
    hnn, z0 = make_hnn(16, (8, 8, 16)).float(), make_states(3, 16).float()
    options = {"n_steps": 4, "dt": 0.1, "backend": "cuda"}
    hf.rollout(hnn.requires_grad_(False), z0, states="final", **options)  # K is remembered on a CPU
    with Watched() as watched:
        hf.rollout(hnn, z0, states="final", **options)
    assert watched.launched == ["full", "addmm", "cat", "forward", "mm", "add", "mm", "add"]
    with Watched() as watched:
        out = hf.rollout(hnn.requires_grad_(), z0.requires_grad_(), energy=True, **options)
    assert len(watched.launched) <= 18
    assert not {"zeros_like", "new_zeros", "zeros", "clone", "_to_copy"} & set(watched.launched)
    given = [torch.ones_like(out.states), torch.ones_like(out.energy)]
    with Watched() as watched:
        torch.autograd.grad([out.states, out.energy], [z0, *hnn.parameters()], given)
    launched = collections.Counter(watched.launched)
    assert launched["backward"] == 1
    assert launched.total() <= 60
    assert sum(launched[name] for name in ("zeros_like", "new_zeros", "zeros", "_foreach_zero_")) <= 4
    assert launched["clone"] <= 4
    assert launched["_to_copy"] == 0


def test_the_backend_is_listed_and_what_it_lacks_is_named():
    state = hf.available_backends()["cuda"]
    if state == "available":
        pytest.skip("the extension and a CUDA device are there, nothing is missing")
    assert "CUDA" in state
    hnn = hf.LatentHNN(4, (3,))
    with pytest.raises(RuntimeError, match="CUDA backend"):
        hf.rollout(hnn, torch.zeros(2, 4), 0.1, 1, backend="cuda")


@pytest.mark.parametrize("extension", [False, True])
@pytest.mark.parametrize("triton", [False, True])
def test_auto_takes_it_for_few_samples(triton, extension, monkeypatch):
    monkeypatch.setattr(cuda_backend, "available", lambda: extension)
    monkeypatch.setattr(triton_backend, "available", lambda: triton)

    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    rest = "triton" if triton else "torch"
    most = cuda_backend.MOST_SAMPLES
    assert choose_backend("auto", OnGpu(most, 8)) == ("cuda" if extension else rest)
    assert choose_backend("auto", OnGpu(most + 1, 8)) == rest
    assert choose_backend("auto", torch.zeros(1, 8)) == ("cpp" if cpp.available() else "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_papers_network_fits_a_cluster_of_16(dtype, emulator):
    """With eight samples a cluster, in the shared memory of Hopper and Blackwell; bfloat16 forward in one of 8 blocks."""
    case = Case(2, PAPER, n_steps=1).to(torch.float32)
    case.tail = case.tail._replace(weights=[w.to(dtype) for w in case.tail.weights])
    emulator.set(CLUSTER, team=16 if dtype == torch.float32 else 8, rows=8, threads=256)
    out = case.forward(cuda_backend)
    assert emulator.library.matrices_in_shared() == 3
    emulator.set(CLUSTER, team=16, rows=8, threads=256)
    case.backward(cuda_backend, out[-1])
    assert emulator.library.matrices_in_shared() == 3


HOPPER, AMPERE, GEFORCE = (132, 227 << 10, 16), (108, 163 << 10, 0), (170, 99 << 10, 8)


@pytest.mark.parametrize(
    ("device", "widths", "batch", "bf16", "expected"),
    [
        (HOPPER, PAPER, 1, False, (1, 16, 1, 1, 3)),
        (HOPPER, PAPER, 8, False, (1, 16, 1, 8, 3)),
        (HOPPER, PAPER, 32, False, (1, 16, 4, 8, 3)),
        (HOPPER, PAPER, 64, True, (1, 16, 8, 8, 3)),
        (HOPPER, PAPER, 65, False, (1, 16, 8, 5, 3)),  # nine groups: two turns, for which five clusters do
        (HOPPER, PAPER, 400, True, (1, 16, 8, 8, 3)),  # 50 groups, seven turns
        (HOPPER, (1024, 1024, 1024), 1, False, (0, 132, 1, 1, 3)),  # 12 MB: no cluster holds them
        (HOPPER, (64, 64), 4, False, (1, 4, 1, 4, 2)),
        (HOPPER, (5,), 1, False, (1, 1, 1, 1, 1)),
        (AMPERE, PAPER, 1, False, (0, 108, 1, 1, 3)),
        (AMPERE, PAPER, 64, True, (0, 27, 8, 4, 3)),  # four teams take two turns each
        (GEFORCE, PAPER, 1, True, (0, 128, 1, 1, 3)),  # 8 blocks hold 0.8 MB
        (GEFORCE, (64, 64), 1, False, (1, 4, 1, 1, 2)),
    ],
)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_how_a_rollout_is_shared_out(back, device, widths, batch, bf16, expected, emulator):
    """Clusters or not, blocks of a team, samples that it takes together, teams, matrices in shared memory."""
    out = (ctypes.c_int * 5)()
    multiprocessors, shared, largest = device
    width = (ctypes.c_int * len(widths))(*widths)
    emulator.library.chosen_on(
        multiprocessors, ctypes.c_long(shared), largest, len(widths), width, batch, int(bf16), int(back), out
    )
    assert tuple(out) == expected


TARGETS = {"80": "sm_80", "90a": "sm_90a", "100": "sm_100"}


def nvcc() -> str:
    found = shutil.which("nvcc")
    if not found:
        pytest.skip("needs nvcc")
    return found


@pytest.mark.parametrize("gpu", TARGETS)
def test_compiles_for_gpus_that_are_not_here(gpu, tmp_path):
    """No register is spilled, the block's 256 threads get all that they use, and the variants talk as they should."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    target = f"-gencode=arch=compute_{gpu},code={TARGETS[gpu]}"
    options = [target, "-Xptxas", "-v", "--keep", "--keep-dir", str(tmp_path)]
    file = tmp_path / "object.o"
    command = ["nvcc", "-std=c++20", "-O3", *options, "-c", str(SOURCES / "kernels.cu"), "-o", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.S,
    )
    assert len(kernels) == 24, done.stderr[-3000:]
    for name, stack, *spilled, registers in kernels:
        assert spilled == ["0", "0"], name
        # the bits of 2 / pi that the sine of a large number needs
        assert int(stack) <= 32, name
        assert int(registers) <= 224, name
    check_ptx(next(tmp_path.glob("kernels*.ptx")).read_text(), has_clusters=gpu != "80")
    assert gpu == "80" or "UCGABAR_ARV" in disassembled(file), "no barrier of a cluster"


def check_ptx(ptx: str, has_clusters: bool) -> None:
    entries = re.split(r"(?=\.visible \.entry)", ptx)[1:]
    assert len(entries) == 24
    for entry in entries:
        name = re.search(r"\.entry (\w+)", entry)[1]
        cluster = "7Cluster" in name
        assert ("st.release.gpu" in entry) != cluster, name
        for instruction in ("barrier.cluster.arrive", "barrier.cluster.wait", "mapa.shared::cluster", "st.shared::cluster"):
            assert (instruction in entry) == (cluster and has_clusters), f"{instruction} in {name}"
        assert not re.search(r"\b(atom|red)\.", entry), "sums depend on who comes first"


def disassembled(file: Path) -> str:
    triton = pytest.importorskip("triton", reason="brings cuobjdump along")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), "-sass", str(file)], capture_output=True, text=True, check=True).stdout


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--name"]
    environment = {**os.environ, "HJEPA_FAST_BUILD": "0", **environment}
    return subprocess.run(command, cwd=SOURCES.parent.parent, env=environment, capture_output=True, text=True)


def test_the_cuda_backend_is_built_only_when_it_is_asked_for():
    for unasked in ("0", ""):
        done = setup(HJEPA_FAST_BUILD_CUDA=unasked)
        assert done.returncode == 0
        assert "CUDA" not in done.stderr
    if not torch.version.cuda:
        done = setup(HJEPA_FAST_BUILD_CUDA="1")
        assert done.returncode != 0
        assert "no CUDA backend: PyTorch is for the CPU here" in done.stderr


def to_gpu(case: Case) -> Case:
    return case.to(torch.float32).to("cuda")


def on_variants(monkeypatch, variant: int, team: int, rows: int) -> None:
    for name, value in (("variant", variant), ("team", team), ("rows", rows)):
        monkeypatch.setattr(cuda_backend, name, value)


def skip_without(variant: int) -> None:
    if variant == CLUSTER and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the device has no clusters")


@on_gpu
@pytest.mark.parametrize("batch", [1, 5, 64, cuda_backend.MOST_SAMPLES])
@pytest.mark.parametrize("widths", [*WIDTHS, PAPER, (1024, 1024, 1024)], ids=str)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_equals_torch_on_a_gpu(precision, widths, batch):
    """As the device chooses; forward and, from its tape, back."""
    torch.set_float32_matmul_precision(precision)
    case = Case(batch, widths, n_steps=2)
    exact, mine = case.to(torch.float32).to(torch.float64).to("cuda"), to_gpu(case)
    tolerance = 3e-6 if precision == "highest" else 3e-2
    expected, found = exact.forward(torch_backend), mine.forward(cuda_backend)
    assert error([x.cpu() for x in found], [x.cpu() for x in expected]) < tolerance
    expected, found = exact.backward(torch_backend, expected[-1]), mine.backward(cuda_backend, found[-1])
    assert error([x.cpu() for x in found], [x.cpu() for x in expected]) < 10 * tolerance


@on_gpu
@VARIANTS
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("team", [1, 2, 8, 16])
def test_every_variant_on_a_gpu(team, rows, variant, monkeypatch):
    skip_without(variant)
    on_variants(monkeypatch, variant, team, rows)
    case = Case(2 * rows + 1, (130, 70, 40), scheme="many", n_steps=2)
    expected, found = case.to(torch.float32).to(torch.float64).forward(torch_backend), to_gpu(case).forward(cuda_backend)
    assert error([x.cpu() for x in found], expected) < 3e-6
    again = to_gpu(case).forward(cuda_backend)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@on_gpu
@VARIANTS
def test_captured_in_a_cuda_graph(variant, monkeypatch):
    """Replays follow what is in the inputs by then."""
    skip_without(variant)
    on_variants(monkeypatch, variant, 8, 4)
    case = to_gpu(Case(3, (130, 70, 40)))
    case.forward(cuda_backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.forward(cuda_backend)
    for _ in range(2):
        case.a.copy_(torch.randn_like(case.a))
        case.K.mul_(0.9)
        case.dt.mul_(1.1)
        expected = case.forward(cuda_backend)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@on_gpu
def test_what_a_gpu_does_not_take_runs_elsewhere(monkeypatch):
    monkeypatch.setattr(cuda_backend, "_told", set())
    on_variants(monkeypatch, GRID, 1000, 1)
    case = Case(1, (33, 20))
    expected = case.to(torch.float32).to(torch.float64).forward(torch_backend)
    with pytest.warns(UserWarning, match="the device does not take a launch of the CUDA kernel"):
        found = to_gpu(case).forward(cuda_backend)
    assert error([x.cpu() for x in found], expected) < 3e-6


def on_gpus(device: str, **options) -> list[torch.Tensor]:
    """States, energies and gradients of a training step in float32."""
    hnn, z0 = make_hnn(64, (48, 40, 24)).float().to(device), make_states(5, 64).float().to(device).requires_grad_()
    dt = torch.full((6,), 0.1, device=device, requires_grad=True)
    return [x.detach() for x in gradients(hnn, z0, dt, 6, **options)]


@on_gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
def test_a_training_step_on_a_gpu(memory, backend):
    hnn, z0 = make_hnn(64, (48, 40, 24)).float().double(), make_states(5, 64).float().double().requires_grad_()
    dt = torch.full((6,), 0.1).double().requires_grad_()
    found = [x.cpu().double() for x in on_gpus("cuda", backend=backend, memory=memory)]
    assert_all_close(found, gradients(hnn, z0, dt, 6), rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize(
    "options", [{}, {"integrator": "implicit-midpoint", "unconverged": "flag"}, {"memory": "checkpoint"}], ids=str
)
def test_nothing_waits_on_a_gpu(options):
    """PyTorch tells of every call that does; the first one compiles and copies what later ones have."""
    on_gpus("cuda", **options)
    hnn, z0 = make_hnn(64, (48, 40, 24)).float().cuda(), make_states(5, 64).float().cuda().requires_grad_()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = hf.rollout(hnn, z0, 0.1, 6, energy=True, **options)
            torch.autograd.grad((out.states.sum(), out.energy.sum()), [z0, *hnn.parameters()])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu_that_is_not_the_current_one(backend):
    expected, found = on_gpus("cuda:0", backend=backend), on_gpus("cuda:1", backend=backend)
    assert all(x.device.index == 1 for x in found)
    assert torch.cuda.current_device() == 0
    assert_all_close([x.cpu() for x in found], [x.cpu() for x in expected], rtol=1e-5, atol=1e-5)


@on_gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_is_clean_under_the_sanitizer(tool):
    done = check_kernel.check(tool, seconds=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_what_the_sanitizer_runs_is_the_kernels(emulator, monkeypatch):
    """Its cases are right, so that what it finds is the kernel's."""
    for team, rows, batch, widths, scheme, low in check_kernel.CASES[:3]:
        emulator.set(CLUSTER, team, rows)
        case = Case(batch, widths, scheme=scheme, n_steps=2).to(torch.float32)
        if low:
            case.tail = case.tail._replace(weights=[w.bfloat16() for w in case.tail.weights])
        out = case.forward(cuda_backend)
        assert all(x.isfinite().all() for x in [*out, *case.backward(cuda_backend, out[-1])])
