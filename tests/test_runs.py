"""What a run says of itself when it was interrupted, changed or written twice at once; what the environment hands down."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hjepa_fast.cli import build_parser, main
from hjepa_fast.errors import CheckpointError, HJEPAError, UsageError
from hjepa_fast.models import LatentHNN
from hjepa_fast.pipeline import checkpoints, figures, files, runs, train, zoo
from hjepa_fast.pipeline.config import DataConfig, TrainConfig
from hjepa_fast.pipeline.dream import dream
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.run_folder import Run
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents

DATA = DataConfig(window=5)
CONFIG = TrainConfig(epochs=3, batch_size=8)
OPTIONS = ("--epochs", "3", "--batch-size", "8", "--window", "5", "--timing-runs", "1", "--timing-warmup", "0",
           "--extended-steps", "5", "--dream-steps", "3", "--quiet")  # fmt: skip


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "hjepa_fast", *map(str, arguments)]


def start(*arguments, env=None, **options) -> subprocess.Popen:
    env = {"PYTHONPATH": os.pathsep.join(sys.path), **os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command(*arguments), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture
def small_networks(monkeypatch):
    monkeypatch.setattr(zoo, "LatentHNN", lambda dim: LatentHNN(dim, (8, 8)))


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path / "latents")), DATA)


class Killed(BaseException):
    """Stands for the end of a process: nothing handles it."""


def stop_after(epoch):
    def log(row):
        if row["epoch"] == epoch:
            raise Killed

    return log


def state(folder: Path) -> dict:
    """All that a training left, without times."""
    left: dict = {}
    for path in sorted(path for path in folder.iterdir() if path.name != files.LOCK):
        if path.suffix == ".safetensors":
            loaded = checkpoints.load(path)
            tensors = loaded.model | {f"optimizer/{name}": tensor for name, tensor in loaded.optimizer.items()}
            left[path.name] = timeless(loaded.facts), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        elif path.suffix == ".json":
            left[path.name] = timeless(json.loads(path.read_text()))
        else:
            left[path.name] = timeless({"history": list(csv.DictReader(io.StringIO(path.read_text())))})
    return left


def timeless(facts: dict) -> dict:
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in facts["history"]]
    return facts | {"history": rows}


class TestOneEpoch:
    @pytest.fixture(autouse=True)
    def _small(self, small_networks):
        pass

    def test_a_kill_between_any_two_renames_changes_nothing_in_the_end(self, dataset, tmp_path, monkeypatch):
        config = TrainConfig(epochs=2, batch_size=16)
        train.train("hnn", dataset, tmp_path / "whole", config, DATA)
        wanted = state(tmp_path / "whole")
        assert sorted(wanted) == ["best.json", "best.safetensors", "history.csv", "last.json", "last.safetensors"]
        replace = Path.replace
        for stop in range(1, 99):
            left = [stop]

            def killed(self, target, left=left):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return replace(self, target)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", killed)
                try:
                    train.train("hnn", dataset, tmp_path / str(stop), config, DATA)
                except Killed:
                    pass
                else:
                    break
            train.train("hnn", dataset, tmp_path / str(stop), config, DATA)
            assert state(tmp_path / str(stop)) == wanted
        assert stop > 3 * 2  # three files at least in each of two epochs

    @pytest.mark.parametrize("lost", ["best.safetensors", "best.json", "last.json", "history.csv"])
    def test_what_follows_from_the_last_epoch_is_written_again(self, lost, dataset, tmp_path, monkeypatch):
        # the last epoch is the best one, so that the best checkpoint follows from it too
        errors = iter((3.0, 2.0, 1.0))
        monkeypatch.setattr(train, "rollout_error", lambda *_: next(errors))
        train.train("hnn", dataset, tmp_path / "run", CONFIG, DATA)
        wanted = state(tmp_path / "run")
        (tmp_path / "run" / lost).unlink()
        train.train("hnn", dataset, tmp_path / "run", CONFIG, DATA, log=lambda row: pytest.fail("trained again"))
        assert state(tmp_path / "run") == wanted

    def test_a_best_checkpoint_that_cannot_be_made_again_is_missed(self, dataset, tmp_path, monkeypatch):
        errors = iter((1.0, 2.0, 3.0, 4.0))
        monkeypatch.setattr(train, "rollout_error", lambda *_: next(errors))
        folder = tmp_path / "run"
        train.train("hnn", dataset, folder, CONFIG, DATA)
        best = folder / "best.safetensors"
        assert (
            checkpoints.load(best).facts["epoch"]
            == train.best_epoch(checkpoints.load(folder / "last.safetensors").facts["history"])
            == 1
        )
        best.unlink()
        with pytest.raises(CheckpointError, match=r"best.safetensors is missing .* epoch 1 of 3 was the best"):
            train.train("hnn", dataset, folder, CONFIG, DATA)
        shutil.copy(folder / "last.safetensors", best)
        with pytest.raises(CheckpointError, match=r"best.safetensors is of epoch 3; .* epoch 1 of 3 was the best"):
            train.train("hnn", dataset, folder, CONFIG, DATA)

    def test_a_kill_of_an_earlier_version_goes_on(self, dataset, tmp_path, monkeypatch):
        """It wrote the best checkpoint first: that one may be an epoch ahead of the last one."""
        errors = iter((3.0, 2.0, 2.0, 1.0))
        monkeypatch.setattr(train, "rollout_error", lambda *_: next(errors))
        folder = tmp_path / "run"
        with pytest.raises(Killed):
            train.train("hnn", dataset, folder, CONFIG, DATA, log=stop_after(1))
        last = (folder / "last.safetensors").read_bytes()
        with pytest.raises(Killed):
            train.train("hnn", dataset, folder, CONFIG, DATA, log=stop_after(2))
        (folder / "last.safetensors").write_bytes(last)
        errors = iter((2.0, 1.0))
        train.train("hnn", dataset, folder, CONFIG, DATA)
        assert len(checkpoints.load(folder / "best.safetensors").facts["history"]) == 3

    def test_only_one_at_a_time(self, dataset, tmp_path):
        def nested(row):
            with pytest.raises(HJEPAError, match=rf"run is in use: process {os.getpid()} on .* writes into it"):
                train.train("hnn", dataset, tmp_path / "run", CONFIG, DATA)

        train.train("hnn", dataset, tmp_path / "run", CONFIG, DATA, log=nested)
        assert train.standing(tmp_path / "run")["epochs_done"] == 3

    def test_checkpoints_of_two_trainings(self, dataset, tmp_path):
        for name, seed in (("a", 1), ("b", 2)):
            train.train("hnn", dataset, tmp_path / name, TrainConfig(epochs=3, batch_size=8, seed=seed), DATA)
        shutil.copy(tmp_path / "a" / "best.safetensors", tmp_path / "b" / "best.safetensors")
        with pytest.raises(CheckpointError, match="are of different trainings"):
            train.standing(tmp_path / "b")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A run of two models, of which the first got through one of three epochs; and that run gone on with to its end."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    write_latents(folder / "latents")
    save = train._save

    def interrupt(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "LatentHNN", lambda dim: LatentHNN(dim, (8, 8)))
        with patch.context() as inner:
            inner.setattr(train, "_save", interrupt)
            assert train_run(folder) == 130
        shutil.copytree(folder, folder.with_name("finished"))
        files.write_json(
            folder.with_name("finished") / "run" / "inputs.json", {"videos": None, "latents": str(folder / "latents")}
        )
        assert (
            run(
                "train",
                folder / "latents",
                "--out",
                folder.with_name("finished") / "run",
                "--models",
                "hnn",
                "baseline",
                *OPTIONS,
            )
            == 0
        )
    return folder.parent


def copied(folder, to):
    """A copy that uses the latents beside it."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    files.write_json(to / "run" / "inputs.json", {"videos": None, "latents": str((to / "latents").resolve())})
    return to / "run"


@pytest.fixture
def interrupted(two_runs, tmp_path, small_networks):
    return copied(two_runs / "interrupted", tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not written, which takes the time."""
    monkeypatch.setattr(figures, "save", lambda figure, stem: [stem.with_suffix(".png")])


def train_run(folder, *options, models=("hnn", "baseline")) -> int:
    return run("train", folder / "latents", "--out", folder / "run", "--models", *models, *OPTIONS, *options)


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


class TestUnfinished:
    def test_the_table_says_how_far_each_model_got(self, interrupted, capsys):
        assert run("evaluate", interrupted, "--quiet") == 1
        captured = capsys.readouterr()
        assert "is not finished: HNN (full): 1 of 3 epochs; Baseline MLP: not trained. " in captured.err
        assert "--partial" in captured.err
        table = (interrupted / "summary.md").read_text()
        assert captured.out.strip() == table.strip()
        assert "| HNN (full)  | 1 of 3 |" in table
        assert "Training is not finished." in table
        assert "Baseline MLP: not trained" in table
        assert "; at least 1 of 3 epochs; " in table
        summary = summary_of(interrupted)
        row = summary["models"][1]
        assert (row["epochs_done"], row["epochs_asked"], row["finished"]) == (1, 3, False)
        assert (summary["epochs"], summary["epochs_asked"], summary["finished"]) == (1, 3, False)
        assert summary["missing"] == ["baseline"]
        assert run("evaluate", interrupted, "--quiet", "--partial") == 0

    def test_figures_say_so_too(self, interrupted, undrawn, capsys, monkeypatch):
        from matplotlib.figure import Figure

        assert run("evaluate", interrupted, "--quiet", "--partial") == 0
        titles = []
        title = Figure.suptitle
        monkeypatch.setattr(Figure, "suptitle", lambda self, text, **rest: titles.append(text) or title(self, text, **rest))
        assert run("figures", interrupted) == 1
        captured = capsys.readouterr()
        assert "energy.png" in captured.out
        assert "is not finished: HNN (full): 1 of 3 epochs; Baseline MLP: not trained" in captured.err
        assert titles
        assert all(text.startswith("TRAINING IS NOT FINISHED: HNN (full): 1 of 3 epochs; Baseline MLP:") for text in titles)
        assert run("figures", interrupted, "--partial") == 0

    def test_a_summary_of_an_earlier_version(self, interrupted, undrawn, capsys):
        """It says nothing of epochs done; the checkpoints do."""
        assert run("evaluate", interrupted, "--quiet", "--partial") == 0
        summary = summary_of(interrupted)
        for key in ("finished", "missing", "checkpoints", "arrays_sha256", "epochs_asked", "step", "motion"):
            del summary[key]
        for row in summary["models"]:
            for key in ("epochs_done", "epochs_asked", "finished", "best_epoch"):
                row.pop(key, None)
        files.write_json(interrupted / "summary.json", summary | {"epochs": 3})
        capsys.readouterr()
        assert run("figures", interrupted) == 1
        assert "HNN (full): 1 of 3 epochs" in capsys.readouterr().err

    def test_going_on_makes_it_whole(self, interrupted, undrawn, capsys):
        assert run("evaluate", interrupted, "--quiet", "--partial") == 0
        assert train_run(interrupted.parent) == 0
        capsys.readouterr()
        assert run("figures", interrupted, "--partial") == 1
        assert "hnn was trained after" in capsys.readouterr().err
        assert run("evaluate", interrupted, "--quiet") == 0
        assert run("figures", interrupted) == 0
        table, summary = (interrupted / "summary.md").read_text(), summary_of(interrupted)
        assert "not finished" not in table
        assert "; 3 epochs; " in table
        assert (summary["epochs"], summary["finished"], summary["missing"]) == (3, True, [])
        assert [row.get("epochs_done") for row in summary["models"]] == [None, 3, 3]

    def test_a_model_that_is_no_longer_wanted(self, interrupted):
        assert train_run(interrupted.parent, models=("hnn",)) == 0
        assert run("evaluate", interrupted, "--quiet") == 1
        shutil.rmtree(interrupted / "models" / "baseline")
        assert run("evaluate", interrupted, "--quiet") == 0

    def test_without_the_last_checkpoint_nothing_is_claimed(self, interrupted, capsys):
        (interrupted / "models" / "hnn" / "last.safetensors").unlink()
        assert run("evaluate", interrupted, "--quiet") == 1
        assert "HNN (full): 1 of 3 epochs" in capsys.readouterr().err

    def test_a_kill_between_an_epoch_and_its_best_checkpoint(self, interrupted):
        best = interrupted / "models" / "hnn" / "best.safetensors"
        wanted = best.read_bytes()
        best.unlink()
        assert run("evaluate", interrupted, "--quiet", "--partial") == 0
        assert checkpoints.load(best).facts["epoch"] == 1
        assert len(best.read_bytes()) == len(wanted)

    def test_dreams_and_checks_name_the_epoch(self, interrupted, tmp_path, capsys):
        best = interrupted / "models" / "hnn" / "best.safetensors"
        latents = tmp_path / "latents" / "video_000.safetensors"
        assert run("dream", best, "--latents", latents, "--steps", 3, "--out", tmp_path / "d") == 0
        assert "; epoch 1 of 3, training not finished (1 epochs done); mean step length" in capsys.readouterr().out
        metadata = files.read_metadata(tmp_path / "d.safetensors")
        digest = hashlib.sha256(best.read_bytes()).hexdigest()
        assert metadata["checkpoint_sha256"] == digest
        assert metadata["trained"] == "epoch 1 of 3, training not finished (1 epochs done)"
        assert run("check", best, "--integrators", "euler", "--steps", 20, "--states", 2, "--out", tmp_path / "c") == 0
        assert "epoch 1 of 3, training not finished" in capsys.readouterr().out
        written = json.loads((tmp_path / "c.json").read_text())
        assert (written["checkpoint_sha256"], written["model"]) == (digest, "hnn")
        assert train_run(tmp_path) == 0
        facts = checkpoints.load(best).facts
        assert train.how_trained(best, facts) == f"epoch {facts['epoch']} of 3"


class TestAnotherTraining:
    """Nothing is stated of a model that was not trained as the run says."""

    @pytest.fixture
    def finished(self, two_runs, tmp_path, small_networks):
        return copied(two_runs / "finished", tmp_path)

    @pytest.mark.parametrize(
        ("section", "field", "value"),
        [
            ("train", "epochs", 50),
            ("train", "epochs", 2),
            ("train", "dt", 0.5),
            ("train", "seed", 1),
            ("train", "energy_reference", "z0"),
            ("data", "split_seed", 1),
            ("data", "test_fraction", 0.21),
        ],
    )
    def test_other_settings(self, section, field, value, finished, capsys):
        config = json.loads((finished / "config.json").read_text())
        before, config[section][field] = config[section][field], value
        files.write_json(finished / "config.json", config)
        assert run("evaluate", finished, "--quiet", "--partial") == 1
        message = f"was not trained as the run's configuration says: {section}.{field} {before!r} -> {value!r}. "
        error = capsys.readouterr().err
        assert message in error or "trained on other data" in error
        assert not (finished / "summary.json").exists()

    def test_a_model_in_the_folder_of_another(self, finished, capsys):
        shutil.copytree(finished / "models" / "hnn", finished / "models" / "hnn-euler")
        assert run("evaluate", finished, "--quiet", "--partial") == 1
        assert "model 'hnn' -> 'hnn-euler'" in capsys.readouterr().err

    def test_other_models_than_the_summary_is_of(self, finished, undrawn, capsys):
        assert run("evaluate", finished, "--quiet") == 0
        shutil.rmtree(finished / "models" / "hnn")
        assert run("figures", finished) == 0  # checkpoints that are gone contradict nothing
        assert train_run(finished.parent, models=("hnn-no-energy",)) == 0
        assert run("figures", finished, "--partial") == 1
        assert "hnn-no-energy was trained after" in capsys.readouterr().err
        shutil.rmtree(finished / "models" / "hnn-no-energy")
        (finished / "models" / "hnn-euler").mkdir()
        assert run("figures", finished, "--partial") == 1
        assert "other models were to be trained since" in capsys.readouterr().err

    def test_a_checkpoint_that_was_exchanged(self, finished, capsys):
        assert run("evaluate", finished, "--quiet") == 0
        best = finished / "models" / "hnn" / "best.safetensors"
        loaded = checkpoints.load(best)
        loaded.model["hnn.net.0.weight"] *= 2
        checkpoints.save(best, loaded)
        assert run("figures", finished, "--partial") == 1
        assert "hnn was trained after" in capsys.readouterr().err

    def test_a_kill_between_arrays_and_summary(self, finished, capsys, monkeypatch):
        assert run("evaluate", finished, "--quiet") == 0
        write = files.write_json

        def killed(path, value):
            if path.name == "summary.json":
                raise KeyboardInterrupt
            write(path, value)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_json", killed)
            assert run("evaluate", finished, "--quiet") == 130
        assert not (finished / "summary.md").exists()
        arrays, metadata = files.load_tensors(finished / "evaluation.safetensors", "arrays")
        arrays["hnn/energy"] += 1
        files.save_tensors(finished / "evaluation.safetensors", arrays, metadata)
        assert run("figures", finished) == 1
        assert "is not what" in capsys.readouterr().err

    def test_outputs_take_the_place_of_nothing(self, finished, tmp_path):
        best, latents = finished / "models" / "hnn" / "best.safetensors", tmp_path / "latents" / "video_000.safetensors"
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for stem in (best.with_suffix(""), finished / "models" / "hnn" / "last", finished / "evaluation",
                     finished / "videos" / "x", latents.with_suffix("")):  # fmt: skip
            with pytest.raises(UsageError, match="choose another --out"):
                dream(best, stem, latents=latents, n_steps=2)
        for stem in ("summary", "config", "inputs", "models/hnn/best"):
            assert run("check", best, "--out", finished / stem) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class TestTwoAtOnce:
    def test_every_command_that_writes_is_refused(self, tmp_path, small_networks, capsys):
        write_latents(tmp_path / "latents")
        assert train_run(tmp_path, models=("hnn",)) == 0
        out, best = tmp_path / "run", tmp_path / "run" / "models" / "hnn" / "best.safetensors"
        assert run("evaluate", out, "--quiet") == 0
        latents = tmp_path / "latents" / "video_000.safetensors"
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with Run(out).locked():
            for arguments in (
                ("evaluate", out),
                ("figures", out),
                ("train", tmp_path / "latents", "--out", out, "--models", "hnn", *OPTIONS),
                ("reproduce", "--quick", "--out", out),
                ("generate", "--out", out / "videos"),
                ("dream", best, "--latents", latents, "--out", out / "d"),
                ("check", best, "--out", out / "deep" / "c"),
            ):
                capsys.readouterr()
                assert run(*arguments) == 1
                assert f"{out} is in use: process {os.getpid()} on " in capsys.readouterr().err
            assert run("dream", best, "--latents", latents, "--steps", 2, "--out", tmp_path / "elsewhere") == 0
        for path in tmp_path.glob("elsewhere.*"):
            path.unlink()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_what_is_still_written_is_not_read(self, tmp_path, capsys):
        write_latents(tmp_path / "latents")
        with files.locked(tmp_path / "latents"):
            assert train_run(tmp_path) == 1
            assert "latents is in use" in capsys.readouterr().err
            assert run("encode", tmp_path / "latents", "--out", tmp_path / "latents", "--encoder", "offline") == 1
        assert not (tmp_path / "run").exists()

    def test_a_place_that_cannot_be_written_is_said(self, capsys):
        for arguments in (("generate", "--out", "/proc/none"), ("reproduce", "--quick", "--out", "/proc/none")):
            assert run(*arguments) == 1
            assert "cannot write into /proc/none: " in capsys.readouterr().err


class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_they_end_a_command_as_an_interrupt_does(self, name, tmp_path, monkeypatch, capsys):
        number = getattr(signal, name)

        def killed(folder, *_):
            with files.atomic_path(folder / "file.txt") as temporary:
                temporary.write_text("half")
                signal.raise_signal(number)

        monkeypatch.setattr(runs, "make_videos", killed)
        before = signal.signal(number, signal.SIG_DFL)  # nohup, which the tests may be run by, ignores SIGHUP
        try:
            assert run("generate", "--out", tmp_path / "v") == 128 + number
            assert capsys.readouterr().err == f"hjepa-fast: ended by {name}; the same command goes on from here\n"
            assert not list((tmp_path / "v").iterdir())
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)

    def test_what_ignores_them_still_does(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(runs, "make_videos", lambda *_: signal.raise_signal(signal.SIGHUP) or [])
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert run("generate", "--out", tmp_path / "v") == 0
        finally:
            signal.signal(signal.SIGHUP, before)
        assert "0 videos" in capsys.readouterr().out

    def test_a_process_that_is_ended_and_one_that_is_killed(self, tmp_path, capsys):
        """The lock names the process and ends with it; the last epoch stays; what was half written goes."""
        write_latents(tmp_path / "latents")
        options = ("--models", "baseline", "--epochs", "5000", "--batch-size", "8", "--window", "5", "--quiet")
        arguments = ("train", tmp_path / "latents", "--out", tmp_path / "run", *options)
        folder = tmp_path / "run" / "models" / "baseline"
        for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
            process = start(*arguments)
            try:
                done = train.standing(folder)["epochs_done"] if (folder / "best.json").exists() else 0
                deadline = time.monotonic() + 120
                while not (folder / "history.csv").exists() or len((folder / "history.csv").read_text().split()) < done + 3:
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                assert run("evaluate", tmp_path / "run") == 1
                assert f"run is in use: process {process.pid} on " in capsys.readouterr().err
                process.send_signal(number)
                _, error = process.communicate(timeout=60)
            finally:
                process.kill()
            assert process.returncode == code
            assert b"Traceback" not in error
            if number == signal.SIGTERM:
                assert not list(tmp_path.rglob(f"{files.PARTIAL}*"))
            train.settle(folder)
            assert done + 2 <= train.standing(folder)["epochs_done"] < 5000
        (folder / ".partial-abcdefgh.safetensors").write_text("half")
        with files.locked(folder):
            assert not list(folder.glob(f"{files.PARTIAL}*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run, evaluated and drawn in this process."""
    folder = tmp_path_factory.mktemp("tiny")
    write_latents(folder / "latents")
    assert train_run(folder, "--epochs", "1", models=("hnn",)) == 0
    assert run("evaluate", folder / "run", "--quiet") == 0
    assert run("figures", folder / "run") == 0
    return folder / "run"


class TestEnvironment:
    """Commands in processes of their own, as a shell, a notebook, a scheduler or a container starts them."""

    def test_figures_are_the_same_under_any_settings_of_matplotlib(self, tiny, tmp_path):
        """A backend that is not there, a style, no home, no cache, a date that is none; all three streams closed."""
        drawn = {path.name: path.read_bytes() for path in (tiny / "figures").iterdir()}
        assert len(drawn) == 12
        shutil.rmtree(tiny / "figures")
        (tmp_path / "rc").write_text("backend: TkAgg\ntext.usetex: True\nfont.size: 40\nsavefig.dpi: 7\naxes.facecolor: red\n")
        env = {"MPLBACKEND": "nowhere", "MATPLOTLIBRC": str(tmp_path / "rc"), "MPLCONFIGDIR": "/proc/none",
               "SOURCE_DATE_EPOCH": "today", "TERM": "dumb", "HOME": "/proc/none"}  # fmt: skip
        closing = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), **os.environ, **env}
        done = subprocess.run([sys.executable, "-c", closing, *command("figures", tiny)], env=environment)
        assert done.returncode == 0
        assert {path.name: path.read_bytes() for path in (tiny / "figures").iterdir()} == drawn

    def test_an_ascii_terminal_and_warnings_as_errors(self, tiny):
        env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1",
               "COLUMNS": "0", "TERM": "dumb", "PYTHONWARNINGS": "error", "MPLBACKEND": "module://none.backend"}  # fmt: skip
        process = start("evaluate", tiny, env=env)
        output, error = process.communicate()
        assert process.returncode == 0, error
        table = (tiny / "summary.md").read_text(encoding="utf-8")
        assert "±" in table
        assert output.decode("ascii").strip() == table.replace("±", "+-").strip()
        assert b"Traceback" not in error

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_a_reader_that_is_gone(self, stream, tiny):
        """`hjepa-fast evaluate run | head -0`: the work is done, and nothing is said."""
        (tiny / "summary.json").unlink()
        process = start("evaluate", tiny)
        getattr(process, stream).close()
        other = process.stderr if stream == "stdout" else process.stdout
        text = other.read()
        assert process.wait() == 0
        assert (tiny / "summary.json").exists()
        assert b"Traceback" not in text
        assert b"Broken" not in text
        assert (stream == "stdout") or b"| HNN (full)" in text

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device here that is always full")
    def test_results_that_cannot_be_printed_are_an_error(self, tiny):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                command("reproduce", "--help"),
                stdout=full,
                stderr=subprocess.PIPE,
                env={"PYTHONPATH": os.pathsep.join(sys.path), **os.environ},
            )
        assert done.returncode == 1
        assert done.stderr.startswith(b"hjepa-fast: error: standard output cannot be written: [Errno 28]")

    def test_training_goes_on_where_nobody_looks(self, tmp_path, small_networks, monkeypatch):
        """Progress and results into streams that fail at every write."""

        class Broken(io.StringIO):
            def write(self, text):
                raise OSError(5, "Input/output error")

            def isatty(self):
                return True

        write_latents(tmp_path / "latents")
        for broken in (Broken(), None):
            monkeypatch.setattr(sys, "stderr", broken)
            arguments = ("train", tmp_path / "latents", "--out", tmp_path / f"run{broken}", "--models", "hnn", *OPTIONS)
            assert run(*(part for part in arguments if part != "--quiet")) == 0

    def test_names_of_files_that_are_no_text_or_look_like_formulas(self, tiny, tmp_path, capsys):
        latents = tmp_path / "a$b_{$.safetensors"
        shutil.copy(tiny.parent / "latents" / "video_000.safetensors", latents)
        assert run("dream", tiny / "models" / "hnn" / "best.safetensors", "--latents", latents, "--out", tmp_path / "d") == 0
        assert files.read_metadata(tmp_path / "d.safetensors")["source"] == latents.name
        with pytest.raises(HJEPAError, match="is no UTF-8 text"):
            files.save_tensors(tmp_path / "x.safetensors", {}, {"source": os.fsdecode(b"\xff")})
        assert run("evaluate", tmp_path / os.fsdecode(b"none\xff")) == 1
        assert "none\\udcff" in capsys.readouterr().err

    def test_an_error_that_nobody_foresaw_is_one_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(runs, "make_videos", lambda *_: [][0])
        assert run("generate", "--out", tmp_path / "v") == 1
        assert (
            capsys.readouterr().err
            == "hjepa-fast: unexpected error: IndexError: list index out of range (--debug shows where)\n"
        )
        with pytest.raises(IndexError):
            run("generate", "--out", tmp_path / "v", "--debug")

    def test_partial_is_an_option_of_what_states_results(self):
        for arguments in (("evaluate", "r"), ("figures", "r"), ("reproduce",)):
            assert not build_parser().parse_args([*arguments]).partial
