"""Correctness first, then interleaved timing: what one case's entry in a results file is made of."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import hjepa_fast as hf

from .cases import Case
from .rivals import DISTINCT_ROWS, EAGER, Builder, Contestant, Problem, baseline_rollout, is_ours, make_problem, objective

TOLERANCE = {
    ("float64", "rollout"): 1e-10,
    ("float64", "training"): 1e-8,
    ("float32", "rollout"): 2e-5,
    ("float32", "training"): 1e-3,
    # twice the error of the eager rollout in bfloat16: a step moves z by a few of its rounding errors
    ("bfloat16", "rollout"): 2e-1,
    # twice what the eager rollout and the baseline's gradients get with factors rounded to TF32
    ("tf32", "rollout"): 1e-3,
    ("tf32", "training"): 3e-1,
}
"""Largest allowed error relative to the float64 reference: of states, to how far they moved; of gradients ("training"), to
their size."""
MANY_STATES, LOOSER = 10_000, 5.0
"""Beyond so many states, batch times steps, float32 gradients have so many times the tolerance: that of the output weight is a
difference of sums over all of them, and in rollouts of right rivals was off by up to 2.6e-3."""
CHECKED_ROWS = 64
"""Rows of a rollout that are compared; with gradients every sample counts in what is."""
BLOCK_SECONDS = 0.02
"""A timing repeats its call until about this long."""
FEWEST_ROUNDS = 3
"""However little time there is."""
TOO_LARGE = "does not fit into the device's memory"
NOT_TIMED, FAILED = "not timed: ", "failed: "
"""Beginnings of the reasons why a rival has no time."""
Tell = Callable[[str], None]
"""Takes what is being done at the moment."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much time a case is given."""

    rounds: int = 9
    """At least, if `budget` allows."""
    seconds: float = 5.0
    """At least, if `budget` allows."""
    longest_call: float = math.inf
    """Seconds; a rival that takes longer for one call is not timed."""
    budget: float = math.inf
    """Seconds for checks and rounds together. Of the latter there are `FEWEST_ROUNDS` in any case."""


def tolerance_of(case: Case) -> float:
    kind = "rollout" if case.kind == "rollout" else "training"
    many = case.batch * case.n_steps > MANY_STATES and (case.arithmetic, kind) == ("float32", "training")
    return TOLERANCE[case.arithmetic, kind] * (LOOSER if many else 1)


class WrongResultError(Exception):
    """A contestant disagrees with the float64 reference."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """float64 results, each with the size its error is relative to."""

    values: list[Tensor]
    scales: list[float]
    rows: Tensor | None
    """The rows of the states that were computed; None in training."""

    def error(self, contestant: Contestant, outputs: list[Any]) -> float:
        """The largest relative error; infinite if a number is not finite or a shape is another."""
        found = contestant.values(outputs)
        if len(found) != len(self.values) or not all(bool(x.isfinite().all()) for x in found):
            return math.inf
        worst = 0.0
        for x, value, scale in zip(found, self.values, self.scales, strict=True):
            x = (x if self.rows is None else x[self.rows.to(x.device)]).detach().to(value.device, torch.float64)
            if x.shape != value.shape:
                return math.inf
            worst = max(worst, (x - value).abs().max().item() / scale)
        return worst


def expected(problem: Any, network: str) -> Expected:
    """Of "hamiltonian:integrator" by nested autograd (backend "reference"), of others by their own code; in float64."""
    if network == "zoo":
        exact = problem.to(torch.float64)
        value = exact.textbook()
        return _of_gradients([value.detach(), *torch.autograd.grad(value, exact.parameters, materialize_grads=True)])
    case = problem.case

    def roll(p: Problem) -> tuple[Tensor, Tensor | None]:
        if network == "baseline":
            return baseline_rollout(p), None
        integrator = network.partition(":")[2]
        if case.kind == "matching":
            return hf.vector_field(p.hnn, p.z0, backend="reference"), None
        if case.kind == "residual":
            return hf.step_residual(p.hnn, p.z0, p.target[:, -1], p.dt, backend="reference"), None
        return hf.rollout(
            p.hnn, p.z0, p.dt, case.n_steps, energy=p.training, states=case.states, integrator=integrator, backend="reference"
        )[:2]

    if not problem.training:
        rows = torch.linspace(0, case.batch - 1, min(case.batch, CHECKED_ROWS)).round().long()
        some = problem.to(torch.float64, rows.to(problem.z0.device))
        with torch.no_grad():
            states = roll(some)[0]
        start = some.z0 if case.states == "final" else some.z0[:, None]
        return Expected([states], [(states - start).abs().max().item() or 1.0], rows)

    # of the distinct rows the first few stand once more than the others in the batch, of whose loss each has its share
    distinct = min(case.batch, DISTINCT_ROWS)
    copies, more = divmod(case.batch, distinct)
    sums: list[Tensor] = []
    for share, times in ((slice(0, more), copies + 1), (slice(more, distinct), copies)):
        part = problem.to(torch.float64, share)
        if not len(part.z0):
            continue
        parameters = list(part.baseline.parameters()) if network == "baseline" else part.parameters
        value = objective(part, *roll(part)) * (len(part.z0) * times / case.batch)
        terms = [value.detach(), *torch.autograd.grad(value, parameters, materialize_grads=True)]
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
    return _of_gradients(sums)


def _of_gradients(sums: list[Tensor]) -> Expected:
    """Of a loss and its gradients."""
    sizes = [x.abs().max().item() for x in sums]
    # the output bias has no effect on the loss: its gradient is rounding, which has no size of its own
    largest = max(sizes[1:])
    return Expected(sums, [size if size > 1e-10 * largest else largest for size in sizes], None)


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Stopwatch:
    """Seconds of `number` calls: by the clock, or by events where the work is queued on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def __call__(self, run: Callable[[], Any], number: int = 1) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(number):
                run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(number):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


def time_interleaved(
    contestants: Sequence[Contestant],
    rounds: int,
    seconds: float,
    device: torch.device,
    seed: int = 0,
    most: float = math.inf,
    tell: Tell = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round; the order is drawn anew every round.

    At least `rounds` rounds and `seconds` seconds in all; fewer, but `FEWEST_ROUNDS`, where they would take longer than
    `most` seconds. Each contestant has been called before.
    """
    clock, order = Stopwatch(device), random.Random(seed)
    repeats = {}
    for contestant in contestants:
        duration = clock(contestant.run)
        if duration < BLOCK_SECONDS or device.type == "cuda":
            duration = clock(contestant.run)
        repeats[contestant.name] = max(1, math.ceil(BLOCK_SECONDS / max(duration, 1e-7)))
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    if not contestants:
        return times
    begin = time.perf_counter()
    done, elapsed = 0, 0.0
    while done < rounds or elapsed < seconds:
        if done >= min(FEWEST_ROUNDS, rounds) and elapsed * (done + 1) / done > most:
            break
        tell(f"round {done + 1}")
        for contestant in order.sample(list(contestants), len(contestants)):
            number = repeats[contestant.name]
            if number > 1:
                # a short call pays for the caches and sleeping threads that the one before it left
                contestant.run()
            times[contestant.name].append(clock(contestant.run, number) / number)
        done, elapsed = done + 1, time.perf_counter() - begin
    return times


def kept_bytes(contestant: Contestant, problem: Any) -> int | None:
    """Bytes that a rollout with energies keeps for its backward pass: unique storages, without parameters and inputs."""
    if contestant.roll is None:
        return None
    given = [*problem.parameters, *problem.baseline.parameters(), problem.z0, problem.target]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = contestant.roll()
    total = sum(storage.nbytes() for storage in kept.values())
    del graph
    return total


def checked(
    case: Case,
    builders: dict[str, Builder],
    device: torch.device,
    longest_call: float = math.inf,
    tell: Tell = lambda text: None,
    keep_going: bool = False,
) -> tuple[Any, list[Contestant], dict[str, Any], dict[str, str]]:
    """A case's contestants, each run once and found right.

    Returns
    -------
    tuple
        The problem; the contestants; by name what is known of each; by name why one is not among them: it does not fit into a
        GPU's memory, or it is a rival that failed, or that takes more than `longest_call` seconds for a call; with
        `keep_going` it may be any that failed or was wrong.

    Raises
    ------
    WrongResultError
        A contestant's states, or in training its loss or a gradient, are not the reference's within `TOLERANCE`.
    """
    problem = make_problem(case, device)
    one_step = make_problem(dataclasses.replace(case, n_steps=1), device)
    clock = Stopwatch(device)
    tolerance = tolerance_of(case)
    references: dict[str, Expected] = {}
    contestants, facts = [], {}
    left_out: dict[str, str] = {}
    for name, build in builders.items():
        tell(f"checking {name}")
        outputs: list[Any] = []
        try:
            if name in EAGER and case.n_steps > 1 and longest_call < math.inf:
                # of two: the first may load what every later one has
                seconds = _call_within(clock, build(one_step).run, longest_call / case.n_steps)
                if seconds * case.n_steps > longest_call:
                    whole = f"{case.n_steps} steps about {seconds * case.n_steps:.2g} s"
                    left_out[name] = f"{NOT_TIMED}one call of 1 step took {seconds:.2g} s, of {whole}"
                    continue
            contestant = build(problem)
            first_call = clock(lambda run=contestant.run, out=outputs: out.extend(run()))
            if device.type == "cuda":  # a graph's next replay writes where this one did
                outputs = [x.clone() if isinstance(x, Tensor) else x for x in outputs]
            seconds = first_call
            if not contestant.ours and seconds > longest_call and name not in EAGER:  # it may have compiled
                seconds = clock(contestant.run)
        except torch.OutOfMemoryError:
            left_out[name] = TOO_LARGE
            continue
        except Exception as error:
            if is_ours(name) and not keep_going:
                raise
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device itself has failed: then nothing more will run
            first_line = (str(error).strip().splitlines() or [""])[0]
            left_out[name] = f"{FAILED}{type(error).__name__}: {first_line}"
            continue
        if not contestant.ours and seconds > longest_call:
            left_out[name] = f"{NOT_TIMED}one call took {seconds:.2g} s"
            continue
        if contestant.predicts not in references:
            tell(f"float64 reference of {contestant.predicts}")
            references[contestant.predicts] = expected(problem, contestant.predicts)
        error = references[contestant.predicts].error(contestant, outputs)
        if not error <= tolerance and keep_going:
            left_out[name] = f"{FAILED}wrong: error {error:.2e}, at most {tolerance:.0e} is allowed"
            continue
        if not error <= tolerance:
            raise WrongResultError(
                f"{contestant.name} is wrong in {case.name}: error {error:.2e} relative to the float64 reference, "
                f"at most {tolerance:.0e} is allowed (inf: numbers that are not finite, or another shape). Nothing was timed."
            )
        contestants.append(contestant)
        facts[contestant.name] = {"ours": contestant.ours, "error": error, "first_call_s": first_call}
    return problem, contestants, facts, left_out


def _call_within(clock: Stopwatch, run: Callable[[], Any], seconds: float) -> float:
    """Seconds of a first call, or of a second one if that is shorter and the first was longer than `seconds`."""
    first = clock(run)
    return first if first <= seconds else min(first, clock(run))


def measure(
    case: Case,
    builders: dict[str, Builder],
    device: torch.device,
    effort: Effort,
    tell: Tell = lambda text: None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Check and time one case.

    Returns
    -------
    dict
        The case, the contestants' times with what else is known of each, and for each of ours by rival the ratio
        rival / ours: the median over rounds of the ratio within a round.
    """
    begin = time.perf_counter()
    with matmul_precision(case.precision):
        problem, contestants, facts, left_out = checked(case, builders, device, effort.longest_call, tell, keep_going)
        most = effort.budget - (time.perf_counter() - begin)
        times = time_interleaved(contestants, effort.rounds, effort.seconds, device, most=most, tell=tell)
    for contestant in contestants:
        fact = facts[contestant.name]
        fact |= _percentiles(times[contestant.name])
        if contestant.ours and contestant.predicts == "hamiltonian:leapfrog":
            fact["gflops_per_s"] = case.flops / fact["median_s"] / 1e9
        if problem.training:
            fact["kept_bytes"] = kept_bytes(contestant, problem)
    return {
        "case": dataclasses.asdict(case),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": len(next(iter(times.values()), [])),
        "asked": {
            name: value if math.isfinite(value) else None
            for name, value in dataclasses.asdict(effort).items()
            if name != "budget"
        },
        "tolerance": tolerance_of(case),
        "contestants": facts,
        "left_out": left_out,
        "ratios": {
            ours.name: {
                rival.name: statistics.median(b / a for a, b in zip(times[ours.name], times[rival.name], strict=True))
                for rival in contestants
                if rival.name != ours.name
            }
            for ours in contestants
            if ours.ours
        },
    }


def release() -> None:
    """Give back what a case took: JAX keeps what it compiled, the C library what was freed, gigabytes after large cases, and
    PyTorch a GPU's memory, which JAX could not have then."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def _percentiles(times: list[float]) -> dict[str, float]:
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20_s", "median_s", "p80_s"), quantiles.tolist(), strict=True))
