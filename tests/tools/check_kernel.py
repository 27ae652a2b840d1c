"""Run the CUDA kernel under compute-sanitizer, on small cases and few steps.

    python tests/tools/check_kernel.py --tools memcheck racecheck

memcheck sees every access outside an allocation or at a bad address, racecheck every race within a block's shared memory,
synccheck barriers that not all threads reach. initcheck, which must be asked for, sees reads of what was never written: one is
meant, of what stands beyond a layer's width in a grid's exchange, which is replaced by zeros. Every case goes forward and back:
a team's blocks that share unevenly, samples that fill its rows and not, teams that take turns, matrices that stay in device
memory. Needs a GPU, the built extension and compute-sanitizer. Exits 1 on any report, 2 where something is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9
"""Exit code of the sanitizer that has something to report."""
# of a team, its samples, all samples, widths, scheme, and whether the weights are bfloat16
CASES = (
    (4, 4, 5, (33, 20, 18), "many", False),
    (3, 1, 2, (7, 5), "euler", False),
    (8, 8, 8, (130, 70, 40), "leapfrog", True),
    (2, 8, 400, (16, 8), "leapfrog", False),
    (2, 1, 1, (512, 512, 256), "leapfrog", False),
)


def run_cases() -> None:
    """The child: forward and back in both variants."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    from hjepa_fast.backends import cuda
    from test_cpp import Case

    if not cuda.available():
        print(cuda.why_not(), file=sys.stderr)
        sys.exit(2)
    warnings.filterwarnings("error", message="the device does not take")  # then another backend would be looked at
    clusters = torch.cuda.get_device_capability()[0] >= 9
    for cuda.variant in (1, 2) if clusters else (2,):
        for cuda.team, cuda.rows, batch, widths, scheme, low in CASES:
            case = Case(batch, widths, scheme=scheme, n_steps=2).to(torch.float32).to("cuda")
            if low:
                case.tail = case.tail._replace(weights=[w.bfloat16() for w in case.tail.weights])
            out = case.forward(cuda)
            case.backward(cuda, out[-1])
            if not all(bool(x.isfinite().all()) for x in out):
                sys.exit(f"numbers that are not finite: variant {cuda.variant}, {batch} samples of {widths}")
    torch.cuda.synchronize()


def command(tool: str) -> list[str]:
    own = [sys.executable, str(Path(__file__).resolve()), "--child"]
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *own]


def check(tool: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Exit code 0: nothing found; FOUND: the output tells what."""
    # PyTorch's allocator keeps memory that a kernel may no longer touch, and gives several tensors one allocation
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command(tool), env=environment, capture_output=True, text=True, timeout=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS[:3]), help="default: all but initcheck")
    parser.add_argument("--seconds", type=float, default=200.0, help="at most for each tool (default 200)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases()
        return 0
    if options.list:
        print("\n".join(" ".join(command(tool)) for tool in options.tools))
        return 0
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on the PATH; it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    codes = []
    for tool in options.tools:
        start = time.monotonic()
        try:
            done = check(tool, options.seconds)
        except subprocess.TimeoutExpired:
            print(f"{tool}: not done within {options.seconds:.0f} s", flush=True)
            codes.append(1)
            continue
        state = {0: "nothing found", FOUND: "found something"}.get(done.returncode, f"exit status {done.returncode}")
        print(f"{tool}: {state} in {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-3000:], sep="\n", flush=True)
        codes.append(done.returncode)
    return 2 if 2 in codes else int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
