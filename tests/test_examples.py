"""The examples run, are short, and show what they say they show."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_in_the_list(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    assert f"[{script.name}]({script.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_matching_learns_the_pendulum_and_a_symplectic_integrator_keeps_its_energy():
    loss, drift = main_of("pendulum_matching")(n_steps=400, n_test=8)
    assert loss < 3e-4  # 1e-4 is the noise
    assert drift["implicit-midpoint"] < 0.1
    assert drift["implicit-midpoint"] < drift["leapfrog"] / 2


def test_the_drop_in_trains_as_plain_pytorch_does():
    runs = main_of("training_loop")(n_epochs=5)
    plain, ours = (losses for losses, _ in runs.values())
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < ours[0]


def test_control_swings_the_pendulum_up():
    friction, (q, p) = main_of("model_predictive_control")(n_training=600)
    assert friction == pytest.approx(0.05, abs=0.02)
    assert -q.cos() > 0.95
    assert abs(p) < 0.3


def test_the_ensemble_is_apart_where_it_has_seen_nothing():
    errors, spread = main_of("ensemble")(n_members=4, n_epochs=200)
    assert errors.max() < 0.01
    assert spread[3.0] > 2 * spread[0.75]


def test_the_compiled_graph_and_the_exported_model_give_the_eager_numbers():
    torch.compiler.reset()
    assert max(main_of("compiled_rollout")(batches=(4, 3), backend="aot_eager")) < 1e-5


def test_the_benchmark_of_ones_own_passes_its_checks():
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(EXAMPLES / "bench_own_model.py"),
        "-q",
        "-o",
        "addopts=",
        "--benchmark-disable",
    ]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_the_notebook_runs_from_videos_to_the_table(tmp_path):
    notebook = nbformat.read(EXAMPLES / "published.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what it shows is the reader's own
    environment = os.environ | {"HJEPA_FAST_QUICK": "1", "HJEPA_FAST_OUT": "run", "CUDA_VISIBLE_DEVICES": ""}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    table = (tmp_path / "run" / "run" / "summary.md").read_text(encoding="utf-8")
    assert "HNN (Euler)" in table
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in shown) >= 6
    assert any(output.get("data", {}).get("text/markdown") == table for output in shown)
