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
from hjepa_fast.diagnostics import power_balance
from hjepa_fast.errors import CheckpointError, TrainingError, UsageError
from hjepa_fast.pipeline import checkpoints, controls, files, train, zoo
from hjepa_fast.pipeline.config import DataConfig, TrainConfig
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents

DATA = DataConfig(window=5)
CONFIG = TrainConfig(epochs=4, batch_size=8)


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path / "latents")), DATA)


@pytest.fixture
def small_networks(monkeypatch):
    monkeypatch.setattr(zoo, "LatentHNN", lambda dim: hf.LatentHNN(dim, (8, 8)))


@pytest.fixture
def driven(tmp_path):
    latents = load_latents(write_latents(tmp_path / "driven"))
    for item in latents:
        controls.write(tmp_path / f"{item.name}.control.json", torch.randn(60, 2).double(), "test")
    return prepare(latents, dataclasses.replace(DATA, control="recorded"), tmp_path)


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


@pytest.mark.parametrize("friction", ["conformal", "rayleigh"])
def test_the_energy_loss_leaves_out_what_friction_and_control_do(friction):
    """H(z_t) less the power put in and plus the power lost, by the trapezoidal rule with `power_balance`."""
    config = dataclasses.replace(CONFIG, friction=friction)
    model = zoo.assemble(zoo.spec_in("hnn", config, 2), 6, 0.7, seed=3)
    assert not model.hnn.port.any()  # it starts as the model without a control
    nn.init.normal_(model.hnn.port)
    windows, control = torch.randn(3, 5, 6), torch.randn(3, 4, 2)
    mse, term = train.loss_terms(model, windows, config, True, control)
    states = [windows[:, 0]]
    for t in range(4):
        states.append(model.trajectory(states[-1], 1, control=control[:, t]).states[:, 1])
    E = [model.hnn(states[0]).squeeze(-1)]
    for t in range(4):
        ends = [power_balance(model.hnn, states[t + k], control[:, t]) for k in (0, 1)]
        work = 0.7 * sum(end.supplied - end.lost for end in ends) / 2
        E.append(E[-1] + (model.hnn(states[t + 1]) - model.hnn(states[t])).squeeze(-1) - work)
    torch.testing.assert_close(mse, sum((states[t] - windows[:, t]).square().mean() for t in range(1, 5)) / 4)
    torch.testing.assert_close(term, sum((E[t] - E[1]).abs().mean() for t in range(1, 5)) / 4, rtol=1e-3, atol=1e-6)
    term.backward()
    assert model.hnn.raw_friction.grad.abs() > 0
    assert model.hnn.port.grad.abs().sum() > 0


def test_friction_and_control_train_resume_and_come_back(driven, tmp_path, small_networks):
    config = dataclasses.replace(CONFIG, epochs=3, batch_size=16, friction="rayleigh", friction_per_dimension=True, lr=1e-2)
    data = dataclasses.replace(DATA, control="recorded")
    whole = checkpoints.load(train.train("hnn", driven, tmp_path / "whole", config, data))

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train("hnn", driven, tmp_path / "parts", config, data, log=interrupt)
    path = train.train("hnn", driven, tmp_path / "parts", config, data)
    resumed = checkpoints.load(path)
    assert all(torch.equal(whole.model[key], resumed.model[key]) for key in whole.model)
    assert (resumed.facts["friction"], resumed.facts["control_dim"]) == ("rayleigh", 2)
    torch.testing.assert_close(resumed.control_scale, driven.control_scale)
    model = checkpoints.restore(resumed, path)
    assert model.hnn.friction.shape == (3,)
    assert (model.hnn.friction >= 0).all()
    best = min(row["test_mse"] for row in resumed.facts["history"])
    assert train.rollout_error(model, driven.test, driven.test_control) == pytest.approx(best, rel=1e-6)
    assert train.rollout_error(model, driven.test) != pytest.approx(best, rel=1e-3)  # without its control
    with pytest.raises(TrainingError, match="another friction: found 'rayleigh', expected 'conformal'"):
        train.train("hnn", driven, tmp_path / "parts", dataclasses.replace(config, friction="conformal"), data)
    with pytest.raises(TrainingError, match="another control_dim: found 2, expected 0"):
        train.train("hnn", prepare(load_latents(tmp_path / "driven"), DATA), tmp_path / "parts", config, DATA)


def test_what_a_model_lacks_is_all_it_lacks(driven, tmp_path, small_networks):
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=32, friction="conformal")
    data = dataclasses.replace(DATA, control="recorded")
    found = {}
    for name in ("hnn", "hnn-no-friction", "hnn-no-control", "baseline"):
        path = train.train(name, driven, tmp_path / name, config, data)
        found[name] = checkpoints.restore(checkpoints.load(path), path)
    ports = {name: zoo.port_of(model) for name, model in found.items()}
    assert [(p.kind, p.control_dim) for p in ports.values() if p] == [("conformal", 2), (None, 2), ("conformal", 0)]
    assert [zoo.title(name, model) for name, model in found.items()] == [
        "HNN (full) + friction, control", "HNN (no friction) + control", "HNN (no control) + friction", "Baseline MLP"
    ]  # fmt: skip
    assert zoo.spec_in("hnn-no-control", dataclasses.replace(config, integrator="rk4"), 2).title == (
        "HNN (no control, rk4) + friction"
    )
    with pytest.raises(UsageError, match="tao is not there with friction or a control"):
        train.train("hnn", driven, tmp_path / "t", dataclasses.replace(config, integrator="tao"), data)


def test_checkpoints_from_before_friction_load_and_go_on(dataset, tmp_path, small_networks):
    config = dataclasses.replace(CONFIG, epochs=1)
    run("hnn", dataset, tmp_path, config)
    for name in ("best", "last"):
        path = tmp_path / f"{name}.safetensors"
        old = checkpoints.load(path)
        for key in ("friction", "control_dim"):
            del old.facts[key]
        del old.facts["train"]["friction"], old.facts["train"]["friction_per_dimension"], old.facts["data"]["control"]
        checkpoints.save(path, old)
    assert "control" not in (tmp_path / "last.json").read_text()
    assert zoo.port_of(checkpoints.restore(checkpoints.load(path), path)) is None
    run("hnn", dataset, tmp_path, config, log=lambda row: pytest.fail("trained again"))


PUBLISHED = zoo.chosen(None, CONFIG, DATA)


@pytest.mark.parametrize("name", PUBLISHED)
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
    damped = dataclasses.replace(config, epochs=1, friction="conformal")
    low, exact = (
        run("hnn", dataset, tmp_path / f"damped-{amp}", dataclasses.replace(damped, amp=amp))[1] for amp in ("bfloat16", "off")
    )
    assert low[0]["train_energy"] == pytest.approx(exact[0]["train_energy"], rel=1e-4)


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
