"""Training: schedules, losses, selection, determinism, resuming, failure; and checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast.errors import CheckpointError, TrainingError, UsageError
from hjepa_fast.pipeline import checkpoints, files, train, zoo
from hjepa_fast.pipeline.config import DataConfig, TrainConfig
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents

DATA = DataConfig(window=5)
CONFIG = TrainConfig(epochs=4, batch_size=8)


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path / "latents")), DATA)


def run(name, dataset, folder, config=CONFIG, **kwargs):
    path = train.train(name, dataset, folder, config, DATA, **kwargs)
    return checkpoints.load(path), checkpoints.load(folder / "last.safetensors").facts["history"]


def losses(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_schedules_match_the_published_ones():
    config = TrainConfig(epochs=50)
    assert train.energy_weight(1, config) == pytest.approx(0.1)
    assert train.energy_weight(50, config) == pytest.approx(1.0)
    assert train.energy_weight(25, config) == pytest.approx(0.1 + 0.9 * 24 / 49)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-5)
    for epoch in range(1, 51):
        assert train.learning_rate(epoch, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("reference", ["z1", "z0"])
def test_loss_terms_as_written(reference):
    model = zoo.build("hnn", 6, dt=0.7, seed=3)
    windows = torch.randn(3, 5, 6)
    mse, term = train.loss_terms(model, windows, dataclasses.replace(CONFIG, energy_reference=reference), energy_loss=True)
    states = [windows[:, 0]]
    for _ in range(4):
        states.append(model.step(states[-1]))
    errors = [(states[t] - windows[:, t]).square().mean() for t in range(1, 5)]
    H = [model.hnn(state).squeeze(-1) for state in states]
    first = H[1] if reference == "z1" else H[0]
    torch.testing.assert_close(mse, sum(errors) / 4)
    torch.testing.assert_close(term, sum((H[t] - first).abs().mean() for t in range(1, 5)) / 4)
    assert train.loss_terms(model, windows, CONFIG, energy_loss=False)[1] == 0


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_learns(name, dataset, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=25, lr=4e-3)
    checkpoint, history = run(name, dataset, tmp_path / name, config)
    assert history[-1]["train_mse"] < 0.9 * history[0]["train_mse"]
    best = min(history, key=lambda row: row["test_mse"])
    assert checkpoint.facts["history"][-1]["test_mse"] == best["test_mse"]
    model = checkpoints.restore(checkpoint, tmp_path)
    assert train.rollout_error(model, dataset.test) == pytest.approx(best["test_mse"], rel=1e-6)
    if zoo.MODELS[name].integrator:
        assert history[-1]["dt"] != history[0]["dt"]


def test_models_of_one_kind_start_equal():
    first, second = zoo.build("hnn", 6, 1.0, seed=1), zoo.build("hnn-euler", 6, 1.0, seed=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    other = zoo.build("hnn", 6, 1.0, seed=2)
    assert not torch.equal(first.hnn.net[0].weight, other.hnn.net[0].weight)


def test_training_is_deterministic_from_its_seed(dataset, tmp_path):
    first, second = (run("hnn", dataset, tmp_path / name)[1] for name in ("a", "b"))
    other = run("hnn", dataset, tmp_path / "c", dataclasses.replace(CONFIG, seed=1))[1]
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


@pytest.mark.parametrize("name", ["hnn", "baseline"])
def test_interrupted_training_resumes_bit_equal(name, dataset, tmp_path):
    whole, history = run(name, dataset, tmp_path / "whole")

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, dataset, tmp_path / "parts", log=interrupt)
    seen = []
    resumed, resumed_history = run(name, dataset, tmp_path / "parts", log=lambda row: seen.append(row["epoch"]))
    assert seen == [3, 4]
    assert losses(resumed_history) == losses(history)
    assert whole.model.keys() == resumed.model.keys()
    assert all(torch.equal(whole.model[key], resumed.model[key]) for key in whole.model)
    run(name, dataset, tmp_path / "parts", log=lambda row: pytest.fail("a finished run was trained again"))


def test_history_is_written_as_csv_and_json(dataset, tmp_path):
    _, history = run("hnn", dataset, tmp_path)
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_mse"]) for row in rows] == [row["test_mse"] for row in history]
    facts = json.loads((tmp_path / "last.json").read_text())
    assert facts["history"] == history
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))


def test_a_folder_with_other_settings_is_refused(dataset, tmp_path):
    run("hnn", dataset, tmp_path)
    with pytest.raises(TrainingError, match=r"another train: .*0.001.* expected .*0.002"):
        run("hnn", dataset, tmp_path, dataclasses.replace(CONFIG, lr=2e-3))
    with pytest.raises(TrainingError, match="another model: found 'hnn', expected 'baseline'"):
        run("baseline", dataset, tmp_path)


def test_a_loss_that_is_not_finite_stops_with_its_place(dataset, tmp_path):
    poisoned = dataclasses.replace(dataset, train=dataset.train.clone())
    poisoned.train[:, 2] = float("inf")
    with pytest.raises(TrainingError, match=r"HNN \(full\): the loss is inf in epoch 1, batch 1"):
        run("hnn", poisoned, tmp_path)
    assert not (tmp_path / "last.safetensors").exists()


def test_gradients_are_clipped_separately(dataset, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: seen.append((len(list(parameters)), norm)))
    run("hnn", dataset, tmp_path, dataclasses.replace(CONFIG, epochs=1, batch_size=32))
    assert seen == [(8, 1.0), (1, 1.0)]


def test_autocast_rounds_the_plain_network_and_leaves_rollouts_in_float32(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2)
    for name in ("baseline", "hnn"):
        low = run(name, dataset, tmp_path / f"{name}-low", dataclasses.replace(config, amp="bfloat16"))[1]
        exact = run(name, dataset, tmp_path / name, config)[1]
        assert low[0]["train_mse"] == pytest.approx(exact[0]["train_mse"], rel=0.05)
        assert (low[0]["train_mse"] == pytest.approx(exact[0]["train_mse"], rel=1e-6)) == (name == "hnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, found 0"),
        ({"lr": -1.0}, "lr must be positive, found -1.0"),
        ({"lr": float("nan")}, "lr must be positive, found nan"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"batch_size": 100}, "batch_size 100 is larger than the training set of 32 windows"),
    ],
)
def test_bad_numbers_are_named(dataset, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        run("hnn", dataset, tmp_path, dataclasses.replace(CONFIG, **change))


def test_unknown_models_and_odd_sizes():
    with pytest.raises(UsageError, match="unknown model resnet; known: hnn, "):
        zoo.build("resnet", 6, 1.0, 0)
    with pytest.raises(UsageError, match="even size .* found 5"):
        zoo.build("hnn", 5, 1.0, 0)
    assert zoo.build("baseline", 5, 1.0, 0).latent_dim == 5


class TestCheckpoints:
    def test_missing_truncated_and_foreign_files(self, dataset, tmp_path):
        run("hnn", dataset, tmp_path)
        whole = (tmp_path / "best.safetensors").read_bytes()
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[: len(whole) // 2])
        foreign = tmp_path / "foreign.safetensors"
        files.save_tensors(foreign, {"x": torch.zeros(1)}, {})
        for path, message in (
            (tmp_path / "none.safetensors", "checkpoint not found"),
            (cut, "not a readable safetensors file"),
            (foreign, "was not written by hjepa_fast"),
        ):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.load(path)

    def test_another_shape_is_named(self, dataset, tmp_path):
        checkpoint, _ = run("hnn", dataset, tmp_path)
        checkpoint.model["hnn.net.0.weight"] = torch.zeros(512, 8)
        with pytest.raises(CheckpointError, match=r"hnn.net.0.weight is \[512, 8\] in the file, \[512, 6\] in the model"):
            checkpoints.restore(checkpoint, tmp_path)

    @pytest.mark.parametrize("with_integrator", [True, False])
    def test_published_pickles_load(self, tmp_path, with_integrator):
        hnn = hf.LatentHNN(8, (6, 5, 4))
        integrator = hf.SymplecticIntegrator(hnn, dt=1.167)
        content = {"epoch": 50, "hnn_state_dict": hnn.state_dict()}
        if with_integrator:
            content["integrator_state_dict"] = integrator.state_dict()
        torch.save(content, tmp_path / "published.pt")
        loaded = checkpoints.load_published(tmp_path / "published.pt")
        z = torch.randn(2, 8)
        expected = hf.leapfrog(hnn, z, 1.167 if with_integrator else 1.0, 3)
        torch.testing.assert_close(loaded.rollout(z, 3), expected)

    def test_pickles_are_never_executed(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        path = tmp_path / "attack.pt"
        torch.save({"hnn_state_dict": Attack()}, path)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint of plain tensors"):
            checkpoints.load_published(path)
        assert not (tmp_path / "executed").exists()

    def test_other_published_content_is_named(self, tmp_path):
        path = tmp_path / "other.pt"
        with pytest.raises(CheckpointError, match="not found"):
            checkpoints.load_published(path)
        torch.save({"weights": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match="neither hnn_state_dict nor integrator_state_dict, found: weights"):
            checkpoints.load_published(path)
        path.write_bytes(pickle.dumps(object, protocol=2))
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.load_published(path)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_three_epochs_through_the_operators_match_nested_autograd(backend, tmp_path):
    """The published network and training on the same batches from the same weights: the same losses to 1e-4."""
    data = prepare(load_latents(write_latents(tmp_path / "latents", n_videos=6, n_clips=34, dim=32)), DataConfig())
    config = TrainConfig(epochs=3, batch_size=16)
    expected, found = (
        run("hnn", data, tmp_path / name, dataclasses.replace(config, backend=name))[1] for name in ("reference", backend)
    )
    for a, b in zip(expected, found, strict=True):
        for key in ("train_loss", "train_mse", "test_mse", "dt"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert b["train_energy"] == pytest.approx(a["train_energy"], rel=1e-3, abs=1e-6)
