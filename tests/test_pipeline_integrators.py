"""Integrators and kinds of H through the pipeline: training, checkpoints, comparison, failure."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.cli import main
from hjepa_fast.diagnostics import energy_balance
from hjepa_fast.errors import CheckpointError, TrainingError, UsageError
from hjepa_fast.pipeline import checkpoints, evaluate, files, train, zoo
from hjepa_fast.pipeline.config import DataConfig, EvaluateConfig, TrainConfig
from hjepa_fast.pipeline.dream import dream
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.windows import prepare
from hjepa_fast.schemes import SCHEMES
from synthetic import write_latents

DATA = DataConfig(window=5)
CONFIG = TrainConfig(epochs=2, batch_size=8)
EVALUATE = EvaluateConfig(extended_steps=30, dream_steps=6, timing_warmup=0, timing_runs=1)
OPTIONS = ("--epochs", "1", "--batch-size", "8", "--window", "5", "--timing-runs", "1", "--timing-warmup", "0",
           "--extended-steps", "20", "--quiet")  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path / "latents")), DATA)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def curved(model, factor=12.0):
    """The model with an H so curved that implicit steps cannot be solved."""
    with torch.no_grad():
        for parameter in model.hnn.parameters():
            parameter.mul_(factor)
    return model


class TestZoo:
    def test_modules_name_the_integrators_they_know(self):
        for make in (hf.SymplecticIntegrator, lambda hnn, integrator: hf.SymplecticIntegrator(hnn, integrator=integrator)):
            with pytest.raises((ValueError, TypeError)):
                make(hf.LatentHNN(4), "verlet")
        with pytest.raises(ValueError, match="integrator must be one of leapfrog, implicit-leapfrog, .*; found 'verlet'"):
            hf.SymplecticIntegrator(hf.LatentHNN(4), integrator="verlet")

    def test_kinds_of_h_and_integrators(self):
        implicit, separable = (zoo.build(name, 6, 1.0, 0) for name in ("hnn-implicit", "hnn-separable"))
        assert (type(implicit.hnn), implicit.integrator) == (hf.LatentHNN, "implicit-leapfrog")
        assert (type(separable.hnn), separable.integrator) == (hf.SeparableHNN, "leapfrog")
        assert zoo.title("hnn-implicit", implicit) == "HNN (implicit leapfrog)"
        assert zoo.title("hnn-separable", separable) == "Separable HNN"

    @pytest.mark.parametrize("latent_dim", [192, 1024])
    def test_a_separable_h_has_about_as_many_parameters(self, latent_dim):
        count = {
            name: sum(p.numel() for p in zoo.build(name, latent_dim, 1.0, 0).hnn.parameters())
            for name in ("hnn", "hnn-separable")
        }
        assert count["hnn-separable"] == pytest.approx(count["hnn"], rel=0.1)

    def test_the_option_is_for_the_full_model_alone(self):
        for name, own in zoo.MODELS.items():
            spec = zoo.spec_of(name, "suzuki4")
            if own.lacks:  # differs from the full model in that alone
                assert spec.integrator == "suzuki4"
                continue
            if name == "hnn":
                assert (spec.title, spec.integrator) == ("HNN (full, suzuki4)", "suzuki4")
                assert zoo.title(name, zoo.build(name, 6, 1.0, 0, integrator="suzuki4")) == spec.title
            else:
                assert spec == own
        assert zoo.spec_of("hnn") == zoo.spec_of("hnn", "auto") == zoo.spec_of("hnn", "leapfrog") == zoo.MODELS["hnn"]

    def test_what_is_not_there_is_named(self):
        spec = dataclasses.replace(zoo.MODELS["hnn-separable"], integrator="verlet")
        message = "Separable HNN: integrator 'verlet' is not there for a separable H; expected one of leapfrog, "
        with pytest.raises(UsageError, match=message):
            zoo.assemble(spec, 6, 1.0, 0)
        assert zoo.assemble(dataclasses.replace(spec, integrator="implicit-midpoint"), 6, 1.0, 0)
        with pytest.raises(UsageError, match="unknown kind of Hamiltonian 'quadratic'"):
            zoo.assemble(dataclasses.replace(spec, hamiltonian="quadratic"), 6, 1.0, 0)


class TestTraining:
    @pytest.mark.parametrize("integrator", SCHEMES)
    def test_every_integrator_trains_and_its_checkpoint_knows(self, integrator, dataset, tmp_path):
        config = dataclasses.replace(CONFIG, epochs=1, integrator=integrator)
        best = train.train("hnn", dataset, tmp_path / "run", config, DATA)
        facts = json.loads(best.with_suffix(".json").read_text())
        assert (facts["integrator"], facts["hamiltonian"]) == (integrator, "mlp")
        model = checkpoints.restore(checkpoints.load(best), best)
        assert model.integrator == integrator
        expected = hf.rollout(model.hnn, dataset.test[:, 0], model.step_size, 3, integrator=integrator).states
        torch.testing.assert_close(model.rollout(dataset.test[:, 0], 3), expected)

    @pytest.mark.parametrize("name", ["hnn-implicit", "hnn-separable"])
    def test_an_interrupted_training_resumes_bit_equal(self, name, dataset, tmp_path):
        def interrupt(row):
            raise KeyboardInterrupt

        train.train(name, dataset, tmp_path / "whole", CONFIG, DATA)
        with pytest.raises(KeyboardInterrupt):
            train.train(name, dataset, tmp_path / "parts", CONFIG, DATA, log=interrupt)
        train.train(name, dataset, tmp_path / "parts", CONFIG, DATA)
        whole, parts = (checkpoints.load(tmp_path / folder / "last.safetensors") for folder in ("whole", "parts"))
        assert whole.facts["hamiltonian"] == zoo.MODELS[name].hamiltonian
        assert all(torch.equal(whole.model[key], parts.model[key]) for key in whole.model)

    def test_another_integrator_does_not_go_on_from_there(self, dataset, tmp_path):
        train.train("hnn", dataset, tmp_path, CONFIG, DATA)
        with pytest.raises(TrainingError, match="another integrator: found 'leapfrog', expected 'suzuki4'"):
            train.train("hnn", dataset, tmp_path, dataclasses.replace(CONFIG, integrator="suzuki4"), DATA)

    def test_checkpoints_from_before_integrators_were_recorded(self, dataset, tmp_path):
        train.train("hnn-euler", dataset, tmp_path, CONFIG, DATA)
        for name in ("best", "last"):
            path = tmp_path / f"{name}.safetensors"
            old = checkpoints.load(path)
            for key in ("integrator", "hamiltonian"):
                del old.facts[key]
            del old.facts["train"]["integrator"]
            checkpoints.save(path, old)
        assert "integrator" not in json.loads((tmp_path / "last.json").read_text())
        assert checkpoints.restore(checkpoints.load(path), path).integrator == "euler"
        train.train("hnn-euler", dataset, tmp_path, CONFIG, DATA, log=lambda row: pytest.fail("trained again"))

    def test_a_checkpoint_of_an_integrator_that_is_not_there(self, dataset, tmp_path):
        checkpoint = checkpoints.load(train.train("hnn", dataset, tmp_path, CONFIG, DATA))
        checkpoint.facts["integrator"] = "verlet"
        with pytest.raises(CheckpointError, match="x.safetensors cannot be used: .*'verlet' is not there for a mlp H"):
            checkpoints.restore(checkpoint, "x.safetensors")

    @pytest.mark.parametrize(
        ("name", "integrator", "title", "advice"),
        [
            ("hnn-implicit", "auto", "HNN (implicit leapfrog): implicit-leapfrog", "leave hnn-implicit out of --models"),
            ("hnn", "implicit-midpoint", "HNN (full, implicit-midpoint): implicit-midpoint", "with another --integrator"),
        ],
    )
    def test_a_step_that_cannot_be_solved_ends_with_what_to_do(
        self, name, integrator, title, advice, dataset, tmp_path, monkeypatch
    ):
        # from the third epoch on, a learning rate that makes H far too curved
        monkeypatch.setattr(train, "learning_rate", lambda epoch, config: config.lr if epoch < 3 else 1.0)
        config = dataclasses.replace(CONFIG, epochs=4, dt=2.0, integrator=integrator)
        with pytest.raises(TrainingError) as caught:
            train.train(name, dataset, tmp_path, config, DATA)
        text = str(caught.value)
        assert text.startswith(f"{title} could not solve a step in epoch 3: dt ")
        assert "last.safetensors holds epoch 2" in text
        assert "smaller --dt" in text
        assert text.endswith(f"{advice}.")
        last = checkpoints.load(tmp_path / "last.safetensors")
        assert last.facts["epoch"] == 2
        assert all(tensor.isfinite().all() for tensor in last.model.values())

    @pytest.mark.parametrize("name", ["hnn-implicit", "hnn-separable"])
    def test_dreams(self, name, dataset, tmp_path):
        best = train.train(name, dataset, tmp_path / "run", CONFIG, DATA)
        latents = tmp_path / "latents" / "video_000.safetensors"
        result = dream(best, tmp_path / "dream", latents=latents, n_steps=4, animate=False)
        assert result.text.startswith(zoo.MODELS[name].title)
        assert "could not be solved" not in result.text
        tensors, _ = files.load_tensors(tmp_path / "dream.safetensors", "dream")
        assert (tensors["states"].shape, tensors["energy"].shape) == ((5, 6), (5,))

    def test_dreams_that_fail_say_so(self, dataset, tmp_path):
        best = train.train("hnn-implicit", dataset, tmp_path / "run", CONFIG, DATA)
        checkpoint, latents = checkpoints.load(best), tmp_path / "latents" / "video_000.safetensors"
        steep = curved(zoo.build("hnn-implicit", 6, 2.0, 0), 30)
        steep_path = tmp_path / "steep.safetensors"
        checkpoints.save(steep_path, dataclasses.replace(checkpoint, model=steep.state_dict()))
        result = dream(steep_path, tmp_path / "dream", latents=latents, n_steps=60, animate=False)
        assert re.search(r"; \d+ implicit steps could not be solved, for which dt 2 is too large$", result.text)
        best = train.train("baseline", dataset, tmp_path / "baseline", CONFIG, DATA)
        checkpoint = checkpoints.load(best)
        checkpoint.model["net.4.weight"] *= 1e12
        checkpoints.save(best, checkpoint)
        with pytest.raises(hf.errors.HJEPAError, match="Baseline MLP: .*: the rollout is not finite from step 4 on"):
            dream(best, tmp_path / "dream", latents=latents, n_steps=9)


class TestEvaluation:
    def test_the_comparison_matches_rollouts(self, dataset):
        models = {"hnn": zoo.build("hnn", 6, 0.8, seed=4, integrator="suzuki4")}
        result = evaluate.evaluate(models, dataset, EVALUATE)
        rows = result.integrators
        assert [row["integrator"] for row in rows] == [*evaluate.COMPARED, "suzuki4"]
        assert [row["trained"] for row in rows] == [False] * 4 + [True]
        assert result.rows[1]["title"] == "HNN (full, suzuki4)"
        hnn, z0, dt = models["hnn"].hnn.double(), dataset.test[:, 0].double(), models["hnn"].step_size.double()
        published = None
        for row in rows:
            H = hf.rollout(hnn, z0, dt, 30, integrator=row["integrator"], energy=True).energy.detach()
            drift = (H - H[:, :1]).abs()
            torch.testing.assert_close(result.arrays[f"integrators/{row['integrator']}/energy"], H)
            assert row["drift_mean"] == pytest.approx(drift[:, :5].amax(1).mean().item(), rel=1e-6)
            assert row["drift_extended_mean"] == pytest.approx(drift.amax(1).mean().item(), rel=1e-6)
            published = published or row["drift_extended_mean"]
            assert row["drift_ratio"] == pytest.approx(row["drift_extended_mean"] / published)
            assert row["diverged"] == 0
            assert row["ms_per_step"] > 0
        gradients = {row["integrator"]: row["evaluations_per_step"] for row in rows}
        assert (gradients["leapfrog"], gradients["euler"]) == (3, 1)
        assert gradients["implicit-leapfrog"] > 2
        assert {row["integrator"]: row["converged"] for row in rows} == {
            "leapfrog": None, "euler": None, "implicit-leapfrog": 1, "implicit-midpoint": 1, "suzuki4": 1,
        }  # fmt: skip

    def test_symplectic_integrators_keep_the_energy_of_the_full_model(self, dataset):
        model = zoo.build("hnn", 6, 0.5, seed=4)
        with torch.no_grad():
            for parameter in model.hnn.parameters():
                parameter.mul_(2)
        config = dataclasses.replace(EVALUATE, extended_steps=400)
        rows = {row["integrator"]: row for row in evaluate.evaluate({"hnn": model}, dataset, config).integrators}
        assert rows["implicit-leapfrog"]["drift_ratio"] < 0.1
        assert rows["implicit-midpoint"]["drift_ratio"] < 0.1

    @pytest.mark.parametrize("name", ["hnn", "hnn-separable", "friction", "baseline", "persistence"])
    def test_energies_in_pieces_are_those_of_the_whole(self, name, dataset, monkeypatch):
        damped = zoo.assemble(zoo.spec_in("hnn", TrainConfig(friction="rayleigh"), 0), 6, 0.8, seed=4)
        model = damped if name == "friction" else None if name == "persistence" else zoo.build(name, 6, 0.8, seed=4)
        meter = model if isinstance(model, hf.SymplecticIntegrator) else zoo.build("hnn", 6, 0.8, seed=4)
        z0 = dataset.test[:, 0]
        predictor = evaluate._Predictor(model)
        lengths = []
        states = predictor.states
        monkeypatch.setattr(predictor, "states", lambda z0, n: lengths.append(n) or states(z0, n))
        monkeypatch.setattr(evaluate, "NUMBERS_AT_ONCE", 7 * z0.numel())
        with torch.no_grad():
            found = predictor.energies(meter, z0, 20)
            expected = hf.energy(meter.hnn, states(z0, 20))
            if name == "friction":
                expected = expected + energy_balance(meter.hnn, states(z0, 20), 0.8).lost
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert lengths == ([7, 7, 6] if name in ("hnn-separable", "friction", "baseline") else [])

    def test_extended_rollouts_start_from_a_few_windows(self, dataset, monkeypatch):
        assert evaluate._spread(100, 5).tolist() == [0, 25, 50, 74, 99]
        assert evaluate._spread(3, 5).tolist() == [0, 1, 2]
        monkeypatch.setattr(evaluate, "EXTENDED_WINDOWS", 3)
        models = {name: zoo.build(name, 6, 0.8, seed=4) for name in ("hnn", "baseline")}
        result = evaluate.evaluate(models, dataset, EVALUATE)
        assert result.extended_windows == 3
        chosen = dataset.test[evaluate._spread(len(dataset.test), 3), 0]
        for name in models:
            assert result.arrays[f"{name}/energy"].shape == (len(dataset.test), 5)
            assert result.arrays[f"{name}/energy_extended"].shape == (3, 31)
            torch.testing.assert_close(result.arrays[f"{name}/energy_extended"][:, 0], hf.energy(models["hnn"].hnn, chosen))

    def test_steps_that_cannot_be_solved_are_counted(self, dataset):
        models = {"hnn": curved(zoo.build("hnn", 6, 2.0, 0)), "hnn-implicit": curved(zoo.build("hnn-implicit", 6, 2.0, 0))}
        with pytest.warns(UserWarning, match="implicit steps could not be solved") as caught:
            result = evaluate.evaluate(models, dataset, EVALUATE)
        assert any(str(warning.message).startswith("HNN (implicit leapfrog): ") for warning in caught)
        assert any(str(warning.message).startswith("the full model under implicit-midpoint: ") for warning in caught)
        rows = {row["name"]: row for row in result.rows}
        assert 0 <= rows["hnn-implicit"]["converged"] < 1
        assert rows["hnn"]["converged"] is None
        assert {row["integrator"]: row["converged"] for row in result.integrators}["implicit-midpoint"] < 1


@pytest.fixture
def trained(tmp_path):
    """A run with the full model under another integrator, the two further models and a baseline."""
    write_latents(tmp_path / "latents")
    names = ("hnn", "hnn-implicit", "hnn-separable", "baseline")
    options = ("--models", *names, "--integrator", "implicit-midpoint", *OPTIONS)
    assert run("train", tmp_path / "latents", "--out", tmp_path / "run", *options) == 0
    return tmp_path / "run"


def spoil(path, factor):
    """Multiply every weight of a checkpoint."""
    checkpoint = checkpoints.load(path)
    for name, tensor in checkpoint.model.items():
        if name.endswith("weight"):
            tensor.mul_(factor)
    checkpoints.save(path, checkpoint)


def test_train_evaluate_and_draw(trained, capsys):
    assert run("evaluate", trained, "--quiet") == 0
    table = capsys.readouterr().out
    for text in ("| HNN (full, implicit-midpoint) |", "| HNN (implicit leapfrog) ", "| Separable HNN ", "drift, 20 steps",
                 "under other integrators", "The network was trained with implicit-midpoint", "gradients/step"):  # fmt: skip
        assert text in table
    assert "diverged" not in table
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["extended_windows"] == 8
    assert [row["integrator"] for row in summary["integrators"]] == list(evaluate.COMPARED)
    assert run("figures", trained) == 0
    assert (trained / "figures" / "drift_by_integrator.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("factor", [30.0, 1e9])
def test_a_run_that_diverges_is_evaluated_and_drawn(trained, factor, capsys):
    for name in ("hnn", "hnn-implicit", "hnn-separable", "baseline"):
        spoil(trained / "models" / name / "best.safetensors", factor)
    assert run("evaluate", trained, "--quiet") == 0
    text = capsys.readouterr()
    assert "implicit steps could not be solved" in text.err
    assert "diverged" in text.out
    assert re.search(r"- HNN \(full, implicit-midpoint\): [0-9.]+% of the implicit steps could be solved", text.out)
    rows = {row["name"]: row for row in json.loads((trained / "summary.json").read_text())["models"]}
    assert rows["baseline"]["drift_extended_mean"] is None
    assert rows["baseline"]["diverged"] == 1
    assert run("figures", trained) == 0


def test_figures_need_a_new_evaluation_of_an_old_run(trained, capsys):
    assert run("evaluate", trained, "--quiet") == 0
    summary = json.loads((trained / "summary.json").read_text())
    del summary["integrators"]
    files.write_json(trained / "summary.json", summary)
    assert run("figures", trained) == 1
    assert "was evaluated by an older version: run 'hjepa-fast evaluate" in capsys.readouterr().err


def test_a_run_recorded_before_the_option_goes_on(trained):
    config = json.loads((trained / "config.json").read_text())
    del config["data"]["split_seed"]
    files.write_json(trained / "config.json", config)
    options = ("--models", "baseline", "--integrator", "implicit-midpoint", *OPTIONS)
    assert run("train", trained.parent / "latents", "--out", trained, *options) == 0
