"""What an import costs, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("transformers", "av", "matplotlib", "tqdm", "safetensors", "scipy", "triton", "PIL", "pydantic", "torch._dynamo")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_library_imports_no_heavy_package():
    assert loaded_after("import hjepa_fast") <= loaded_after("import torch")


@pytest.mark.parametrize(
    "module", ["cli", "pipeline.runs", "pipeline.videos", "pipeline.latents", "pipeline.dream", "pipeline.check"]
)
def test_the_pipeline_imports_them_when_they_are_needed(module):
    assert loaded_after(f"import hjepa_fast.{module}") <= loaded_after("import torch")


def test_the_library_imports_only_itself_and_torch():
    """Cold import cost is torch's: every module that `import hjepa_fast` adds to `import torch` is the library's own."""
    code = "import sys, torch; before = set(sys.modules); import hjepa_fast; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(done.stdout.split())
    assert added
    assert all(name.partition(".")[0] in ("hjepa_fast", *sys.stdlib_module_names) for name in added)


def test_no_function_hides_a_module():
    code = (
        "import hjepa_fast.backends.cpp as c, hjepa_fast as hf; assert hf.backends.cpp is c; "
        "assert callable(hf.available_backends)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
