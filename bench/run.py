"""Measure, keep, report: `python -m bench.run [--quick | --full]`."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hjepa_fast as hf
from hjepa_fast.pipeline import files
from hjepa_fast.pipeline.evaluate import processor_name

from . import cases, report
from .cases import Case
from .chip import measure_chip
from .measure import WrongResultError, measure
from .rivals import entrants

BUSY = 0.5
"""Load average from which a run warns."""
TOO_LARGE = "does not fit into the device's memory"


class ResultsError(Exception):
    """A results file that cannot be continued."""


def environment(device: torch.device) -> dict[str, Any]:
    """What must be the same for two measurements to stand in one table."""
    return {
        "hardware": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "device": device.type,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "hjepa_fast": hf.__version__,
            "source": _source_hash(),
            "torch": torch.__version__,
            "jax": _version("jax"),
            "python": platform.python_version(),
        },
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_hash() -> str:
    """Of everything that a rollout runs: the library without its pipeline, and the C++ and CUDA sources."""
    package = Path(hf.__file__).parent
    sources = [*package.glob("*.py"), *package.glob("backends/*.py"), *package.parent.glob("csrc/**/*.*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def load(path: Path, found: dict[str, Any], again: bool) -> dict[str, Any]:
    """A results file to go on with; a new one if there is none.

    Raises
    ------
    ResultsError
        It was measured on other hardware or with other versions, and `again` does not say to start over.
    """
    if path.exists():
        results = files.read_json(path, "results file")
        differences = _differences(results["environment"], found)
        if not differences:
            return results
        if not again:
            raise ResultsError(
                f"{path} was measured elsewhere: {'; '.join(differences)}. "
                "Pass --again to replace it, or another name with --out."
            )
    return {"environment": found, "cases": {}}


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += _differences(x, y, f"{key}.")
        elif x != y:
            found.append(f"{prefix}{key} was {x}, is {y}")
    return found


def _too_large(known: dict[str, Any]) -> set[str]:
    return {name for name, reason in known["left_out"].items() if reason == TOO_LARGE}


def run(
    selected: Sequence[Case],
    path: Path,
    device: torch.device,
    *,
    compile: bool = False,
    again: bool = False,
    rounds: int = 9,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Measure the cases that `path` does not hold yet, writing it after each one; returns all it holds.

    Raises
    ------
    ResultsError, WrongResultError
        See `load` and `measure`.
    """
    results = load(path, environment(device), again)
    if again or "chip" not in results:
        results["chip"] = measure_chip(device)
    for index, case in enumerate(selected, start=1):
        builders, left_out = entrants(case, device, compile)
        label = f"[{index}/{len(selected)}] {case.name}"
        known = results["cases"].get(case.name)
        if known and not again and builders.keys() <= known["contestants"].keys() | _too_large(known):
            print(f"{label}: kept, measured {known['date']}")
            continue
        print(f"{label}: {', '.join(builders)}", flush=True)
        for name, reason in left_out.items():
            print(f"    without {name}: {reason}")
        entry = measure(case, builders, device, rounds, seconds)
        left_out |= dict.fromkeys(builders.keys() - entry["contestants"].keys(), TOO_LARGE)
        results["cases"][case.name] = {**entry, "left_out": left_out}
        files.write_json(path, results)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Time hjepa_fast against its rivals.")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--quick", action="store_true", help="the table of ratios, a few minutes (default without --only)")
    subset.add_argument("--full", action="store_true", help="every case, with --compile")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also torch.compile, which takes minutes a case to compile (default: with --full, and on CUDA)",
    )
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name contains it or matches it as a shell pattern")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/quick-cpu.json and the like")
    parser.add_argument("--again", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--rounds", type=int, default=9, help="at least so many rounds a case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="at least so long a case (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch and JAX (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    full = options.full or (options.only and not options.quick)
    quick, every = cases.of_device(device.type)
    selected = cases.select(every if full else quick, options.only)
    if not selected:
        parser.error(f"no case matches {options.only!r}; there are {', '.join(c.name for c in every)}")
    name = f"{'full' if full else 'quick'}-{device.type}.json"
    path = options.out or Path(__file__).parent / "results" / name
    compile = options.full or device.type == "cuda" if options.compile is None else options.compile
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        print(f"warning: load average {os.getloadavg()[0]:.1f}: with other work on its cores, threaded code loses most")
    try:
        results = run(
            selected, path, device, compile=compile, again=options.again, rounds=options.rounds, seconds=options.seconds
        )
    except (ResultsError, WrongResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on with {path}", file=sys.stderr)
        return 130
    print(report.write(path, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
