"""The figures of a run, drawn from its files; nothing is trained or evaluated again."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError, MissingDependencyError
from . import checkpoints, files, zoo
from .encoder_files import file_sha256
from .evaluate import PERSISTENCE
from .latents import load_latents
from .tables import unfinished
from .train import standing
from .videos import find_videos, load_ground_truth, middle_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .run_folder import Run

P = ParamSpec("P")
T = TypeVar("T")

# Okabe and Ito's palette, distinguishable with any colour vision, and two of Tol's
COLORS = {
    "hnn": "#0072B2",
    "hnn-no-energy": "#009E73",
    "hnn-euler": "#D55E00",
    "hnn-implicit": "#56B4E9",
    "hnn-separable": "#F0E442",
    "baseline": "#CC79A7",
    "baseline-residual": "#E69F00",
    "hnn-no-friction": "#882255",
    "hnn-no-control": "#332288",
    PERSISTENCE: "#999999",
}
TRUE = "#000000"
INTEGRATOR_COLORS = {
    "leapfrog": "#0072B2",
    "euler": "#D55E00",
    "implicit-leapfrog": "#56B4E9",
    "implicit-midpoint": "#009E73",
}
OTHER_INTEGRATOR = "#CC79A7"
LARGEST = 1e30
"""What a rollout that diverges goes on to is not drawn."""


def check_available() -> None:
    """Refuse at once what would fail when figures are drawn, perhaps after hours.

    Raises
    ------
    MissingDependencyError
        Matplotlib is not installed.
    HJEPAError
        It cannot be imported.
    """
    _matplotlib()


def _matplotlib() -> Any:
    """Matplotlib, whatever backend the environment names; for the rest of the process that backend stays."""
    backend = os.environ.get("MPLBACKEND")
    first = "matplotlib" not in sys.modules
    try:
        with _without("MPLBACKEND"):  # the import fails with a name that it does not know
            import matplotlib
            from matplotlib.backends import backend_agg, backend_pdf  # noqa: F401  what savefig would import
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'hjepa_fast[pipeline]'") from error
    except Exception as error:  # such as a matplotlibrc that cannot be read
        raise HJEPAError(f"matplotlib cannot be imported: {type(error).__name__}: {error}") from error
    if first and backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    """The environment without a variable."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    matplotlib = _matplotlib()
    # the date is left out, and one that is no number is an error
    with matplotlib.rc_context(), _without("SOURCE_DATE_EPOCH"):
        matplotlib.rcdefaults()
        yield


def own_style(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` draw with matplotlib's own defaults: a user's matplotlibrc changes no figure, nor does it see a change."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with _defaults():
            return function(*args, **kwargs)

    return wrapped


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
    arrays = {name: torch.where(values.abs() < LARGEST, values, torch.nan) for name, values in arrays.items()}
    written = []
    for name, figure in (
        ("energy", _energy(summary, rows, arrays)),
        ("drift_by_integrator", _drift_by_integrator(summary, arrays)),
        ("dissipation", _dissipation(summary, arrays, rows)),
        ("phase", _phase(rows, arrays)),
        ("comparison", _comparison(run, rows, arrays)),
        ("ablation", _ablation(rows)),
        ("dataset", _dataset(run)),
    ):
        if figure is not None:
            figure.suptitle(f"{figure.get_suptitle()}\n{_caption(summary)}", fontsize=10, parse_math=False)
            written += save(figure, run.figures / name)
    return written


@own_style
def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF, atomically."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".pdf")]
    for path in paths:
        with files.atomic_path(path) as temporary:
            pdf = path.suffix == ".pdf"
            # no creation date: the same run gives the same file
            metadata = {"CreationDate": None} if pdf else None
            figure.savefig(temporary, dpi=130, metadata=metadata, backend="pdf" if pdf else "agg")
    return paths


def new_figure(title: str, n_rows: int, n_columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure without pyplot's global state, and its axes [n_rows, n_columns]; for a function with `own_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(9)
    figure.suptitle(title, parse_math=False)  # a file's name may hold dollar signs
    return figure, axes


@own_style
def dream_figure(states: Tensor, energy: Tensor | None, title: str, kept: bool = True) -> Figure:
    """A free rollout [n + 1, d]: its path in the plane of its two largest components, step lengths, energy [n + 1].

    `kept` says whether exact solutions keep that energy.
    """
    figure, axes = new_figure(title, 1, 2 if energy is None else 3, 10.5, 3.6)
    path = _principal_plane(states, states)
    axes[0, 0].plot(*path.T, "-", color=COLORS["hnn"], lw=1)
    axes[0, 0].scatter(*path.T, c=np.arange(len(path)), cmap="viridis", s=18, zorder=3)
    axes[0, 0].set(xlabel="first component", ylabel="second component", title="path (dark to bright)")
    axes[0, 1].plot(np.arange(1, len(states)), states.diff(dim=0).norm(dim=1), ".-", color=COLORS["hnn"])
    axes[0, 1].set(xlabel="step", ylabel="|z(t+1) - z(t)|", title="step length", ylim=(0, None))
    if energy is not None:
        axes[0, 2].plot(energy - energy[0], ".-", color=COLORS["hnn"])
        axes[0, 2].set(xlabel="step", ylabel="H(z(t)) - H(z(0))", title="energy drift" if kept else "energy")
    return figure


def _caption(summary: dict[str, Any]) -> str:
    scale = "standardised" if summary["standardized"] else "raw"
    about = f"encoder: {summary['encoder']}; {scale} latents; split by {summary['split']}; {summary['n_test']} test windows"
    open_ended = unfinished(summary)
    return about + (f"\nTRAINING IS NOT FINISHED: {'; '.join(open_ended)}" if open_ended else "")


def _band(axis: Axes, x: np.ndarray, values: Tensor, color: str, label: str, style: str = "-") -> None:
    """Median and 10th to 90th percentile over the first dimension of values [n, T], without what is not finite."""
    low, middle, high = torch.nanquantile(values.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0).numpy()
    axis.plot(x, middle, style, color=color, label=label, lw=1.6)
    if style == "-":
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _drift_panel(axis: Axes, drawn: Iterable[tuple[Tensor, str, str]], formula: str = "|H(z(t)) - H(z(0))|") -> None:
    """Each of: energies [n, T + 1], a colour, a label."""
    some = False
    for H, color, label in drawn:
        drift = (H[:, 1:] - H[:, :1]).abs()
        _band(axis, np.arange(1, H.shape[1]), drift, color, label)
        some |= bool((drift > 0).any())
    axis.set(xlabel="step", ylabel=formula)
    if some:  # nothing but zeros and what is not finite has no logarithms
        axis.set_yscale("log")


def _drift_of(rows: dict[str, Any]) -> tuple[str, str]:
    """What the drift of energies is, in words and as a formula: friction and control change H as well."""
    if any(row.get("port") for row in rows.values()):
        return "Error of the energy balance", "|H(z(t)) - H(z(0)) - supplied + lost|"
    return "Energy drift", "|H(z(t)) - H(z(0))|"


def _energy(summary: dict[str, Any], rows: dict[str, Any], arrays: dict[str, Tensor]) -> Figure | None:
    names = [name for name in rows if f"{name}/energy" in arrays and name != PERSISTENCE]
    if not names:
        return None
    words, formula = _drift_of(rows)
    figure, axes = new_figure(f"{words} of predictions (median, 10th to 90th percentile)", 1, 2, 10, 4.4)
    for axis, key in zip(axes.flat, ("energy", "energy_extended"), strict=True):
        _drift_panel(axis, ((arrays[f"{name}/{key}"], COLORS[name], rows[name]["title"]) for name in names), formula)
    axes[0, 0].set_title(f"{summary['n_steps']} steps", fontsize=9)
    axes[0, 1].set_title(f"{summary['extended_steps']} steps, {summary['extended_windows']} test windows", fontsize=9)
    if zoo.FULL_MODEL in names:
        H = arrays[f"{zoo.FULL_MODEL}/energy_true"]
        _band(axes[0, 0], np.arange(1, H.shape[1]), (H[:, 1:] - H[:, :1]).abs(), TRUE, "full model's H on true latents", "--")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _dissipation(summary: dict[str, Any], arrays: dict[str, Tensor], rows: dict[str, Any]) -> Figure | None:
    """How H changes where friction or a control changes it."""
    names = [name for name in rows if f"{name}/change" in arrays]
    if not names:
        return None
    figure, axes = new_figure("H of models with friction or a control (median, 10th to 90th percentile)", 1, 2, 10, 4.4)
    for axis, key, title in ((axes[0, 0], "change", "predictions"), (axes[0, 1], "change_true", "the true latents")):
        for name in names:
            change = arrays[f"{name}/{key}"]
            _band(axis, np.arange(change.shape[1]), change, COLORS[name], rows[name]["title"])
        axis.axhline(0, color=TRUE, lw=0.6)
        axis.set(xlabel="step", ylabel="H(z(t)) - H(z(0))")
        axis.set_title(f"{title}, {summary['n_steps']} steps", fontsize=9)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _drift_by_integrator(summary: dict[str, Any], arrays: dict[str, Tensor]) -> Figure | None:
    compared = summary["integrators"]
    if not compared:
        return None
    alone = ", without friction and control," if f"{zoo.FULL_MODEL}/change" in arrays else ""
    title = f"Energy drift of the full model's network{alone} by integrator (median, 10th to 90th percentile)"
    figure, axes = new_figure(title, 1, 1, 7.5, 4.8)
    trained = next(row["integrator"] for row in compared if row["trained"])
    names = [row["integrator"] for row in compared]
    _drift_panel(
        axes[0, 0],
        (
            (
                arrays[f"integrators/{name}/energy"],
                INTEGRATOR_COLORS.get(name, OTHER_INTEGRATOR),
                f"{name} (trained with)" if name == trained else name,
            )
            for name in names
        ),
    )
    axes[0, 0].set_title(f"{summary['extended_steps']} steps, {summary['extended_windows']} test windows, float64", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def _phase(rows: dict[str, Any], arrays: dict[str, Tensor]) -> Figure | None:
    if zoo.FULL_MODEL not in rows:
        return None
    true = arrays["true/example"]
    d = true.shape[1] // 2
    pairs = min(4, d)
    predicted = arrays[f"{zoo.FULL_MODEL}/example"][: len(true)]
    figure, axes = new_figure("One test window: phase portraits and time series", 2, pairs, 2.9 * pairs, 5.6)
    for i in range(pairs):
        for states, color, label in ((true, TRUE, "true"), (predicted, COLORS["hnn"], rows[zoo.FULL_MODEL]["title"])):
            q, p = states[:, i], states[:, d + i]
            axes[0, i].plot(q, p, ".-", color=color, label=label, lw=1, ms=3)
            axes[0, i].plot(q[:1], p[:1], "o", color=color, ms=6, mfc="none")
            axes[1, i].plot(q, "-", color=color, lw=1.4, label=f"q, {label}")
            axes[1, i].plot(p, "--", color=color, lw=1.4, label=f"p, {label}")
        axes[0, i].set(xlabel=f"q{i + 1}", ylabel=f"p{i + 1}")
        axes[1, i].set(xlabel="step", ylabel=f"q{i + 1}, p{i + 1}")
    axes[0, 0].legend(fontsize=7, frameon=False)
    axes[1, 0].legend(fontsize=7, frameon=False)
    return figure


def _comparison(run: Run, rows: dict[str, Any], arrays: dict[str, Tensor]) -> Figure:
    figure, axes = new_figure("HNN and baseline", 2, 2, 10, 7.4)
    compared = ("hnn", "hnn-no-friction", "hnn-no-control", "baseline", "baseline-residual", PERSISTENCE)
    names = [name for name in rows if name in compared] or list(rows)
    for name in names:
        errors = arrays[f"{name}/step_mse"]
        _band(axes[0, 0], np.arange(1, errors.shape[1] + 1), errors, COLORS[name], rows[name]["title"])
    axes[0, 0].set(xlabel="step", ylabel="MSE", title="error at each step (median, 10th to 90th percentile)")
    axes[0, 0].legend(fontsize=7, frameon=False)
    with_energy = [name for name in names if f"{name}/energy" in arrays and name != PERSISTENCE]
    if with_energy:
        words, formula = _drift_of(rows)
        drawn = ((arrays[f"{name}/energy"], COLORS[name], rows[name]["title"]) for name in with_energy)
        _drift_panel(axes[0, 1], drawn, formula)
        axes[0, 1].set_title(words.lower())
    true = arrays["true/example"]
    axes[1, 0].plot(*true[:, :2].T, ".-", color=TRUE, label="true", lw=1.2)
    for name in names:
        if name != PERSISTENCE:
            axes[1, 0].plot(
                *arrays[f"{name}/example"][: len(true), :2].T, ".-", color=COLORS[name], label=rows[name]["title"], lw=1.2
            )
    axes[1, 0].set(xlabel="latent dimension 0", ylabel="latent dimension 1", title="one test window")
    axes[1, 0].legend(fontsize=7, frameon=False)
    for name, path in run.trained().items():
        last = path.with_name("last.safetensors")
        history = checkpoints.load(last if last.exists() else path).facts["history"]
        epochs = [row["epoch"] for row in history]
        title = rows[name]["title"]
        axes[1, 1].semilogy(epochs, [row["test_mse"] for row in history], color=COLORS[name], label=title, lw=1.4)
        axes[1, 1].semilogy(epochs, [row["train_mse"] for row in history], ":", color=COLORS[name], lw=1)
    axes[1, 1].set(xlabel="epoch", ylabel="MSE", title="training (dotted) and test error")
    axes[1, 1].legend(fontsize=7, frameon=False)
    return figure


def _ablation(rows: dict[str, Any]) -> Figure:
    figure, axes = new_figure("Ablation (mean and standard deviation over test windows)", 1, 2, 10, 4.2)
    for axis, key, label in ((axes[0, 0], "mse", "MSE"), (axes[0, 1], "drift", f"max {_drift_of(rows)[1]}")):
        shown = [name for name in rows if rows[name][f"{key}_mean"] is not None]
        for position, name in enumerate(shown):
            mean, std = rows[name][f"{key}_mean"], rows[name][f"{key}_std"] or 0.0
            # a bar of a positive quantity does not reach below zero
            axis.bar(position, mean, color=COLORS[name], yerr=[[min(std, mean)], [std]], capsize=4, error_kw={"lw": 1})
        axis.set_xticks(range(len(shown)), [rows[name]["title"] for name in shown], rotation=20, ha="right", fontsize=8)
        axis.set_ylabel(label)
    return figure


def _dataset(run: Run) -> Figure | None:
    inputs = run.read_inputs()
    videos, folder = inputs["videos"], inputs["latents"]
    assert folder is not None
    latents = load_latents(folder)
    try:
        paths = find_videos(videos) if videos is not None else []
    except HJEPAError:
        paths = []  # the videos may have been deleted since; the latents still show the data's diversity
    shown = [paths[i] for i in np.linspace(0, len(paths) - 1, min(4, len(paths))).round().astype(int)]
    figure, axes = new_figure("Dataset diversity", 2 if shown else 1, max(len(shown), 2), 11, 5.8 if shown else 3.4)
    for axis, path in zip(axes[0], shown, strict=False):
        axis.imshow(middle_frame(path))  # synthetic videos all start alike
        axis.set_title(path.stem, fontsize=8, parse_math=False)
        axis.set_axis_off()
    below = axes[-1]
    truths = [truth for truth in map(load_ground_truth, paths) if truth is not None]
    if truths:
        for truth in truths:
            for ball in range(truth.positions.shape[1]):
                below[0].plot(*truth.positions[:, ball].T, color=f"C{ball}", lw=0.5, alpha=0.5)
        below[0].invert_yaxis()
        below[0].set_aspect("equal")
        below[0].set_title("ball centres, all videos", fontsize=8)
    everything = torch.cat([item.latents for item in latents])
    step_lengths = torch.cat([item.latents.diff(dim=0).norm(dim=1) for item in latents])
    plane = below[1] if truths else below[0]
    for item in latents:
        plane.plot(*_principal_plane(item.latents, everything).T, lw=0.6, alpha=0.7)
    plane.set_title("latents, two largest components", fontsize=8)
    rest = list(below[2:]) if truths else list(below[1:])
    if rest:
        # in float32, forty bins do not fit between lengths that are almost equal
        rest[0].hist(step_lengths.double(), bins=40, color=COLORS["hnn"])
        rest[0].set_title("distance between neighbouring latents", fontsize=8)
    for axis in rest[1:]:
        axis.set_axis_off()
    return figure


def _principal_plane(states: Tensor, basis_of: Tensor) -> np.ndarray:
    """States [n, d] in the two largest principal components of `basis_of` [m, d]: [n, 2]."""
    centre = basis_of.mean(dim=0)
    _, _, components = torch.linalg.svd((basis_of - centre).double(), full_matrices=False)
    plane = ((states - centre).double() @ components[:2].T).numpy()
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
