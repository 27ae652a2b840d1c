"""Seeds, deterministic arithmetic, and the header that says what this machine leaves out."""

from __future__ import annotations

import os

import pytest
import torch

from hjepa_fast import rolling


def pytest_configure() -> None:
    # some tests ask for deterministic operators, which cuBLAS gives with a workspace of its own only
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # processes of pytest-xdist share the cores
    rolling.said = True  # what is not installed is no test's affair
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, so nothing here runs on one"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads; GPU: {gpu}"]


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch._dynamo.reset() if "torch._dynamo" in __import__("sys").modules else None
