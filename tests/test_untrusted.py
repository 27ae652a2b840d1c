"""Files of others: whatever they hold, what comes out is what was asked for or an error of this package."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import struct
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hjepa_fast as hf
from hjepa_fast.api import BACKENDS
from hjepa_fast.cli import build_parser, config_of, main
from hjepa_fast.errors import CheckpointError, EncoderError, HJEPAError, LatentError, UsageError
from hjepa_fast.pipeline import (
    checkpoints,
    controls,
    encoder_files,
    encoders,
    files,
    latents,
    runs,
    schemas,
    train,
    untrusted,
    zoo,
)
from hjepa_fast.pipeline.config import Config, DataConfig, TrainConfig
from hjepa_fast.pipeline.dream import dream
from hjepa_fast.pipeline.figures import draw
from hjepa_fast.pipeline.latents import load_latents, read_latents
from hjepa_fast.pipeline.run_folder import Run
from hjepa_fast.pipeline.videos import load_ground_truth, write_video
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents, write_one

FACTS = {
    "format": 1,
    "model": "hnn",
    "latent_dim": 4,
    "hamiltonian": "mlp",
    "integrator": "leapfrog",
    "encoder": "offline",
    "encoding": {"model": "offline", "clip_frames": 16, "clip_stride": 4},
    "history": [],
}


def write_checkpoint(path, facts=FACTS, dim=4, **tensors):
    state = {f"model/{name}": tensor for name, tensor in zoo.build("hnn", 4, 1.0, 0).state_dict().items()}
    text = facts if isinstance(facts, str) else json.dumps(facts)
    tensors = state | {"data/mean": torch.zeros(dim), "data/std": torch.ones(dim)} | tensors
    save_file(tensors, path, metadata={"hjepa_fast": text})
    return path


class TestJson:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"a": {"b": [1, NaN]}}', "x: a.b.1 is NaN"),
            ('{"a": -Infinity}', "x: a is -Infinity"),
            ('{"a": 1e999}', "x: a is 1e999, which no 64-bit number can hold"),
            ('{"a": ' + "9" * 5000 + "}", "x: a is an integer of more than 64 bits \\(5000 characters"),
            ('{"a": {"b": 1, "b": 2}}', "x: a is an object with the key 'b' twice"),
            ("[" * 200_000 + "]" * 200_000, "x: nested too deeply"),
            ("[" * 33 + "]" * 33, "nested too deeply, expected at most 32"),
            ("[" + "[]," * 2_000_000 + "[]]", "x: too large"),
            ("{} {}", "x: Extra data"),
            ("", "x: Expecting value"),
        ],
    )
    def test_what_is_no_plain_json_is_refused_with_its_place(self, text, message):
        with pytest.raises(HJEPAError, match=message):
            untrusted.parse_json(text, "x")

    def test_what_is_plain_json_is_as_python_reads_it(self):
        text = json.dumps({"a": [1, -2.5, None, True, "é\n", {"b": 2**63 - 1}], "": {}})
        assert untrusted.parse_json(text, "x") == json.loads(text)
        assert untrusted.parse_json("[" * 32 + "]" * 32, "x") == json.loads("[" * 32 + "]" * 32)

    def test_pipes_and_devices_are_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.json")
        for path in (tmp_path / "pipe.json", pathlib.Path("/dev/zero"), tmp_path):
            with pytest.raises(HJEPAError, match="no regular file"):
                files.read_json(path, "settings")
            with pytest.raises(HJEPAError, match="no regular file"):
                files.load_tensors(path, "tensors")


class TestHeaders:
    @pytest.mark.parametrize(
        ("header", "length", "message"),
        [
            (b"{}", 2**63, "its header has 9,223,372,036,854,775,808 bytes"),
            (b"", 0, "its header has 0 bytes"),
            (b'{"a":' * 1000 + b"1" + b"}" * 1000, None, "nested too deeply"),
            (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', None, "numbers, expected at most"),
            (b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}', None, "a has no shape"),
            (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', None, "a has no shape"),
            (b'{"a":1,"a":2}', None, "the key 'a' twice"),
            (b"[]", None, "no JSON object"),
            (b"\xff\xfe", None, "can't decode"),
        ],
    )
    def test_what_a_header_cannot_say_is_refused(self, tmp_path, header, length, message):
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + b"0000")
        with pytest.raises(HJEPAError, match=message):
            files.load_tensors(path, "thing")
        assert files.read_metadata(path) is None

    def test_many_tensors_are_too_many(self, tmp_path):
        entries = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}
        header = json.dumps(entries).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(HJEPAError, match="10,001 tensors"):
            files.load_tensors(tmp_path / "x.safetensors", "thing")


class TestCheckpoints:
    def test_a_good_one_loads(self, tmp_path):
        path = write_checkpoint(tmp_path / "c.safetensors")
        assert isinstance(checkpoints.restore(checkpoints.load(path), path), hf.SymplecticIntegrator)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": True}, "format True"),
            ({"format": [1]}, r"format \[1\]"),
            ({"model": ["hnn"]}, r"model: .*found \['hnn'\]"),
            ({"model": "x"}, "unknown model x"),
            ({"latent_dim": "4"}, "latent_dim: .*integer, found '4'"),
            ({"latent_dim": True}, "latent_dim: .*found True"),
            ({"latent_dim": 4.0}, "latent_dim: .*found 4.0"),
            ({"latent_dim": 10**9}, "latent_dim: .*65536, found 1000000000"),
            ({"latent_dim": -4}, "latent_dim: .*found -4"),
            ({"latent_dim": 6}, r"data/mean .*shape \[6\].*found \[4\]"),
            ({"integrator": []}, r"integrator: .*found \[\]"),
            ({"integrator": None}, "integrator None"),
            ({"hamiltonian": "x"}, "unknown kind of Hamiltonian 'x'"),
            ({"encoding": []}, "encoding: "),
            ({"encoding": {}}, "encoding.model: Field required"),
            ({"encoding": {"model": "offline", "clip_frames": 10**9, "clip_stride": 4}}, "encoding.clip_frames: "),
            ({"encoder": "a\x1b[2Jb"}, "encoder: .*control characters"),
            ({"history": [{}]}, "history.0.epoch: Field required"),
            ({"train": {"dt_bounds": [1]}}, r"train.dt_bounds: expected 2 numbers, found \[1\]"),
            ({"train": {"dt_bounds": [2, 1]}}, "low < high"),
            ({"train": {"epochs": True}}, "train.epochs: expected int, found True"),
            ({"train": 3}, "train: "),
        ],
    )  # fmt: skip
    def test_facts_that_do_not_fit_are_named(self, tmp_path, change, message):
        path = write_checkpoint(tmp_path / "c.safetensors", FACTS | change)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(checkpoints.load(path), path)

    @pytest.mark.parametrize("text", ["[]", '"x"', "3", "{", "[" * 100_000, '{"format": NaN}', '{"format": 1, "format": 1}'])
    def test_facts_that_are_no_object_are_refused(self, tmp_path, text):
        with pytest.raises(CheckpointError, match="c.safetensors"):
            checkpoints.load(write_checkpoint(tmp_path / "c.safetensors", text))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"model/dt": torch.tensor(float("nan"))}, "model/dt holds numbers that are not finite"),
            ({"model/dt": torch.tensor(1)}, "model/dt is no plain floating-point tensor, found torch.int64"),
            ({"data/std": torch.zeros(4)}, "positive data/std"),
            ({"data/std": torch.ones(3)}, r"found \[4\] and \[3\]"),
            ({"optimizer/dt/step": torch.tensor(1.0)}, "optimizer/dt does not fit its parameter"),
            ({"optimizer/x/step": torch.tensor(1.0)}, "optimizer/x does not fit its parameter"),
        ],
    )
    def test_tensors_that_do_not_fit_are_named(self, tmp_path, tensors, message):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(write_checkpoint(tmp_path / "c.safetensors", **tensors))

    def test_random_damage_gives_errors_of_this_package_only(self, tmp_path):
        """One to four bytes of a good file are changed, mostly in its header and facts."""
        whole = write_checkpoint(tmp_path / "c.safetensors").read_bytes()
        header = struct.unpack("<Q", whole[:8])[0]
        rng = np.random.default_rng(0)
        refused = 0
        for trial in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.integers(1, 5)):
                damaged[rng.integers(0, len(whole) if trial % 4 == 0 else 8 + header)] ^= 1 << rng.integers(0, 8)
            path = tmp_path / "d.safetensors"
            path.write_bytes(damaged)
            try:
                checkpoints.restore(checkpoints.load(path), path)
            except HJEPAError:
                refused += 1
        assert refused > 50

    @pytest.mark.parametrize("bounds", [(0.001, 0.05), None, (0.1, 2.0)])
    def test_bounds_of_dt_are_recorded_and_restored(self, tmp_path, bounds):
        data = DataConfig(window=5)
        dataset = prepare(load_latents(write_latents(tmp_path / "latents")), data)
        dt = 0.5 if bounds == (0.1, 2.0) else 0.02
        config = TrainConfig(epochs=2, batch_size=8, dt=dt, dt_bounds=bounds)
        path = train.train("hnn", dataset, tmp_path / "run", config, data)
        train.train("hnn", dataset, tmp_path / "run", config, data)  # goes on: the recorded settings are the same
        loaded = checkpoints.load(path)
        model = checkpoints.restore(loaded, path)
        assert model.dt_bounds == bounds
        assert model.step_size == model.dt != dt
        assert model.dt.item() == pytest.approx(dt, rel=0.2)

    def test_checkpoints_without_recorded_bounds_have_the_published_ones(self, tmp_path):
        path = write_checkpoint(tmp_path / "c.safetensors", FACTS | {"train": {"epochs": 3}})
        loaded = checkpoints.load(path)
        assert checkpoints.restore(loaded, path).dt_bounds == (0.1, 2.0)
        assert loaded.facts["train"] == dataclasses.asdict(TrainConfig(epochs=3))


def test_a_step_size_outside_its_bounds_is_a_usage_error(tmp_path, capsys):
    write_latents(tmp_path / "latents")
    small = ["--epochs", "1", "--batch-size", "8", "--window", "5", "--models", "hnn", "--quiet"]
    command = ["train", str(tmp_path / "latents"), "--out", str(tmp_path / "run"), *small, "--dt", "0.01"]
    assert main(command) == 2
    assert "from 0.1 to 2, found 0.01" in (error := capsys.readouterr().err)
    assert "--dt-bounds LOW HIGH, or --dt-bounds none" in error
    assert not (tmp_path / "run").exists()
    assert main([*command, "--dt-bounds", "0.001", "1"]) == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert recorded["dt_bounds"] == [0.001, 1.0]
    assert main([*command, "--dt-bounds", "0.001,1"]) == 0  # the same settings: nothing to do
    for wrong in (["1"], ["2", "1"], ["a", "b"], ["1", "2", "3"], ["0.001,inf"]):
        assert main([*command, "--dt-bounds", *wrong]) == 2


def test_bounds_of_dt_can_be_taken_off_in_a_file_and_by_an_option(tmp_path):
    files.write_json(tmp_path / "c.json", {"train": {"dt_bounds": None}})
    parse = build_parser().parse_args
    assert config_of(parse(["train", "x", "--config", str(tmp_path / "c.json")])).train.dt_bounds is None
    assert config_of(parse(["train", "x", "--dt-bounds", "none"])).train.dt_bounds is None
    assert config_of(parse(["train", "x", "--dt-bounds", "-1", "1"])).train.dt_bounds == (-1.0, 1.0)
    assert config_of(parse(["train", "x"])).train.dt_bounds == (0.1, 2.0)


def test_every_backend_can_be_asked_for_and_one_that_is_not_there_is_a_usage_error(tmp_path, monkeypatch):
    for backend in BACKENDS:
        assert config_of(build_parser().parse_args(["train", "x", "--backend", backend])).train.backend == backend
    dataset = prepare(load_latents(write_latents(tmp_path / "latents")), DataConfig(window=5))
    monkeypatch.setattr(zoo, "choose_backend", _refuse)
    with pytest.raises(UsageError, match="not there"):
        train.train("hnn", dataset, tmp_path, TrainConfig(batch_size=8, backend="cuda"), DataConfig(window=5))


def _refuse(*_):
    raise RuntimeError("not there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": {"n_videos": 10**18}}, "n_videos: expected at most 1,000,000"),
        ({"videos": {"fps": 10**30}}, "fps: expected at most 1,000"),
        ({"videos": {"n_frames": 10**5, "size": 8000}}, "has 1.92e\\+13 bytes"),
        ({"train": {"seed": 2**60}}, "seed: expected at most"),
        ({"train": {"lr": float("nan")}}, "lr: expected a finite number, found nan"),
        ({"train": {"lr": 10**400}}, "lr: expected a finite number"),
        ({"train": {"epochs": 10**5000}}, "epochs: expected at most 50,000, found a number of thousands of digits"),
        ({"encode": {"encoder": "a\0b"}}, "encoder: expected a line of text"),
        ({"data": {"split": ["video"]}}, "is not one of video, window"),
        ({"videos": {"radius": [5.0] * 2000}}, "radius: expected a list of numbers"),
    ],
)
def test_settings_without_measure_are_refused(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        runs.make_videos(tmp_path / "v", Config.from_dict(change, "x"), show=False)


class TestPublished:
    @pytest.fixture
    def module(self):
        return hf.SymplecticIntegrator(hf.LatentHNN(8, (6, 5)), 0.7)

    @pytest.mark.parametrize(
        "rename",
        [
            lambda k: f"_orig_mod.{k}",
            lambda k: f"module.{k}",
            lambda k: f"module._orig_mod.{k}",
            lambda k: k.replace("hnn.", "hnn._orig_mod."),
            lambda k: k.replace("net.", "net.module."),
            lambda k: f"_orig_mod.{k}".replace("hnn.", "hnn.module._orig_mod."),
        ],
    )
    @pytest.mark.parametrize("bare", [False, True])
    def test_names_that_wrappers_add_are_taken_off(self, tmp_path, module, rename, bare):
        state = {rename(key): value for key, value in module.state_dict().items()}
        torch.save(state if bare else {"integrator_state_dict": state}, tmp_path / "c.pt")
        loaded = checkpoints.load_published(tmp_path / "c.pt")
        assert loaded.state_dict().keys() == module.state_dict().keys()
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in loaded.state_dict().items())

    def test_an_average_of_weights_loads(self, tmp_path, module):
        average = torch.optim.swa_utils.AveragedModel(module)
        torch.save({"integrator_state_dict": average.state_dict()}, tmp_path / "c.pt")
        assert torch.equal(checkpoints.load_published(tmp_path / "c.pt").dt, module.dt)

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize(
        "beside",
        [
            {"val_loss": np.float64(0.1), "epoch": np.int64(3), "flag": np.bool_(True)},
            {"losses": np.arange(5.0), "names": np.array(["a", "b"])},
            {"args": argparse.Namespace(lr=0.1, path=pathlib.Path("x"))},
            {"path": pathlib.Path("x"), "order": OrderedDict(a=1), "none": None, "default": defaultdict(list, a=[1])},
            {"config": DataConfig()},
            {"ema_state_dict": {"shadow": torch.ones(2)}},
        ],
    )
    def test_what_lies_beside_the_tensors_is_passed_over_or_named(self, tmp_path, module, beside, legacy):
        optimizer = torch.optim.AdamW(module.parameters())
        content = {"integrator_state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), **beside}
        torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
        if legacy and "config" in beside:  # such a file, of PyTorch before 1.6, does not say beforehand what it holds
            with pytest.raises(CheckpointError, match=r"class hjepa_fast\.pipeline\.config\.DataConfig.*Save it again"):
                checkpoints.load_published(tmp_path / "c.pt")
            return
        loaded = checkpoints.load_published(tmp_path / "c.pt")
        assert torch.equal(loaded.hnn.net[0].weight, module.hnn.net[0].weight)

    def test_classes_of_others_are_neither_imported_nor_called(self, tmp_path, module):
        content = {"integrator_state_dict": module.state_dict(), "x": Recorder()}
        torch.save(content, tmp_path / "c.pt")
        made.clear()
        before = set(torch.serialization.get_safe_globals())
        checkpoints.load_published(tmp_path / "c.pt")
        assert not made
        assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"hnn_state_dict": [1]}, "expected a state dict of tensors by name, found list"),
            ({"hnn_state_dict": {"net.0.weight": 3}}, "found int at 'net.0.weight'"),
            ({"integrator_state_dict": {1: torch.ones(2)}}, "found Tensor at int"),
            ({"hnn_state_dict": None}, "found: hnn_state_dict"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(())}}, "no MLP Hamiltonian"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(0, 4)}}, "no MLP Hamiltonian"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(1, 0)}}, "no MLP Hamiltonian"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(1).expand(10**6, 10**6)}}, "no plain floating-point tensor"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(1, 4, device="meta")}}, "no plain floating-point tensor"),
            ({"hnn_state_dict": {"net.0.weight": torch.ones(1, 4).to_sparse()}}, "no plain floating-point tensor"),
            ({"hnn_state_dict": {"net.0.weight": torch.full((1, 4), torch.nan)}}, "not finite"),
            ({"a.net.0.weight": torch.ones(1, 4), "module.a.net.0.weight": torch.ones(1, 4)}, "twice"),
            (hf.BaselineMLP(4, (3,)).state_dict(), "no MLP Hamiltonian"),
            ([torch.ones(2)], "found: list"),
            (hf.LatentHNN(4, (3,)), "whole object of class hjepa_fast.models.LatentHNN.*Save it again"),
        ],
    )
    def test_what_is_no_checkpoint_is_named(self, tmp_path, content, message):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_published(tmp_path / "c.pt")

    def test_double_precision_is_kept(self, tmp_path, module):
        torch.save({"integrator_state_dict": module.double().state_dict()}, tmp_path / "c.pt")
        loaded = checkpoints.load_published(tmp_path / "c.pt")
        assert loaded.hnn.net[0].weight.dtype == torch.float64
        assert torch.equal(loaded.hnn.net[0].weight, module.hnn.net[0].weight)

    def test_other_bounds_can_be_given(self, tmp_path):
        free = hf.SymplecticIntegrator(hf.LatentHNN(8, (6, 5)), 0.02, dt_bounds=None)
        torch.save({"integrator_state_dict": free.state_dict()}, tmp_path / "c.pt")
        assert checkpoints.load_published(tmp_path / "c.pt", dt_bounds=(0.01, float("inf"))).step_size == free.dt
        with pytest.warns(UserWarning, match="loaded dt, 0.02"):
            assert checkpoints.load_published(tmp_path / "c.pt").step_size.item() == pytest.approx(0.1)

    def test_random_damage_gives_errors_of_this_package_only(self, tmp_path, module):
        torch.save({"integrator_state_dict": module.state_dict(), "loss": np.float64(1)}, tmp_path / "c.pt")
        whole = (tmp_path / "c.pt").read_bytes()
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.integers(1, 5)):
                damaged[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
            (tmp_path / "d.pt").write_bytes(damaged)
            try:
                checkpoints.load_published(tmp_path / "d.pt")
            except HJEPAError:
                refused += 1
        assert refused > 20


made: list[object] = []


class Recorder:
    def __setstate__(self, state):
        made.append(state)

    def __getstate__(self):
        return {"x": 1}


class TestLatents:
    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"provenance": "[]"}, "metadata: provenance"),
            ({"provenance": "[" * 100_000}, "nested too deeply"),
            ({"provenance": '{"model": "m", "clip_frames": true}'}, "provenance.clip_frames"),
            ({"provenance": '{"model": "m", "clip_frames": 16, "clip_stride": 0}'}, "provenance.clip_stride"),
            ({"fps": "nan"}, "fps"),
            ({"fps": "1e999"}, "fps"),
            ({"n_frames": "9" * 5000}, "delete it and encode again"),
            ({"n_frames": "3"}, "frames outside 0 to 2"),
            ({"label": "\x1b[2J"}, "control characters"),
        ],
    )
    def test_facts_that_do_not_fit_are_refused(self, tmp_path, metadata, message):
        path = tmp_path / "a.safetensors"
        write_one(path, torch.ones(3, 4))
        tensors, known = files.load_tensors(path, "x")
        files.save_tensors(path, tensors, known | metadata)
        with pytest.raises(LatentError, match=message):
            read_latents(path)
        assert not latents.is_current(path, {"model": "other", "source_frames": "shown"}, path)

    @pytest.mark.parametrize("starts", [torch.tensor([0.0, 4.0, 8.0]), torch.tensor([-1, 4, 8]), torch.tensor([0, 4, 10**9])])
    def test_clips_that_start_nowhere_are_refused(self, tmp_path, starts):
        path = tmp_path / "a.safetensors"
        write_one(path, torch.ones(3, 4))
        tensors, known = files.load_tensors(path, "x")
        files.save_tensors(path, tensors | {"start_frame": starts}, known)
        with pytest.raises(LatentError, match="start at frames outside"):
            read_latents(path)

    def test_random_damage_gives_errors_of_this_package_only(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write_one(path, torch.randn(3, 4))
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(rng.integers(1, 5)):
                damaged[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
            path.write_bytes(damaged)
            with contextlib.suppress(HJEPAError):
                read_latents(path)

    @pytest.mark.parametrize(
        "change",
        [{"positions": torch.ones(3, 2)}, {"velocities": torch.ones(2, 1, 2)}, {"radii": torch.ones(2)},
         {"positions": torch.full((3, 1, 2), torch.inf)}, {"radii": torch.ones(1, dtype=torch.int64)}],
    )  # fmt: skip
    def test_ground_truth_of_other_shapes_is_refused(self, tmp_path, change):
        good = {"positions": torch.ones(3, 1, 2), "velocities": torch.ones(3, 1, 2), "radii": torch.ones(1)}
        files.save_tensors(tmp_path / "v.safetensors", good, {})
        assert load_ground_truth(tmp_path / "v.mp4").positions.shape == (3, 1, 2)
        files.save_tensors(tmp_path / "v.safetensors", good | change, {})
        with pytest.raises(HJEPAError, match="not the ground truth"):
            load_ground_truth(tmp_path / "v.mp4")


class TestControls:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "c.json"),
            ("[[1, 2]]", "valid dictionary"),
            ('{"control": []}', "control: List should have at least 1 item"),
            ('{"control": [[]]}', "control.0: List should have at least 1 item"),
            ('{"control": [[1], ["2"]]}', "control.1.0: Input should be a valid number, found '2'"),
            ('{"control": [[1], [true]]}', "control.1.0: Input should be a valid number, found True"),
            ('{"control": [[1], [NaN]]}', "control.1.0 is NaN"),
            ('{"control": [[1], [2, 3]]}', "found 1 in row 0 and 2 in row 1"),
            ('{"about": 3, "control": [[1]]}', "about"),
        ],
    )
    def test_what_is_no_control_is_refused(self, tmp_path, text, message):
        path = tmp_path / "c.json"
        path.write_text(text)
        with pytest.raises(HJEPAError, match=re.escape(message)):
            controls.read(path)

    def test_random_damage_gives_errors_of_this_package_only(self, tmp_path):
        path, rng = tmp_path / "c.json", np.random.default_rng(0)
        controls.write(path, torch.randn(30, 2, dtype=torch.float64), "a test")
        whole, refused = path.read_bytes(), 0
        assert controls.read(path).shape == (30, 2)
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.integers(1, 5)):
                damaged[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
            path.write_bytes(damaged)
            try:
                assert controls.read(path).isfinite().all()
            except HJEPAError:
                refused += 1
        assert refused > 50

    @pytest.mark.parametrize(
        ("facts", "tensors", "message"),
        [
            ({"control_dim": 2}, {}, r"data/control_scale of shape \[2\], as control_dim says; found absent"),
            ({"control_dim": 2}, {"data/control_scale": torch.ones(3)}, r"shape \[2\], .* found \[3\]"),
            ({"control_dim": 2}, {"data/control_scale": torch.tensor([1.0, 0.0])}, r"expected positive data/control_scale"),
            ({"control_dim": 2}, {"data/control_scale": torch.ones(2)}, r"hnn.H.net.0.bias is absent in the file"),
            ({"control_dim": -1}, {}, "control_dim: Input should be greater than or equal to 0"),
            ({"control_dim": 10**6}, {}, "control_dim"),
            ({"friction": "viscous"}, {}, "cannot be used: friction must be one of"),
            ({"friction": "conformal"}, {}, r"hnn.H.net.0.bias is absent in the file"),
            ({"friction": "conformal", "integrator": "tao"}, {}, "tao is not there with friction"),
        ],
    )
    def test_checkpoints_whose_friction_or_control_do_not_fit(self, tmp_path, facts, tensors, message):
        path = write_checkpoint(tmp_path / "c.safetensors", FACTS | facts, **tensors)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(checkpoints.load(path), path)


def test_random_damage_to_settings_gives_errors_of_this_package_only(tmp_path):
    files.write_json(tmp_path / "c.json", Config().to_dict())
    whole = (tmp_path / "c.json").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
        (tmp_path / "d.json").write_bytes(damaged)
        with contextlib.suppress(HJEPAError):
            Config.from_dict(files.read_json(tmp_path / "d.json", "x"), "x")


class TestRunFolders:
    @pytest.fixture
    def trained(self, tmp_path):
        """A run and its latents, and a folder outside both."""
        write_latents(tmp_path / "latents")
        (tmp_path / "outside").mkdir()
        small = [
            "--epochs",
            "1",
            "--batch-size",
            "8",
            "--window",
            "5",
            "--timing-runs",
            "1",
            "--extended-steps",
            "20",
            "--quiet",
        ]
        out = tmp_path / "run"
        assert main(["train", str(tmp_path / "latents"), "--out", str(out), "--models", "hnn", *small]) == 0
        return Run(out), tmp_path / "outside"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[]", "inputs.json: "),
            ('{"latents": 3, "videos": null}', "latents: .*found 3"),
            ('{"latents": null, "videos": null}', "latents: .*found None"),
            ('{"videos": null}', "latents: Field required"),
            ('{"videos": null, "latents": "../latents"}', "leads out of the run's folder"),
        ],
    )
    def test_inputs_that_do_not_fit_are_refused(self, trained, text, message):
        run, _ = trained
        run.inputs.write_text(text)
        with pytest.raises(HJEPAError, match=message):
            runs.evaluate_run(run, "cpu", False)

    @pytest.mark.parametrize("name", ["models/hnn", "figures", "summary.json", "config.json", "models/hnn/best.safetensors"])
    def test_nothing_is_read_or_written_through_a_link_that_leads_out(self, trained, name):
        run, outside = trained
        run.figures.mkdir()
        run.summary.write_text("{}")
        path = run.root / name
        path.rename(outside / "moved")
        path.symlink_to(outside / "moved")
        before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
        with pytest.raises(HJEPAError, match="leads out of the run's folder"):
            runs.evaluate_run(run, "cpu", False)
            draw(run)
        assert before == {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}

    def test_a_file_is_not_written_through_a_folder_that_leads_out(self, trained):
        run, outside = trained
        (run.root / "figures").symlink_to(outside)
        with pytest.warns(UserWarning, match="figures was a link out of the run's folder"):
            files.write_text(run.root / "figures" / "x.txt", "x")
        assert not list(outside.iterdir())
        assert (run.root / "figures" / "x.txt").read_text() == "x"
        assert not (run.root / "figures").is_symlink()
        (run.root / "inside").symlink_to(run.root / "figures")
        files.write_text(run.root / "inside" / "y.txt", "y")
        assert (run.root / "inside").is_symlink()

    def test_a_run_behind_a_link_is_a_run(self, trained, tmp_path):
        run, _ = trained
        (tmp_path / "link").symlink_to(run.root)
        runs.evaluate_run(Run(tmp_path / "link"), "cpu", False)
        assert draw(Run(tmp_path / "link"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"models": []}, "models: "),
            ({"models": [{"name": "x"}]}, "models.0.title: Field required"),
            ({"n_steps": True}, "n_steps: "),
            ({"integrators": [{"integrator": "leapfrog", "trained": False}]}, "no integrator is the one"),
            (
                {"integrators": [{"integrator": "x", "trained": True}]},
                "expected floating-point numbers .*'integrators/x/energy'",
            ),
        ],
    )
    def test_summaries_that_do_not_fit_are_refused(self, trained, change, message):
        run, _ = trained
        summary = runs.evaluate_run(run, "cpu", False)
        files.write_json(run.summary, summary | change)
        with pytest.raises(HJEPAError, match=message):
            draw(run)

    def test_arrays_that_do_not_fit_are_refused(self, trained):
        run, _ = trained
        summary = runs.evaluate_run(run, "cpu", False)
        arrays, metadata = files.load_tensors(run.arrays, "x")
        schemas.check_arrays(summary, arrays, zoo.MODELS.keys() | {"persistence"}, "x")
        for name in arrays.keys() - {f"{name}/energy" for name in ("hnn", "persistence")}:
            for change in (None, torch.zeros(3), torch.zeros(0, 2), torch.zeros(2, 2, dtype=torch.int64)):
                changed = {key: value for key, value in (arrays | {name: change}).items() if value is not None}
                with pytest.raises(HJEPAError, match=f"x: expected floating-point numbers .* in '{name}'"):
                    schemas.check_arrays(summary, changed, zoo.MODELS.keys() | {"persistence"}, "x")
        files.save_tensors(run.arrays, {"x": torch.zeros(1)}, metadata)
        with pytest.raises(HJEPAError, match="is not what .*summary.json was made with"):
            draw(run)
        files.write_text(run.summary, json.dumps(summary | {"arrays_sha256": None}))  # as an older version wrote it
        with pytest.raises(HJEPAError, match="'true/example', found absent"):
            draw(run)


class TestEncoders:
    """What a file names is not fetched; what the caller names is."""

    @pytest.fixture
    def fetched(self, monkeypatch):
        pytest.importorskip("transformers", reason="the extra dev, which brings transformers, is not installed")
        names = []

        def download(name, revision):
            names.append((name, revision))
            raise EncoderError("no hub here")

        monkeypatch.setattr(encoder_files, "download", download)
        monkeypatch.setattr(encoder_files, "cached_folder", lambda name, revision: None)
        return names

    @pytest.fixture
    def video(self, tmp_path):
        write_video(tmp_path / "v.mp4", np.zeros((16, 32, 32, 3), np.uint8), 30)
        return tmp_path / "v.mp4"

    def test_a_checkpoint_cannot_name_a_hub_encoder(self, tmp_path, fetched, video):
        facts = FACTS | {"encoding": FACTS["encoding"] | {"model": "evil/model", "commit": "abc"}}
        path = write_checkpoint(tmp_path / "c.safetensors", facts)
        with pytest.raises(EncoderError, match=r"evil/model .* named by a file.*Give --encoder evil/model"):
            dream(path, tmp_path / "d", video=video)
        assert not fetched
        with pytest.raises(EncoderError, match="no hub here"):
            dream(path, tmp_path / "d", video=video, encoder="evil/model")
        with pytest.raises(EncoderError, match="no hub here"):
            dream(path, tmp_path / "d", video=video, encoder="other/model")
        assert fetched == [("evil/model", "abc"), ("other/model", "main")]

    def test_a_checkpoint_cannot_name_a_folder_of_other_weights(self, tmp_path, video):
        facts = FACTS | {"encoding": FACTS["encoding"] | {"model": str(encoder_files.offline_encoder.FOLDER)}}
        path = write_checkpoint(tmp_path / "c.safetensors", facts)
        with pytest.raises(EncoderError, match="holds other weights: name a folder with --encoder"):
            dream(path, tmp_path / "d", video=video)
        facts["encoding"]["model"] = "gone"
        with pytest.raises(EncoderError, match="name a folder with --encoder"):
            dream(write_checkpoint(path, facts), tmp_path / "d", video=video)

    def test_a_file_of_settings_cannot_name_a_hub_encoder(self, tmp_path, fetched, video, capsys):
        (tmp_path / "videos").mkdir()
        video.rename(tmp_path / "videos" / "v.mp4")
        command = ["encode", str(tmp_path / "videos"), "--out", str(tmp_path / "l"), "--quiet"]
        for settings in ({"encoder": "evil/model"}, {"revision": "refs/pr/1"}):
            files.write_json(tmp_path / "c.json", {"encode": settings})
            assert main([*command, "--config", str(tmp_path / "c.json")]) == 1
            assert "is named by a file" in capsys.readouterr().err
        assert not fetched
        assert main([*command, "--config", str(tmp_path / "c.json"), "--encoder", "my/model"]) == 1
        assert main(command) == 1
        assert [name for name, _ in fetched] == ["my/model", Config().encode.encoder]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 10**9}, "hidden_size: .*found 1000000000"),
            ({"num_hidden_layers": 200}, "describes an encoder of .* weights, the safetensors files hold"),
            ({"num_hidden_layers": True}, "num_hidden_layers: "),
            ({"crop_size": "x"}, "crop_size: "),
        ],
    )
    def test_settings_of_an_encoder_without_measure_are_refused(self, tmp_path, change, message):
        pytest.importorskip("transformers", reason="the extra dev, which brings transformers, is not installed")
        for file in encoder_files.offline_encoder.FOLDER.iterdir():
            if file.suffix in (".json", ".safetensors"):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(EncoderError, match=message):
            encoders.load_encoder(str(tmp_path), device="cpu")
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
        with pytest.raises(EncoderError, match="in the same folder"):
            encoders.load_encoder(str(tmp_path), device="cpu")


def test_schemas_name_the_first_fault():
    with pytest.raises(LatentError, match="x: videos: Field required"):
        schemas.check(schemas.Inputs, {"latents": "a"}, "x", LatentError)
