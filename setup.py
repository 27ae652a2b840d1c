"""The C++ and CUDA backends; everything else is declared in pyproject.toml.

The package works without them, so by default a C++ backend that cannot be built is reported and the installation goes on: the
wheel is then pure, and the package says what is missing when it is used. HJEPA_FAST_BUILD=0 leaves the C++ backend out,
HJEPA_FAST_BUILD=1 makes a failure fatal. The CUDA backend is built with HJEPA_FAST_BUILD_CUDA=1 only, which makes its failure
fatal too; TORCH_CUDA_ARCH_LIST chooses its GPUs. HJEPA_FAST_FLAGS are given to the C++ compiler and linker last.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

CPP, CUDA = "hjepa_fast._C", "hjepa_fast._CUDA"
NAMES = {CPP: "C++", CUDA: "CUDA"}
SWITCHES = {CPP: "HJEPA_FAST_BUILD", CUDA: "HJEPA_FAST_BUILD_CUDA"}
SOURCES = ["kernels_avx2", "kernels_avx512", "kernels_avx512bf16", "kernels_generic", "ops", "pool"]
CUDA_SOURCES = ["kernels.cu", "ops.cpp"]
# the stable ABI of torch 2.11: one build serves every later version
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def wanted(extension: str) -> str:
    return os.environ.get(SWITCHES[extension], "")


def without(extension: str, reason: object) -> None:
    """Says what is missing, or raises it where the backend must be built."""
    if wanted(extension) == "1":
        raise reason if isinstance(reason, Exception) else RuntimeError(f"hjepa_fast: no {NAMES[extension]} backend: {reason}")
    print(f"hjepa_fast: built without the {NAMES[extension]} backend: {reason}", file=sys.stderr)


def cpp_lacks() -> str:
    return "it needs GCC or Clang and POSIX threads" if os.name == "nt" else ""


def toolkit_version(home: str | None) -> tuple[int, int] | None:
    nvcc = Path(home or "", "bin", "nvcc")
    if not home or not nvcc.exists():
        return None
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return (int(found[1]), int(found[2])) if found else None


def cuda_lacks() -> str:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.name == "nt":
        return "it is for Linux"
    if not torch.version.cuda:
        return "PyTorch is for the CPU here (torch.version.cuda is None)"
    version = toolkit_version(CUDA_HOME)
    if version is None:
        return "no CUDA toolkit was found; set CUDA_HOME, or put its nvcc on the PATH"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"the CUDA toolkit in {CUDA_HOME} is {version[0]}.{version[1]}, PyTorch was built with {torch.version.cuda}"
    return ""


def gpus(version: tuple[int, int] | None) -> list[str]:
    """Machine code for Ampere, Hopper and Blackwell, and for what is newer the code that the driver compiles."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # PyTorch's build adds them
    newest = ["100"] if version and version >= (12, 8) else []
    flags = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in ("80", "90a", *newest)]
    last = newest[0] if newest else "90"
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def find_ninja() -> None:
    """Makes the ninja of this environment known, which need not be activated; PyTorch's build looks for it on the PATH."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


class Wheel(bdist_wheel):
    """A wheel that is tagged by what it holds: a pure one if no extension could be built."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def arguments() -> dict[str, object]:
    chosen = [name for name, yes in ((CPP, wanted(CPP) != "0"), (CUDA, wanted(CUDA) == "1")) if yes]
    if not chosen:
        return {}
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        for name in chosen:
            without(name, error)
        return {}
    lacks = {name: cpp_lacks() if name == CPP else cuda_lacks() for name in chosen}
    for name, reason in lacks.items():
        if reason:
            without(name, reason)
    find_ninja()

    class Build(BuildExtension):
        """Each extension alone, so that one that fails leaves the other."""

        def run(self) -> None:
            extensions, compiler, inplace = self.extensions, self.compiler, self.inplace
            built = []
            for extension in extensions:
                self.extensions, self.compiler, self.inplace = [extension], compiler, inplace
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:
                    without(extension.name, error)
            # what is left tells the wheel its tag, and an editable installation what to look for
            self.extensions = self.distribution.ext_modules = built

    extensions = []
    if lacks.get(CPP) == "":
        # vectors are passed between inlined functions only, so the ABI notes of -Wpsabi do not apply
        flags = [
            "-std=c++20",
            "-O3",
            "-g0",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
        ]
        more = os.environ.get("HJEPA_FAST_FLAGS", "").split()
        extensions.append(
            CppExtension(
                CPP,
                [f"csrc/cpu/{name}.cpp" for name in SOURCES],
                depends=sorted(glob("csrc/cpu/*.h")),
                extra_compile_args=[*flags, "-Wall", "-Wno-psabi", "-pthread", STABLE, *more],
                extra_link_args=["-pthread", *more],
                py_limited_api=True,
            )
        )
    if lacks.get(CUDA) == "":
        extensions.append(
            CUDAExtension(
                CUDA,
                [f"csrc/cuda/{name}" for name in CUDA_SOURCES],
                depends=sorted(glob("csrc/cuda/*.h")),
                extra_compile_args={
                    "cxx": ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-DUSE_CUDA", STABLE],
                    "nvcc": ["-std=c++20", "-O3", *gpus(toolkit_version(CUDA_HOME))],
                },
                py_limited_api=True,
            )
        )
    if not extensions:
        return {}
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**arguments())
