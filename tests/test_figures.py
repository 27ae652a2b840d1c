"""Figures and their findings on constructed numbers: what is said is true, whatever the numbers are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hjepa_fast.errors import HJEPAError
from hjepa_fast.pipeline import figures, findings, plotting, schemas, zoo
from hjepa_fast.pipeline.plotting import COLORS, INTEGRATOR_COLORS, OTHER_INTEGRATOR, PALETTE, SIZE, TRUE, own_style
from hjepa_fast.pipeline.tables import summary_table

# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB as it is seen with each kind of colour blindness
SEEN = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color, seen):
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ np.clip(np.array(SEEN[seen]) @ linear, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", SEEN)
def test_no_colour_is_there_twice_for_any_eye(seen):
    assert set(COLORS) == {*zoo.MODELS, "persistence"}
    for colors in ([*COLORS.values(), TRUE], [*INTEGRATOR_COLORS.values(), OTHER_INTEGRATOR], PALETTE):
        assert len(set(colors)) == len(colors)
        for one, other in itertools.combinations(colors, 2):
            assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 12


@own_style
def drawn(*values, scale="linear", always=0.0):
    """An axis with a curve "c0", "c1", ... for each of `values` [T], and its notes."""
    axis = plotting.new_figure("")[1][0, 0]
    curves = [
        plotting.curve(axis, np.arange(1, 1 + len(y)), np.array(y, dtype=float), PALETTE[i], f"c{i}")
        for i, y in enumerate(values)
    ]
    plotting.in_view(axis, curves, scale=scale, always=always)
    return axis, [text.get_text() for text in axis.texts]


class TestAxes:
    def test_a_diverging_curve_rules_no_axis_and_is_named(self):
        axis, notes = drawn([1, 2, 3], [2, 4, 5], [1, 5e6, 3e12])
        assert 5 < axis.get_ylim()[1] < 7
        assert notes == ["c2: off the axis from step 2, largest 3.0e+12"]

    def test_what_is_not_finite_is_named(self):
        assert drawn([1, 2, 3], [2, np.inf, np.nan])[1] == ["c1: off the axis from step 2, then diverges"]
        assert drawn([np.nan, np.nan])[1] == ["c0: off the axis from step 1, then diverges"]

    def test_nothing_is_said_where_all_is_in_view(self):
        axis, notes = drawn([1, 2, 3], [2, 4, 5], [1, 8, 16])
        assert notes == []
        assert axis.get_ylim()[1] >= 16

    def test_what_falls_is_in_view_as_well(self):
        axis, notes = drawn([0, -1, -3], [0, 0.5, 1], [0, -1e9, -2e9])
        assert notes == ["c2: off the axis from step 2, largest 2.0e+09"]
        low, high = axis.get_ylim()
        assert -4 < low < -3
        assert 1 < high < 2

    def test_two_that_diverge_do_not_keep_each_other_in_view(self):
        axis, notes = drawn([1, 2, 3], [1, 3, 4], [1, 1, 2], [1, 9e5, 3e6], [1, 9e5, 4e6])
        assert len(notes) == 2
        assert axis.get_ylim()[1] < 6

    def test_usual_values_stay_in_view_however_small_the_others_are(self):
        small, usual = [1e-9, 2e-9], [0.1, 0.9]
        assert drawn(small, usual, scale="log")[1] == ["c1: off the axis from step 1, largest 9.0e-01"]
        axis, notes = drawn(small, usual, [1.0, 1e9], scale="log", always=10.0)
        assert (axis.get_yscale(), len(notes)) == ("log", 1)
        assert 0.9 < axis.get_ylim()[1] < 100
        assert drawn([1.0, 2.0], scale="log")[0].get_yscale() == "linear"

    def test_a_path_out_of_view_is_named(self):
        @own_style
        def axis_of(path):
            axis = plotting.new_figure("")[1][0, 0]
            circle = np.stack([np.cos(np.arange(9)), np.sin(np.arange(9))], axis=1)
            plotting.around(axis, circle, [(np.array(path, dtype=float), PALETTE[0], "model")])
            return axis

        axis = axis_of([[0, 0], [1, 1], [1e9, 0], [np.nan, 0]])
        assert [text.get_text() for text in axis.texts] == ["model: out of view from step 2"]
        assert max(map(abs, (*axis.get_xlim(), *axis.get_ylim()))) < 2
        assert len(axis_of([[0, 0], [1, 1]]).texts) == 0

    def test_a_band_counts_what_diverges_as_largest(self):
        values = torch.tensor([[1.0, 1.0], [2.0, math.nan], [3.0, math.inf]])
        for mean, expected in ((False, [2.0, math.inf]), (True, [2.0, math.inf])):
            band = own_style(
                lambda m=mean: plotting.band(plotting.new_figure("")[1][0, 0], np.arange(2), values, PALETTE[0], "", mean=m)
            )()
            assert band.values.tolist() == expected
        one = torch.tensor([[1.0], [1.0], [math.nan]])
        bands = [
            plotting.band(plotting.new_figure("")[1][0, 0], np.arange(1), one, PALETTE[0], "", mean=m) for m in (True, False)
        ]
        assert [band.values.tolist() for band in bands] == [[math.inf], [1.0]]


def row(name, title=None, **facts):
    return {"name": name, "title": title or zoo.MODELS[name].title, **facts}


class TestFindings:
    """Each in both directions."""

    def test_prediction(self):
        def said(hnn, mlp):
            return findings.prediction([row("hnn", mse_relative=hnn), row("baseline", mse_relative=mlp)], 15)

        assert said(0.1, 0.4) == (
            "Least error over 15 steps, by the data's variance: HNN (full), 0.1; best MLP: Baseline MLP, 0.4 (4x)"
        )
        assert "Baseline MLP, 0.4; best Hamiltonian model: HNN (full), 0.8 (2x)" in said(0.8, 0.4)
        assert "the data's mean" not in said(0.8, 0.4)
        assert said(1.2, 1.0).endswith("None is nearer than the data's mean (1)")
        assert said(None, 0.4).endswith("Baseline MLP, 0.4; every Hamiltonian model diverges")
        assert said(None, None) == "No model's prediction stays finite over 15 steps"

    def test_energy_is_relative_to_each_models_own_scale(self):
        rows = [
            row("hnn", drift_extended_mean=0.2, energy_std=1.0),
            row("hnn-euler", drift_extended_mean=0.1, energy_std=0.1),
            row("baseline", drift_extended_mean=0.9, energy_std=1.0),
            row("persistence", "Persistence", drift_extended_mean=0.0, energy_std=1.0),
        ]
        assert "1,000 steps, by the standard deviation of H: HNN (full), 0.2; best MLP: Baseline MLP, 0.9" in findings.energy(
            rows, 1000
        )
        rows[2]["drift_extended_mean"] = 0.01
        assert ": Baseline MLP, 0.01; best Hamiltonian model: HNN (full), 0.2 (20x)" in findings.energy(rows, 1000)
        for item in rows:
            item["drift_extended_mean"] = None
        assert findings.energy(rows, 9) == "Energy drift over 9 steps: no model has one that stays finite"

    def test_integrators(self):
        def said(*drifts):
            names = ("leapfrog", "euler", "implicit-midpoint")
            rows = [{"integrator": n, "drift_extended_mean": d} for n, d in zip(names, drifts, strict=True)]
            return findings.integrators(rows, 100)

        assert said(0.3, 0.9, 0.001).startswith("implicit-midpoint keeps the full model's energy best over 100 steps: it ")
        assert said(0.3, 0.9, 0.001).endswith("leapfrog, the published step, by 0.3")
        assert said(0.3, 0.9, 0.8) == (
            "leapfrog keeps the full model's energy best over 100 steps: it drifts by 0.3; next implicit-midpoint, 0.8"
        )
        assert said(None, 0.9, 0.8).endswith("leapfrog, the published step, diverges")
        assert said(None, None, None).startswith("No integrator's rollouts")

    def test_a_window(self):
        assert "HNN is nearer to the truth than standing still" in findings.window("HNN", 0.2, 0.9, 15)
        assert "HNN is no nearer to the truth than standing still" in findings.window("HNN", 0.9, 0.9, 15)
        assert "diverges" in findings.window("HNN", math.nan, 0.9, 15)

    def test_dissipation(self):
        def said(change, true):
            return findings.dissipation([row("hnn", port={"change": change, "change_true": true})], 15)

        assert "H falls by 0.2 on predictions and rises by 0.1 along the true latents" in said(-0.2, 0.1)
        assert "H rises by 0.2 on predictions and stays as it is along" in said(0.2, 0.0)
        assert "leaves the finite numbers" in said(None, 0.1)

    def test_ablation_data_and_dreams(self):
        rows = [row("hnn", mse_relative=0.5, drift_mean=0.1, energy_std=2.0), row("baseline", mse_relative=0.4, drift_mean=3.0,
                                                                               energy_std=2.0)]  # fmt: skip
        text = findings.ablation(rows, 15, "energy drift")
        assert (
            "least error is that of Baseline MLP, 0.4 of the variance; the least energy drift that of HNN (full), 0.05" in text
        )
        rows[0]["mse_relative"], rows[0]["drift_mean"] = 0.3, 9.0
        text = findings.ablation(rows, 15, "energy drift")
        assert "error is that of HNN (full), 0.3 of the variance; the least energy drift that of Baseline MLP, 1.5" in text
        assert "neighbours lie 0.5 of the data's spread apart (median); two components hold 80%" in findings.dataset(
            3, 30, 1.0, 2.0, 0.8
        )
        assert findings.dataset(1, 30, 0.0, 0.0, 1.0) == "30 latents of 1 video, all the same"
        assert findings.dream([1.0, 2.0], [5.0, 5.5, 4.0], True).endswith("2 last: H stays within 1 of its start, 5")
        assert findings.dream([1.0, 2.0], [5.0, 5.5, 4.0], False).endswith("H goes from 5 to 4")
        assert findings.dream([1.0], None, True) == "A free rollout of 1 step, of length 1"

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (0.04567, "0.0457"),
            (1.0, "1"),
            (12.34, "12.3"),
            (12345.6, "12,346"),
            (0.00001, "1.0e-05"),
            (3e7, "3.0e+07"),
        ],
    )
    def test_numbers(self, value, text):
        assert findings.shown(value) == text


def summary_of(errors, drifts, lost=(0, 0, 0)):
    """A run of true states of the full model, the residual MLP and persistence, with errors over 4 and 8 steps."""
    models = [
        row(name, title, mse_mean=0.1, mse_std=0.1, mse_relative=0.1, mse_per_step=[0.1], drift_mean=0.1, drift_std=0.1,
            drift_extended_mean=0.1, drift_true_mean=0.1, diverged=0.0, energy_std=1.0, step_length=1.0, params=9, dt=1.0,
            converged=None, ms_per_step=1.0, integrator="leapfrog" if name == "hnn" else None,
            motion={"error": {"4": error and error / 2, "8": error}, "lost": {"4": 0, "8": gone}, "energy_drift": drift})
        for (name, title), error, drift, gone in zip(
            [("hnn", None), ("baseline-residual", None), ("persistence", "Persistence")], errors, drifts, lost, strict=True)
    ]  # fmt: skip
    return {
        "encoder": "state", "split": "video", "standardized": True, "n_train": 3, "n_test": 3, "latent_dim": 2, "n_steps": 4,
        "extended_steps": 8, "extended_windows": 3, "epochs": 1, "probe": None, "integrators": [], "models": models,
        "hardware": {"device": "x", "threads": 1, "torch": "2"}, "recipe": "smooth",
        "step": {"frames": 4, "fps": 30.0, "seconds": 4 / 30},
        "motion": {"horizons": [4, 8], "conservative": True, "energy_scale": 2.0},
    }  # fmt: skip


class TestTrueMotion:
    def test_the_table_says_what_was_found(self):
        table = summary_table(summary_of((0.02, 0.4, 2.0), (0.03, 0.99, 0.0)))
        assert table.startswith("**Least error over 8 steps: HNN (full), 0.02; best MLP: Residual MLP, 0.4 (20x).**\n")
        assert "**Least drift of the true energy over 8 steps: HNN (full), 0.03; best MLP: Residual MLP, 0.99 (33x)." in table
        assert "| error, 4 steps (0.533 s) | error, 8 steps (1.07 s) | true energy's drift, 8 steps |" in table
        assert "; 1 epochs; recipe smooth; 4-step" in table
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        assert [line.split()[1] for line in lines[1:4]] == ["HNN", "Residual", "Persistence"]
        assert [cell.strip() for cell in lines[2].split("|")[2:7]] == ["0.2", "0.4", "0.99", "0 of 3", "-"]

    def test_and_the_opposite(self):
        table = summary_table(summary_of((0.4, 0.02, 0.001), (None, 0.1, 0.0), (3, 0, 0)))
        assert table.startswith(
            "**Least error over 8 steps: Residual MLP, 0.02; best Hamiltonian model: HNN (full), 0.4 (20x).**\n"
        )
        assert "over 8 steps: Residual MLP, 0.1; every Hamiltonian model diverges.**" in table
        assert "| diverged" in table
        assert "| 3 of 3" in table
        assert "No model's rollouts stay finite over 8 steps" in summary_table(
            summary_of((None, None, None), (None, None, None))
        )

    def test_without_a_truth_there_is_no_such_table(self):
        summary = summary_of((0.4, 0.02, 0.001), (0.2, 0.1, 0.0)) | {"motion": None}
        assert "true energy" not in summary_table(summary)
        del summary["motion"], summary["step"]
        assert summary_table(summary).startswith("| model")

    @staticmethod
    def evaluated(hnn_error, mlp_error):
        summary = summary_of((hnn_error, mlp_error, 2.0), (0.03, 0.99, 0.0), (0, 2, 0))
        angle = torch.arange(9) * 0.5
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        arrays = {"true/motion": circle, "true/motion_energy": torch.ones(3, 9), "true/example": circle[:5]}
        for name, size in (("hnn", 1.01), ("baseline-residual", 1e12), ("persistence", 1.0)):
            arrays |= {
                f"{name}/motion": circle * torch.linspace(1, size, 9)[:, None],
                f"{name}/motion_error": torch.linspace(0, size, 9).repeat(3, 1),
                f"{name}/motion_energy": torch.linspace(1, size, 9).repeat(3, 1),
                f"{name}/example": circle[:5],
                f"{name}/step_mse": torch.ones(3, 4),
            }
        return summary, arrays

    def drawn(self, hnn_error, mlp_error):
        summary, arrays = self.evaluated(hnn_error, mlp_error)
        rows = {item["name"]: item for item in summary["models"]}
        view = figures.View(summary, rows, arrays, figures.step_label(summary["step"]))
        return own_style(figures._motion)(view)

    def test_files_that_do_not_fit_are_refused(self):
        summary, arrays = self.evaluated(0.02, 0.4)
        schemas.check(schemas.Summary, summary, "x")
        schemas.check_arrays(summary, arrays, COLORS, "x")
        with pytest.raises(HJEPAError, match="expected floating-point numbers .* in 'hnn/motion_error'"):
            schemas.check_arrays(summary, arrays | {"hnn/motion_error": torch.ones(3)}, COLORS, "x")
        with pytest.raises(HJEPAError, match=r"arrays of motion_energy differ in shape: \[3, 9\] and \[3, 8\]"):
            schemas.check_arrays(summary, arrays | {"hnn/motion_error": torch.ones(3, 8)}, COLORS, "x")
        del summary["models"][1]["motion"]["lost"]["8"]
        with pytest.raises(HJEPAError, match="does not say how 'baseline-residual' compares with the true motion"):
            schemas.check_arrays(summary, arrays, COLORS, "x")
        with pytest.raises(HJEPAError, match="x: motion.horizons"):
            schemas.check(schemas.Summary, summary | {"motion": {"horizons": []}}, "x")

    def test_the_picture(self, tmp_path):
        figure = self.drawn(0.02, 0.4)
        assert tuple(figure.get_size_inches()) == SIZE
        assert (
            figure.get_suptitle()
            .replace("\n", " ")
            .startswith("Least error over 8 steps: HNN (full), 0.02; best MLP: Residual")
        )
        assert self.drawn(0.4, 0.02).get_suptitle().startswith("Least error over 8 steps: Residual MLP, 0.02; best Hamiltonian")
        notes = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert sum("Residual MLP: off the axis from step 1" in note for note in notes) == 2
        assert any(note.startswith("Residual MLP: out of view from step") for note in notes)
        assert not any("HNN (full)" in note for note in notes)
        assert any("left the motion: Residual MLP 2 of 3" in text.get_text().replace("\n", " ") for text in figure.texts)
        for axis in figure.axes:
            assert "(" in axis.get_xlabel(), "a unit"
            assert axis.get_legend() is None, "legends lie off the data"
            assert max(map(abs, axis.get_ylim())) < 100
        assert any(axis.get_xlabel() == "step (4 frames, 0.13 s)" for axis in figure.axes)
        paths = plotting.save(figure, tmp_path / "motion")
        assert all(path.stat().st_size > 5000 for path in paths)

    def test_legend_and_caption_do_not_lie_on_the_axes(self):
        figure = self.drawn(0.02, 0.4)
        figure.draw_without_rendering()
        lowest = min(axis.get_tightbbox().y0 for axis in figure.axes)
        (legend,) = figure.legends
        caption = next(text for text in figure.texts if "encoder: state" in text.get_text())
        assert caption.get_window_extent().y1 <= legend.get_window_extent().y0 + 1
        assert legend.get_window_extent().y1 <= lowest + 1
        for text in (caption, figure._suptitle):
            assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("step", "text"),
    [({"frames": 4, "seconds": 4 / 30}, "step (4 frames, 0.13 s)"), ({"frames": 1, "seconds": None}, "step (1 frame)"),
     ({"frames": None, "seconds": None}, "step")],
)  # fmt: skip
def test_what_a_step_is(step, text):
    assert figures.step_label(step) == text


def test_points_of_an_ablation_are_all_written():
    rows = [row("hnn", mse_mean=1.0, mse_std=0.1, energy_std=1.0), row("baseline", mse_mean=1e9, mse_std=0.1, energy_std=1.0),
            row("hnn-euler", mse_mean=None, mse_std=None, energy_std=1.0)]  # fmt: skip

    @own_style
    def axis():
        found = plotting.new_figure("")[1][0, 0]
        figures._dots(found, rows, "mse", [2.0] * 3, "linear")
        return found

    found = axis()
    assert [text.get_text() for text in found.texts] == ["0.5", "5.0e+08 (off the axis)", "diverged"]
    assert found.get_xlim()[1] < 10


def test_panels_of_drift_say_what_is_drawn():
    for words, port in (("Energy drift", None), ("Error of the energy balance", {"friction": "rayleigh"})):
        rows = {"hnn": row("hnn", port=port, energy_std=2.0)}
        found, formula = figures._drift_of(rows)
        assert found == words
        H = torch.tensor([[1.0, 2.0, 3.0]] * 3)
        view = figures.View({}, rows, {"hnn/energy": H}, "step (4 frames)")

        @own_style
        def axis(view=view):
            found = plotting.new_figure("")[1][0, 0]
            figures._drift_panel(found, view, "energy", [])
            return found

        panel = axis()
        assert panel.get_ylabel() == f"{formula} / std of H"
        assert panel.get_xlabel() == "step (4 frames)"
        assert panel.lines[0].get_ydata().tolist() == [0.5, 1.0]


def test_a_model_that_no_window_is_told_of_has_a_style():
    assert plotting.style_of("hnn") == "-"
    assert plotting.style_of("baseline") == plotting.style_of("persistence") == "--"
