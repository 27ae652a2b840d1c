"""Measure, keep, report: `python -m bench.run [--quick | --zoo | --small | --full]`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hjepa_fast.errors import HJEPAError
from hjepa_fast.pipeline import files

from . import against, cases, machine, report
from .cases import Case
from .chip import beside_case, measure_chip
from .machine import environment
from .measure import CHECKED_ROWS, FAILED, FEWEST_ROUNDS, NOT_TIMED, TOO_LARGE, Effort, WrongResultError, measure, release
from .progress import Progress, duration, prepare_streams
from .rivals import Builder, entrants, is_ours

QUICK_MINUTES, ZOO_MINUTES, SMALL_MINUTES, SMALL_COMPILE_MINUTES = 5.0, 4.0, 40.0, 30.0
"""A quick run on a processor is planned to end in, one of the zoo, one of the grid, and what that takes more with
torch.compile."""
QUICK_LONGEST_CALL, LONGEST_CALL = 5.0, 30.0
"""Seconds of a call, up to which a rival is timed."""
LAUNCH_SECONDS, JAX_SECONDS, COMPILE_SECONDS = 2e-4, 1.5, 12.0
"""Of a gradient's operations however small, of what JAX compiles for a case, and of torch.compile, to which each step adds."""
AFTER = 10.0
"""Seconds of those that are left for the start and for plots."""


class ResultsError(HJEPAError):
    """A results file that cannot be continued."""


def load(path: Path, found: dict[str, Any], again: bool) -> dict[str, Any]:
    """A results file to go on with; a new one if there is none.

    Raises
    ------
    ResultsError
        It cannot be read, or was measured on other hardware or with other versions, and `again` does not say to start over.
    """
    fresh = {"environment": found, "cases": {}}
    if not path.exists():
        return fresh
    remedy = "Pass --again to replace it, or another name with --out."
    try:
        results = report.read(path)
    except HJEPAError as error:
        if again:
            return fresh
        raise ResultsError(f"{error}. {remedy}") from error
    differences = machine.differences(results["environment"], found)
    if not differences:
        return results
    if not again:
        raise ResultsError(f"{path} was measured elsewhere: {'; '.join(differences)}. {remedy}")
    return fresh


def kept(known: dict[str, Any] | None, case: Case, builders: dict[str, Builder], effort: Effort) -> bool:
    """Whether a case need not be measured: it was, as the same problem, as thoroughly, with every contestant."""
    if known is None or Case.of(known["case"]).problem != case.problem:
        return False
    asked = known.get("asked", {})
    if any(asked.get(key, 0) < value for key, value in (("rounds", effort.rounds), ("seconds", effort.seconds))):
        return False
    limit = asked.get("longest_call")
    same_limit = limit is None or effort.longest_call <= limit
    reasons = (TOO_LARGE, FAILED, *([NOT_TIMED] if same_limit else []))
    settled = {name for name, reason in known.get("left_out", {}).items() if reason.startswith(reasons)}
    settled -= set(_ours_that_failed(known))  # perhaps they no longer do
    return builders.keys() <= known["contestants"].keys() | settled


def _ours_that_failed(entry: dict[str, Any]) -> list[str]:
    return [name for name, reason in entry.get("left_out", {}).items() if is_ours(name) and reason.startswith(FAILED)]


class Watch:
    """What `run` says on its way; here nothing."""

    def begin(self, results: dict[str, Any], planned: dict[Case, tuple[dict[str, Builder], dict[str, str]]]) -> None:
        """Nothing is measured yet but the chip's rates."""

    def case(self, case: Case, entry: dict[str, Any], measured: bool) -> None:
        """A case is in the file."""


def run(
    selected: Sequence[Case],
    path: Path,
    device: torch.device,
    *,
    compile: bool = False,
    again: bool = False,
    rounds: int = 9,
    seconds: float = 5.0,
    longest_call: float = math.inf,
    progress: Progress | None = None,
    watch: Watch | None = None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Measure the cases that `path` does not hold yet, writing it after each one; returns all it holds.

    After a first one no case begins that would not end within `progress.limit`.

    Raises
    ------
    ResultsError, HJEPAError, WrongResultError
        See `load`, `files.write_json` and `measure`; or another run writes the file.
    """
    progress, watch = progress or Progress({}), watch or Watch()
    with _alone(path):
        results = load(path, environment(device), again)
        if again:
            for case in selected:
                results["cases"].pop(case.name, None)
        planned = {case: entrants(case, device, compile) for case in selected}
        effort = Effort(rounds, seconds, longest_call)
        keep = {case.name: kept(results["cases"].get(case.name), case, planned[case][0], effort) for case in selected}
        load_average = _load_average()
        if not all(keep.values()):
            results["chip"] = measure_chip(device)
        rate = results["chip"]["matrix_gflops_per_s"]["float32"] if "chip" in results else 1.0
        seconds_of = {c.name: (0.0, 0.0) if keep[c.name] else _expected(c, planned[c][0], effort, rate) for c in selected}
        progress.plan({name: asked for name, (asked, _) in seconds_of.items()})
        watch.begin(results, planned)
        for case in selected:
            builders, left_out = planned[case]
            if not keep[case.name]:
                if progress.late(seconds_of[case.name][1]):
                    progress.done(case, False)
                    continue
                progress.start(case, list(builders))
                budget = progress.share(case.name)
                effort_left = Effort(rounds, seconds, longest_call, budget)
                entry = measure(case, builders, device, effort_left, progress.tell, keep_going)
                if device.type == "cpu":
                    results["chip"] = beside_case(results["chip"], device)
                extra = {"chip": results["chip"], "load": load_average}
                results["cases"][case.name] = {**entry, "left_out": left_out | entry["left_out"], **extra}
                files.write_json(path, results)
                release()
            progress.done(case, not keep[case.name])
            watch.case(case, results["cases"][case.name], not keep[case.name])
        late = {case.name for case in selected} | set(results.get("not_measured", []))
        late -= results["cases"].keys()
        if sorted(late) != results.get("not_measured", []):
            results["not_measured"] = sorted(late)
            files.write_json(path, results)
    return results


def _expected(case: Case, builders: dict[str, Builder], effort: Effort, gflops_per_s: float) -> tuple[float, float]:
    """Seconds of a case as asked, and with the fewest rounds; roughly, from what calls and references took on one processor."""
    call = case.eager_flops / (gflops_per_s * 1e9 / 2) + LAUNCH_SECONDS * case.passes * case.eager_gradients
    # nested autograd through an iteration
    implicit = sum(not name.startswith(("leapfrog", "tao", "rk4")) for name in case.integrators)
    reference = 5 + implicit * (30 if case.kind == "rollout" else 150)  # of at most so many rows
    checks = (2 * len(builders) + reference * min(1.0, CHECKED_ROWS / case.batch)) * call
    checks += JAX_SECONDS * ("jax" in builders)
    checks += (COMPILE_SECONDS + case.passes * case.n_steps) * sum(name.startswith("compiled") for name in builders)
    every_round = len(builders) * call
    return checks + max(effort.seconds, effort.rounds * every_round), checks + FEWEST_ROUNDS * every_round


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not every system has one
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a results file: two runs at once would lose each other's cases, and disturb each other's times."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResultsError(
            f"another run is writing {path}. Wait until it has ended, or pass another name with --out."
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}. Pass another name with --out.") from error
    try:
        yield
    finally:
        lock.release()


class _Shown(Watch):
    """The table, printed as it grows."""

    def __init__(self, path: Path, selected: Sequence[Case], progress: Progress) -> None:
        self.path, self.selected, self.progress = path, selected, progress

    def begin(self, results: dict[str, Any], planned: dict[Case, tuple[dict[str, Builder], dict[str, str]]]) -> None:
        self.results, cases_of = results, results["cases"]
        self.beside = report.beside_of(self.path, results, self.selected)
        names = [name for builders, _ in planned.values() for name in builders]
        stored = [cases_of[case.name] for case in self.selected if case.name in cases_of]
        names += [name for entry in (*stored, *(b.entry for b in self.beside.values())) for name in report.with_a_cell(entry)]
        self.rivals = report.rivals_of(names)
        header = report.header(self.rivals)
        # ratios and reasons come later; a reason that is longer than its column widens its own line only
        self.widths = [max(len(case.name) for case in self.selected), 5, 11, 14, 6, 7, 14, *(6 for _ in self.rivals)]
        self.widths = [max(width, len(cell)) for width, cell in zip(self.widths, header, strict=True)]
        reasons = {(name, why) for _, out in planned.values() for name, why in out.items()}
        for name, why in sorted(reasons):
            if report.of_device(name, results):
                self.progress.say(f"without {name}: {why}")
        print(report.introduction(results, self.beside.values()), end="")
        self._print([header, ["-" * width for width in self.widths]])

    def case(self, case: Case, entry: dict[str, Any], measured: bool) -> None:
        self.progress.clear()
        if not measured:
            self.progress.say(f"{case.name}: kept, measured {entry['date']}; --again measures it anew")
        device, chip = self.results["environment"]["hardware"]["device"], self.results.get("chip")
        self._print(report.rows(case.name, entry, self.rivals, device, chip, self.beside.get(case.name)))

    def _print(self, rows: list[list[str]]) -> None:
        for row in rows:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, self.widths, strict=True)) + " |", flush=True)


def _number(kind: type, least: float, strict: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and (value > least if strict else value >= least)):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if strict else 'at least'} {least:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Time hjepa_fast against its rivals.")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--quick", action="store_true", help="the table of ratios, five minutes (default without --only)")
    subset.add_argument(
        "--zoo",
        action="store_true",
        help=f"training steps of public repositories' models against those repositories' ways, {ZOO_MINUTES:g} minutes",
    )
    subset.add_argument(
        "--small",
        action="store_true",
        help="the grid of small and large networks, batches and steps in which no cell should be lost, "
        f"{SMALL_MINUTES:g} minutes ({SMALL_MINUTES + SMALL_COMPILE_MINUTES:g} with --compile)",
    )
    subset.add_argument("--full", action="store_true", help="every case, with --compile")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also torch.compile, which takes minutes a case to compile (default: with --full, and on CUDA)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="cases whose name contains one or matches one as a shell pattern"
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="one of ours that fails or is wrong is left out; exits with 1 at the end",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .json file, or a folder for quick-cpu.json and the like (default: a file of this machine, these sources and "
        "versions in bench/local, which git ignores)",
    )
    where.add_argument(
        "--commit-results", action="store_true", help="write bench/results/quick-cpu.json and the like, to be committed"
    )
    parser.add_argument("--again", action="store_true", help="measure again what the file already holds")
    parser.add_argument(
        "--rounds", type=_number(int, 1), default=9, help="at least so many rounds a case (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=_number(float, 0), default=5.0, help="at least so long a case (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=_number(float, 0),
        help="fewer rounds, but three, so that the run ends in so many minutes if it can; 0: no limit "
        f"(default: {QUICK_MINUTES:g} for the quick set on a processor without --compile, {ZOO_MINUTES:g} for the zoo, "
        f"{SMALL_MINUTES:g} for the small set, {SMALL_MINUTES + SMALL_COMPILE_MINUTES:g} if that compiles, else 0)",
    )
    parser.add_argument(
        "--longest-call",
        type=_number(float, 0, strict=True),
        metavar="SECONDS",
        help=f"a rival whose call takes longer is not timed (default: {QUICK_LONGEST_CALL:g} for the quick set, "
        f"else {LONGEST_CALL:g})",
    )
    parser.add_argument("--threads", type=_number(int, 1), help="of torch and JAX (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--against", type=Path, metavar="FILE", help=against.HELP)
    parser.add_argument(
        "--tolerance", type=_number(float, 0), help="how much slower is allowed by --against (default: 0.1, a tenth)"
    )
    return parser


def _device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device {name}: there is no such device; cpu, cuda and cuda:N are measured")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name}: only cpu and cuda are measured")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device {name}: PyTorch finds no CUDA device")
        if device.index is not None:
            if device.index >= torch.cuda.device_count():
                parser.error(f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices, from 0 on")
            torch.cuda.set_device(device)  # events and graphs are those of the current device
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 (failure, or slower than --against), 2 (usage) or 130 (interrupted)."""
    prepare_streams()
    parser = _parser()
    options = parser.parse_args(arguments)
    progress = Progress({}, stream=sys.stderr)
    try:
        return _main(options, parser, progress)
    except (HJEPAError, WrongResultError) as error:
        progress.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        same = "the same command without --again" if options.again else "the same command"
        progress.say(f"\ninterrupted; {same} goes on with what was measured")
        return 130
    except OSError as error:
        # standard output was closed or its disk is full; Python would complain once more at its end
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        progress.say(f"error: stopped: {error}; the same command goes on with what was measured")
        return 1


def _main(options: argparse.Namespace, parser: argparse.ArgumentParser, progress: Progress) -> int:
    if options.tolerance is not None and options.against is None:
        parser.error("--tolerance is that of --against, which is missing")
    device = _device(options.device, parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    asked = [name for name in ("quick", "zoo", "small", "full") if getattr(options, name)]
    (subset,) = asked or ["full" if options.only else "quick"]
    quick, every = cases.of_device(device.type)
    pool = {"quick": quick, "zoo": cases.ZOO, "small": cases.SMALL, "full": every}[subset]
    chosen = {pattern: cases.select(pool, pattern) for pattern in options.only or [None]}
    for pattern, found in chosen.items():
        if not found:
            parser.error(f"no case matches {pattern!r}; there are {', '.join(c.name for c in every)}")
    selected = tuple(dict.fromkeys(case for found in chosen.values() for case in found))
    compile = options.full or device.type == "cuda" if options.compile is None else options.compile
    minutes = options.minutes
    if minutes is None:
        small = SMALL_MINUTES + SMALL_COMPILE_MINUTES * compile
        limits = {"quick": 0.0 if compile else QUICK_MINUTES, "zoo": ZOO_MINUTES, "small": small}
        minutes = 0.0 if device.type == "cuda" else limits.get(subset, 0.0)
    progress.limit = max(1.0, minutes * 60 - AFTER) if minutes else None
    path = _path(options, f"{subset}-{device.type}", device, parser)
    before = report.read(options.against) if options.against else None

    load_average = _load_average()
    if load_average is not None and load_average > report.BUSY:
        progress.say(f"warning: load average {load_average:.1f}: with other work on its cores, threaded code loses most")
    newer = machine.newer_sources()
    if newer:
        progress.say(
            f"warning: {newer[0].name} is newer than the extension that is measured: build it again for times of these sources"
        )
    progress.say(f"results: {path}")
    results = run(
        selected,
        path,
        device,
        compile=compile,
        again=options.again,
        rounds=options.rounds,
        seconds=options.seconds,
        longest_call=options.longest_call or (QUICK_LONGEST_CALL if subset == "quick" else LONGEST_CALL),
        progress=progress,
        watch=_Shown(path, selected, progress),
        keep_going=options.keep_going,
    )
    progress.clear()
    names = [case.name for case in selected]
    print(report.details({**results, "cases": {name: e for name, e in results["cases"].items() if name in names}}))
    report.write(path, results, report.beside_of(path, results))
    progress.say(f"{duration(progress.elapsed())}; results in {path}, table in {path.with_suffix('.md')}")
    failed = [f"{name}: {ours}" for name in names for ours in _ours_that_failed(results["cases"].get(name, {}))]
    if failed:
        progress.say(f"error: ours failed: {'; '.join(failed)}")
    if before is None:
        return int(bool(failed))
    text, holds = against.told(
        against.compare(before, results, names), 0.1 if options.tolerance is None else options.tolerance, str(options.against)
    )
    print(text)
    return 0 if holds and not failed else 1


def _path(options: argparse.Namespace, name: str, device: torch.device, parser: argparse.ArgumentParser) -> Path:
    """The results file of a run."""
    if options.commit_results:
        return machine.COMMITTED / f"{name}.json"
    if options.out is None:
        return machine.own_file(name, environment(device))
    out: Path = options.out
    if out.is_dir():
        return out / f"{name}.json"
    if out.suffix != ".json":
        parser.error(f"--out {out}: a results file ends in .json, and the table is written beside it")
    return out


if __name__ == "__main__":
    sys.exit(main())
