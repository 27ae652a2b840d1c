"""What a measurement depends on besides its case, and where a machine's own results are kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import hjepa_fast as hf
from hjepa_fast.pipeline.evaluate import processor_name

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results"
"""Results that belong to the repository."""
LOCAL = HERE / "local"
"""Results of the machines that this checkout is used on, a folder each; git ignores it."""
VARIABLES = (
    *("ATEN_", "CUBLAS_", "CUDA_LAUNCH_BLOCKING", "DNNL_", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_"),
    *("HJEPA_FAST_CUDA_SAMPLES", "HJEPA_FAST_TUNE", "NVIDIA_TF32_OVERRIDE", "OMP_", "ONEDNN_", "TRITON_INTERPRET", "XLA_FLAGS"),
)
"""Environment variables that change how fast products are; OMP_NUM_THREADS shows in the number of threads."""


def environment(device: torch.device) -> dict[str, Any]:
    """What must be the same for two measurements to stand in one table."""
    package = Path(hf.__file__).resolve().parent
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
            # everything that a rollout runs: the library without its pipeline, and the C++ and CUDA sources
            "source": _hash(
                [*package.glob("*.py"), *package.glob("backends/*.py"), *package.parent.glob("csrc/**/*.*")], package.parent
            ),
            "extensions": _hash(extensions(), package),
            "bench": _hash([HERE / f"{name}.py" for name in ("cases", "chip", "measure", "rivals", "zoo")], HERE),
            "torch": torch.__version__,
            "jax": _version("jax"),
            "python": platform.python_version(),
        },
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {
            # a path's folders say nothing about speed
            name: re.sub(r"[^ :=]*/", "", value)
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and name != "OMP_NUM_THREADS"
        },
    }


def extensions() -> list[Path]:
    """The compiled files of the library."""
    package = Path(hf.__file__).resolve().parent
    return [*package.glob("*.so"), *package.glob("*.pyd")]


def newer_sources() -> list[Path]:
    """C++ and CUDA sources that were changed after the extension of theirs was built."""
    sources = Path(hf.__file__).resolve().parent.parent / "csrc"
    folders = {"_C.": "cpu", "_CUDA.": "cuda"}
    return [
        source
        for extension in extensions()
        for prefix, folder in folders.items()
        if extension.name.startswith(prefix)
        for source in sorted((sources / folder).glob("*.*"))
        if source.stat().st_mtime > extension.stat().st_mtime
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash(paths: Iterable[Path], base: Path) -> str | None:
    """Of the names and contents of files, or None if there are none."""
    digest, found = hashlib.sha256(), sorted(path for path in paths if path.is_file())
    for path in found:
        digest.update(path.relative_to(base).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12] if found else None


def own_file(name: str, found: dict[str, Any]) -> Path:
    """Where results `name` of an environment are kept: in this machine's folder, under a name that no other sources,
    versions or hardware have."""
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
    return LOCAL / folder_name(platform.node()) / f"{name}-{digest}.json"


def folder_name(host: str) -> str:
    """A host's name as a folder's: letters, digits, dots, dashes and underscores of ASCII, at most 64."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", host)[:64].strip(".-") or "unnamed"


def described(found: dict[str, Any]) -> str:
    """An environment in a line."""
    hardware, versions = found["hardware"], found["versions"]
    device = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads, {hardware['instruction_set']}"
    variables = "".join(f", {name}={value}" for name, value in found.get("variables", {}).items())
    return (
        f"{device}{variables}; torch {versions['torch']}, JAX {versions['jax'] or 'absent'}, Python {versions['python']}, "
        f"hjepa_fast {versions['hjepa_fast']} ({versions['source']})"
    )


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Each value that two environments do not share: "name was x, is y"."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{key}.")
        elif x != y:
            found.append(f"{prefix}{key} was {x}, is {y}")
    return found
