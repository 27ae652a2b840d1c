"""What a user sees while work goes on: the whole's progress, also after a resume; curves; threads and how they wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

import pytest
import torch

from hjepa_fast.cli import main
from hjepa_fast.errors import MissingDependencyError
from hjepa_fast.pipeline import checkpoints, progress, runs, tensorboard, train
from hjepa_fast.pipeline.config import Config, TrainConfig
from hjepa_fast.pipeline.progress import Outlook, Progress, clock, part
from hjepa_fast.pipeline.run_folder import Run
from hjepa_fast.pipeline.train import check_numbers, epoch_work
from hjepa_fast.waiting import is_command
from synthetic import write_latents

OPTIONS = ("--epochs", "4", "--batch-size", "8", "--window", "5", "--widths", "8,8")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


class TestOutlook:
    def test_jobs_of_which_nothing_was_done_go_on_as_the_others(self):
        outlook = Outlook({"a": [1, 1, 2], "b": [1, 1, 2], "c": [1, 1, 2]})
        assert outlook.left is None
        outlook.add("a", 3.0)
        assert outlook.left == pytest.approx(3.0 * (3 + 4 + 4))
        outlook.add("b", 5.0)  # an epoch of b takes 5, and one of c what those of a and b take on average
        assert outlook.left == pytest.approx(3.0 * 3 + 5.0 * 3 + 4.0 * 4)
        for name in ("a", "b", "c"):
            for _ in range(3):
                outlook.add(name, 1.0)
        assert outlook.left == 0

    def test_epochs_of_longer_rollouts_are_more_work(self):
        work = epoch_work(15, TrainConfig(epochs=10, matching=0.2, horizon_curriculum=0.5))
        assert len(work) == 10
        assert work == sorted(work)
        assert work[0] == work[1] < work[2] < work[6] == work[9]

    def test_clock(self):
        assert [clock(s) for s in (0.2, 59.6, 61, 3600 + 62)] == ["00:00", "01:00", "01:01", "1:01:02"]


def test_what_was_done_before_counts_and_takes_no_time(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with part("run 1 of 2"), part("stage 3 of 5"), Progress("training", 100, unit="epoch", initial=60) as shown:
        shown.announce(left="01:40")
        now[0] = 20.0
        shown.update(10, loss=0.5)
    with part("stage 4 of 5"), Progress("evaluation", 2) as after:
        after.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run 1 of 2, stage 3 of 5, training: 60/100 epoch, left=01:40"
    # ten epochs in 20 seconds, and 30 more: not 70 in 20
    assert re.match(r"run 1 of 2, stage 3 of 5, training: +70% 70/100 \[00:20<01:00, +2\.00s/epoch, loss=0\.5\]", lines[1])
    assert lines[-1].startswith("stage 4 of 5, evaluation: 100% 2/2")


def test_a_resumed_training_says_at_once_what_is_left_of_all_models(tmp_path, capsys, monkeypatch):
    write_latents(tmp_path / "latents")
    arguments = ("train", tmp_path / "latents", "--out", tmp_path / "run", "--models", "hnn", "baseline", *OPTIONS)
    save = train._save

    def interrupted(folder, model, optimizer, dataset, facts):
        for row in facts["history"]:
            row["seconds"] = 7.0
        save(folder, model, optimizer, dataset, facts)
        if facts["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save", interrupted)
        assert run(*arguments) == 130
    first = capsys.readouterr().err
    assert "model 1 of 2, hnn: 0/4 epoch\n" in first
    assert run(*arguments) == 0
    # an epoch of this model, and four of the next one, at seven seconds each
    assert "model 1 of 2, hnn: 3/4 epoch, left in all models=00:35\n" in (text := capsys.readouterr().err)
    assert re.search(r"model 1 of 2, hnn: 100% 4/4 .*, left in all models=\d\d:\d\d", text)
    assert re.search(r"model 2 of 2, baseline: 0/4 epoch, left in all models=\d\d:\d\d", text)
    assert re.search(r"model 2 of 2, baseline: 100% 4/4 .*, left in all models=00:00", text)


def test_a_history_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "last.safetensors").write_bytes(b"nothing")
    assert train.recorded_history(tmp_path) == []
    assert train.recorded_history(tmp_path / "none") == []


@pytest.mark.parametrize(("backend", "said"), [("triton", 1), ("cuda", 0)])
def test_a_word_before_kernels_are_compiled(backend, said, monkeypatch):
    monkeypatch.setattr(runs, "choose_backend", lambda asked, z0: backend)
    dataset = types.SimpleNamespace(latent_dim=6)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device: empty(*shape))
    words = []
    runs._say_what_compiles(Config(), dataset, torch.device("cuda"), words.append)
    runs._say_what_compiles(Config(), dataset, torch.device("cpu"), words.append)
    assert len(words) == said
    assert all("compiles its Triton kernels, which can take minutes" in word for word in words)


class TestTensorboard:
    @pytest.fixture
    def written(self, monkeypatch):
        """What SummaryWriter is given, by its folder's name."""
        found = {}

        class SummaryWriter:
            def __init__(self, folder, purge_step):
                assert purge_step == 1
                self.scalars = found[os.path.basename(folder)] = {}

            def add_scalar(self, name, value, step):
                self.scalars[name, step] = value

            def flush(self): ...

            close = flush

        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        return found

    def test_epochs_are_logged_also_those_before(self, written, tmp_path, monkeypatch):
        write_latents(tmp_path / "latents")
        arguments = ("train", tmp_path / "latents", "--out", tmp_path / "run", "--models", "hnn", "--quiet", *OPTIONS)
        save = train._save

        def interrupted(*given):
            save(*given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train, "_save", interrupted)
            assert run(*arguments) == 130
        assert not written
        assert run(*arguments, "--tensorboard") == 0
        history = checkpoints.load(tmp_path / "run" / "models" / "hnn" / "last.safetensors").facts["history"]
        assert len(history) == 4
        expected = {(name, row["epoch"]): row[name] for row in history for name in tensorboard.SHOWN}
        assert written == {"hnn": expected}

    def test_without_the_package_nothing_begins(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(MissingDependencyError):
            tensorboard.check_available()
        write_latents(tmp_path / "latents")
        for command in (("train", tmp_path / "latents"), ("reproduce", "--quick")):
            assert run(*command, "--out", tmp_path / "run", "--tensorboard") == 1
            assert "--tensorboard needs the package tensorboard: pip install tensorboard" in capsys.readouterr().err
            assert not (tmp_path / "run").exists()


class TestThreads:
    def test_every_command_that_computes_takes_them(self, capsys, monkeypatch):
        before, seen = torch.get_num_threads(), []
        monkeypatch.setattr(runs, "evaluate_run", lambda *_: seen.append(torch.get_num_threads()) or sys.exit("enough"))
        with pytest.raises(SystemExit):
            run("evaluate", "x", "--threads", before + 1)
        assert seen == [before + 1]
        assert torch.get_num_threads() == before
        for command in ("encode", "train", "evaluate", "dream", "check", "reproduce", "demo"):
            assert run(command, "--help") == 0
            assert "--threads N" in capsys.readouterr().out
        for wrong in ("0", "-1", "two", "9999999"):
            assert run("evaluate", "x", "--threads", wrong) == 2
            assert f"expected an integer from 1 to 4096, found '{wrong}'" in capsys.readouterr().err

    def test_the_command_line_is_known(self):
        assert is_command(["/venv/bin/hjepa-fast", "demo"], [])
        assert is_command(["C:\\hjepa-fast.exe"], []) == (os.name == "nt")
        assert is_command(["-m", "train"], ["python", "-u", "-m", "hjepa_fast", "train"])
        assert not is_command(["-m"], ["python", "-m", "pytest", "hjepa_fast"])
        assert not is_command(["-c"], ["python", "-c", "import hjepa_fast"])
        assert not is_command(["train.py"], ["python", "train.py"])
        assert not is_command([], [])

    def test_threads_of_the_command_line_wait_asleep_and_a_users_program_is_left_alone(self):
        """GNU's OpenMP says how long its threads spin."""

        def spins(*arguments, **chosen):
            variables = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
            variables |= {"OMP_DISPLAY_ENV": "VERBOSE", **chosen}
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=variables)
            found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
            return int(found[1]) if found else None

        program = spins("-c", "import hjepa_fast")
        if program is None:
            pytest.skip("PyTorch does not run on GNU's OpenMP here, whose way of waiting this sets")
        assert program > 0
        assert spins("-m", "hjepa_fast", "--version") == 0
        assert spins("-m", "hjepa_fast", "--version", OMP_WAIT_POLICY="ACTIVE") > program


def test_the_demo_is_of_settings_that_can_be(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runs, "reproduce", lambda config, out, *rest: seen.append((config, out, rest)) or {})
    found = runs.demo(tmp_path, "cpu", False, print)
    assert [folder.root for folder, _ in found] == [tmp_path / name for name in ("orbit", "collisions")]
    for config, out, (videos, names, *_) in seen:
        assert videos is None
        runs.check_settings(config, names)
        check_numbers(config.train)
        assert config.encode.encoder == {"orbit": "state", "collisions": "offline"}[out.name]


def test_the_demo_ends_with_what_it_found(monkeypatch, tmp_path, capsys):
    def row(name, title, error, drift):
        return {"name": name, "title": title, "motion": {"error": {"100": error}, "energy_drift": drift}}

    true = {"motion": {"horizons": [15, 100, 1000]}, "models": [row("hnn", "HNN", 0.1, 0.01), row("baseline", "MLP", 0.2, 0.5)]}
    found = [(Run(tmp_path / "orbit"), true), (Run(tmp_path / "collisions"), {})]
    monkeypatch.setattr(runs, "demo", lambda *_: found)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Least error over 100 steps: HNN, 0.1; best MLP: MLP, 0.2 (2x)." in said
    assert "Least drift of the true energy over 1,000 steps: HNN, 0.01; best MLP: MLP, 0.5 (50x)." in said
    assert said.count("Least") == 2  # of the collisions there is no true motion to compare with
    assert f"table: {tmp_path / 'collisions' / 'summary.md'}" in said
