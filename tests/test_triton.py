"""The Triton loop against the PyTorch one in float64: on a GPU where there is one, and in Triton's interpreter.

The interpreter runs the same kernels on the CPU. It must be switched on before Triton is imported, so these tests then run in
a process of their own; what the GPUs' own compilers make of the kernels is looked at without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.activations import Activation
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.backends import triton as triton_backend
from hjepa_fast.backends.torch import Solver
from hjepa_fast.backends.triton import launch, layout, tune
from hjepa_fast.backends.triton.layout import Blocks
from hjepa_fast.backends.triton.tune import SHAPES
from hjepa_fast.hidden_space.outline import kernel_stages
from hjepa_fast.schemes import SCHEMES
from hjepa_fast.testing import make_hnn, make_states
from test_cpp import Case, error
from test_ops import assert_all_close, gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float64 if INTERPRETED else torch.float32
KINDS = tuple(layout.KINDS)
"""Activations that the kernels have."""
SMALL = Blocks(16, 16, 16, 4, 2)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
runs = pytest.mark.skipif(
    not triton_backend.available(), reason=f"{triton_backend.why_not()}; the interpreter's turn is test_in_the_interpreter"
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _defaults():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(autouse=True, scope="module")
def _loops_in_the_interpreter():
    """Triton 3.6 makes loop bounds of arrays of one number by int(), which NumPy 2.4 no longer allows."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
        yield


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def on_device(case: Case) -> Case:
    """In the dtype and on the device that are tested."""
    return case.to(DTYPE).to(DEVICE)


def compare(case: Case, memory: str, with_sums: bool, **options: bool):
    """Everything that both directions return, to rounding; returns residuals and evaluations of the kernel and of PyTorch."""
    exact = case.to(DTYPE).to(torch.float64)
    mine = on_device(case)
    tolerance = 1e-12 if INTERPRETED else 3e-6
    expected, found = exact.forward(torch_backend, memory, **options), mine.forward(triton_backend, memory, **options)
    assert error(cpu(found), expected) < tolerance
    expected = exact.backward(torch_backend, expected[-1], memory, with_sums=with_sums, **options)
    found = mine.backward(triton_backend, found[-1], memory, with_sums=with_sums, **options)
    assert error(cpu(found), expected) < 10 * tolerance
    return mine.solved, exact.solved


def cpu(tensors):
    return [x.cpu() for x in tensors]


WIDTHS = [(1,), (40,), (7, 5), (33, 20), (20, 33, 18), (9, 18, 31, 17)]


@runs
@pytest.mark.parametrize("batch", [1, 19, 40])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_equals_torch(widths, batch, monkeypatch):
    """Rows, widths and layers that fill no tile, one tile and several, with fewer programs than they would fill."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    monkeypatch.setattr(tune, "programs", 2)
    i = 3 * WIDTHS.index(widths) + batch % 3
    scheme = ("leapfrog", "euler", "many")[(i + i // 3) % 3]
    case = Case(batch, widths, KINDS[i % len(KINDS)], scheme, per_sample=i % 2 == 0, n_steps=2, seed=i)
    memory = ("store", "recompute")[i // 2 % 2]
    if i % 3 == 0:
        # a step at a time, or a program's samples and a step
        monkeypatch.setattr(launch, "bound", 1 if i % 2 else 40 * len(case.scheme) * 8 * 300)
    compare(case, memory, with_sums=i % 4 > 0, every_state=i % 3 > 0, with_energy=i % 5 > 0)


@runs
@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.implicit])
def test_implicit_sub_steps_equal_torch(scheme, monkeypatch):
    """Every integrator, each with another network, batch and set of options; the same equations, solved as well."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    monkeypatch.setattr(tune, "programs", 1)
    i = list(SCHEMES).index(scheme)
    widths = (WIDTHS[1:] + WIDTHS[:1])[i % len(WIDTHS)]
    long = len(SCHEMES[scheme].stages) > 3
    # more than a program's samples, or more sub-steps; small steps take the interpreter fewer evaluations
    shape = (3, (5, 4)) if long else (18, widths)
    case = Case(*shape, KINDS[i % len(KINDS)], per_sample=i % 2 == 0, n_steps=1 if long else 2, seed=i)
    case.scheme, case.dt = kernel_stages(SCHEMES[scheme].stages, i % 2 > 0), 0.3 * case.dt
    options = {"every_state": i % 3 > 0, "with_energy": i % 2 > 0}
    (residual, evaluations), expected = compare(case, ("store", "recompute")[i // 2 % 2], with_sums=i % 4 > 0, **options)
    assert bool((residual <= on_device(case).solver.tolerance).all())
    if INTERPRETED:  # rounding may decide whether one more is needed
        assert bool(((evaluations - expected[1]).abs() <= 2 * len(case.scheme)).all())


@runs
def test_points_are_extrapolated_from_the_last_five(monkeypatch):
    """Seven steps fill the history and go round it; a start that is no better than the state takes more evaluations."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(2, (3,), scheme="implicit-midpoint", n_steps=7))
    case.dt.fill_(0.05)
    counts = []
    for backend in (torch_backend, triton_backend):
        case.forward(backend, "none")
        counts.append(case.solved[1].sum(0))
    assert int((counts[0] - counts[1]).abs().max()) <= 2
    assert counts[1][-1] < counts[1][0]


@runs
def test_rows_are_solved_on_their_own(monkeypatch):
    """The same numbers whatever else the program has; one that does not converge, or is not finite, says so and no other."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(6, (20, 17), scheme="implicit-midpoint", n_steps=2))
    clean = [*case.forward(triton_backend), *case.solved]
    case.a[1, 3], case.dt[4] = float("nan"), 1e6
    out = [*case.forward(triton_backend), *case.solved]
    others = [0, 2, 3, 5]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(out, clean, strict=True))
    residual, evaluations = case.solved
    unsolved = ~(residual <= case.solver.tolerance)
    assert unsolved.any(1).tolist() == [False, True, False, False, True, False]
    assert int(evaluations.max()) <= 2 * case.solver.max_evaluations


@runs
def test_too_few_evaluations(monkeypatch):
    """The iteration stops where it is told to, each way, as PyTorch's does."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = Case(3, (7, 5), scheme="implicit-midpoint", n_steps=1)
    monkeypatch.setattr(Case, "solver", Solver(1e-300, 3))
    exact, mine = case.to(torch.float64), on_device(case)
    tolerance = 1e-12 if INTERPRETED else 1e-5
    expected, found = exact.forward(torch_backend), mine.forward(triton_backend)
    assert error(cpu(found), expected) < tolerance
    assert mine.solved[1].cpu().tolist() == exact.solved[1].tolist()
    assert error(cpu(mine.backward(triton_backend, found[-1])), exact.backward(torch_backend, expected[-1])) < 10 * tolerance


@runs
def test_tiles_of_several_shapes(monkeypatch):
    monkeypatch.setattr(tune, "programs", 1)
    for shape in (Blocks(32, 16, 32, 4, 2), Blocks(16, 32, 16, 4, 3)):
        monkeypatch.setattr(tune, "blocks", shape)
        compare(Case(35, (40, 33), n_steps=1), "store", with_sums=True, every_state=True, with_energy=True)


@runs
def test_eight_layers(monkeypatch):
    monkeypatch.setattr(tune, "blocks", SMALL)
    compare(Case(3, (9, 8, 7, 6, 5, 4, 3, 2), n_steps=1), "recompute", with_sums=True, every_state=True, with_energy=True)


@runs
@pytest.mark.parametrize("activation", [*map(Activation, KINDS), Activation("softplus", 2.5, 3.0)], ids=str)
def test_activations(activation, monkeypatch):
    """The network F(a) = s(a) with K = 0 at numbers small, large and in between: s is its energy, s' moves sq, s'' la."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    numbers = [0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.34, 0.35, 1.0, 2.9, 7.0, 19.9, 20.1, 30.0, 90.0]
    a = torch.tensor([*numbers, *(-x for x in numbers)], dtype=DTYPE)
    case = Case(len(a), (1,), activation, "euler", n_steps=1).to(DTYPE)
    case.a, case.K, case.dt = a[:, None], torch.zeros(1, 1, dtype=DTYPE), torch.ones(1, 1, dtype=DTYPE)
    case.tail = case.tail._replace(weights=[torch.ones(1, 1, dtype=DTYPE)], biases=[torch.zeros(1, dtype=DTYPE)])
    case.cotangents = [torch.zeros_like(case.a), torch.ones_like(case.a), torch.zeros_like(case.a)]
    case.of_states = torch.zeros_like(case.of_states)
    moved = case.to(DEVICE)
    out = moved.forward(triton_backend)
    la = moved.backward(triton_backend, out[-1], with_energy=False, with_sums=False)[0]
    found, exact = (out[3][:, 0], out[1][:, 0, 0], la[:, 0]), activation.derivatives(a.double())
    eps = torch.finfo(DTYPE).eps
    # the formulas for gelu-tanh cancel; the oracle in float64 is one of them
    tolerance = (1000 if activation.name == "gelu-tanh" else 32) * eps
    for order, (x, y) in enumerate(zip(cpu(found), exact, strict=True)):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance, msg=lambda m, order=order: f"{order}: {m}")
    if activation.name in ("softplus", "tanh", "silu", "sin") and activation.beta == 1:
        torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=16 * eps, atol=1e-36)


@runs
def test_not_a_number_stays_in_its_row(monkeypatch):
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(6, (20, 17), n_steps=1))
    clean = case.forward(triton_backend)
    case.a[1, 3] = float("nan")
    out = case.forward(triton_backend)
    others = [0, 2, 3, 4, 5]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(out, clean, strict=True))
    assert out[0][1].isnan().all()


@runs
def test_what_it_does_not_do_is_the_torch_loops(monkeypatch):
    monkeypatch.setattr(launch, "_kernels", lambda: pytest.fail("a kernel was asked for"))
    cases = [Case(2, (5, 4)), Case(2, (5, 4), n_steps=1), Case(2, (4,) * 9)]
    cases[0].scheme = SCHEMES["rk4"].stages
    cases[1].a, cases[1].batch = cases[1].a[:0], 0
    cases[1].dt = cases[1].dt[:0]
    for case in map(on_device, cases):
        case.forward(triton_backend)


@runs
def test_the_same_twice(monkeypatch):
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(19, (20, 17), n_steps=1))
    once, again = ([*out, *case.backward(triton_backend, out[-1])] for out in (case.forward(triton_backend) for _ in range(2)))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_without_tuning_blocks_are_the_smallest_that_fill_the_chip(monkeypatch):
    monkeypatch.setattr(tune, "programs", 132)
    for precision, batch, rows in (("bf16", 1, 16), ("bf16", 2112, 16), ("bf16", 2113, 64), ("bf16", 10**6, 128)):
        choice = tune._of_table(precision, batch, torch.device("cpu"))
        assert choice.rows == rows
        assert tune.n_programs(choice, batch, torch.device("cpu")) == min(132, -(-batch // rows))


@pytest.fixture
def tuned(monkeypatch):
    """Tuning with a stopwatch of our own, that runs nothing and prefers the second shape; returns what it was asked to time."""
    asked = []

    def seconds(run):
        asked.append(run)
        return 1.0 if run == SHAPES["tf32"][1] else 2.0

    for name, value in {"tune": True, "_fastest": {}, "_seconds": seconds, "programs": 132}.items():
        monkeypatch.setattr(tune, name, value)
    return asked


def choose(batch, precision="tf32", direction="forward", like=torch.zeros):
    return tune.choose(direction, precision, [64, 32], like(batch, 1), lambda blocks: blocks)


def test_the_fastest_shape_is_timed_once_a_size(tuned):
    table = SHAPES["tf32"]
    assert choose(1000) == choose(1024) == choose(513) == table[1]
    assert tuned == list(table)
    assert choose(1025) == table[1]
    assert choose(1025, direction="backward") == table[1]
    assert len(tuned) == 3 * len(table)


def test_a_small_batch_has_nothing_to_choose_from(tuned):
    assert choose(8) == SHAPES["tf32"][0]
    assert not tuned


def test_nothing_is_timed_while_a_graph_is_captured(tuned, monkeypatch):
    """What was found before is taken, or what the table says, and that is not remembered."""

    class Captured:
        def __init__(self, *shape):
            self.shape, self.device = shape, torch.device("cuda", 0)

    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert choose(5000, like=Captured) == SHAPES["tf32"][1] == tune._of_table("tf32", 5000, torch.device("cpu"))
    assert choose(10**5, like=Captured) == SHAPES["tf32"][-1]
    assert not tuned
    assert not tune._fastest
    capturing = False
    assert choose(10**5, like=Captured) == SHAPES["tf32"][1]
    capturing = True
    assert choose(10**5, like=Captured) == SHAPES["tf32"][1]


@runs
@pytest.mark.parametrize("scheme", ["leapfrog", "implicit-midpoint"])
def test_timing_leaves_no_trace(scheme, monkeypatch):
    """Every shape runs several times before the results are made, which are the same."""
    case = on_device(Case(18, (7, 5), scheme=scheme, n_steps=1))
    shapes = (SMALL, Blocks(32, 16, 16, 4, 2))
    monkeypatch.setitem(SHAPES, "ieee", shapes)
    monkeypatch.setattr(tune, "blocks", shapes[1])
    out = case.forward(triton_backend)
    expected = [*out, *case.backward(triton_backend, out[-1])]
    ran = []

    def seconds(run):
        run(), run()
        ran.append(run)
        return -float(len(ran))

    for name, value in {"blocks": None, "tune": True, "_fastest": {}, "_seconds": seconds}.items():
        monkeypatch.setattr(tune, name, value)
    out = case.forward(triton_backend)
    assert all(torch.equal(x, y) for x, y in zip([*out, *case.backward(triton_backend, out[-1])], expected, strict=True))
    assert len(ran) == 2 * len(shapes)


@pytest.mark.parametrize(("batch", "n_steps", "step_bytes"), [(1, 1, 0), (40, 7, 100), (1000, 3, 1000), (33, 5, 10**9)])
def test_chunks_cover_everything_once(batch, n_steps, step_bytes, monkeypatch):
    monkeypatch.setattr(launch, "bound", 10_000)
    seen = torch.zeros(batch, n_steps)
    last = [n_steps] * batch
    for rows, steps in launch._chunks(batch, n_steps, 16, step_bytes):
        seen[rows, steps] += 1
        assert rows.start % 16 == 0
        for row in range(batch)[rows]:
            assert last[row] == steps.stop, "not backwards"
            last[row] = steps.start
        assert len(range(batch)[rows]) * len(range(n_steps)[steps]) * step_bytes <= max(10_000, 16 * step_bytes)
    assert bool((seen == 1).all())


PAPER = (512, 512, 256)


def relative(found, exact) -> float:
    errors = [(x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30) for x, y in zip(found, exact, strict=True)]
    return max(float(e) for e in errors)


@on_gpu
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("batch", [1, 40, 2500, 9000])
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("high", 5e-3), ("medium", 3e-2), ("weights", 3e-2)])
def test_precisions_on_a_gpu(precision, tolerance, batch, memory):
    """The paper's network with the tables' own shapes; "weights" are bfloat16 themselves."""
    case = Case(batch, PAPER, n_steps=2).to(torch.float32)
    exact = case.to(torch.float64).to("cuda")
    mine = case.to("cuda")
    if precision == "weights":
        mine.tail = mine.tail._replace(weights=[w.bfloat16() for w in mine.tail.weights])
        exact.tail = exact.tail._replace(weights=[w.double() for w in mine.tail.weights])
    else:
        torch.set_float32_matmul_precision(precision)
    expected, found = exact.forward(torch_backend, memory), mine.forward(triton_backend, memory)
    assert relative(found[:4], expected[:4]) < tolerance
    expected, found = exact.backward(torch_backend, expected[-1], memory), mine.backward(triton_backend, found[-1], memory)
    assert relative(found, expected) < 3 * tolerance


@on_gpu
@pytest.mark.parametrize("scheme", ["implicit-leapfrog", "implicit-midpoint"])
@pytest.mark.parametrize("batch", [1, 40, 2500, 9000])
@pytest.mark.parametrize("precision", ["highest", "high", "medium", "weights"])
def test_implicit_steps_are_solved_in_every_precision_on_a_gpu(precision, batch, scheme):
    """To the last digits of float32: products that are rounded elsewhere are not here."""
    case = Case(batch, PAPER, scheme=scheme, n_steps=2).to(torch.float32)
    if precision == "weights":
        case.tail = case.tail._replace(weights=[w.bfloat16().float() for w in case.tail.weights])
    exact = case.to(torch.float64).to("cuda")
    mine = case.to("cuda")
    if precision == "weights":
        mine.tail = mine.tail._replace(weights=[w.bfloat16() for w in mine.tail.weights])
    else:
        torch.set_float32_matmul_precision(precision)
    expected, found = exact.forward(torch_backend), mine.forward(triton_backend)
    assert relative(found[:4], expected[:4]) < 1e-5
    assert bool((mine.solved[0] <= mine.solver.tolerance).all())
    expected, found = exact.backward(torch_backend, expected[-1]), mine.backward(triton_backend, found[-1])
    assert bool((found[4] <= mine.solver.tolerance).all())
    del expected[4], found[4]  # residuals
    assert relative(found, expected) < 3e-5


@on_gpu
@pytest.mark.parametrize("scheme", ["leapfrog", "implicit-midpoint"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_captured_in_a_cuda_graph(memory, precision, scheme):
    """Replays follow what is in the inputs by then."""
    torch.set_float32_matmul_precision(precision)
    case = on_device(Case(33, (130, 70, 40), scheme=scheme))

    def run():
        out = case.forward(triton_backend, memory)
        return [*out, *case.backward(triton_backend, out[-1], memory)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(2):
        case.a.copy_(torch.randn_like(case.a))
        case.K.mul_(0.9)
        case.dt.mul_(1.1)
        expected = run()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@on_gpu
def test_large_batches_on_a_gpu(monkeypatch):
    """More samples than the chip's programs own at a time, and a backward pass in chunks."""
    monkeypatch.setattr(launch, "bound", 2**24)
    case = on_device(Case(20_000, (64, 32), n_steps=2))
    out = case.forward(triton_backend)
    expected = case.forward(torch_backend)
    assert relative(out[:4], expected[:4]) < 1e-5
    expected = case.backward(torch_backend, expected[-1])
    assert relative(case.backward(triton_backend, out[-1]), expected) < 1e-4


def compiled(direction: str, precision: str, blocks: Blocks, capability: int, widths=PAPER, implicit=False, **options):
    """What Triton makes of a kernel for a GPU that need not be there: its metadata, PTX, registers and stack."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hjepa_fast.backends.triton import kernels

    plan = layout.layout_of(widths, blocks, precision, Activation("softplus"), implicit)
    if direction == "forward":
        kernel, C = kernels.forward_kernel, plan.forward._replace(STORE=len(widths) > 1, **options)
    else:
        kernel, C = kernels.backward_kernel, plan.backward._replace(SUMS=True, **options)
    constants = {"C": layout.for_triton(C)}
    product = "*bf16" if precision == "bf16" else "*fp32"
    types = {
        "matrices_ptr": product,
        "layers_ptr": product,
        "factors_ptr": product,
        "which_ptr": "*i32",
        "evaluations_ptr": "*i32",
    }
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32") if pointer else "i32"
        if pointer:
            aligned[(i,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=plan.launch
    )
    return binary


def resources(binary, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of its stack, where spilled registers are."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    out = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2])


FAST_MEMORY = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a program may have, by compute capability."""
MOST_STACK = {("forward", 80): 640, ("forward", 90): 512, ("forward", 100): 512}
MOST_STACK |= {("backward", 80): 2560, ("backward", 90): 1280, ("backward", 100): 1280}
"""Bytes, a little more than was found: registers spilled around a product, in what is done with it."""

# the last shape of the table on every chip, the first one too on the one that the tables are for
TARGETS = [(90, precision, shape) for precision in SHAPES for shape in (0, -1)]
TARGETS += [(chip, precision, -1) for chip in (80, 100) for precision in ("bf16", "tf32", "tf32x3")]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "precision", "shape"), TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_gpus_that_are_not_here(direction, capability, precision, shape, tmp_path):
    blocks = SHAPES[precision][shape]
    binary = compiled(direction, precision, blocks, capability, implicit=precision == "tf32x3")
    registers, stack = resources(binary, tmp_path)
    assert binary.metadata.shared <= FAST_MEMORY[capability] * 1024
    assert registers * 32 * blocks.warps <= 65536
    assert stack <= MOST_STACK[direction, capability]
    ptx = binary.asm["ptx"]
    if capability == 90 and precision != "ieee" and blocks.rows >= 64:
        assert "wgmma" in ptx
    elif capability == 100 and precision != "ieee":
        assert "tcgen05.mma" in ptx
    elif precision != "ieee":
        assert "mma.sync" in ptx


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_narrow_tile_leaves_enough_registers(direction, tmp_path):
    _, stack = resources(compiled(direction, "bf16", SHAPES["bf16"][2], 90), tmp_path)
    assert SHAPES["bf16"][2].columns == 32
    assert stack <= {"forward": 0, "backward": 128}[direction]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("scheme", ["leapfrog", "implicit-midpoint"])
def test_a_launch_compiles_what_no_later_one_has_to(scheme, monkeypatch):
    """The kernels as they are called, up to the launch: other batches, steps and lengths of a step are other arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from hjepa_fast.backends.triton import kernels

    class Hopper:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    class Compiled(dict):
        def __init__(self, kernel):
            self.kernel, self.binaries = kernel, []

        def __getitem__(self, grid):
            return lambda *args, **options: self.binaries.append(self.kernel.warmup(*args, grid=grid, **options))

    class Kernels:
        forward_kernel, backward_kernel = Compiled(kernels.forward_kernel), Compiled(kernels.backward_kernel)

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(launch, "_kernels", lambda: Kernels)
    monkeypatch.setattr(launch, "require", lambda a: None)
    monkeypatch.setattr(tune, "tune", False)
    monkeypatch.setattr(tune, "programs", 132)
    for batch, n_steps, per_sample in ((16, 16, True), (1, 1, True), (5, 3, False)):
        case = Case(batch, (33, 20), scheme=scheme, per_sample=per_sample, n_steps=n_steps).to(torch.float32)
        case.of_states = [x.clone() for x in case.of_states]  # arrays of their own are aligned
        out = case.forward(triton_backend)
        case.backward(triton_backend, out[-1])
    for kernel in (Kernels.forward_kernel, Kernels.backward_kernel):
        assert len(kernel.binaries) == 3
        assert len({binary.hash for binary in kernel.binaries}) == 1


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [
        {"widths": (1,)},
        {"widths": (1,), "implicit": True},
        {"widths": (33, 7), "EVERY_STATE": False, "WITH_ENERGY": False},
        {"widths": (33, 7), "EVERY_STATE": False, "WITH_ENERGY": False, "implicit": True},
    ],
)
def test_other_variants_compile(direction, options):
    compiled(direction, "ieee", SHAPES["ieee"][0], 90, **options)


def test_the_backend_is_listed_and_what_it_lacks_is_named():
    state = hf.available_backends()["triton"]
    if state == "available":
        pytest.skip("Triton and a CUDA device are there, nothing is missing")
    assert "triton" in state.lower()
    hnn = hf.LatentHNN(4, (3,))
    with pytest.raises(RuntimeError, match="Triton backend"):
        hf.rollout(hnn, torch.zeros(2, 4), 0.1, 1, backend="triton")


@runs
@pytest.mark.parametrize(
    ("integrator", "memory"),
    [
        ("leapfrog", "store"),
        ("leapfrog", "checkpoint"),
        ("euler", "recompute"),
        ("implicit-leapfrog", "checkpoint"),
        ("implicit-midpoint", "reversible"),
        ("rk4", "store"),
    ],
)
def test_through_the_operators(integrator, memory, monkeypatch):
    monkeypatch.setattr(tune, "blocks", SMALL)
    hnn, z0 = make_hnn(6, (5, 4)).to(DEVICE, DTYPE), make_states(3, 6).to(DEVICE, DTYPE).requires_grad_()
    dt = torch.full((3,), 0.3, dtype=DTYPE, device=DEVICE, requires_grad=True)
    options = {"integrator": integrator}
    expected = gradients(hnn, z0, dt, 3, backend="reference", **options)
    found = gradients(hnn, z0, dt, 3, backend="triton", memory=memory, **options)
    tolerance = 1e-11 if torch.float64 == DTYPE else 1e-4
    assert_all_close(found, expected, rtol=tolerance, atol=tolerance)
