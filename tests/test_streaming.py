"""Latents that stay in their files, here or behind an address: the same windows, in bounded memory."""

from __future__ import annotations

import csv
import dataclasses
import json
import struct
import sys
import weakref

import numpy as np
import pytest
import torch

from hjepa_fast import cli
from hjepa_fast.errors import HJEPAError, LatentError, MissingDependencyError, UsageError
from hjepa_fast.pipeline import checkpoints, files, latents, places, streaming, train
from hjepa_fast.pipeline.config import DataConfig, TrainConfig
from hjepa_fast.pipeline.windows import read
from synthetic import write_latents, write_one

fsspec = pytest.importorskip("fsspec", reason="the extra dev, which brings fsspec, is not installed")

DATA = DataConfig(window=5)
STREAMED = dataclasses.replace(DATA, stream="windows")
BLOCKS = dataclasses.replace(DATA, stream="blocks")
CONFIG = TrainConfig(epochs=3, batch_size=8)


@pytest.fixture
def folder(tmp_path):
    """Videos of 5 to 24 latents, and one that is too short for a window."""
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate((12, 5, 24, 3, 9, 17)):
        write_one(tmp_path / "latents" / f"video_{i}.safetensors", 3 + torch.randn(length, 6, generator=generator))
    return tmp_path / "latents"


@pytest.fixture
def remote(folder):
    fs = fsspec.filesystem("memory")
    for path in folder.glob("*.safetensors"):
        fs.pipe_file(f"/corpus/latents/{path.name}", path.read_bytes())
    yield places.place("memory://corpus/latents")
    fs.store.clear()


def all_of(windows):
    return windows[torch.arange(len(windows))]


@pytest.mark.filterwarnings("ignore:1 videos have fewer")
@pytest.mark.parametrize("stream", ["windows", "blocks"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("held", [2**28, 16 * 6 * 4 * 7])
def test_streamed_windows_are_those_in_memory(folder, stream, standardize, held, monkeypatch):
    expected = read(folder, dataclasses.replace(DATA, standardize=standardize))
    seen = []
    config = dataclasses.replace(DATA, standardize=standardize, stream=stream)
    data = read(folder, config, progress=lambda *counts: seen.append(counts))
    assert seen == [(n, 5) for n in range(1, 6)]
    monkeypatch.setattr(streaming, "HELD", held)
    streamed = data.train.to("cpu")  # which reads by blocks of this size
    assert streamed.shape == expected.train.shape
    torch.testing.assert_close(all_of(streamed), expected.train)
    torch.testing.assert_close(data.test, expected.test)
    torch.testing.assert_close((data.mean, data.std), (expected.mean, expected.std))
    assert data.variance == pytest.approx(expected.variance, rel=1e-5)
    for field in ("test_videos", "test_starts", "label", "encoding", "latent_dim", "control_dim"):
        assert getattr(data, field) == getattr(expected, field)


@pytest.mark.filterwarnings("ignore:1 videos have fewer")
def test_moments_of_parts_are_those_of_the_whole(folder, monkeypatch):
    rows = streaming.open_latents(folder)[2]
    expected = torch.cat([torch.from_numpy(rows.read(i, i + 5)) for i in range(len(rows) - 4)]).double()
    for held in (2**28, 16 * 6 * 4 * 7):
        monkeypatch.setattr(streaming, "HELD", held)
        moments = streaming.scan(rows, 5).moments
        assert moments.count == len(expected)
        torch.testing.assert_close(moments.mean, expected.mean(dim=0))
        torch.testing.assert_close(moments.squares, (expected - expected.mean(dim=0)).square().sum(dim=0))


def history(path):
    rows = checkpoints.load(path.with_name("last.safetensors")).facts["history"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.filterwarnings("ignore:1 videos have fewer")
def test_training_streams_to_the_same_losses(folder, remote, tmp_path):
    paths = [
        train.train("baseline", read(source, config), tmp_path / name, CONFIG, config)
        for name, source, config in (("memory", folder, DATA), ("files", folder, STREAMED), ("remote", remote, STREAMED))
    ]
    expected, *others = map(history, paths)
    for found in others:
        for row, other in zip(found, expected, strict=True):
            assert {k: v for k, v in row.items() if v is not None} == pytest.approx(
                {k: v for k, v in other.items() if v is not None}, rel=1e-5
            )
    assert others[0] == others[1]


@pytest.mark.filterwarnings("ignore:1 videos have fewer")
def test_blocks_are_shuffled_by_seed_and_epoch_and_go_on_after_an_interruption(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HELD", 16 * 6 * 4 * 7)
    windows = read(folder, BLOCKS).train
    orders = [windows.order(len(windows), torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(len(windows)))
    assert orders[0] == orders[1] != orders[2]

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    whole = train.train("baseline", read(folder, BLOCKS), tmp_path / "whole", CONFIG, BLOCKS)
    with pytest.raises(KeyboardInterrupt):
        train.train("baseline", read(folder, BLOCKS), tmp_path / "parts", CONFIG, BLOCKS, log=interrupt)
    parts = train.train("baseline", read(folder, BLOCKS), tmp_path / "parts", CONFIG, BLOCKS)
    assert history(whole) == history(parts)


def test_a_corpus_is_held_in_parts_and_every_block_is_read_once(tmp_path, monkeypatch):
    write_latents(tmp_path, n_videos=40, n_clips=200, dim=8)
    held, live, peak, reads = 32 * 1024, [0], [0], []
    monkeypatch.setattr(streaming, "HELD", held)
    real = streaming.Rows.read

    def counted(rows, start, stop):
        found = real(rows, start, stop)
        array = found if found.base is None else found.base
        live[0] += array.nbytes
        peak[0] = max(peak[0], live[0])
        weakref.finalize(array, lambda size: live.__setitem__(0, live[0] - size), array.nbytes)
        reads.append((rows.name, start))
        return found

    monkeypatch.setattr(streaming.Rows, "read", counted)
    with pytest.warns(UserWarning, match=r"\d+ of 1568 test windows are used"):
        data = read(tmp_path, BLOCKS)
    assert data.test.numel() * 4 <= held
    reads.clear()
    windows, size = data.train, 16
    order = windows.order(len(windows), torch.Generator().manual_seed(0))
    seen = sum(len(batch) for _, batch in streaming.read_ahead(windows, order.split(size)))
    assert seen == len(windows) == 32 * 196
    assert len(reads) == len(set(reads)) == 32 * -(-196 // windows._windows_a_block)
    corpus = 40 * 200 * 8 * 4
    assert peak[0] <= held < corpus / 7
    # without blocks, no more than the batches in hand
    with pytest.warns(UserWarning, match="204 of 1568 test windows are used"):
        streamed = read(tmp_path, STREAMED).train
    peak[0] = live[0] = 0
    for _ in streaming.read_ahead(streamed, torch.randperm(len(streamed))[:160].split(size)):
        assert live[0] <= 2 * size * 5 * 8 * 4


def test_a_run_trains_and_is_evaluated_behind_an_address(tmp_path, capsys):
    write_latents(tmp_path / "latents", n_videos=6)
    fs = fsspec.filesystem("memory")
    for path in (tmp_path / "latents").glob("*.safetensors"):
        fs.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    options = ["--window", "5", "--epochs", "1", "--models", "baseline", "--stream", "blocks", "--quiet", "--device", "cpu"]
    run = tmp_path / "run"
    assert cli.main(["train", "memory://bucket", "--out", str(run), *options]) == 0
    assert json.loads((run / "inputs.json").read_text())["latents"] == "memory://bucket"
    assert cli.main(["evaluate", str(run), "--quiet", "--device", "cpu"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    row = next(csv.DictReader((run / "models" / "baseline" / "history.csv").open()))
    assert summary["models"][1]["mse_mean"] == pytest.approx(float(row["test_mse"]), rel=1e-5)
    assert cli.main(["figures", str(run), "--quiet"]) == 0
    fs.store.clear()
    assert cli.main(["evaluate", str(run), "--quiet"]) == cli.EXIT_FAILURE
    assert "latent folder not found: memory://bucket" in capsys.readouterr().err


def test_latent_files_are_written_behind_an_address(tmp_path):
    target = places.place("memory://written")
    tensors = {"latents": torch.randn(4, 6), "start_frame": torch.arange(4)}
    write_one(tmp_path / "a.safetensors", tensors["latents"])
    _, metadata = files.load_tensors(tmp_path / "a.safetensors", "x")
    files.save_tensors(target / "a.safetensors", tensors, metadata)
    assert files.read_metadata(target / "a.safetensors") == metadata
    assert [str(path) for path in latents.list_files(target)] == ["memory://written/a.safetensors"]
    (found,) = latents.load_latents(target)
    assert found.name == "a"
    assert torch.equal(found.latents, tensors["latents"])
    assert files.read_metadata(target / "none.safetensors") is None
    fsspec.filesystem("memory").store.clear()


def test_videos_are_encoded_behind_an_address(tmp_path):
    pytest.importorskip("transformers", reason="the extra dev, which brings transformers, is not installed")
    video = pytest.importorskip("hjepa_fast.pipeline.videos", reason="needs av")
    video.write_video(tmp_path / "videos" / "v.mp4", np.zeros((20, 64, 64, 3), dtype=np.uint8), fps=25)
    options = ["--encoder", "offline", "--quiet", "--device", "cpu"]
    for out in ("memory://encoded", f"file://{tmp_path}/encoded", "memory://encoded"):
        assert cli.main(["encode", str(tmp_path / "videos"), "--out", out, *options]) == 0
    fs = fsspec.filesystem("memory")
    ((name, facts),) = ((name, fs.info(name)) for name in fs.ls("/encoded", detail=False))
    made = facts["created"]
    assert name == "/encoded/v.safetensors"
    assert cli.main(["encode", str(tmp_path / "videos"), "--out", "memory://encoded", *options]) == 0
    assert fs.info(name)["created"] == made  # what is there already is kept
    here, there = (latents.load_latents(places.place(p)) for p in (tmp_path / "encoded", "memory://encoded"))
    assert torch.equal(here[0].latents, there[0].latents)
    assert here[0].metadata == there[0].metadata
    fs.store.clear()


def spoiled(path, change):
    """A latent file with another header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["latents"].update(data_offsets=[0, 10**6]),
        lambda h: h["latents"].update(data_offsets=[-4, 188]),
        lambda h: h["latents"].update(data_offsets=[0, 4.5]),
        lambda h: h["latents"].update(shape=[1000, 6]),
        lambda h: h["latents"].update(dtype="F16"),
        lambda h: h["latents"].pop("dtype"),
        lambda h: h.pop("latents"),
        lambda h: h["__metadata__"].update(fps="fast"),
        lambda h: h["__metadata__"].update(fps=3),
        lambda h: h.update(__metadata__=[]),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, change):
    write_one(tmp_path / "a.safetensors", torch.randn(8, 6))
    streaming.open_latents(tmp_path)
    spoiled(tmp_path / "a.safetensors", change)
    with pytest.raises(LatentError, match="a.safetensors is not a readable latent file"):
        streaming.open_latents(tmp_path)


def test_what_is_wrong_with_latents_shows_when_they_are_read(folder):
    write_one(folder / "video_2.safetensors", torch.full((24, 6), float("nan")))
    with pytest.warns(UserWarning, match="1 videos"), pytest.raises(LatentError, match="video_2.* has 144 non-finite values"):
        read(folder, STREAMED)
    (rows, *_) = streaming.open_latents(folder)
    rows.path.write_bytes(rows.path.read_bytes()[:-100])
    with pytest.raises(LatentError, match="video_0.safetensors has become shorter"):
        rows.read(0, 12)
    rows.path.unlink()
    with pytest.raises(LatentError, match="video_0.safetensors cannot be read"):
        rows.read(0, 12)


@pytest.mark.parametrize(("field", "value"), [("split", "window"), ("control", "recorded")])
def test_what_cannot_be_streamed_is_refused(folder, field, value):
    with pytest.raises(UsageError, match=f"stream windows needs {field} .*, found {value}"):
        read(folder, dataclasses.replace(STREAMED, **{field: value}))


def test_true_states_are_not_streamed(tmp_path):
    for name in "ab":
        write_one(tmp_path / f"{name}.safetensors", torch.randn(8, 4), scene={"name": "pendulum"})
    with pytest.raises(UsageError, match="true states of a scene"):
        read(tmp_path, STREAMED)


def test_addresses_and_paths(tmp_path, monkeypatch):
    assert places.place(f"file://{tmp_path}/x") == tmp_path / "x"
    assert places.place("some/folder") == places.Path("some/folder")
    assert str(places.place("memory://a/b/") / "c.x") == "memory://a/b/c.x"
    with pytest.raises(HJEPAError, match="nowhere://a cannot be reached: .*nowhere"):
        places.place("nowhere://a")
    with pytest.raises(HJEPAError, match="not found: memory://nothing"):
        places.place("memory://nothing").read()
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match="s3://bucket needs fsspec: pip install fsspec"):
        places.place("s3://bucket")
