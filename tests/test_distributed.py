"""Two processes that work together: they do what one does, and end together. FSDP2 over integrators."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

import hjepa_fast as hf
from hjepa_fast import cli
from hjepa_fast.errors import HJEPAError, UsageError
from hjepa_fast.pipeline import checkpoints, distributed, evaluate, files, latents, runs, train
from hjepa_fast.pipeline.config import DataConfig, EncodeConfig, EvaluateConfig, TrainConfig
from hjepa_fast.pipeline.videos import write_video
from hjepa_fast.pipeline.windows import prepare, read
from synthetic import write_latents

av = pytest.importorskip("av", reason="the extra dev, which brings av, is not installed")

DATA = DataConfig(window=5)
CONFIG = TrainConfig(epochs=3, batch_size=7, friction="conformal", matching=0.4)
"""Batches of 7, which two processes cannot halve."""
EVALUATE = EvaluateConfig(extended_steps=9, dream_steps=6, timing_warmup=0, timing_runs=1)
ENCODE = EncodeConfig(encoder="unused", clip_frames=4, clip_stride=2, encode_batch=3)
TRAINED = ("hnn", "baseline")
MISFORTUNE = "one process found something that the other did not"


class MeanColour:
    """Stands for an encoder: a clip's latent is made of its mean colours."""

    crop, tubelet_size, label, device = 32, 2, "mean colours", torch.device("cpu")

    def __init__(self):
        self.provenance = {"model": self.label}

    def __call__(self, clips):
        return clips.mean(dim=(1, 3, 4)).repeat(1, 2)


def dataset(folder):
    return prepare(latents.load_latents(folder / "latents"), DATA)


def unused_is_left_out(module, x):
    return (module["used"](x).sum(),)


def sharded_steps(rank=None):
    """A model after four steps of training: of one process, or of two that share batches out, as FSDP2 has it."""
    torch.manual_seed(0)
    model = hf.SymplecticIntegrator(hf.PortHNN(hf.LatentHNN(6, (16,)), friction="conformal"), 0.5)
    z, target, rows = torch.randn(6, 6), torch.randn(6, 4, 6), slice(rank, None, 1 if rank is None else 2)
    if rank is not None:
        torch.distributed.fsdp.fully_shard(model, ignored_params=hf.replicated_scalars(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (model(z[rows], 3) - target[rows]).square().mean().backward()
        optimizer.step()
    return model


def _join(rank, port, attempt):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }  # fmt: skip


def _work(rank, folder, port):
    torch.set_num_threads(1)
    _join(rank, port, 0)
    with distributed.joined():
        found = {"rank": distributed.rank(), "size": distributed.size(), "own": list(range(7)[distributed.own(7)])}
        found["shared_out"] = distributed.shared_out("abcde", lambda text: text + text)
        found["once"] = [distributed.once("said"), distributed.once(f"said by {rank}")]
        found["on_first"] = distributed.on_first(lambda: f"of {rank}")
        with distributed.by_first(files.locked(folder / "locked")):
            if rank:
                with pytest.raises(HJEPAError, match="is in use: process"):
                    files.refuse_if_locked(folder / "locked")
        with pytest.raises(HJEPAError, match="processes 0 and 1 found different files in here: epoch is 0 and 1"):
            distributed.check_same({"data": 5, "epoch": rank}, "here")

        torch.manual_seed(0)
        module = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
        parallel = distributed.data_parallel(module, unused_is_left_out)
        parallel(torch.full((1, 3), 2.0 * rank))[0].backward()
        assert module["unused"].weight.grad is None
        found["gradient"] = module["used"].weight.grad.tolist()

        written, save = [], files.save_tensors
        files.save_tensors = lambda path, *rest: (written.append(path.name), time.sleep(0.2), save(path, *rest))
        videos = sorted((folder / "videos").glob("*.mp4"))
        progress = []
        with distributed.by_first(files.locked(folder / "encoded")):
            latents.encode_videos(
                videos, folder / "encoded", ENCODE, encoder=MeanColour(), progress=lambda *x: progress.append(x)
            )
        found |= {"written": written, "progress": progress[-1]}
        files.save_tensors = save

        found["fingerprint"] = read(folder / "latents", dataclasses.replace(DATA, stream="windows")).fingerprint()
        data = dataset(folder)
        models = {}
        for name in TRAINED:
            path = train.train(name, data, folder / "two" / name, CONFIG, DATA)
            models[name] = checkpoints.restore(checkpoints.load(path), path).eval()
        train.train("hnn", data, folder / "begun", CONFIG, DATA)
        found["rollout_error"] = train.rollout_error(models["hnn"], data.test[:1])
        result = evaluate.evaluate(models, data, EVALUATE)
        torch.save((result.rows, result.integrators, result.arrays), folder / f"evaluation{rank}.pt")

        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        sharded = sharded_steps(rank)
        with pytest.raises(ValueError, match="parameters of LatentHNN are sharded"):
            hf.leapfrog(sharded.hnn.H, torch.zeros(1, 6), 0.1, 1)
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        torch.save(state, folder / f"state{rank}.pt")
        del sharded
    (folder / f"found{rank}.json").write_text(json.dumps(found))

    _join(rank, port, 1)
    if rank:

        def fails(*_):
            raise HJEPAError(MISFORTUNE)

        runs.train_models = fails
    text = os.open(folder / f"said{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(text, 1)
    os.dup2(text, 2)
    cli.main(["train", str(folder / "latents"), "--window", "5", "--out", str(folder / "fails"), "--device", "cpu", "--quiet"])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with what two processes made, beside what one did."""
    folder = tmp_path_factory.mktemp("together")
    write_latents(folder / "latents")
    (folder / "videos").mkdir()
    for i, n_frames in enumerate((11, 12, 8, 9)):
        frames = torch.randint(0, 256, (n_frames, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        write_video(folder / "videos" / f"v_{i}.mp4", frames.numpy(), fps=25)
    data = dataset(folder)
    for name in TRAINED:
        train.train(name, data, folder / "one" / name, CONFIG, DATA)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train("hnn", data, folder / "begun", CONFIG, DATA, log=interrupt)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, folder, port)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    assert codes == [1, 1], [
        (folder / f"said{rank}.txt").read_text() for rank in range(2) if (folder / f"said{rank}.txt").exists()
    ]
    return folder


@pytest.fixture
def found(together):
    return [json.loads((together / f"found{rank}.json").read_text()) for rank in range(2)]


def assert_same(found, expected, tolerance=1e-5):
    """Nested values that agree, numbers but for rounding."""
    if isinstance(expected, (dict, list)):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(found[key], expected[key], tolerance)
    else:
        assert found == (pytest.approx(expected, rel=tolerance, abs=tolerance) if isinstance(expected, float) else expected)


def histories(path):
    facts = checkpoints.load(path).facts
    return [{key: value for key, value in row.items() if key != "seconds"} for row in facts.pop("history")], facts


def test_what_processes_share(found):
    assert [(f["rank"], f["size"]) for f in found] == [(0, 2), (1, 2)]
    assert found[0]["own"] + found[1]["own"] == list(range(7))
    for f in found:
        assert f["shared_out"] == ["aa", "bb", "cc", "dd", "ee"]
        assert f["on_first"] == "of 0"
    assert sorted(f["once"] for f in found) == [[False, True], [True, True]]


def test_gradients_are_averaged_and_what_is_not_used_has_none(found):
    assert found[0]["gradient"] == found[1]["gradient"] == [[1.0, 1.0, 1.0]]


def test_every_video_is_encoded_by_one_process(together, found, tmp_path):
    names = [f"v_{i}.safetensors" for i in range(4)]
    assert sorted(found[0]["written"] + found[1]["written"]) == names
    assert found[0]["written"]
    assert found[1]["written"]
    latents.encode_videos(sorted((together / "videos").glob("*.mp4")), tmp_path, ENCODE, encoder=MeanColour())
    one, two = (latents.load_latents(path) for path in (tmp_path, together / "encoded"))
    assert [video.metadata for video in one] == [video.metadata for video in two]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(one, two, strict=True))
    n_clips = sum(len(video.latents) for video in one)
    assert [f["progress"] for f in found] == [[n_clips, n_clips]] * 2


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_to_the_losses_of_one(together, name):
    one, two = (histories(together / n / name / "last.safetensors") for n in ("one", "two"))
    assert len(one[0]) == CONFIG.epochs
    assert_same(two[0], one[0])
    assert two[1] == one[1]  # nothing tells how many there were


def test_two_processes_go_on_from_what_one_began(together):
    begun, expected = (histories(together / n / "last.safetensors") for n in ("begun", "one/hnn"))
    assert begun[0][:2] == expected[0][:2]
    assert_same(begun[0], expected[0])
    one = train.train("hnn", dataset(together), together / "begun", CONFIG, DATA)  # finished: one process reads it
    assert checkpoints.load(one).facts["model"] == "hnn"


def test_evaluation_is_what_one_process_finds(together, found):
    models = {}
    for name in TRAINED:
        path = together / "two" / name / "best.safetensors"
        models[name] = checkpoints.restore(checkpoints.load(path), path).eval()
    data = dataset(together)
    expected = evaluate.evaluate(models, data, EVALUATE)
    rows, integrators, arrays = torch.load(together / "evaluation0.pt")
    timed = ("ms_per_step", "seconds_extended")
    for ours, theirs in ((rows, expected.rows), (integrators, expected.integrators)):
        for row, other in zip(ours, theirs, strict=True):
            assert (row["ms_per_step"] is None) == (other["ms_per_step"] is None)
            row, other = ({k: v for k, v in x.items() if k not in timed} for x in (row, other))
            assert_same(row, other)
    torch.testing.assert_close(arrays, expected.arrays, rtol=1e-5, atol=1e-6)
    assert torch.load(together / "evaluation1.pt") == ([], [], {})
    one_window = train.rollout_error(models["hnn"], data.test[:1])
    assert [f["rollout_error"] for f in found] == pytest.approx([one_window] * 2, rel=1e-6)


def test_an_error_of_one_process_ends_all_and_is_said_once(together):
    said = [(together / f"said{rank}.txt").read_text() for rank in range(2)]
    assert "".join(said).count("hjepa-fast: error: ") == 1
    assert said[1] == f"hjepa-fast: error: {MISFORTUNE}\n"


def test_streamed_latents_are_known_to_all(together, found):
    alone = read(together / "latents", dataclasses.replace(DATA, stream="windows")).fingerprint()
    assert [f["fingerprint"] for f in found] == [alone] * 2


def test_fsdp_trains_as_one_process_does(together):
    expected = sharded_steps().state_dict()
    state = torch.load(together / "state0.pt")
    assert state["dt"].shape == state["hnn.raw_friction"].shape == ()
    torch.testing.assert_close(dict(state), dict(expected), rtol=1e-5, atol=1e-6)
    hf.SymplecticIntegrator(hf.PortHNN(hf.LatentHNN(6, (16,)), friction="conformal")).load_state_dict(state)


def test_fsdp_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        hf.replicated_scalars(nn.Linear(1, 1))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc, which only Linux has")
def test_a_lost_process_is_started_again_and_training_goes_on(tmp_path):
    write_latents(tmp_path / "latents")
    config, data = TrainConfig(epochs=25, batch_size=7), dataclasses.replace(DATA, split_seed=1)
    options = ["--window", "5", "--split-seed", "1", "--epochs", "25", "--batch-size", "7", "--models", "baseline"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += [
        "-m",
        "hjepa_fast",
        "train",
        str(tmp_path / "latents"),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--quiet",
        *options,
    ]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    history = tmp_path / "run" / "models" / "baseline" / "history.csv"
    try:
        while run.poll() is None and not (history.exists() and len(history.read_text().splitlines()) > 2):
            time.sleep(0.05)
        killed = _worker(run.pid, rank=1)
        os.kill(killed, signal.SIGKILL)
        out, err = run.communicate(timeout=300)
    finally:
        run.terminate()  # it ends what it started
    assert run.returncode == 0, err
    assert "failed (exitcode: " in err  # of the killed one, or of the other, which it left alone
    assert err.count("hjepa-fast: error: another process has ended") <= 1
    assert out.count("best test MSE") == 1
    expected = train.train(
        "baseline", prepare(latents.load_latents(tmp_path / "latents"), data), tmp_path / "one", config, data
    )
    one, two = (histories(path.with_name("last.safetensors")) for path in (expected, history))
    assert_same(two[0], one[0], 1e-3)  # rounding grows over hundreds of steps


def _worker(launcher, rank):
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
            except OSError:  # it has ended
                continue
    raise AssertionError("torchrun has no such process")


@pytest.fixture
def launched(monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_each_process_has_the_gpu_of_its_number(launched):
    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed.device(asked) for asked in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match="device 'cuda:0' is one device"):
        distributed.device("cuda:0")
    launched.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="started 2 processes on this machine, which has 1 GPUs"):
        distributed.device("auto")


def test_a_process_that_has_not_joined_works_for_itself(launched, tmp_path):
    """A script of a user's own, which torchrun started, may train something else in each process."""
    write_latents(tmp_path / "latents")
    path = train.train("baseline", dataset(tmp_path), tmp_path / "m", dataclasses.replace(CONFIG, epochs=1), DATA)
    assert checkpoints.load(path).facts["epoch"] == 1


def test_without_a_gpu_all_have_the_cpu(launched):
    launched.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device("auto") == "cpu"
    launched.delenv("TORCHELASTIC_RUN_ID")
    assert distributed.device("auto") == "auto"


def test_what_one_process_does_is_refused_and_only_the_first_says_what_is_wrong(launched, capfd, tmp_path):
    for arguments in (["generate", "--out", str(tmp_path / "v")], ["train", "x", "--epochs", "many"], ["nothing"]):
        said = []
        for number in ("0", "1"):
            launched.setenv("RANK", number)
            launched.setenv("LOCAL_RANK", number)
            assert cli.main(arguments) == cli.EXIT_USAGE
            said.append("".join(capfd.readouterr()))
        assert said[0]
        assert not said[1]
    assert not (tmp_path / "v").exists()


def test_a_batch_must_have_a_window_for_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    write_latents(tmp_path / "latents")
    with pytest.raises(UsageError, match="batch_size 1 leaves some of 2 processes without a window"):
        train.train("baseline", dataset(tmp_path), tmp_path / "m", dataclasses.replace(CONFIG, batch_size=1), DATA)
