"""How models are trained: matching, horizon, starts, schedules, networks, sub-steps, recipes; exact, resumable, refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.cli import build_parser, config_of, main
from hjepa_fast.errors import CheckpointError, UsageError
from hjepa_fast.pipeline import checkpoints, files, train, zoo
from hjepa_fast.pipeline.config import RECIPES, Config, DataConfig, TrainConfig, recipe_of
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents

DATA = DataConfig(window=5)
SMALL = TrainConfig(epochs=6, batch_size=8, widths=(8, 8))
STAGED = dataclasses.replace(SMALL, matching=0.3, horizon_curriculum=0.5, warmup=0.2, learn_dt=False, gain=1.5)


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path / "latents")), DATA)


def model_of(name, config, control_dim=0, seed=3):
    model = zoo.assemble(zoo.spec_in(name, config, control_dim), 6, config.dt, seed, dt_bounds=config.dt_bounds)
    return model.double()


def numbers(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


class TestSchedules:
    def test_the_horizon_by_epoch(self):
        config = TrainConfig(epochs=20, matching=0.2, horizon_curriculum=0.5)
        # ten epochs for 15 steps: ceil(1.5 k)
        expected = [0] * 4 + [2, 3, 5, 6, 8, 9, 11, 12, 14, 15] + [15] * 6
        assert [train.horizon(epoch, 15, config) for epoch in range(1, 21)] == expected
        assert [train.horizon(epoch, 15, TrainConfig(epochs=3)) for epoch in (1, 2, 3)] == [15] * 3

    def test_cosine_with_warm_up_and_constant_are_torchs(self):
        for schedule in ("cosine", "constant"):
            config = TrainConfig(epochs=12, warmup=0.25, lr=1e-2, lr_end=1e-4, lr_schedule=schedule)
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
            rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
            then = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, T_max=9, eta_min=1e-4 if schedule == "cosine" else 1e-2
            )
            both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, then], milestones=[3])
            for epoch in range(1, 13):
                assert train.learning_rate(epoch, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
                optimizer.step()
                both.step()

    def test_one_cycle_is_torchs(self):
        config = TrainConfig(epochs=21, lr=1e-2, lr_end=1e-5, lr_schedule="one-cycle")
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
        # its rise ends one step before the share that it is given
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-2, total_steps=21, pct_start=7 / 21, div_factor=25, final_div_factor=1e-2 / 25 / 1e-5,
            cycle_momentum=False,
        )  # fmt: skip
        for epoch in range(1, 22):
            assert train.learning_rate(epoch, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            scheduler.step()
        assert train.learning_rate(1, dataclasses.replace(config, epochs=1)) == 1e-2


class TestLosses:
    def test_matching_is_the_error_of_single_steps(self):
        windows = torch.randn(3, 5, 6, dtype=torch.float64)
        z0, z1 = windows[:, :-1], windows[:, 1:]
        leapfrog = model_of("hnn", SMALL)
        expected = (torch.stack([leapfrog.step(z0[:, t]) for t in range(4)], 1) - z1).square().mean()
        torch.testing.assert_close(train.matching_loss(leapfrog, windows), expected)
        plain = model_of("baseline", SMALL)
        torch.testing.assert_close(train.matching_loss(plain, windows), (plain(z0) - z1).square().mean())
        for name, integrator in (("hnn", "implicit-midpoint"), ("hnn-euler", "auto")):
            model = model_of(name, dataclasses.replace(SMALL, integrator=integrator))
            where = ((z0 + z1) / 2 if name == "hnn" else z0).requires_grad_()
            (g,) = torch.autograd.grad(model.hnn(where).sum(), where)
            field = torch.cat((g[..., 3:], -g[..., :3]), -1)
            torch.testing.assert_close(train.matching_loss(model, windows), (z1 - z0 - field).square().mean())

    def test_matching_has_its_control(self):
        config = dataclasses.replace(SMALL, friction="conformal", integrator="implicit-midpoint")
        windows, control = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
        found = []
        for sub_steps in (1, 2):
            model = model_of("hnn", dataclasses.replace(config, sub_steps=sub_steps), 2)
            torch.nn.init.normal_(model.hnn.port)
            with torch.no_grad():
                found.append([train.matching_loss(model, windows, u) for u in (control, 0 * control)])
        steps = [model.trajectory(windows[:, t], 1, control=control[:, t : t + 1]).states[:, 1] for t in range(4)]
        torch.testing.assert_close(found[1][0], (torch.stack(steps, 1) - windows[:, 1:]).square().mean().detach())
        assert abs(found[0][0] - found[0][1]) > 1e-3

    @pytest.mark.parametrize("friction", ["none", "conformal", "rayleigh"])
    @pytest.mark.parametrize("integrator", ["implicit-midpoint", "symplectic-euler", "leapfrog", "implicit-leapfrog"])
    @pytest.mark.parametrize("control_dim", [0, 2])
    def test_a_models_own_steps_match(self, friction, integrator, control_dim):
        model = model_of("hnn", dataclasses.replace(SMALL, friction=friction, integrator=integrator), control_dim)
        control = torch.randn(3, 4, control_dim, dtype=torch.float64) if control_dim else None
        with torch.no_grad():
            windows = zoo.states(model, torch.randn(3, 6, dtype=torch.float64), 4, control)
            assert train.matching_loss(model, windows, control) < 1e-24

    def test_short_rollouts_start_first_or_one_after_the_other(self):
        windows, control = torch.arange(16.0).reshape(1, 8, 2), torch.arange(7.0).reshape(1, 7, 1)
        first, u = train.cut(windows, control, 3, "first")
        assert first[..., 0].tolist() == [[0, 2, 4, 6]]
        assert u.flatten().tolist() == [0, 1, 2]
        pieces, u = train.cut(windows, control, 3, "all")
        assert pieces[..., 0].tolist() == [[0, 2, 4, 6], [6, 8, 10, 12]]
        assert u[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
        whole, none = train.cut(windows, None, 7, "all")
        assert torch.equal(whole, windows)
        assert none is None

    def test_an_epoch_has_its_horizon(self):
        model, windows = model_of("hnn", SMALL), torch.randn(3, 5, 6, dtype=torch.float64)
        config = dataclasses.replace(STAGED, epochs=8, matching=0.25)
        assert torch.equal(train.epoch_loss(model, windows, config, 1, True)[0], train.matching_loss(model, windows))
        mse, energy = train.epoch_loss(model, windows, config, 4, True)  # the second of four epochs for four steps
        expected = train.loss_terms(model, windows[:, :3], config, True)
        assert (mse, energy) == expected
        assert energy > 0


class TestNetworks:
    def test_the_published_recipe_is_as_it_was(self):
        """Weights, step size and what is learned, drawn without the options."""
        for name, build in (
            ("hnn", lambda: hf.LatentHNN(6)),
            ("hnn-separable", lambda: hf.SeparableHNN(6, zoo.SEPARABLE_WIDTHS, zoo.SEPARABLE_WIDTHS)),
        ):
            torch.manual_seed(5)
            expected = build().state_dict()
            model = zoo.assemble(zoo.spec_in(name, TrainConfig(), 0), 6, 1.0, seed=5)
            assert all(torch.equal(model.hnn.state_dict()[key], value) for key, value in expected.items())
            assert (model.sub_steps, model.dt.requires_grad) == (1, True)
            scale = [m.weight.std() * ((m.in_features + m.out_features) / 2) ** 0.5 for m in model.hnn.modules()
                     if isinstance(m, torch.nn.Linear) and m.weight.numel() > 10_000]  # fmt: skip
            torch.testing.assert_close(torch.stack(scale), torch.full((len(scale),), 0.5), rtol=0.02, atol=0)
        assert recipe_of(TrainConfig()) == "published"
        assert Config.from_dict(RECIPES["published"], "x") == Config()

    def test_widths_activation_and_gain(self):
        config = dataclasses.replace(SMALL, widths=(9, 7), activation="tanh", gain=2.0)
        double = model_of("hnn", dataclasses.replace(config, gain=1.0))
        for name, networks in (("hnn", 1), ("hnn-separable", 2), ("baseline", 1), ("baseline-residual", 1)):
            model = model_of(name, config)
            hidden = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
            assert hidden[:2] == [9, 7]
            assert sum(isinstance(m, torch.nn.Tanh) for m in model.modules()) == 2 * networks
        model = model_of("hnn", config)
        torch.testing.assert_close(model.hnn.net[2].weight, 2 * double.hnn.net[2].weight)
        with pytest.raises(ValueError, match="gain must be positive, found 0"):
            hf.SeparableHNN(4, gain=0)
        with pytest.raises(ValueError, match="activation must be one of softplus, .*; found 'step'"):
            hf.BaselineMLP(4, activation="step")

    @pytest.mark.parametrize("integrator", ["leapfrog", "implicit-midpoint", "tao"])
    def test_sub_steps_are_steps_of_a_part_of_dt(self, integrator):
        config = dataclasses.replace(SMALL, integrator=integrator, sub_steps=3, dt=0.9)
        model, z0 = model_of("hnn", config), torch.randn(2, 6, dtype=torch.float64)
        fine = hf.rollout(model.hnn, z0, (model.dt / 3).detach(), 12, integrator=integrator, energy=True)
        found = model.trajectory(z0, 4, energy=True)
        torch.testing.assert_close(found.states, fine.states[:, ::3])
        torch.testing.assert_close(found.energy, fine.energy[:, ::3])
        torch.testing.assert_close(model.rollout(z0, 4), found.states)
        torch.testing.assert_close(model.step(z0), fine.states[:, 3])
        final = model.trajectory(z0, 4, states="final", energy=True)
        torch.testing.assert_close(final.states, fine.states[:, -1])
        assert model.trajectory(z0, 0).states.shape == (2, 1, 6)
        if integrator == "implicit-midpoint":
            assert torch.equal(found.solve.evaluations, fine.solve.evaluations.reshape(2, 4, 3).sum(-1))
            assert found.solve.converged.all()
            assert torch.equal(found.solve.residual, fine.solve.residual.reshape(2, 4, 3).amax(-1))
        if integrator == "tao":
            torch.testing.assert_close(found.distance, fine.distance[:, 2::3])
        assert f"integrator='{integrator}'" in repr(model)
        assert "sub_steps=3" in repr(model)

    def test_sub_steps_under_a_control(self):
        config = dataclasses.replace(SMALL, friction="rayleigh", sub_steps=2)
        model = model_of("hnn", config, control_dim=2)
        torch.nn.init.normal_(model.hnn.port)
        z0, control = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
        found = zoo.states(model, z0, 4, control)
        fine = hf.rollout(model.hnn, z0, 0.5, 8, control=control.repeat_interleave(2, 1)).states
        torch.testing.assert_close(found, fine[:, ::2])
        held = model.trajectory(z0, 4, control=control[:, 0]).states
        torch.testing.assert_close(held, hf.rollout(model.hnn, z0, 0.5, 8, control=control[:, 0]).states[:, ::2])
        torch.testing.assert_close(zoo.without_port(model).rollout(z0, 2), hf.rollout(model.hnn.H, z0, 0.5, 4).states[:, ::2])

    def test_no_sub_step_is_refused(self):
        with pytest.raises(ValueError, match="sub_steps must be positive, found 0"):
            hf.SymplecticIntegrator(hf.LatentHNN(4, (8,)), sub_steps=0)


class TestResuming:
    @pytest.mark.parametrize("name", ["hnn", "hnn-implicit", "baseline"])
    def test_in_every_phase_to_the_same_bits(self, name, dataset, tmp_path):
        config = dataclasses.replace(STAGED, sub_steps=2 if name == "hnn" else 1, starts="all")
        train.train(name, dataset, tmp_path / "whole", config, DATA)

        def interrupt(row):
            raise KeyboardInterrupt

        for _ in range(config.epochs):  # after every epoch: of matching, of the growing horizon, of whole windows
            with pytest.raises(KeyboardInterrupt):
                train.train(name, dataset, tmp_path / "parts", config, DATA, log=interrupt)
        train.train(name, dataset, tmp_path / "parts", config, DATA, log=lambda row: pytest.fail("trained again"))
        whole, parts = (checkpoints.load(tmp_path / folder / "last.safetensors") for folder in ("whole", "parts"))
        assert numbers(whole.facts["history"]) == numbers(parts.facts["history"])
        assert all(torch.equal(whole.model[key], parts.model[key]) for key in whole.model)
        restored = checkpoints.restore(parts, tmp_path)
        expected = parts.facts["history"][-1]["test_mse"]
        assert train.rollout_error(restored, dataset.test) == pytest.approx(expected, rel=1e-6)
        if name != "baseline":
            assert whole.model["dt"] == 1.0  # not learned
            assert restored.sub_steps == config.sub_steps

    def test_a_file_that_names_wider_networks_than_it_holds(self, dataset, tmp_path):
        path = train.train("hnn", dataset, tmp_path, dataclasses.replace(SMALL, epochs=1), DATA)
        checkpoint = checkpoints.load(path)
        checkpoint.facts["train"]["widths"] = [10**6] * 3
        with pytest.raises(CheckpointError, match=r"cannot be used: widths \[1000000, .*\] need at least .* found 138"):
            checkpoints.restore(checkpoint, path)
        checkpoint.facts["train"]["widths"] = [8, 9]
        with pytest.raises(CheckpointError, match="need at least 96|does not fit LatentHNN|does not fit SymplecticIntegrator"):
            checkpoints.restore(checkpoint, path)

    def test_checkpoints_from_before_these_options(self, dataset, tmp_path):
        config = TrainConfig(epochs=1, batch_size=16)
        train.train("hnn", dataset, tmp_path, config, DATA)
        for name in ("best", "last"):
            path = tmp_path / f"{name}.safetensors"
            old = checkpoints.load(path)
            for key in ("lr_schedule", "warmup", "matching", "horizon_curriculum", "starts", "widths",
                        "activation", "gain", "sub_steps", "learn_dt"):  # fmt: skip
                del old.facts["train"][key]
            checkpoints.save(path, old)
        assert "sub_steps" not in (tmp_path / "last.json").read_text()
        assert checkpoints.restore(checkpoints.load(path), path).hnn.net[0].out_features == 512
        train.train("hnn", dataset, tmp_path, config, DATA, log=lambda row: pytest.fail("trained again"))


class TestOptions:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"horizon_curriculum": 1.5}, "horizon_curriculum must be a share of the epochs, from 0 to 1, found 1.5"),
            ({"matching": 7.0}, "matching must be a share of the epochs, from 0 to 1, found 7.0"),
            ({"warmup": -0.1}, "warmup must be a share of the epochs, from 0 to 1, found -0.1"),
            ({"warmup": 0.1, "lr_schedule": "one-cycle"}, "warmup is for cosine and constant: .*, found 0.1"),
            ({"widths": (8, 0)}, "widths must be positive, found 8, 0"),
            ({"gain": 0.0}, "gain must be positive, found 0.0"),
            ({"sub_steps": 0}, "sub_steps must be positive, found 0"),
        ],
    )
    def test_what_cannot_be_is_named(self, change, message):
        with pytest.raises(UsageError, match=message):
            train.check_numbers(dataclasses.replace(SMALL, **change))

    def test_a_recipe_sets_many_and_options_override_it(self, tmp_path):
        parse = build_parser().parse_args
        files.write_json(tmp_path / "c.json", {"train": {"gain": 3.0, "seed": 7}, "data": {"window": 9}})
        smooth = config_of(parse(["train", "x", "--config", str(tmp_path / "c.json"), "--recipe", "smooth"]))
        assert (smooth.train.gain, smooth.train.seed, smooth.data.window) == (RECIPES["smooth"]["train"]["gain"], 7, 9)
        assert recipe_of(smooth.train) == "smooth"
        own = config_of(parse(["reproduce", "--recipe", "smooth", "--widths", "16", "24", "--no-learn-dt", "--sub-steps", "2"]))
        assert (own.train.widths, own.train.learn_dt, own.train.sub_steps) == ((16, 24), False, 2)
        assert recipe_of(own.train) == "own"
        assert config_of(parse(["train", "x", "--recipe", "published"])) == Config()
        assert config_of(parse(["train", "x", "--widths", "none"])).train.widths is None
        assert config_of(parse(["train", "x", "--widths", "8,9", "--dt-bounds", "0.1", "3"])).train.widths == (8, 9)
        for name, recipe in RECIPES.items():
            train.check_numbers(Config.from_dict(recipe, name).train)

    def test_options_that_are_no_numbers(self, capsys):
        assert main(["train", "x", "--widths", "8", "wide"]) == 2
        assert "argument --widths: expected integers or none, found '8 wide'" in capsys.readouterr().err
        assert main(["train", "x", "--recipe", "fast"]) == 2
        assert "published" in capsys.readouterr().err

    def test_a_run_with_options_from_the_command_line_to_its_evaluation(self, tmp_path, capsys):
        write_latents(tmp_path / "latents")
        options = ("--epochs", "2", "--batch-size", "8", "--window", "5", "--timing-runs", "1", "--timing-warmup", "0",
                   "--extended-steps", "9", "--quiet", "--widths", "8,8", "--sub-steps", "2", "--matching", "0.5",
                   "--activation", "silu", "--no-learn-dt")  # fmt: skip
        out = ["--out", str(tmp_path / "run"), "--models", "hnn", "baseline"]
        assert main(["train", str(tmp_path / "latents"), *out, *options]) == 0
        assert main(["evaluate", str(tmp_path / "run"), "--quiet"]) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        row = next(row for row in summary["models"] if row["name"] == "hnn")
        checkpoint = checkpoints.load(tmp_path / "run" / "models" / "hnn" / "best.safetensors")
        model = checkpoints.restore(checkpoint, tmp_path)
        dataset = prepare(load_latents(tmp_path / "latents"), DATA)
        assert row["mse_mean"] == pytest.approx(train.rollout_error(model, dataset.test), rel=1e-5)
        assert summary["integrators"][0]["evaluations_per_step"] == 6  # two published steps of three gradients
        assert main(["train", str(tmp_path / "latents"), *out, *options, "--sub-steps", "3"]) == 1
        assert "other settings: train.sub_steps 2 -> 3" in capsys.readouterr().err
