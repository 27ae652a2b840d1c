"""Everything that a machine with an NVIDIA GPU has to say about the GPU backends, in parts that each end in time.

    python tests/tools/gpu_day.py --out FOLDER                # all parts
    python tests/tools/gpu_day.py --out FOLDER --minutes 9.5  # what there is time for; the same command goes on with the rest
    python tests/tools/gpu_day.py --list

It needs PyTorch for CUDA, numpy, pytest and filelock, for the CUDA kernel nvcc and ninja; nothing is installed, and the package
is taken from this checkout, into which the extension is built. FOLDER gets a log of each part as it goes, `summary.json` and
`summary.txt` after each, and of the benchmark the results, the table and, in `targets.txt`, what they say of the targets. Exits
1 if a part failed or ran past its limit, 3 if parts are left for another call.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = "targets.json"
PASSED, FAILED, LATE, NOTHING, SKIPPED = "passed", "failed", "ran past its limit", "ran no test", "skipped most tests"
NO_TESTS = 5
"""pytest's exit code."""


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    """Its limit."""
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def pytest_of(*arguments: str, jobs: int) -> tuple[str, ...]:
    """pytest, by several processes where pytest-xdist is there: Triton compiles on one core for each."""
    spread = ("--numprocesses", str(jobs)) if jobs > 1 and importlib.util.find_spec("xdist") else ()
    return python("-m", "pytest", "-q", "-ra", "--durations=10", "-p", "no:cacheprovider", *spread, *arguments)


LATENCY = (
    *("rollout-b1-t15", "bfloat16-rollout-b1-t15", "rollout-b32-t15", "rollout-b8-t15", "rollout-b64-t15"),
    *("bfloat16-rollout-b64-t15", "tf32-rollout-b32-t15"),
)
RATE = ("bfloat16-rollout-b16384-t15", "tf32-rollout-b16384-t15")
TRAINING = ("training-b32-t15", "backward-b32-t15", "tf32-training-b32-t15")
COMPILED = ("rollout-b1-t15", "training-b32-t15")
TURNS = ("rollout-b128-t15", "rollout-b256-t15", "bfloat16-rollout-b128-t15", "bfloat16-rollout-b256-t15")
"""Where both the CUDA kernel and Triton take part, above one turn's samples."""


REHEARSED = ("rollout-b1-t15", "training-b32-t15")
"""Cases that a processor has too."""


def bench(out: Path, device: str, names: Sequence[str], minutes: float, *more: str) -> tuple[str, ...]:
    """Of the cases of a GPU, all into one file."""
    if device == "cpu":
        names = [name for name in names if name in REHEARSED] or REHEARSED[:1]
    options = (
        "--device",
        device,
        "--minutes",
        f"{minutes:g}",
        "--seconds",
        "3",
        "--keep-going",
        *more,
        "--out",
        str(out / TARGETS),
    )
    return python("-m", "bench.run", *options, "--only", *names)


def parts(out: Path, device: str, jobs: int) -> list[Part]:
    """In order of what one wants to know first."""
    alone = "(gpu and not compiles) or cuda_graph"
    table = (("HJEPA_FAST_TUNE", "0"),)
    return [
        Part("machine", 60, python(__file__, "--describe")),
        Part("build", 420, python(__file__, "--build")),
        Part("cuda-tests", 240, pytest_of("tests/test_cuda.py", "-k", alone, jobs=1)),
        Part("sanitizer-memcheck", 180, python("tests/tools/check_kernel.py", "--tools", "memcheck", "--seconds", "170")),
        Part("sanitizer-racecheck", 240, python("tests/tools/check_kernel.py", "--tools", "racecheck", "--seconds", "230")),
        Part("triton-tests-gpu", 240, pytest_of("tests/test_triton.py", "-k", alone, jobs=jobs)),
        Part("bench-latency", 420, bench(out, device, LATENCY, 6.5, "--no-compile"), table),
        Part("bench-rate", 300, bench(out, device, RATE, 4.5, "--no-compile"), table),
        Part("bench-training", 420, bench(out, device, TRAINING, 6.5, "--no-compile"), table),
        Part(
            "triton-tests",
            420,
            pytest_of("tests/test_triton.py", "-k", f"not interpreter and not compile and not ({alone})", jobs=jobs),
        ),
        Part(
            "operator-tests", 300, pytest_of("tests/test_ops.py", "tests/test_gpu_paths.py", "tests/test_bench.py", jobs=jobs)
        ),
        Part("sanitizer-synccheck", 180, python("tests/tools/check_kernel.py", "--tools", "synccheck", "--seconds", "170")),
        Part("bench-compiled", 560, bench(out, device, COMPILED, 9, "--compile"), table),
        Part("bench-turns", 420, bench(out, device, TURNS, 6.5, "--no-compile"), table),
    ]


def describe() -> int:
    """What the machine is and has; fails without a GPU, which every part needs."""
    import torch

    for name in ("torch", "triton", "numpy", "jax", "pytest", "xdist", "filelock", "hypothesis", "ninja"):
        found = importlib.util.find_spec(name)
        version = getattr(__import__(name), "__version__", "present") if found else "absent"
        print(f"{name}: {version}")
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores; PyTorch for CUDA {torch.version.cuda}")
    for command in (["nvidia-smi"], ["nvcc", "--version"], ["compute-sanitizer", "--version"]):
        try:
            print(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{command[0]}: {error}")
    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device")
        return 1
    for i in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_properties(i))
    return 0


def build() -> int:
    """The extensions, in place, that of CUDA for this machine's GPUs alone; the C++ one may fail."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    switches = {"HJEPA_FAST_BUILD": "", "HJEPA_FAST_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    # ninja may be beside the interpreter
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    done = subprocess.run(python("setup.py", "build_ext", "--inplace"), cwd=ROOT, env={**os.environ, **switches, "PATH": path})
    if done.returncode:
        return done.returncode
    tell = "from hjepa_fast.backends import cuda; print(cuda.why_not() or 'the backend is there'); exit(not cuda.available())"
    return subprocess.run(python("-c", tell), cwd=ROOT).returncode


def run(part: Part, log: Path, seconds: float) -> tuple[str, float]:
    """Its state, and how long it took. Past the limit it is interrupted, so that it can write what it has, and then ended."""
    environment = {**os.environ, **dict(part.environment), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with log.open("wb") as to:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=to, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            state = PASSED if code == 0 else NOTHING if code == NO_TESTS else FAILED
            if state == PASSED and skipped_more_than_it_ran(last_line(log)):
                state = SKIPPED
        except subprocess.TimeoutExpired:
            state = LATE
            for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return state, time.monotonic() - start


def skipped_more_than_it_ran(summary: str) -> bool:
    """By pytest's last line: then what the tests need is not there."""
    numbers = {name: int(n) for n, name in re.findall(r"(\d+) (passed|skipped)", summary)}
    return numbers.get("skipped", 0) > numbers.get("passed", 0)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def targets(results: dict[str, Any]) -> str:
    """The targets, each with what a results file of the benchmark says of it. Ours is the fastest of the library's backends,
    graphed or not; rivals are graphed ones, and what compiles its own graphs."""
    lines = []
    for name in (*LATENCY, *TURNS, *TRAINING, *RATE):
        if name not in results["cases"]:
            continue
        entry = results["cases"][name]
        facts, case = entry["contestants"], entry["case"]
        ours = min((x for x in facts if facts[x]["ours"]), key=lambda x: facts[x]["median_s"], default=None)
        if ours is None:
            lines.append(f"{name}: none of ours was timed")
            continue
        said = [f"{ours} {facts[ours]['median_s'] / case['n_steps'] * 1e6:.1f} us a step"]
        if name in LATENCY:
            said[0] += " (batch 1: 30)"
        ratios = entry["ratios"][ours]
        graphed = [x for x in ratios if not facts[x]["ours"] and x.endswith(("-graphed", "reduce-overhead", "jax"))]
        strongest = min((x for x in graphed if not x.startswith("baseline")), key=ratios.__getitem__, default=None)
        for rival, target in (("eager", 30 if name in TRAINING else 50), ("baseline", 1), (strongest, 3)):
            if rival in ratios:
                said.append(f"{ratios[rival]:.2f} times as fast as {rival} ({target})")
        arithmetic = "tf32" if case["precision"] == "high" else case["dtype"]
        rate = results["chip"]["matrix_gflops_per_s"].get(arithmetic)
        if name in RATE and rate and "gflops_per_s" in facts[ours]:
            said.append(f"{facts[ours]['gflops_per_s'] / rate:.1%} of the measured {arithmetic} matrix rate (60 %)")
        said += [f"{x} {why}" for x, why in entry["left_out"].items() if why.startswith("failed")]
        lines.append(f"{name}: {'; '.join(said)}")
    return "\n".join(["Targets in parentheses.", *lines, ""])


class Day:
    """What was run, in a folder."""

    def __init__(self, out: Path, planned: Sequence[Part]) -> None:
        self.out, self.planned = out, planned
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "summary.json"
        self.done: dict[str, dict[str, object]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def go(self, names: Sequence[str], minutes: float, again: bool) -> int:
        end = time.monotonic() + minutes * 60
        left = []
        for part in self.planned:
            asked = part.name in names if names else again or self.done.get(part.name, {}).get("state") != PASSED
            if not asked:
                continue
            seconds = min(part.seconds, end - time.monotonic())
            # half a part's time is worth a try: what it has by then is written
            if seconds < part.seconds / 2:
                left.append(part.name)
                continue
            log = self.out / f"{part.name}.log"
            print(f"{part.name}: at most {seconds:.0f} s", flush=True)
            state, took = run(part, log, seconds)
            self.done[part.name] = {"state": state, "seconds": round(took, 1), "says": last_line(log)}
            self.save()
            print(f"{part.name}: {state} in {took:.0f} s: {self.done[part.name]['says']}", flush=True)
        if left:
            print(f"left for another call: {', '.join(left)}", flush=True)
        states = [self.done[part.name]["state"] for part in self.planned if part.name in self.done]
        return 1 if any(state != PASSED for state in states) else 3 if left else 0

    def save(self) -> None:
        write(self.file, json.dumps(self.done, indent=1))
        rows = [f"{name:22} {x['state']:20} {x['seconds']:>7} s  {x['says']}" for name, x in self.done.items()]
        write(self.out / "summary.txt", "\n".join(rows) + "\n")
        if (self.out / TARGETS).exists():
            write(self.out / "targets.txt", targets(json.loads((self.out / TARGETS).read_text())))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-day", help="default: build/gpu-day")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of all parts together (default: no limit)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts")
    parser.add_argument("--again", action="store_true", help="also parts that have passed before")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes of the Triton tests")
    parser.add_argument("--device", default="cuda", help="of the benchmark: cuda, or cpu for a rehearsal")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.describe or options.build:
        return describe() if options.describe else build()
    planned = parts(options.out.resolve(), options.device, options.jobs)
    unknown = set(options.only) - {part.name for part in planned}
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts: {', '.join(part.name for part in planned)}")
    if options.list:
        for part in planned:
            before = "".join(f"{name}={value} " for name, value in part.environment)
            print(f"{part.name:22} {part.seconds:>4.0f} s  {before}{' '.join(part.command)}")
        return 0
    return Day(options.out.resolve(), planned).go(options.only, options.minutes, options.again)


if __name__ == "__main__":
    sys.exit(main())
