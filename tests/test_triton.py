"""The Triton loop against the PyTorch one in float64: on a GPU where there is one, and in Triton's interpreter.

The interpreter runs the same kernels on the CPU. It must be switched on before Triton is imported, so these tests then run in
a process of their own; what the GPUs' own compilers make of the kernels is looked at without a GPU.
"""

from __future__ import annotations

import collections
import functools
import gc
import importlib.util
import math
import os
import re
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import hjepa_fast as hf
from gpu_hazards import copies_over_operands, unordered
from hjepa_fast.activations import Activation
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.backends import triton as triton_backend
from hjepa_fast.backends.torch import Gradients, Solver
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
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
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
    found, exact = one_unit(activation, a, DTYPE), activation.derivatives(a.double())
    eps = torch.finfo(DTYPE).eps
    # the formulas for gelu-tanh cancel; the oracle in float64 is one of them
    tolerance = (1000 if activation.name == "gelu-tanh" else 32) * eps
    for order, (x, y) in enumerate(zip(found, exact, strict=True)):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance, msg=lambda m, order=order: f"{order}: {m}")
    if activation.name in ("softplus", "tanh", "silu", "sin") and activation.beta == 1:
        torch.testing.assert_close(found[0].double(), exact[0], rtol=16 * eps, atol=1e-36)


def one_unit(activation, a, dtype):
    """s, s', s'' of the kernels at a: the network F(a) = s(a) with K = 0."""
    case = Case(len(a), (1,), activation, "euler", n_steps=1).to(dtype)
    case.a, case.K, case.dt = a.to(dtype)[:, None], torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    case.tail = case.tail._replace(weights=[torch.ones(1, 1, dtype=dtype)], biases=[torch.zeros(1, dtype=dtype)])
    case.cotangents = [torch.zeros_like(case.a), torch.ones_like(case.a), torch.zeros_like(case.a)]
    case.of_states = torch.zeros_like(case.of_states)
    moved = case.to(DEVICE)
    out = moved.forward(triton_backend)
    la = moved.backward(triton_backend, out[-1], with_energy=False, with_sums=False)[0]
    return cpu((out[3][:, 0], out[1][:, 0, 0], la[:, 0]))


@pytest.fixture
def hardware(monkeypatch):
    """Functions in the interpreter are as wrong as those of the chip may be, by NVIDIA's bounds (PTX ISA), either way."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(0)

    def wrong(name, relative, absolute):
        original = getattr(InterpreterBuilder, name)

        def create(self, *arguments):
            exact = original(self, *arguments)
            x = exact.data.astype(np.float64)
            x = x * (1 + relative * generator.choice([-1, 1], x.shape)) + absolute * generator.choice([-1, 1], x.shape)
            x = np.where(np.abs(x) < 2.0**-126, 0.0, x)
            return TensorHandle(x.astype(np.float32), exact.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, name, create)

    for name, relative, absolute in (
        ("create_exp2", 2.0**-22, 0.0),
        ("create_fdiv", 2.0**-23, 0.0),
        ("create_sin", 0.0, 2.0**-20.5),
        ("create_cos", 0.0, 2.0**-20.5),
    ):
        wrong(name, relative, absolute)


@runs
@pytest.mark.parametrize("activation", [*map(Activation, KINDS), Activation("softplus", 2.5, 3.0)], ids=str)
def test_approximated_activations(activation, hardware, monkeypatch):
    """Where products are of rounded numbers: 16 times closer than the rounding, for numbers of every size."""
    monkeypatch.setattr(tune, "blocks", Blocks(1024, 16, 16, 4, 2) if INTERPRETED else None)
    torch.set_float32_matmul_precision("high")
    sizes = torch.cat([torch.logspace(-30, -3, 100), torch.logspace(-3, 2, 1948)]).double()
    a = torch.cat([-sizes, sizes]).float().double()
    with np.errstate(all="ignore"):
        found, exact = one_unit(activation, a, torch.float32), activation.derivatives(a)
    rounding = 2.0**-11
    value = exact[0]
    # 1 + tanh(y) and 1 + erf(y) would cancel in the oracle
    if activation.name == "gelu-tanh":
        value = a * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (a + 0.044715 * a**3))
    elif activation.name == "gelu":
        value = a * torch.special.erfc(-a / 2**0.5) / 2
    # a sine far from 0 is as close as its scale allows, and so are both derivatives; below float32's normal numbers is 0
    scale = value.abs() if activation.name != "sin" else value.abs().where(a.abs() < 1, torch.ones(()).double())
    wrong = (found[0].double() - value).abs() - rounding / 16 * scale
    assert float(wrong.max()) <= 1e-35, float(a[wrong.argmax()])
    for x, y in zip(found[1:], exact[1:], strict=True):
        assert float((x.double() - y).abs().max()) <= rounding / 64 * max(1.0, float(y.abs().max()))
    assert bool(torch.isfinite(torch.stack(found)).all())


@pytest.fixture
def matrix_units(monkeypatch):
    """Products in the interpreter are of TF32 numbers as matrix units add them up.

    Of eight products at a time and the sum before, all are cut off at the last bit of the largest one, and so is their sum. Of
    three products the small ones come first; tile by tile they are added up outside. NVIDIA does not say what its units do:
    this is the worst that was measured of them (Ootomo and Yokota, Int. J. High Perform. Comput. Appl. 36, 475, 2022).
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounded(x):
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def add(total, a, b):
        for k in range(0, a.shape[1], 8):
            products = a[:, k : k + 8, None].astype(np.float64) * b[None, k : k + 8]
            largest = np.maximum(np.abs(products).max(1), np.abs(total))
            last = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - 23)
            exact = (np.trunc(products / last[:, None]).sum(1) + np.trunc(total / last)) * last
            nearest = exact.astype(np.float32)
            total = np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)
        return total

    def dot(self, a, b, total, precision, _):
        assert precision.name == "TF32x3"
        large, whole = [rounded(x.data) for x in (a, b)], np.zeros_like(total.data)
        small = [rounded(x.data - y) for x, y in zip((a, b), large, strict=True)]
        for left, right in ((small[0], large[1]), (large[0], small[1]), (large[0], large[1])):
            whole = add(whole, left, right)
        return TensorHandle(whole + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@runs
def test_float32_from_three_tf32_products_is_within_twice_the_eager_error(matrix_units, monkeypatch):
    """By default: the largest and the mean error of several problems, against PyTorch's own products on this processor."""
    monkeypatch.setattr(tune, "programs", 1)
    errors: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
    for i, widths in enumerate([(256,), (96, 64), (130, 40)]):
        monkeypatch.setattr(tune, "blocks", Blocks(16, 128, 32, 8, 3))
        case = Case(9, widths, KINDS[i], n_steps=1 + i % 2, seed=i).to(torch.float32)
        exact, mine = case.to(torch.float64), case.to(DEVICE)
        expected, eager, found = exact.forward(torch_backend), case.forward(torch_backend), mine.forward(triton_backend)
        errors["forward"].append((error(cpu(found), expected), error(eager, expected)))
        expected, eager = exact.backward(torch_backend, expected[-1]), case.backward(torch_backend, eager[-1])
        errors["backward"].append((error(cpu(mine.backward(triton_backend, found[-1])), expected), error(eager, expected)))
    for direction, pairs in errors.items():
        found, eager = zip(*pairs, strict=True)
        assert max(found) <= 2 * max(eager), (direction, pairs)
        assert sum(found) <= 2 * sum(eager), (direction, pairs)


@pytest.mark.parametrize(
    ("setting", "weights", "scheme", "expected"),
    [
        ("highest", torch.float32, "leapfrog", "tf32x3"),
        ("highest", torch.bfloat16, "leapfrog", "bf16"),
        ("high", torch.float32, "leapfrog", "tf32"),
        ("medium", torch.float32, "leapfrog", "bf16"),
        ("medium", torch.bfloat16, "implicit-midpoint", "tf32x3"),
        ("high", torch.float32, "implicit-midpoint", "tf32x3"),
    ],
)
def test_precision_follows_torchs(setting, weights, scheme, expected, monkeypatch):
    torch.set_float32_matmul_precision(setting)
    case = Case(2, (5, 4), scheme=scheme).to(torch.float32)
    case.tail = case.tail._replace(weights=[w.to(weights) for w in case.tail.weights])
    assert launch._precision(case.a, case.tail, case.scheme) == expected
    assert launch._precision(case.a.double(), case.tail, case.scheme) == "ieee"
    monkeypatch.setattr(launch, "float32", "ieee")
    assert launch._precision(case.a, case.tail, case.scheme) == expected.replace("tf32x3", "ieee")


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would be a kernel on a GPU: every operator that is not a view and does more than reserve memory."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        start = launch._start

        def counted(kernel, *arguments, **options):
            self.counts[kernel.fn.__name__] += 1
            with torch._C._DisableTorchDispatch():  # the interpreter's own copies
                start(kernel, *arguments, **options)

        monkeypatch.setattr(launch, "_start", counted)

    def __torch_dispatch__(self, func, types, arguments=(), options=None):
        reserved = (
            "aten::empty",
            "aten::new_empty",
            "aten::empty_like",
            "aten::empty_strided",
            "aten::detach",
            "aten::lift_fresh",
        )
        if not func.is_view and func._schema.name not in reserved and "unsafe_view" not in func._schema.name:
            self.counts[func._schema.name] += 1
        return func(*arguments, **(options or {}))


@runs
def test_launches_of_a_rollout(monkeypatch):
    """Forward the loop's own kernel and one that packs; backward those, and the products that the parameters' gradients are."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(3, (7, 5), n_steps=1))
    case.forward(triton_backend)  # compiles
    launches = Launches(monkeypatch)
    with launches:
        out = case.forward(triton_backend)
    assert launches.counts == {"pack_kernel": 1, "forward_kernel": 1}
    launches.counts.clear()
    sums = Gradients.zeros(case.K, case.tail)
    with launches:
        triton_backend.backward(
            *case.cotangents, *case.of_states, case.of_energy, out[-1], case.K, case.tail, case.dt, case.scheme, "store", sums,
            case.solver,
        )  # fmt: skip
    counts = launches.counts
    # K's of three sub-steps, two of the inner layer's weights
    products = counts.pop("aten::addmm_")
    assert products == 5
    # biases', the output weights' and the energies' sums; the residuals' zeros
    assert counts.pop("aten::sum") == counts.pop("aten::add_") == 3
    assert sum(counts.pop(name, 0) for name in ("aten::new_zeros", "aten::zero_", "aten::fill_", "aten::zeros")) == 1
    assert counts == {"pack_kernel": 1, "backward_kernel": 1}


@runs
def test_nothing_stays_on_the_device(monkeypatch):
    """A CUDA graph would own what was made while it was captured, and PyTorch refuses what outlives it."""
    monkeypatch.setattr(tune, "blocks", SMALL)
    case = on_device(Case(3, (7, 5), scheme="implicit-midpoint", n_steps=1))
    for cached in (layout.numbers_of, layout.for_triton, layout.layout_of):
        cached.cache_clear()

    def tensors() -> int:
        gc.collect()
        return sum(1 for x in gc.get_objects() if type(x) is torch.Tensor)

    before = tensors()
    out = case.forward(triton_backend)
    case.backward(triton_backend, out[-1], with_sums=False)
    del out, case.solved
    assert tensors() == before


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

    mine = {"tune": True, "_fastest": {}, "_seconds": seconds, "compile_at_once": lambda *_: None, "programs": 132}
    for name, value in mine.items():
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
            self.shape, self.device, self.is_cuda = shape, torch.device("cuda", 0), False

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


SCRATCH = ("work_ptr", "layers_ptr", "factors_ptr", "history_ptr")
"""What a program both writes and reads."""
FAST_MEMORY = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a program may have, by compute capability."""
MOST_STACK = {("forward", 80): 640, ("forward", 90): 512, ("forward", 100): 512}
MOST_STACK |= {("backward", 80): 2560, ("backward", 90): 1280, ("backward", 100): 1280}
"""Bytes, a little more than was found: registers spilled around a product, in what is done with it."""

# the last shape of the table on every chip, the first one too on the one that the tables are for
TARGETS = [(90, precision, shape) for precision in SHAPES for shape in (0, -1)]
TARGETS += [(chip, precision, -1) for chip in (80, 100) for precision in ("bf16", "tf32", "tf32x3")]


@needs_triton
@compiles
@pytest.mark.parametrize(("capability", "precision", "shape"), TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_gpus_that_are_not_here(direction, capability, precision, shape, tmp_path):
    blocks = SHAPES[precision][shape]
    binary = compiled(direction, precision, blocks, capability, implicit=precision == "tf32x3")
    registers, stack = resources(binary, tmp_path)
    assert unordered(binary.asm["ttgir"], SCRATCH) == []
    if precision != "tf32x3":  # there the units read halves of what was copied, which are elsewhere
        assert copies_over_operands(binary.asm["ptx"]) == []
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


@pytest.fixture
def hopper(monkeypatch):
    """Kernels are called as on a GPU, up to the launch: a function that names what each launch asks the compiler for."""
    pytest.importorskip("triton", reason="the extra dev, which brings triton, is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from hjepa_fast.backends.triton import kernels

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    wanted: list[tuple[str, str]] = []

    class Called:
        def __init__(self, kernel):
            self.warmup = kernel.warmup

        def __getitem__(self, grid):
            return lambda *args, **options: self.warmup(*args, grid=grid, **options)

    called = {}
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
        monkeypatch.setattr(kernel, "_do_compile", lambda key, *_, name=name: wanted.append((name, key)))
        called[name] = Called(kernel)
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(launch, "_kernels", lambda: types.SimpleNamespace(**called))
    monkeypatch.setattr(launch, "_begun", set())
    monkeypatch.setattr(launch, "require", lambda a: None)
    monkeypatch.setattr(triton_backend, "require", lambda a: None)
    monkeypatch.setattr(tune, "programs", 132)
    return wanted


def binaries(wanted) -> dict[str, int]:
    """How many of each kernel."""
    return dict(collections.Counter(name for name, _ in set(wanted)))


@compiles
@pytest.mark.parametrize("scheme", ["leapfrog", "implicit-midpoint"])
def test_a_launch_compiles_what_no_later_one_has_to(scheme, hopper):
    """Other batches, steps, lengths of a step and places in memory are other arguments."""
    for batch, n_steps, per_sample in ((16, 16, True), (1, 1, True), (5, 3, False)):
        case = Case(batch, (33, 20), scheme=scheme, per_sample=per_sample, n_steps=n_steps).to(torch.float32)
        out = case.forward(triton_backend)
        case.backward(triton_backend, out[-1])
        if batch == 16:
            first = binaries(hopper)
    # both directions pack, and each its own form of K
    assert binaries(hopper) == first == {"pack_kernel": 2, "forward_kernel": 1, "backward_kernel": 1}


@compiles
@pytest.mark.parametrize(
    ("integrator", "memory", "n_steps", "forwards"),
    [
        ("leapfrog", "checkpoint", 30, 2),  # with a tape and without
        ("leapfrog", "recompute", 30, 2),  # and what fills it
        ("implicit-midpoint", "checkpoint", 30, 2),
        ("implicit-midpoint", "reversible", 30, 3),  # and the way back; forward again, as nothing has run that could come back
    ],
)
def test_no_step_of_a_training_run_compiles_another_kernel(integrator, memory, n_steps, forwards, hopper):
    """Segments begin anywhere in the arrays, of one sample above all, and have any length; nor do other sizes matter."""
    hnn = make_hnn(6, (33, 20)).float()
    for batch, steps in ((1, n_steps), (3, n_steps), (1, n_steps - 3)):
        z0 = make_states(batch, 6).float().requires_grad_()
        dt = torch.full((batch, steps), 0.1, requires_grad=True)
        out = hf.rollout(
            hnn, z0, dt, steps, integrator=integrator, backend="triton", memory=memory, energy=True, unconverged="flag"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing has run: numbers are whatever was in memory
            torch.autograd.grad(out.states.sum() + out.energy.sum(), [z0, dt, *hnn.parameters()])
        if batch == 1 and steps == n_steps:
            first = binaries(hopper)
    assert first == binaries(hopper)
    assert first["forward_kernel"] == forwards
    assert first["backward_kernel"] == 1


@compiles
@pytest.mark.parametrize("every_state", [True, False])
@pytest.mark.parametrize("memory", ["store", "recompute", "none"])
def test_the_first_call_of_a_training_run_compiles_the_backward_pass_too(memory, every_state, hopper):
    """At a time with the forward pass; what is asked for then is what the backward pass launches."""
    case = Case(4, (33, 20), n_steps=3).to(torch.float32)
    out = case.forward(triton_backend, memory, every_state=every_state)
    expected = binaries(hopper)
    if memory == "none":
        assert expected == {"pack_kernel": 1, "forward_kernel": 1}
        return
    assert expected == {"pack_kernel": 2, "forward_kernel": 1 + (memory == "recompute"), "backward_kernel": 1}
    case.backward(triton_backend, out[-1], memory, every_state=every_state)
    assert binaries(hopper) == expected
    n = len(hopper)
    case.forward(triton_backend, memory, every_state=every_state)
    assert len(hopper) == n + 2, "compiled ahead once"


@compiles
def test_shapes_that_are_timed_are_compiled_at_a_time(hopper, monkeypatch):
    """On every processor, before anything runs; and on the device of the tensors events are recorded."""
    import triton

    from hjepa_fast.backends.triton import kernels

    shapes = (Blocks(16, 32, 32, 4, 2), Blocks(32, 32, 32, 4, 2))
    monkeypatch.setitem(SHAPES, "bf16", shapes)
    threads, timed, guarded = set(), [], []

    def seconds(launched):
        timed.append({name: len(getattr(kernels, name).device_caches[0][0]) for name in kernels.__all__})
        return float(len(timed))

    def compile_here(*arguments, **options):
        threads.add(threading.get_ident())
        return triton.compile(*arguments, **options)

    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernel, "_do_compile", functools.partial(type(kernel)._do_compile, kernel))
        assert len(kernel.device_caches[0][0]) == 0  # that sets `compile`, too
        monkeypatch.setattr(kernel, "compile", compile_here)
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    for name, value in {"tune": True, "_fastest": {}, "_seconds": seconds}.items():
        monkeypatch.setattr(tune, name, value)
    torch.set_float32_matmul_precision("medium")
    case = Case(40, (5,), "silu", "euler", n_steps=1).to(torch.float32)
    case.forward(triton_backend)
    assert timed == [{"backward_kernel": 0, "forward_kernel": 2, "pack_kernel": 2}] * 2
    assert threading.get_ident() not in threads
    assert tune._fastest[next(iter(tune._fastest))] == shapes[0]
    assert any(x is case.a for x in guarded)


@needs_triton
@compiles
def test_what_the_compiler_must_order_is_found():
    """Each barrier of a kernel with implicit sub-steps is needed, or stands at the end of a loop over layers or samples."""
    ttgir = compiled("forward", "tf32x3", SHAPES["tf32x3"][0], 90, implicit=True).asm["ttgir"]
    assert unordered(ttgir, SCRATCH) == []
    # three TF32 products of a tile start from zero, and are added to the others in float32: the units round towards zero
    dots = re.findall(r"(%\w+) = tt\.dot \S+ \S+ (%\w+), inputPrecision = tf32", ttgir)
    assert len(dots) % 3 == 0
    for (_, first), (third, _) in zip(dots[::3], dots[2::3], strict=True):
        assert re.search(rf"{first} = arith\.constant dense<0\.0", ttgir)
        assert re.search(rf"= arith\.addf {third}, %", ttgir)
    lines = ttgir.splitlines()
    barriers = [i for i, line in enumerate(lines) if "gpu.barrier" in line]
    needed = [unordered("\n".join(lines[:i] + lines[i + 1 :]), SCRATCH) != [] for i in barriers]
    assert len(barriers) > 10
    assert needed.count(False) <= 3, [lines[i] for i, yes in zip(barriers, needed, strict=True) if not yes]


@needs_triton
@compiles
def test_approximated_activations_take_few_instructions(tmp_path):
    """Machine instructions an element, of s and s' for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from activation_kernel import activation_kernel

    types = {
        "a_ptr": "*fp32",
        "s_ptr": "*fp32",
        "s1_ptr": "*fp32",
        "N": "constexpr",
        "ACTIVATION": "constexpr",
        "RUN": "constexpr",
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    tool, n = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", 512

    def instructions(kind: int, run: bool) -> int:
        constants = {"N": n, "ACTIVATION": (kind, 1.0, 20.0, True), "RUN": run}
        source = ASTSource(activation_kernel, types, constants, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        file = tmp_path / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        out = subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", out)
        return len([name for name in found if not name.startswith(("NOP", "BRA", "EXIT"))])

    moved = instructions(0, run=False)
    for name, most in {"softplus": 14, "tanh": 14, "sin": 12}.items():
        assert (instructions(layout.KINDS[name], run=True) - moved) / (n // 32) <= most


@needs_triton
@compiles
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
