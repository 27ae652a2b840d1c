"""What is shipped, what an installation says and shows; and that one fact is one fact wherever it is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import venv
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast import names, rolling
from hjepa_fast.backends import cpp
from hjepa_fast.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GENERATED = {"PKG-INFO", "setup.cfg"}
"""What setuptools puts beside the project's own files in an sdist, but for hjepa_fast.egg-info."""


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "setup.py" not in done.stdout:
        pytest.skip("what belongs to the project is known from git; this is no checkout")
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).exists())


def copy_of_sources(folder: Path, only: tuple[str, ...] = ("",)) -> Path:
    """The project's own files whose names begin so."""
    for name in tracked():
        if name.startswith(only):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(folder: Path, what: str, **environment: str) -> Path:
    """The file that setuptools builds of the sources in a folder, without extensions unless the environment says else."""
    code = f"from setuptools import build_meta; build_meta.{what}('dist')"
    env = {"PATH": "", "HJEPA_FAST_BUILD": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    (built,) = (folder / "dist").iterdir()
    return built


def test_the_sdist_holds_what_git_tracks_and_nothing_else(tmp_path):
    sources = copy_of_sources(tmp_path)
    for stray in ("runs/demo/secret.txt", "notes.txt", "bench/local/mine.json", "csrc/cpu/ops.o", "hjepa_fast/_C.abi3.so"):
        (sources / stray).parent.mkdir(parents=True, exist_ok=True)
        (sources / stray).touch()
    with tarfile.open(build(sources, "build_sdist")) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in found if not name.startswith("hjepa_fast.egg-info/")} - GENERATED == set(tracked())


def test_without_a_compiler_the_wheel_is_pure(tmp_path):
    """An empty PATH has none; the tag says what the wheel holds, or pip would take it for one with the extension."""
    sources = copy_of_sources(tmp_path, ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/", "hjepa_fast/__"))
    wheel = build(sources, "build_wheel", HJEPA_FAST_BUILD="")
    assert wheel.name == f"hjepa_fast-{hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    assert "hjepa_fast/__init__.py" in held
    assert not [name for name in held if name.endswith((".so", ".cpp"))]


USER = """
import torch
import hjepa_fast as hf

hnn = hf.LatentHNN(latent_dim=8, hidden_dims=(16, 16))
z0 = torch.randn(4, 8)
energy: torch.Tensor = hf.rollout(hnn, z0, 0.1, 5, energy=True, integrator="implicit-midpoint").energy
energy = hf.SymplecticIntegrator(hnn).trajectory(z0, 5, energy=True, states="final").energy
hf.rollout(hnn, z0, 0.1, 5, energy=bool(z0.sum() > 0)).energy.mean()  # line 8: perhaps None
hf.rollout(hnn, z0, 0.1, 5).energy.mean()  # 9: None
hf.SymplecticIntegrator(hnn).trajectory(z0, 5).energy.mean()  # 10: None
hf.rollout(hnn, z0, 0.1, 5, integrator="leepfrog")  # 11: no such names, to the end
hf.rollout(hnn, z0, 0.1, 5, memory="storage")
hf.rollout(hnn, z0, 0.1, 5, unconverged="ignore")
hf.rollout(hnn, z0, 0.1, 5, states="last")
hf.odeint(hnn, z0, [0.0, 1.0], integrator="dopri5")
hf.step_residual(hnn, z0, z0, 0.1, scheme="rk4")
hf.gradient(hnn, z0, backend="gpu")
hf.SymplecticIntegrator(hnn, integrator="verlet")
"""


def test_a_type_checker_sees_an_editable_installation(tmp_path):
    """mypy follows a .pth file, and no finder; the types that it reads there tell right from wrong calls."""
    api = pytest.importorskip("mypy.api", reason="the extra dev, which brings mypy.api, is not installed")
    copy_of_sources(tmp_path / "source", ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hjepa_fast/"))
    environment, user = tmp_path / "environment", tmp_path / "user.py"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(build(tmp_path / "source", "build_editable")) as wheel:
        wheel.extractall(packages)
    user.write_text(USER.lstrip(), encoding="utf-8")
    # torch is not there, so that its tensors are anything: what is None, or a name, is still known
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nignore_missing_imports = True\n", encoding="utf-8")
    (interpreter,) = environment.glob("bin/python")
    found, errors, _ = api.run(
        [str(user), f"--config-file={settings}", f"--python-executable={interpreter}", f"--cache-dir={tmp_path / 'cache'}"]
    )
    assert not errors
    wrong = sorted({int(line) for line in re.findall(r"user\.py:(\d+): error", found)})
    assert wrong == list(range(8, 19)), found


def test_the_names_for_type_checkers_are_those_that_are_taken():
    assert typing.get_args(names.Integrator) == tuple(SCHEMES)
    hnn, z = hf.LatentHNN(4, (3,)), torch.zeros(1, 4)
    for argument, literal in (
        ("integrator", names.Integrator), ("backend", names.Backend), ("memory", names.Memory), ("states", names.States),
        ("unconverged", names.Unconverged),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{argument} must be one of {', '.join(typing.get_args(literal))}; found 'x'"):
            hf.rollout(hnn, z, 0.1, 1, **{argument: "x"})


def test_an_installation_without_the_extension_says_so_once(monkeypatch):
    monkeypatch.setattr(cpp, "_problem", "_C.abi3.so was not built")
    monkeypatch.setattr(rolling, "said", False)
    hnn, z = hf.LatentHNN(4, (3,)), torch.zeros(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.rollout(hnn, z, 0.1, 1, backend="torch")
        torch.compile(lambda z: hf.leapfrog(hnn, z, 0.1, 1), fullgraph=True, backend="eager")(z)
        hf.available_backends(z)
    with pytest.warns(UserWarning, match=r'"auto" takes "torch".*_C.abi3.so was not built.*HJEPA_FAST_BUILD=1') as caught:
        hf.leapfrog(hnn, z, 0.1, 1)
    assert [Path(one.filename) for one in caught] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.leapfrog(hnn, z, 0.1, 1)
        hf.gradient(hnn, z)


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", hf.__version__)
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited == hf.__version__
    assert re.search(rf"^## (\[?Unreleased|\[?{re.escape(hf.__version__)})", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)


def test_what_make_installs_is_within_the_ranges():
    """constraints.txt pins every package that pyproject.toml names, to a version that it allows."""
    requirements = pytest.importorskip(
        "packaging.requirements", reason="the extra dev, which brings packaging.requirements, is not installed"
    )
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = PROJECT["project"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra, requirements_of_it in project["optional-dependencies"].items():
        wanted += requirements_of_it if extra != "jax" else []
    for text in wanted:
        one = requirements.Requirement(text)
        if one.name != project["name"]:
            assert one.specifier.contains(pins[one.name.lower().replace("_", "-")]), text


def test_pre_commit_takes_the_versions_of_make_lint():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = dict(re.findall(r"repo: https://github.com/\S+/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n +rev: v(\S+)", hooks))
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert set(revisions) == {"ruff", "clang-format"}
    assert all(f"\n{name}=={version}\n" in constraints for name, version in revisions.items()), revisions


def test_workflows_try_every_python_that_is_claimed():
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    (matrix,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert re.findall(r"3\.\d+", matrix) == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
