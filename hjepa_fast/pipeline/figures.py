"""The figures of a run, drawn from its files; nothing is trained or evaluated again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HJEPAError
from . import checkpoints, files, findings, streaming, zoo
from .encoder_files import file_sha256
from .evaluate import PERSISTENCE, step_units
from .latents import Latents, load_latents
from .plotting import (
    BLUE,
    COLORS,
    GREY,
    INTEGRATOR_COLORS,
    OTHER_INTEGRATOR,
    PALETTE,
    TRUE,
    Curve,
    around,
    band,
    check_available,
    curve,
    in_view,
    legend,
    new_figure,
    own_style,
    reach,
    save,
    style_of,
    titled,
)
from .tables import unfinished
from .train import standing
from .videos import find_videos, load_ground_truth, middle_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .run_folder import Run

__all__ = ["check_available", "draw", "draw_locked", "dream_figure", "read_summary", "save"]


def draw(run: Run) -> list[Path]:
    """Draw every figure that the run has data for, as PNG and PDF in its folder `figures`.

    Labels say which models' training did not end.

    Raises
    ------
    HJEPAError
        The run was not evaluated, or by a version whose evaluation held less, or it was trained since; or another process
        writes into it.
    MissingDependencyError
        Matplotlib is not installed.
    """
    read_summary(run)  # a folder that is no run is left as it is
    with run.locked():
        return draw_locked(run)


def read_summary(run: Run) -> dict[str, Any]:
    """The run's `summary.json`, if it is of the models that the run holds now.

    An older version did not say how far each model got; what the checkpoints say is added then.

    Raises
    ------
    HJEPAError
        It is missing, of an older version that measured less, or not of these models.
    """
    from . import schemas

    summary: dict[str, Any] = files.read_json(run.summary, "the run's summary (run 'hjepa-fast evaluate' first)")
    again = f"run 'hjepa-fast evaluate {run.root}' again"
    if isinstance(summary, dict) and "integrators" not in summary:
        raise HJEPAError(f"{run.root} was evaluated by an older version: {again}")
    summary = schemas.check(schemas.Summary, summary, str(run.summary))
    rows = {row["name"]: row for row in summary["models"]}
    for name, path in run.trained().items():
        found, digest = standing(run.model(name)), summary["checkpoints"].get(name)
        same = name in rows and all(rows[name].setdefault(key, value) == value for key, value in found.items())
        if not same or digest not in (None, file_sha256(path)):
            raise HJEPAError(f"{name} was trained after {run.summary} was written: {again}")
    missing = [name for name in run.asked() if name not in run.trained() and name not in rows]
    if summary["missing"] is None:  # of an older version
        summary["missing"] = missing
    if summary["missing"] != missing:
        raise HJEPAError(f"other models were to be trained since {run.summary} was written: {again}")
    return summary


@own_style
def draw_locked(run: Run) -> list[Path]:
    """`draw` for who holds the run's lock."""
    from . import schemas

    summary = read_summary(run)
    arrays, _ = files.load_tensors(run.arrays, "the run's evaluation (run 'hjepa-fast evaluate' first)")
    if summary["arrays_sha256"] not in (None, file_sha256(run.arrays)):
        raise HJEPAError(f"{run.arrays} is not what {run.summary} was made with: run 'hjepa-fast evaluate {run.root}' again")
    schemas.check_arrays(summary, arrays, COLORS, str(run.arrays))
    rows = {
        row["name"]: row | {"title": row["title"] + ("" if row.get("finished", True) else f" ({row['epochs_done']} epochs)")}
        for row in summary["models"]
    }
    folder = run.read_inputs()["latents"]
    assert folder is not None
    latents = load_latents(folder, None if run.read_config().data.stream == "off" else streaming.HELD)
    view = View(summary, rows, arrays, step_label(summary.get("step") or step_units(latents)))
    written = []
    for name, figure in (
        ("motion", _motion(view)),
        ("energy", _energy(view)),
        ("drift_by_integrator", _drift_by_integrator(view)),
        ("dissipation", _dissipation(view)),
        ("phase", _phase(view)),
        ("comparison", _comparison(run, view)),
        ("ablation", _ablation(view)),
        ("dataset", _dataset(run, view, latents)),
    ):
        if figure is not None:
            written += save(figure, run.figures / name)
    return written


@dataclass(frozen=True)
class View:
    """What the figures of a run are drawn from."""

    summary: dict[str, Any]
    rows: dict[str, Any]
    """The summary's rows by the models' names."""
    arrays: dict[str, Tensor]
    """Of the evaluation; what diverged is not finite, or absurdly large."""
    step: str
    """A label for axes of steps."""

    def figure(self, finding: str, n_rows: int = 1, n_columns: int = 1, about: str = "", **grid: Any) -> tuple[Figure, Any]:
        """A new figure that says what it was drawn from, `about` first, and, if it did not end, how far training got."""
        figure = self.titled(finding, about)
        return figure, figure.subplots(n_rows, n_columns, squeeze=False, **grid)

    def titled(self, finding: str, about: str = "") -> Figure:
        """`figure` without its axes."""
        open_ended = unfinished(self.summary)
        finding = (f"TRAINING IS NOT FINISHED: {'; '.join(open_ended)}\n" if open_ended else "") + finding
        return titled(finding, f"{about}{_caption(self.summary)}")

    def measured(self, key: str) -> list[str]:
        """The models that have an array of this name."""
        return [name for name in self.rows if f"{name}/{key}" in self.arrays and name != PERSISTENCE]

    def band(self, axis: Axes, name: str, x: np.ndarray, values: Tensor, **options: bool) -> Curve:
        """A model's mean and percentiles in its colour; options as those of `plotting.band`."""
        return band(axis, x, values, COLORS[name], self.rows[name]["title"], style_of(name), **options)


def step_label(step: Mapping[str, Any]) -> str:
    """How long a step is, for an axis: "step (4 frames, 0.13 s)"; what is not known of it is left out."""
    frames, seconds = step.get("frames"), step.get("seconds")
    known = [f"{frames} frame{'s' if frames > 1 else ''}"] if frames else []
    known += [f"{seconds:.2g} s"] if seconds else []
    return f"step ({', '.join(known)})" if known else "step"


@own_style
def dream_figure(states: Tensor, energy: Tensor | None, title: str, kept: bool = True, step: str = "step") -> Figure:
    """A free rollout [n + 1, d]: its path in the plane of its two largest components, step lengths, energy [n + 1].

    `title` says what was rolled out, `kept` whether exact solutions keep that energy, and `step` labels the axes.
    """
    lengths = states.diff(dim=0).norm(dim=1)
    finding = findings.dream(lengths.tolist(), None if energy is None else energy.tolist(), kept)
    figure, axes = new_figure(finding, title, 1, 2 if energy is None else 3)
    path = principal_plane(states)
    axes[0, 0].plot(*path.T, "-", color=GREY, lw=1)
    axes[0, 0].scatter(*path.T, c=np.arange(len(path)), cmap="viridis", s=18, zorder=3)
    axes[0, 0].set(xlabel="first component (latent units)", ylabel="second component (latent units)")
    axes[0, 0].set_title("path in its largest plane (dark to bright)")
    axes[0, 1].plot(np.arange(1, len(states)), lengths, ".-", color=BLUE)
    axes[0, 1].set(xlabel=step, ylabel="|z(t+1) - z(t)| (standardised)", ylim=(0, None))
    axes[0, 1].set_title("length of a step")
    if energy is not None:
        axes[0, 2].plot(energy - energy[0], ".-", color=BLUE)
        axes[0, 2].set(xlabel=step, ylabel="H(z(t)) - H(z(0)) (units of H)")
        axes[0, 2].set_title("energy drift" if kept else "energy")
    return figure


def _caption(summary: dict[str, Any]) -> str:
    scale = "standardised" if summary["standardized"] else "raw"
    return f"encoder: {summary['encoder']}; {scale} latents; split by {summary['split']}; {summary['n_test']} test windows"


USUAL = 10.0
"""What relative errors and drifts are drawn up to, however small those of other models are."""
_SHADED = "lines: mean over test windows, shaded: 10th to 90th percentile; dashed: models without a Hamiltonian; "


def _drift_of(rows: Mapping[str, Any]) -> tuple[str, str]:
    """What the drift of energies is, in words and as a formula: friction and control change H as well."""
    if any(row.get("port") for row in rows.values()):
        return "Error of the energy balance", "|H(z(t)) - H(z(0)) - supplied + lost|"
    return "Energy drift", "|H(z(t)) - H(z(0))|"


def _drift_panel(axis: Axes, view: View, key: str, curves: list[Curve]) -> None:
    """Drift of the energies `<name>/<key>` over the standard deviation of each model's H, without those whose H is constant.

    `curves` are on the axis already.
    """
    for name in view.measured(key):
        H, scale = view.arrays[f"{name}/{key}"].double(), view.rows[name]["energy_std"]
        if scale:
            drift = (H[:, 1:] - H[:, :1]).abs() / scale
            curves.append(view.band(axis, name, np.arange(1, H.shape[1]), drift))
    axis.set(xlabel=view.step, ylabel=f"{_drift_of(view.rows)[1]} / std of H")
    in_view(axis, curves, scale="log", always=USUAL)


COURSE = 100
"""Steps of a coordinate's course that are drawn beside the true one."""


def _motion(view: View) -> Figure | None:
    """Predicted beside true motion, the error and the true energy over many steps; the best model of either kind in front."""
    if not view.summary["motion"]:
        return None
    summary, arrays, step = view.summary, view.arrays, str(findings.motion_horizon(view.summary))
    trained = findings.models(list(view.rows.values()))
    kinds = [[row for row in trained if findings.has_hamiltonian(row) == has] for has in (True, False)]
    best = [
        (findings.least(rows, lambda row: row["motion"]["error"][step]) or (rows[0], math.nan))[0]["name"]
        for rows in kinds
        if rows
    ]
    left = findings.lost(summary)
    about = (
        f"starts: {summary['extended_windows']} test windows, the path shown is from the first; lines: median over windows, "
        "shaded: 10th to 90th percentile, of the best model of either kind"
        + (f"; rollouts that left the motion: {left}; " if left else "; ")
    )
    figure = view.titled(findings.motion(summary), about)
    axes = figure.subplot_mosaic("aaabbbcccc\ndddddeeeee")
    true = arrays["true/motion"].double().numpy()
    pair = [0, true.shape[1] // 2]
    for axis, name in zip((axes["a"], axes["b"]), best, strict=False):
        path, title = arrays[f"{name}/motion"].double().numpy(), view.rows[name]["title"]
        axis.plot(*true[:, pair].T, "o", color=TRUE, ms=3.5, mew=0, alpha=0.35)
        axis.plot(*path[:, pair].T, "o", color=COLORS[name], ms=2, mew=0)
        axis.set(xlabel="q1 (standardised)", ylabel="p1 (standardised)", title=f"{title}, {len(true) - 1:,} steps")
        around(axis, true[:, pair], [(path[:, pair], COLORS[name], title)])
    if len(best) == 1:
        axes["b"].set_axis_off()
    steps = np.arange(min(COURSE, len(true) - 1) + 1)
    courses = [np.stack([steps, arrays[f"{name}/motion"][: len(steps), 0].double().numpy()], axis=1) for name in best]
    axes["c"].plot(steps, true[: len(steps), 0], color=TRUE, lw=3, alpha=0.35, label="true motion")
    for name, course in zip(best, courses, strict=True):
        axes["c"].plot(*course.T, style_of(name), color=COLORS[name], lw=1.3)
    seen = [(course, COLORS[name], view.rows[name]["title"]) for name, course in zip(best, courses, strict=True)]
    around(axes["c"], np.stack([steps, true[: len(steps), 0]], axis=1), seen)
    axes["c"].set(xlabel=view.step, ylabel="q1 (standardised)", title=f"course over {steps[-1]} steps")
    energy, scale = arrays["true/motion_energy"].double(), summary["motion"]["energy_scale"]
    errors, drifts = [], []
    for name in (row["name"] for row in trained):
        error, found = arrays[f"{name}/motion_error"].double(), arrays[f"{name}/motion_energy"].double()
        drift = (found - (found[:, :1] if summary["motion"]["conservative"] else energy)).abs() / scale
        x = np.arange(1, len(true))
        errors.append(view.band(axes["d"], name, x, error[:, 1:], shaded=name in best, mean=False))
        drifts.append(view.band(axes["e"], name, x, drift[:, 1:], shaded=name in best, mean=False))
    for axis, curves, title in (
        (axes["d"], errors, "squared error / variance"),
        (axes["e"], drifts, "true energy's error / |E|"),
    ):
        axis.set(xlabel=view.step, ylabel=title, xscale="log", xlim=(1, len(true) - 1))
        in_view(axis, curves, scale="log", always=USUAL)
    axes["d"].axhline(1, color=TRUE, lw=0.6, ls=":")
    legend(figure, 5)
    return figure


def _energy(view: View) -> Figure | None:
    if not view.measured("energy"):
        return None
    summary = view.summary
    finding = findings.energy(summary["models"], summary["extended_steps"], _drift_of(view.rows)[0])
    figure, axes = view.figure(finding, 1, 2, f"each model by its own H, those without one by the full model's; {_SHADED}")
    curves = []
    full = view.rows.get(zoo.FULL_MODEL)
    if full is not None and full["energy_std"]:
        H = view.arrays[f"{zoo.FULL_MODEL}/energy_true"].double()
        true = (H[:, 1:] - H[:, :1]).abs().mean(dim=0) / full["energy_std"]
        curves.append(
            curve(axes[0, 0], np.arange(1, H.shape[1]), true.numpy(), TRUE, "full model's H along the true latents", ":")
        )
    _drift_panel(axes[0, 0], view, "energy", curves)
    _drift_panel(axes[0, 1], view, "energy_extended", [])
    axes[0, 0].set_title(f"{summary['n_steps']} steps, all {summary['n_test']} test windows")
    axes[0, 1].set_title(f"{summary['extended_steps']:,} steps from {summary['extended_windows']} test windows")
    axes[0, 1].set(xscale="log", xlim=(1, None))
    legend(figure, 4)
    return figure


def _dissipation(view: View) -> Figure | None:
    """How H changes where friction or a control changes it."""
    names, arrays = view.measured("change"), view.arrays
    if not names:
        return None
    finding = findings.dissipation(view.summary["models"], view.summary["n_steps"])
    figure, axes = view.figure(finding, 1, 2, f"models with friction or a control; {_SHADED}")
    for axis, key, title in ((axes[0, 0], "change", "predictions"), (axes[0, 1], "change_true", "the true latents")):
        curves = [view.band(axis, name, np.arange(arrays[f"{name}/{key}"].shape[1]), arrays[f"{name}/{key}"]) for name in names]
        in_view(axis, curves)
        axis.axhline(0, color=TRUE, lw=0.6)
        axis.set(xlabel=view.step, ylabel="H(z(t)) - H(z(0)) (units of H)")
        axis.set_title(f"along {title}, {view.summary['n_steps']} steps")
    legend(figure, 4)
    return figure


def _drift_by_integrator(view: View) -> Figure | None:
    compared, summary = view.summary["integrators"], view.summary
    if not compared:
        return None
    alone = "without its friction and control; " if f"{zoo.FULL_MODEL}/change" in view.arrays else ""
    trained = next(row["integrator"] for row in compared if row["trained"])
    about = (
        f"the full model's network, trained with {trained}, {alone}its dt; float64; {summary['extended_windows']} windows; "
        "lines: mean, shaded: 10th to 90th percentile; "
    )
    figure, axes = view.figure(findings.integrators(compared, summary["extended_steps"]), about=about)
    curves = []
    for name in (row["integrator"] for row in compared):
        H = view.arrays[f"integrators/{name}/energy"].double()
        label = f"{name} (trained with)" if name == trained else name
        color = INTEGRATOR_COLORS.get(name, OTHER_INTEGRATOR)
        curves.append(band(axes[0, 0], np.arange(1, H.shape[1]), (H[:, 1:] - H[:, :1]).abs(), color, label))
    axes[0, 0].set(xlabel=view.step, ylabel="|H(z(t)) - H(z(0))| (units of H)", xscale="log", xlim=(1, None))
    full = view.rows.get(zoo.FULL_MODEL, {})
    in_view(axes[0, 0], curves, scale="log", always=USUAL * (full.get("energy_std") or 0.0))
    legend(figure)
    return figure


def _phase(view: View) -> Figure | None:
    if zoo.FULL_MODEL not in view.rows:
        return None
    true = view.arrays["true/example"]
    d = true.shape[1] // 2
    pairs = min(3, d)
    title, color = view.rows[zoo.FULL_MODEL]["title"], COLORS[zoo.FULL_MODEL]
    predicted = view.arrays[f"{zoo.FULL_MODEL}/example"][: len(true)]
    variance = _variance(view.rows)
    error, standing_still = ((states - true)[1:].double().square().mean().item() / variance for states in (predicted, true[:1]))
    finding = findings.window(title, error, standing_still, len(true) - 1)
    about = f"one test window; the first {pairs} of {d} pairs (q, p); circles: where both start; "
    figure, axes = view.figure(finding, 2, pairs, about)
    steps = np.arange(len(true))
    for i in range(pairs):
        paths = [np.stack([states[:, i], states[:, d + i]], axis=1) for states in (true, predicted)]
        for path, tone, label in zip(paths, (TRUE, color), ("true", title), strict=True):
            axes[0, i].plot(*path.T, ".-", color=tone, label=label, lw=1, ms=3)
            axes[0, i].plot(*path[0], "o", color=tone, ms=7, mfc="none")
            axes[1, i].plot(steps, path[:, 0], "-", color=tone, lw=1.4)
        around(axes[0, i], paths[0], [(paths[1], color, title)])
        courses = [np.stack([steps, path[:, 0]], axis=1) for path in paths]
        around(axes[1, i], courses[0], [(courses[1], color, title)])
        axes[0, i].set(xlabel=f"q{i + 1} (latent units)", ylabel=f"p{i + 1} (latent units)")
        axes[1, i].set(xlabel=view.step, ylabel=f"q{i + 1} (latent units)")
    legend(figure)
    return figure


def _variance(rows: Mapping[str, Any]) -> float:
    """The variance of the data that relative errors are relative to; not a number where no row says."""
    return next(
        (row["mse_mean"] / row["mse_relative"] for row in rows.values() if row["mse_mean"] and row["mse_relative"]), math.nan
    )


def _comparison(run: Run, view: View) -> Figure:
    """Errors step by step, their course in training, a path, and the drift of energies over a window."""
    rows, arrays = view.rows, view.arrays
    names = [name for name in (PERSISTENCE, _best_hamiltonian(rows), "baseline", "baseline-residual") if name in rows]
    finding = findings.prediction(view.summary["models"], view.summary["n_steps"])
    figure, axes = view.figure(finding, 1, 3, _SHADED)
    variance, curves = _variance(rows), []
    for name in names:
        errors = arrays[f"{name}/step_mse"].double() / variance
        curves.append(view.band(axes[0, 0], name, np.arange(1, errors.shape[1] + 1), errors, shaded=name != PERSISTENCE))
    axes[0, 0].axhline(1, color=TRUE, lw=0.6, ls=":")
    axes[0, 0].set(xlabel=view.step, ylabel="MSE / variance of the data")
    axes[0, 0].set_title("error (dotted: the data's mean)")
    in_view(axes[0, 0], curves, scale="log", always=USUAL)
    true = arrays["true/example"][:, :2].numpy()
    axes[0, 1].plot(*true.T, ".-", color=TRUE, label="true", lw=1.2)
    others = []
    for name in names:
        if name != PERSISTENCE:
            path = arrays[f"{name}/example"][: len(true), :2].numpy()
            axes[0, 1].plot(*path.T, f".{style_of(name)}", color=COLORS[name], label=rows[name]["title"], lw=1.2)
            others.append((path, COLORS[name], rows[name]["title"]))
    around(axes[0, 1], true, others)
    axes[0, 1].set(xlabel="latent dimension 1 (latent units)", ylabel="latent dimension 2 (latent units)")
    axes[0, 1].set_title("one test window")
    curves = []
    for name, best in run.trained().items():
        last = best.with_name("last.safetensors")
        history = checkpoints.load(last if last.exists() else best).facts["history"]
        if history and name in rows:
            epochs, tested = (np.array([row[key] for row in history]) for key in ("epoch", "test_mse"))
            curves.append(
                curve(axes[0, 2], epochs, tested / variance, COLORS[name], rows[name]["title"], style_of(name), marker=".")
            )
    axes[0, 2].set(xlabel="epoch", ylabel="test MSE / variance of the data")
    axes[0, 2].set_title("in training, all models")
    in_view(axes[0, 2], curves, "epoch", scale="log", always=1.0)
    legend(figure, 4)
    return figure


def _best_hamiltonian(rows: Mapping[str, Any]) -> str:
    """The Hamiltonian model of the least error; the full model where all diverge."""
    found = findings.least([row for row in rows.values() if findings.has_hamiltonian(row)], lambda row: row["mse_relative"])
    return zoo.FULL_MODEL if found is None else found[0]["name"]


def _ablation(view: View) -> Figure:
    """Error and drift of every model, each with its number."""
    words = _drift_of(view.rows)[0].lower()
    finding = findings.ablation(view.summary["models"], view.summary["n_steps"], words)
    about = "points: mean over test windows, lines: standard deviation over windows; "
    figure, axes = view.figure(finding, 1, 2, about, sharey=True)
    rows = [row for row in view.rows.values() if row["name"] != PERSISTENCE]
    for axis, key, label, scale in (
        (axes[0, 0], "mse", "MSE / variance of the data", "linear"),
        (axes[0, 1], "drift", f"{words} / std of H", "log"),
    ):
        units = [_variance(view.rows) if key == "mse" else row["energy_std"] for row in rows]
        _dots(axis, rows, key, units, scale)
        axis.set_xlabel(f"{label}, over {view.summary['n_steps']} steps")
    axes[0, 0].set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _dots(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, units: Sequence[float | None], scale: str) -> None:
    """`<key>_mean` and `<key>_std` of each row in its units; the axis shows what lies near the middle one, all are written."""
    numbers = []
    for row, unit in zip(rows, units, strict=True):
        mean, std = row[f"{key}_mean"], row[f"{key}_std"]
        numbers.append((math.nan if mean is None or not unit else mean / unit, (std or 0.0) / (unit or 1.0)))
    means = sorted(mean for mean, _ in numbers if math.isfinite(mean) and (mean > 0 or scale == "linear"))
    limit = reach(means, scale, USUAL)
    inside = [mean for mean in means if mean <= limit] or [1.0]
    if scale == "log":
        axis.set_xscale("log")
    else:
        axis.locator_params(axis="x", nbins=5)
    left, right = (0.0, 1.5 * max(inside)) if scale == "linear" else (min(inside) / 3, max(inside) * 3)
    axis.set_xlim(left, right or 1.0)
    for place, (row, unit, (mean, std)) in enumerate(zip(rows, units, numbers, strict=True)):
        color = COLORS[row["name"]]
        text = findings.shown(mean) if math.isfinite(mean) else "diverged" if unit else "-"
        if math.isfinite(mean) and mean <= limit and (mean > 0 or scale == "linear"):
            axis.plot([max(mean - std, left), min(mean + std, right)], [place] * 2, color=color, lw=2, alpha=0.5)
            axis.plot(mean, place, "o" if findings.has_hamiltonian(row) else "s", color=color, ms=7)
        elif math.isfinite(mean) and mean > limit:
            text += " (off the axis)"
        axis.text(1.01, place, text, va="center", fontsize=8, transform=axis.get_yaxis_transform())
    axis.grid(axis="y", color="#EEEEEE")


def _dataset(run: Run, view: View, latents: Sequence[Latents]) -> Figure:
    videos = run.read_inputs()["videos"]
    try:
        paths = find_videos(videos) if videos is not None else []
    except HJEPAError:
        paths = []  # the videos may have been deleted since; the latents still show the data's diversity
    everything = torch.cat([item.latents for item in latents])
    lengths = torch.cat([item.latents.diff(dim=0).norm(dim=1) for item in latents])
    truths = [truth for truth in map(load_ground_truth, paths) if truth is not None]
    shown = [paths[i] for i in np.linspace(0, len(paths) - 1, min(4, len(paths))).round().astype(int)]
    spread = (everything - everything.mean(dim=0)).double().square().sum(dim=1).mean().sqrt().item()
    centre, components, shares = _components(everything)
    plane = [((item.latents - centre).double() @ components.T).numpy() for item in latents]
    step = float(lengths.median()) if len(lengths) else None
    finding = findings.dataset(len(latents), len(everything), step, spread, shares[:2].sum().item())
    figure, axes = view.figure(finding, 2 if shown else 1, 4)
    for axis, path in zip(axes[0], shown, strict=False):
        axis.imshow(middle_frame(path))  # synthetic videos all start alike
        axis.set_title(path.stem, parse_math=False)
    for axis in axes[0] if shown else ():
        axis.set_axis_off()
    motion, plot, histogram, variances = axes[-1]
    if truths:
        for truth in truths:
            for ball in range(truth.positions.shape[1]):
                motion.plot(*truth.positions[:, ball].T, color=PALETTE[ball % len(PALETTE)], lw=0.5, alpha=0.5)
        motion.invert_yaxis()
        motion.set_aspect("equal")
        motion.set(xlabel="x (pixels)", ylabel="y (pixels)")
        motion.set_title("bodies' centres, all videos")
    else:
        motion.set_axis_off()
    for points in plane:
        plot.plot(*points.T, lw=0.6, alpha=0.7, color=BLUE)
    plot.set(xlabel="first component (latent units)", ylabel="second component")
    plot.set_title("latents, largest plane")
    # in float32, forty bins do not fit between lengths that are almost equal
    histogram.hist(lengths.double(), bins=40, color=BLUE)
    histogram.set(xlabel="|z(t+1) - z(t)| (latent units)", ylabel="steps")
    histogram.set_title("length of a step")
    variances.plot(np.arange(1, 1 + len(shares[:20])), 100 * shares[:20].cumsum(dim=0), ".-", color=BLUE)
    variances.set(xlabel="principal components", ylabel="variance held (%)", ylim=(0, 102))
    variances.set_title("variance")
    return figure


def _components(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of states [n, d]: the mean [d], the two largest principal components [2, d], each one's share of variance [k]."""
    centre = states.mean(dim=0)
    _, sizes, components = torch.linalg.svd((states - centre).double(), full_matrices=False)
    shares = sizes.square() / sizes.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return centre, F.pad(components[:2], (0, 0, 0, 2 - len(components[:2]))), shares


def principal_plane(states: Tensor) -> np.ndarray:
    """States [n, d] in their two largest principal components: [n, 2]."""
    centre, components, _ = _components(states)
    return ((states - centre).double() @ components.T).numpy()
