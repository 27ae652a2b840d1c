"""Measurements against plain loops over windows and steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.diagnostics import power_balance
from hjepa_fast.errors import UsageError
from hjepa_fast.pipeline import evaluate, zoo
from hjepa_fast.pipeline.config import DataConfig, EvaluateConfig, TrainConfig
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.tables import summary_table
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_latents

PUBLISHED = zoo.chosen(None, TrainConfig(), DataConfig())
CONFIG = EvaluateConfig(extended_steps=9, dream_steps=6, timing_warmup=1, timing_runs=2)


@pytest.fixture
def dataset(tmp_path):
    return prepare(load_latents(write_latents(tmp_path)), DataConfig(window=5))


@pytest.fixture
def models():
    return {name: zoo.build(name, 6, 0.8, seed=4) for name in PUBLISHED}


def test_numbers_match_loops(dataset, models):
    result = evaluate.evaluate(models, dataset, CONFIG)
    rows = {row["name"]: row for row in result.rows}
    assert list(rows) == ["persistence", *PUBLISHED]
    for name in rows:
        errors, drifts, long_drifts, true_drifts = [], [], [], []
        hnn = (models[name] if name in models and zoo.MODELS[name].integrator else models["hnn"]).hnn
        H = lambda z, hnn=hnn: hnn(z).item()  # noqa: E731
        for window in dataset.test:
            states = [window[0]]
            with torch.no_grad():
                for _ in range(9):
                    states.append(states[0] if name == "persistence" else models[name].rollout(states[-1][None], 1)[0, 1])
                errors.append(torch.stack([(states[t] - window[t]).square().mean() for t in range(1, 5)]))
                drifts.append(max(abs(H(z) - H(states[0])) for z in states[:5]))
                long_drifts.append(max(abs(H(z) - H(states[0])) for z in states))
                true_drifts.append(max(abs(H(z) - H(window[0])) for z in window))
        errors = torch.stack(errors)
        row = rows[name]
        assert row["mse_mean"] == pytest.approx(errors.mean().item(), rel=1e-4)
        assert row["mse_std"] == pytest.approx(errors.mean(1).std(correction=0).item(), rel=1e-3)
        assert row["mse_per_step"] == pytest.approx(errors.mean(0).tolist(), rel=1e-4)
        assert row["mse_relative"] == pytest.approx(row["mse_mean"] / dataset.variance, rel=1e-6)
        assert row["drift_mean"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-3, abs=1e-6)
        assert row["drift_extended_mean"] == pytest.approx(sum(long_drifts) / len(long_drifts), rel=1e-3, abs=1e-6)
        assert row["drift_true_mean"] == pytest.approx(sum(true_drifts) / len(true_drifts), rel=1e-3, abs=1e-6)
    assert rows["persistence"]["drift_mean"] == rows["persistence"]["step_length"] == rows["persistence"]["params"] == 0
    assert rows["persistence"]["ms_per_step"] is None
    assert rows["hnn"]["ms_per_step"] > 0
    assert rows["hnn"]["dt"] == pytest.approx(0.8)
    assert rows["baseline"]["dt"] is rows["baseline"]["converged"] is None
    assert [row["name"] for row in result.rows if row["converged"] == 1] == ["hnn-implicit"]
    assert all(row["diverged"] == 0 for row in result.rows)
    assert rows["hnn"]["params"] == sum(p.numel() for p in models["hnn"].hnn.parameters())
    assert result.arrays["hnn/energy"].shape == result.arrays["hnn/energy_true"].shape == (len(dataset.test), 5)
    assert result.arrays["hnn/energy_extended"].shape == (len(dataset.test), 10)
    assert result.arrays["hnn/example"].shape == (7, 6)
    assert result.extended_windows == len(dataset.test)


def test_step_length_is_that_of_the_free_rollout(dataset, models):
    row = evaluate.evaluate({"hnn": models["hnn"]}, dataset, CONFIG).rows[1]
    with torch.no_grad():
        states = hf.leapfrog(models["hnn"].hnn, dataset.test[evaluate.EXAMPLE, 0], 0.8, 6)
    expected = sum((states[t + 1] - states[t]).norm().item() for t in range(6)) / 6
    assert row["step_length"] == pytest.approx(expected, rel=1e-5)


def summary_of(result):
    return {
        "encoder": "e", "split": "window", "standardized": True, "n_train": 1, "n_test": 1, "latent_dim": 6, "n_steps": 4,
        "epochs": 1, "probe": None, "hardware": evaluate.hardware("cpu"), "models": result.rows,
        "extended_steps": 9, "extended_windows": result.extended_windows, "integrators": result.integrators,
    }  # fmt: skip


def test_without_the_full_model_baselines_have_no_energy(dataset, models):
    result = evaluate.evaluate({"baseline": models["baseline"]}, dataset, CONFIG)
    assert all(row["drift_mean"] is None for row in result.rows)
    assert "baseline/energy" not in result.arrays
    assert result.integrators == []
    table = summary_table(summary_of(result))
    assert "under other integrators" not in table
    assert "| Baseline MLP" in table
    assert "split by window (windows of one video overlap" in table


@pytest.mark.parametrize("friction", ["conformal", "rayleigh"])
def test_friction_and_control_match_loops(friction, dataset, models):
    """Predictions under the recorded control, and the energy balance along predictions and true latents, by `power_balance`."""
    n = 5
    controlled = dataclasses.replace(
        dataset, test=dataset.test[:n], test_control=torch.randn(n, 4, 2), control_scale=torch.ones(2)
    )
    settings = TrainConfig(friction=friction)
    ported = {name: zoo.assemble(zoo.spec_in(name, settings, 2), 6, 0.8, seed=4) for name in ("hnn", "hnn-no-control")}
    torch.nn.init.normal_(ported["hnn"].hnn.port, std=0.3)
    result = evaluate.evaluate(ported | {"baseline": models["baseline"]}, controlled, CONFIG)
    rows = {row["name"]: row for row in result.rows}

    def errors_of_balance(hnn, states, control):
        found = [0.0]
        for t in range(len(states) - 1):
            ends = [power_balance(hnn, states[t + k], None if control is None else control[t]) for k in (0, 1)]
            work = 0.8 / 2 * sum((end.supplied - end.lost).item() for end in ends)
            found.append(found[-1] + (hnn(states[t + 1]) - hnn(states[t])).item() - work)
        return found

    def rolled(name, window, u):
        if name == "persistence":
            return window[:1].expand(5, -1)
        if name == "hnn":
            return hf.rollout(ported[name].hnn, window[0], 0.8, 4, control=u).states
        return (ported | models)[name].rollout(window[:1], 4)[0]

    for name, owner in (("hnn", "hnn"), ("hnn-no-control", "hnn-no-control"), ("baseline", "hnn"), ("persistence", "hnn")):
        errors, drifts, true, changes = [], [], [], []
        hnn = ported[owner].hnn
        for window, u in zip(controlled.test, controlled.test_control, strict=True):
            states, given = rolled(name, window, u).detach(), u if hnn.control_dim else None
            errors.append((states[1:] - window[1:]).square().mean().item())
            drifts.append(max(map(abs, errors_of_balance(hnn, states, given))))
            true.append(max(map(abs, errors_of_balance(hnn, window, given))))
            changes.append((hnn(states[-1]) - hnn(states[0])).item())
        assert rows[name]["mse_mean"] == pytest.approx(sum(errors) / n, rel=1e-4)
        assert rows[name]["drift_mean"] == pytest.approx(sum(drifts) / n, rel=1e-3, abs=1e-6)
        assert rows[name]["drift_true_mean"] == pytest.approx(sum(true) / n, rel=1e-3, abs=1e-6)
        assert ("port" in rows[name]) == (name == owner)
        if name == owner:
            port = rows[name]["port"]
            assert port["change"] == pytest.approx(sum(changes) / n, rel=1e-3, abs=1e-6)
            assert abs(port["change"] - (port["supplied"] or 0) + port["lost"]) <= rows[name]["drift_mean"] + 1e-6
            assert port["coefficient"] == pytest.approx(0.1, rel=1e-5)
            assert (port["contraction_defect"] is None) == (friction == "rayleigh")
            assert friction == "conformal" or (port["lost"] > 0 and port["largest_rise"] < 1e-3)
    assert rows["hnn"]["port"]["supplied"] != 0
    assert rows["hnn-no-control"]["port"]["supplied"] is None
    # nothing acts after a window's end, nor in extended rollouts
    long = hf.rollout(ported["hnn"].hnn, controlled.test[0, 0], 0.8, 9).states.detach()
    energies = result.arrays["hnn/energy_extended"][0]
    expected = torch.tensor(errors_of_balance(ported["hnn"].hnn, long, None))
    torch.testing.assert_close(energies - energies[0], expected, rtol=1e-2, atol=2e-6)
    table = summary_table(summary_of(result))
    assert "Its friction and control are left out" in table
    assert f"| HNN (full) + friction, control | {friction} " in table


class Rotation:
    """The truth of states that turn by 0.4 a step in each plane (q_i, p_i), and lose a share of their size."""

    def __init__(self, lost=0.0):
        self.lost, self.conservative = lost, lost == 0

    def energy(self, z):
        return z.double().square().sum(dim=-1) / 2

    def rollout(self, z0, n_steps):
        q, p = z0.double().chunk(2, dim=-1)
        angle = 0.4 * torch.arange(n_steps + 1, dtype=torch.float64)[:, None]
        c, s, size = angle.cos(), angle.sin(), (1 - self.lost) ** torch.arange(n_steps + 1)[:, None]
        return torch.cat([q[:, None] * c - p[:, None] * s, q[:, None] * s + p[:, None] * c], dim=-1) * size


@pytest.mark.parametrize("lost", [0.0, 0.1])
def test_the_true_motion_matches_loops(lost, tmp_path, monkeypatch):
    """Errors, energies and rollouts that leave the motion, by a loop over windows and steps."""
    monkeypatch.setattr(evaluate, "HORIZONS", (6, 1000))
    plain = prepare(load_latents(write_latents(tmp_path)), DataConfig(window=5, standardize=False))
    truth = Rotation(lost)
    known = dataclasses.replace(plain, truth=truth)
    models = {name: zoo.build(name, 6, 0.8, seed=4) for name in ("hnn", "baseline", "baseline-residual")}
    with torch.no_grad():
        models["baseline"].net[-1].weight.mul_(1e12)
        models["baseline-residual"].net[-1].bias.add_(3.0)  # leaves, and stays finite
    result = evaluate.evaluate(models, known, CONFIG)
    assert result.motion == {"horizons": [4, 6, 9], "conservative": lost == 0, "energy_scale": pytest.approx(1.5, rel=1e-5)}
    rows = {row["name"]: row["motion"] for row in result.rows}
    starts = known.test[evaluate._spread(len(known.test), 32), 0]
    for name, found in rows.items():
        errors, drifts, gone = [], [], 0
        for z0 in starts:
            with torch.no_grad():
                path = z0.expand(10, -1) if name == "persistence" else models[name].rollout(z0[None], 9)[0]
            true = truth.rollout(z0[None], 9)[0]
            errors.append([(path[t].double() - true[t]).square().mean().item() / known.variance for t in range(10)])
            first = truth.energy(path[0]).item()
            away = [abs(truth.energy(path[t]) - (truth.energy(true[t]) if lost else first)).item() for t in range(10)]
            drifts.append(max(away) if all(map(math.isfinite, away)) else math.inf)
            gone += any(not error < 100 for error in errors[-1])
        for steps, error in found["error"].items():
            means = sorted(m if math.isfinite(m := sum(e[1 : int(steps) + 1]) / int(steps)) else math.inf for e in errors)
            expected = means[len(means) // 2]
            assert error == (pytest.approx(expected, rel=1e-5) if math.isfinite(expected) else None)
        drift = sorted(drifts)[len(drifts) // 2] / 1.5
        assert found["energy_drift"] == (pytest.approx(drift, rel=1e-4) if math.isfinite(drift) else None)
        assert found["lost"]["9"] == gone
    n = len(starts)
    assert [rows[name]["lost"]["9"] for name in ("hnn", "baseline", "baseline-residual", "persistence")] == [0, n, n, 0]
    assert rows["baseline"]["error"]["9"] is None
    assert rows["baseline-residual"]["error"]["9"] > 100
    assert result.arrays["hnn/motion_error"].shape == result.arrays["true/motion_energy"].shape == (n, 10)
    torch.testing.assert_close(result.arrays["true/motion"][0].float(), known.test[0, 0])


def test_without_a_truth_nothing_is_said_of_it(dataset, models):
    result = evaluate.evaluate({"baseline": models["baseline"]}, dataset, CONFIG)
    assert result.motion is None
    assert not any("motion" in row for row in result.rows)
    assert not any("motion" in name for name in result.arrays)


def test_a_diverging_model_is_reported_not_crashed(dataset, models):
    with torch.no_grad():
        models["baseline"].net[-1].weight.mul_(1e12)
    row = evaluate.evaluate({"baseline": models["baseline"]}, dataset, CONFIG).rows[1]
    assert row["mse_mean"] is None


def test_bad_counts_are_named(dataset):
    with pytest.raises(UsageError, match="timing_runs must be at least 1, found 0"):
        evaluate.evaluate({}, dataset, dataclasses.replace(CONFIG, timing_runs=0))
