"""The C++ backend; everything else is declared in pyproject.toml.

The package works without it, so by default a failure to build it is reported and the installation goes on.
HJEPA_FAST_BUILD=0 leaves it out, HJEPA_FAST_BUILD=1 makes a failure fatal.
"""

from __future__ import annotations

import os
import sys

from setuptools import setup

WANTED = os.environ.get("HJEPA_FAST_BUILD", "")
SOURCES = ["kernels_avx2", "kernels_avx512", "kernels_avx512bf16", "kernels_generic", "ops", "pool"]
HEADERS = [
    "activations",
    "crew",
    "features",
    "gemm",
    "kernels",
    "network",
    "pool",
    "problem",
    "rows",
    "separable",
    "separable_ops",
    "simd",
    "solve",
]


def without(reason: object) -> None:
    print(f"hjepa_fast: built without the C++ backend: {reason}", file=sys.stderr)


def arguments() -> dict[str, object]:
    if WANTED == "0":
        without("HJEPA_FAST_BUILD=0")
        return {}
    if os.name == "nt":
        if WANTED == "1":
            raise RuntimeError("hjepa_fast: the C++ backend needs GCC or Clang and POSIX threads")
        without("it needs GCC or Clang and POSIX threads")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if WANTED == "1":
            raise
        without(error)
        return {}

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if WANTED == "1":
                    raise
                without(error)

    # vectors are passed between inlined functions only, so the ABI notes of -Wpsabi do not apply
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    extension = CppExtension(
        "hjepa_fast._C",
        [f"csrc/cpu/{name}.cpp" for name in SOURCES],
        depends=[f"csrc/cpu/{name}.h" for name in HEADERS],
        # the stable ABI of torch 2.11: one build serves every later version
        extra_compile_args=[*flags, "-Wall", "-Wno-psabi", "-pthread", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**arguments())
