"""Build the C++ backend with sanitizers and run `stress.py` under them.

    python tests/tools/check_memory.py --seconds 400

The address sanitizer, with the one for undefined behaviour, sees every access outside a tensor or outside a piece of a call's
memory; the thread sanitizer sees every race between this library's threads. `--seconds` is for the rollouts; the builds take
some two minutes more. They go to build/sanitize. Exits 1 on any report, wrong value or error. Needs Linux and GCC.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools"
COMMON = "-O1 -g1 -fno-omit-frame-pointer"
FLAGS = {
    "address": f"{COMMON} -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": f"{COMMON} -fsanitize=thread",
}
OPTIONS = {
    # leaks: the interpreter and PyTorch keep what they allocate; the modules are linked to one another, not to libasan
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"suppressions={TOOLS / 'tsan.supp'}:exitcode=66:report_signal_unsafe=0",
}
SHARE = {"address": 0.6, "thread": 0.4}
"""Of the seconds."""


def build(sanitizer: str) -> Path:
    """The folder of a package like the source's, but for the extension."""
    folder = ROOT / "build" / "sanitize" / sanitizer
    switches = {"HJEPA_FAST_BUILD": "1", "HJEPA_FAST_BUILD_CUDA": "0", "HJEPA_FAST_FLAGS": FLAGS[sanitizer], "CXX": "g++"}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # ninja is beside the interpreter
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **switches, "PATH": path}, check=True, stdout=subprocess.DEVNULL)
    package = folder / "hjepa_fast"
    for source in (ROOT / "hjepa_fast").iterdir():
        link = package / source.name
        if source.name != "__pycache__" and source.suffix != ".so" and not link.is_symlink():
            link.symlink_to(source)
    return folder


def run(sanitizer: str, folder: Path, seconds: float, first: int) -> int:
    library = "libasan.so" if sanitizer == "address" else "libtsan.so"
    runtime = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": str(folder), "LD_PRELOAD": runtime}
    # a thread sanitizer's fixed addresses leave less room for random ones than newer kernels take
    still = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    command = [*still, sys.executable, str(TOOLS / "stress.py"), "--seconds", str(seconds), "--first", str(first)]
    return subprocess.run(command, cwd=folder, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400.0, help="of rollouts, for both sanitizers together (default 400)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (default 0)")
    parser.add_argument("--only", choices=FLAGS, help="one sanitizer")
    options = parser.parse_args()
    codes = {}
    for sanitizer in [options.only] if options.only else FLAGS:
        start = time.monotonic()
        folder = build(sanitizer)
        print(f"{sanitizer}: built in {time.monotonic() - start:.0f} s", flush=True)
        share = 1.0 if options.only else SHARE[sanitizer]
        codes[sanitizer] = run(sanitizer, folder, options.seconds * share, options.first)
        print(f"{sanitizer}: {'nothing found' if codes[sanitizer] == 0 else f'exit status {codes[sanitizer]}'}", flush=True)
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
