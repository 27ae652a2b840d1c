"""The hidden-space loop for few samples on NVIDIA GPUs: a rollout is one launch each way of a CUDA C++ kernel (`csrc/cuda`).

A team of blocks holds K and F's weights in its shared memory and goes through all steps together: a cluster where the chip
has them (since Hopper) and the weights fit, else blocks all over the chip that meet in the L2 cache. A team takes up to eight
samples at a time; where there are more than all teams take at once, each takes its turns. What the kernels do not do (many
samples, implicit and mixed sub-steps, a linear H, float64), and what the device does not take (where others have some of it),
is Triton's, or the PyTorch loop's where Triton is missing.

The extension is optional; `available()` and `why_not()` tell whether it is there. Nothing waits for the device, and a call can
be captured in a CUDA graph once the same call has run before, which loads the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import warn
from ..schemes import SubStep
from . import torch as torch_backend
from . import triton as triton_backend
from .torch import Gradients, Rolled, Solver, Tail, evaluate, tape_width

product = torch_backend.product
# programs are PyTorch's
run, run_back = torch_backend.run, torch_backend.run_back

# as in csrc/cuda/problem.h
_KINDS = {"softplus": 0, "tanh": 1, "silu": 2, "gelu": 3, "gelu-tanh": 4, "sin": 5}
_MAX_LAYERS, _MAX_SUB_STEPS = 8, 32


def _most_samples() -> int:
    asked = os.environ.get("HJEPA_FAST_CUDA_SAMPLES") or "400"
    if not asked.isdecimal():
        raise ValueError(f"HJEPA_FAST_CUDA_SAMPLES must be a number of samples, 0 or more; found {asked!r}")
    return int(asked)


MOST_SAMPLES = _most_samples()
"""With more, the matrix units that Triton uses should win over turns. By counting, not measured: 64 samples of the published
network are a turn of a chip with room for eight clusters, and Triton's programs read as many weights for 16 samples as for one.
HJEPA_FAST_CUDA_SAMPLES in the environment says otherwise; up to there `python -m bench.run --device cuda` times both."""
_WIDEST = 4096

_BOUND = 2**31
"""Bytes of the factors of the weights' gradients, and of restored layer values, that are held at a time."""

# For tests: 1 clusters, 2 a grid; blocks of a team; samples that a team takes at a time; 0: by what the device has. The bound.
variant = 0
team = 0
rows = 0
bound = _BOUND


def _load() -> str:
    """Load the extension: "" or what went wrong."""
    file = Path(__file__).parent.parent / "_CUDA.abi3.so"
    if not file.exists():
        return f"{file.name} was not built"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return str(error)
    return ""


_problem = _load()  # once, at import: torch.compile cannot look at files while it traces


def available() -> bool:
    """Whether the extension is there, loads, and there is a GPU."""
    return not _problem and torch.cuda.is_available()


def why_not() -> str:
    """Why `available()` is false and how to get the extension, or ""."""
    if _problem:
        return (
            f"the CUDA backend is missing: {_problem}. Install hjepa_fast from source with the CUDA toolkit (nvcc), ninja and "
            "PyTorch for CUDA: HJEPA_FAST_BUILD_CUDA=1 pip install --no-build-isolation <source folder>"
        )
    return "" if torch.cuda.is_available() else "the CUDA backend needs a CUDA device, and PyTorch finds none"


def require(a: Tensor) -> None:
    if not available():
        raise RuntimeError(f"hjepa_fast: {why_not()}")
    if not a.is_cuda:
        raise RuntimeError(f"hjepa_fast: the CUDA backend runs on a CUDA device; the tensors are on {a.device}")


def _operators() -> Any:
    return torch.ops.hjepa_fast_cuda


def _other() -> ModuleType:
    """The backend for what the kernel does not do."""
    return triton_backend if triton_backend.available() else torch_backend


_told: set[str] = set()


def _instead(refused: str) -> ModuleType:
    """The backend for what the device does not take; a warning says so, once for each reason."""
    other = _other()
    if refused not in _told:
        name = other.__name__.rpartition(".")[2]
        warn(f'the device does not take a launch of the CUDA kernel ({refused}); backend "{name}" runs instead')
        _told.add(refused)
    return other


def _delegated(a: Tensor, tail: Tail, scheme: Sequence[SubStep], n_steps: int) -> bool:
    small = 0 < a.shape[0] <= MOST_SAMPLES and 0 < len(tail.weights) <= _MAX_LAYERS
    fits = small and all(0 < width <= _WIDEST for width in tail.widths) and 0 < len(scheme) <= _MAX_SUB_STEPS
    explicit = not any(stage.mix or stage.implicit for stage in scheme)
    fits = fits and len(tail.activation.layers) == 1 and tail.activation.layers[0].name in _KINDS
    return not (fits and explicit and n_steps and a.dtype == torch.float32)


def _matrix(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of whole 16-byte pieces in both dtypes, at such an address: the kernel reads four numbers at a time."""
    W, missing = W.to(dtype), -W.shape[1] % 8
    if missing:
        return F.pad(W, (0, missing))
    return W.contiguous() if W.data_ptr() % 16 == 0 else W.clone(memory_format=torch.contiguous_format)


def _common(K: Tensor, tail: Tail, dt: Tensor, scheme: Sequence[SubStep]) -> tuple[Any, ...]:
    """What both operators take last."""
    low = tail.weights[0].dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
    dtype = torch.bfloat16 if low else torch.float32
    return (
        [_matrix(W, dtype) for W in (*tail.weights[:-1], K)],
        torch.cat((*tail.biases, tail.weights[-1][0])).float(),
        dt,
        [c for stage in scheme for c in (stage.kick, stage.drift)],
        tail.widths,
        _KINDS[tail.activation.layers[0].name],
        *tail.activation.layers[0][1:],
        variant,
        team,
        rows,
    )


def forward(
    a: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    n_steps: int,
    every_state: bool,
    with_energy: bool,
    memory: str,
    solver: Solver,
) -> Rolled:
    """As `backends.torch.forward`; `tail.weights` may be bfloat16 where a and K are float32.

    Products are IEEE float32; where the weights are bfloat16 or `torch.get_float32_matmul_precision()` is "medium", those and
    K are rounded to bfloat16. What is multiplied with them, sums and states are float32 always.

    Where the device does not take the launch, another backend runs instead, with a warning.

    Raises
    ------
    RuntimeError
        The launch failed; the message says what was asked of the device.
    """
    require(a)
    if _delegated(a, tail, scheme, n_steps):
        return _other().forward(a, K, tail, dt, scheme, n_steps, every_state, with_energy, memory, solver)
    batch, h = a.shape
    sq = a.new_empty(batch, n_steps if every_state else 1, h)
    sp, end = torch.empty_like(sq), a.new_empty(batch, h)
    energy = a.new_empty(batch, n_steps if with_energy else 0)
    tape = a.new_empty(batch, n_steps, len(scheme), tape_width(tail.widths, memory))
    with torch.cuda.device_of(a):
        refused = _operators().forward(end, sq, sp, energy, tape, a.contiguous(), *_common(K, tail, dt, scheme))
    if refused:
        return _instead(refused).forward(a, K, tail, dt, scheme, n_steps, every_state, with_energy, memory, solver)
    none = a.new_empty(batch, 0)
    return Rolled(end, sq, sp, energy, tape, none, none.int())


def backward(
    la: Tensor,
    lsq: Tensor,
    lsp: Tensor,
    gsq: Tensor,
    gsp: Tensor,
    gE: Tensor | None,
    tape: Tensor,
    K: Tensor,
    tail: Tail,
    dt: Tensor,
    scheme: Sequence[SubStep],
    memory: str,
    sums: Gradients | None,
    solver: Solver,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `backends.torch.backward`; `sums` is in la's dtype. Precision and errors as in `forward`; the products that
    the weights' gradients are come from PyTorch.
    """
    require(la)
    n_steps, n_sub, widths = tape.shape[1], len(scheme), tail.widths
    if _delegated(la, tail, scheme, n_steps):
        return _other().backward(la, lsq, lsp, gsq, gsp, gE, tape, K, tail, dt, scheme, memory, sums, solver)
    given = la, lsq, lsp, gsq, gsp, gE, tape, K, tail, dt, scheme, memory, sums, solver
    batch, none = la.shape[0], la.new_empty(0)
    if gsq.shape[1] < n_steps:
        lsq, lsp, gsq, gsp = lsq + gsq[:, -1], lsp + gsp[:, -1], none, none
    gdt = la.new_empty(batch, n_steps)
    la, lsq, lsp, gsq, gsp, gE_, tape = (x.contiguous() for x in (la, lsq, lsp, gsq, gsp, none if gE is None else gE, tape))
    before = [torch.empty_like(la) for _ in range(3)]
    restored = memory == "recompute" and len(widths) > 1
    exact, common = tail.to(la.dtype), _common(K, tail, dt, scheme)
    width, places = _factors(widths)
    step_bytes = la.itemsize * batch * n_sub * ((width if sums is not None else 0) + (tape_width(widths, "store") * restored))
    most_steps = max(1, min(bound // max(step_bytes, 1), n_steps))
    for end in range(n_steps, 0, -most_steps):
        begin = max(end - most_steps, 0)
        saved, saved_begin = tape, 0
        if restored:
            point, _, _ = evaluate(exact, tape[:, begin:end].flatten(0, 2))
            saved, saved_begin = point.tape().unflatten(0, (batch, end - begin, n_sub)), begin
        factors = la.new_empty(n_sub * (end - begin) * batch if sums is not None else 0, width)
        with torch.cuda.device_of(la):
            refused = _operators().backward(
                *before, gdt, factors, la, lsq, lsp, gsq, gsp, gE_, saved, saved_begin, begin, end, *common
            )  # fmt: skip
        if refused and end == n_steps:
            return _instead(refused).backward(*given)
        if refused:
            raise RuntimeError(f"hjepa_fast: the device does not take a launch like one that it took before: {refused}")
        la, lsq, lsp = before
        if sums is not None:
            _add_gradients(sums, factors, places, scheme)
    if sums is not None and gE is not None:
        sums.biases[-1].add_(gE.sum())
    return la, lsq, lsp, gdt, la.new_zeros(batch)


def _factors(widths: Sequence[int]) -> tuple[int, dict[str, slice]]:
    """What the kernel leaves side by side for the weights' gradients (csrc/cuda/problem.h): its width, and each one's place."""
    names, last = [("la", 0), ("step", 0)], len(widths) - 1
    for j in range(last):
        names += [(f"z{j}", j), (f"zd{j}", j), (f"e{j}", j + 1)]
    names += [*((f"r{j}", j + 1) for j in range(last)), ("top", last)]
    places, width = {}, 0
    for name, layer in names:
        places[name] = slice(width, width + widths[layer])
        width += widths[layer]
    return width, places


def _add_gradients(sums: Gradients, factors: Tensor, places: dict[str, slice], scheme: Sequence[SubStep]) -> None:
    """dK += drift (dt delta)^T la - kick la^T (dt delta) of every sub-step; dW += e^T zd + r^T z, db += sum r of a layer."""
    x = {name: factors[:, place] for name, place in places.items()}
    for stage, la, step in zip(scheme, x["la"].chunk(len(scheme)), x["step"].chunk(len(scheme)), strict=True):
        if stage.kick:
            sums.K.addmm_(la.T, step, alpha=-stage.kick)
        if stage.drift:
            sums.K.addmm_(step.T, la, alpha=stage.drift)
    for j, weight in enumerate(sums.weights[:-1]):
        weight.addmm_(x[f"e{j}"].T, x[f"zd{j}"]).addmm_(x[f"r{j}"].T, x[f"z{j}"])
    totals = [*sums.biases[:-1], sums.weights[-1][0]]
    # they stand at the end, side by side
    shares = factors[:, factors.shape[1] - sum(len(total) for total in totals) :].sum(0)
    torch._foreach_add_(totals, list(shares.split([len(total) for total in totals])))
