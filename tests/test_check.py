"""`hjepa-fast check`: what it writes, prints and refuses."""

from __future__ import annotations

import json

import pytest
import torch

from hjepa_fast.cli import main
from hjepa_fast.models import LatentHNN
from hjepa_fast.pipeline import checkpoints, files, zoo
from hjepa_fast.schemes import SCHEMES, Properties
from synthetic import LABEL, write_latents, write_one

FAST = ("--steps", "20", "--states", "2")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch):
    monkeypatch.setattr(zoo, "LatentHNN", lambda dim: LatentHNN(dim, (16, 16)))


def save(path, name="hnn", dim=6, dt=0.4):
    """A checkpoint whose dynamics are fast enough for errors above rounding."""
    model = zoo.build(name, dim, dt=dt, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.mul_(3)
    facts = {"model": name, "latent_dim": dim, "encoder": LABEL}
    scale = torch.linspace(0.5, 2, dim)
    checkpoints.save(path, checkpoints.Checkpoint(facts, model.state_dict(), 0.1 * scale, scale, {}))
    return path


@pytest.fixture
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "best.safetensors")


def test_the_model_and_its_remedy(checkpoint, tmp_path, capsys):
    assert run("check", checkpoint, "--out", tmp_path / "deep" / "a.b", *FAST, "--strict") == 0
    printed = capsys.readouterr().out
    for part in (
        "HNN (full), 6 dimensions, dt 0.4, 2 standard normal states",
        "symplecticity",
        "leapfrog",
        "implicit-leapfrog",
    ):
        assert part in printed
    assert 'use integrator="implicit-leapfrog"' in printed
    folder = tmp_path / "deep"
    assert sorted(path.name for path in folder.iterdir()) == ["a.b.json", "a.b.pdf", "a.b.png"]
    assert all(str(folder / f"a.b.{suffix}") in printed for suffix in ("json", "png", "pdf"))
    assert (folder / "a.b.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "a.b.pdf").read_bytes().startswith(b"%PDF")
    written = json.loads((folder / "a.b.json").read_text())
    assert [entry["integrator"] for entry in written["integrators"]] == ["leapfrog", "implicit-leapfrog"]
    published, implicit = ({v["name"]: v for v in entry["verdicts"]} for entry in written["integrators"])
    assert published["symplectic"]["outcome"] == "not claimed"
    assert published["symplectic"]["value"] > 1e3 * implicit["symplectic"]["value"]
    assert implicit["symplectic"]["outcome"] == implicit["order"]["outcome"] == "passed"
    drift = written["integrators"][0]["energy_drift"]
    assert drift["steps"] == list(range(21))
    assert len(drift["mean"]) == len(drift["max"]) == 21
    assert written["integrators"][0]["plain_words"] in printed


def test_latents_and_choices(checkpoint, tmp_path, capsys):
    """States of a file are taken to the model's units, evenly spread over it."""
    latents = write_latents(tmp_path / "latents", n_videos=1) / "video_000.safetensors"
    arguments = ("check", checkpoint, "--latents", latents, "--integrators", "euler, rk4", "--dt", 0.2, "--steps", 30)
    assert run(*arguments, "--states", 3, "--backend", "torch", "--out", tmp_path / "c") == 0
    assert "dt 0.2, 3 states of video_000.safetensors" in capsys.readouterr().out
    written = json.loads((tmp_path / "c.json").read_text())
    assert [entry["integrator"] for entry in written["integrators"]] == ["euler", "rk4"]
    assert run(*arguments, "--states", 99, "--out", tmp_path / "d") == 0
    assert "12 states of video_000.safetensors" in capsys.readouterr().out

    from hjepa_fast.pipeline.check import _states

    loaded = checkpoints.load(checkpoint)
    z0, _ = _states(loaded, checkpoint, latents, 3)
    stored = files.load_tensors(latents, "latents")[0]["latents"][[0, 6, 11]]
    torch.testing.assert_close(z0 * loaded.std + loaded.mean, stored.double(), rtol=1e-6, atol=1e-6)


def test_the_same_check_writes_the_same_files(checkpoint, tmp_path):
    for name in ("a", "b"):
        assert run("check", checkpoint, "--integrators", "leapfrog", "--out", tmp_path / name, *FAST) == 0
    for suffix in (".json", ".png", ".pdf"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_finding_is_an_error_only_if_strict(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SCHEMES, "euler", SCHEMES["euler"]._replace(general=Properties(2, symplectic=True, reversible=False)))
    arguments = ("check", checkpoint, "--integrators", "euler,leapfrog", "--out", tmp_path / "e", *FAST)
    assert run(*arguments) == 0
    assert "FAILED" in capsys.readouterr().out
    assert run(*arguments, "--strict") == 1
    assert "claimed, and does not hold: euler: symplectic; euler: volume; euler: order" in capsys.readouterr().err
    assert (tmp_path / "e.json").exists()


def test_every_model_with_a_hamiltonian(tmp_path, capsys):
    for name, spec in ((name, spec) for name, spec in zoo.MODELS.items() if spec.lacks is None):
        code = run("check", save(tmp_path / f"{name}.safetensors", name, dim=2), "--out", tmp_path / "out" / name, *FAST)
        assert code == (2 if spec.integrator is None else 0)
        captured = capsys.readouterr()
        if spec.integrator is None:
            assert f"{name}.safetensors is a {spec.title}, which has no Hamiltonian to check" in captured.err
            assert not (tmp_path / "out" / f"{name}.json").exists()
        else:
            assert spec.title in captured.out
            assert spec.integrator in captured.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--states", "0"), 2, "at least 1 state, found 0"),
        (("--steps", "19"), 2, "at least 20 steps, found 19"),
        (("--dt", "0"), 2, "dt must be finite and not 0, found 0.0"),
        (("--dt", "inf"), 2, "dt must be finite and not 0, found inf"),
        (("--integrators", "leapfrog,verlet"), 2, "one of leapfrog, implicit-leapfrog"),
        (("--integrators", ""), 2, "found ''"),
        (("--backend", "jax"), 2, "invalid choice: 'jax'"),
        (("--latents", "none.safetensors"), 1, "latent file not found"),
        (("--latents", "other.safetensors"), 1, f"was trained on 6 dimensions of {LABEL}; other.safetensors gives 4"),
    ],
)
def test_what_cannot_be_checked_is_said(arguments, code, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_one(tmp_path / "other.safetensors", torch.randn(5, 4))
    assert run("check", checkpoint, *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_a_backend_that_is_not_there_and_a_missing_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    from hjepa_fast.backends import cpp

    monkeypatch.setattr(cpp, "available", lambda: False)
    monkeypatch.setattr(cpp, "why_not", lambda: "it was not built")
    assert run("check", checkpoint, "--backend", "cpp", "--out", tmp_path / "x") == 2
    assert 'backend "cpp" is not there: it was not built' in capsys.readouterr().err
    assert run("check", tmp_path / "none.safetensors") == 1
    assert "checkpoint not found" in capsys.readouterr().err
