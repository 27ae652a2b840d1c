"""How every figure looks: one size and palette, a finding as its title, legends off the data, no axis ruled by one curve."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError, MissingDependencyError
from . import files, zoo
from .evaluate import PERSISTENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

SIZE = (10.0, 5.6)
"""Width and height of every figure, in inches."""
DPI = 130
# Okabe and Ito's palette without its yellow, which white swallows, and four of Paul Tol's muted one
BLUE, SKY, GREEN, PURPLE, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00"
INDIGO, WINE, OLIVE, GREY, BLACK = "#332288", "#882255", "#999933", "#BBBBBB", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, INDIGO, WINE, OLIVE, GREY)
"""For what has no colour of its own, in this order."""
COLORS = {
    "hnn": BLUE,
    "hnn-no-energy": INDIGO,
    "hnn-euler": PURPLE,
    "hnn-implicit": SKY,
    "hnn-separable": GREEN,
    "baseline": ORANGE,
    "baseline-residual": VERMILLION,
    "hnn-no-friction": WINE,
    "hnn-no-control": OLIVE,
    PERSISTENCE: GREY,
}
"""Of each model, everywhere."""
TRUE = BLACK
INTEGRATOR_COLORS = {"leapfrog": BLUE, "euler": PURPLE, "implicit-leapfrog": SKY, "implicit-midpoint": GREEN}
"""Of each integrator; the first three as the models that are there to show them."""
OTHER_INTEGRATOR = WINE
LARGEST = 1e30
"""What a rollout that diverges goes on to is not drawn."""
ROOM = {"log": 1e4, "linear": 4.0}
"""How many times as high as the one below it a curve may reach without leaving the axis."""
_STYLE = {
    "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
_TITLE, _ABOUT, _LEGEND = 110, 180, 0.033
"""Characters in a line of a title and of what stands below, and the height of a row of the legend, of the figure's."""


def style_of(name: str) -> str:
    """Solid lines for models with a Hamiltonian, dashed ones for those without."""
    spec = zoo.MODELS.get(name)
    return "-" if spec is not None and spec.integrator is not None else "--"


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
def defaults() -> Iterator[None]:
    """Matplotlib's own settings and the looks of this project's figures, whatever a user's matplotlibrc says."""
    matplotlib = _matplotlib()
    # the date is left out, and one that is no number is an error
    with matplotlib.rc_context(), _without("SOURCE_DATE_EPOCH"):
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def own_style(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` draw with matplotlib's own defaults: a user's matplotlibrc changes no figure, nor does it see a change."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with defaults():
            return function(*args, **kwargs)

    return wrapped


@own_style
def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF, atomically."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".pdf")]
    for path in paths:
        with files.atomic_path(path) as temporary:
            pdf = path.suffix == ".pdf"
            # no creation date: the same run gives the same file
            metadata = {"CreationDate": None} if pdf else None
            figure.savefig(temporary, dpi=DPI, metadata=metadata, backend="pdf" if pdf else "agg")
    return paths


def new_figure(finding: str, about: str = "", n_rows: int = 1, n_columns: int = 1, **grid: Any) -> tuple[Figure, np.ndarray]:
    """A figure without pyplot's global state, and its axes [n_rows, n_columns]; for a function with `own_style`.

    `finding` is its title; `about`, what it was drawn from, stands small below it. `grid`: see `Figure.subplots`.
    """
    figure = titled(finding, about)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **grid)


def titled(finding: str, about: str = "") -> Figure:
    """`new_figure` without its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    # a file's name may hold dollar signs
    figure.suptitle(_wrapped(finding, _TITLE), x=0.01, ha="left", fontsize=10.5, fontweight="bold", parse_math=False)
    text = _wrapped(about, _ABOUT)
    figure.text(0.01, 0.008, text, fontsize=7.5, color="#555555", parse_math=False, in_layout=False)
    _keep_free(figure, 0.01 + 0.023 * len(text.splitlines()))
    return figure


def _keep_free(figure: Figure, bottom: float) -> None:
    """Leave room at the bottom for what the engine that lays out the axes knows nothing of, as a share of the height."""
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom), w_pad=0.06)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, width))


def legend(figure: Figure, columns: int = 5) -> None:
    """One legend for all of a figure's axes, below them: each label once, in the order in which they are drawn."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    columns = max(1, min(columns, len(found), 150 // (8 + max(map(len, found)))))
    engine = figure.get_layout_engine()
    assert engine is not None
    below = engine.get()["rect"][1]
    figure.legend(
        found.values(), found.keys(), loc="lower center", bbox_to_anchor=(0.5, below), ncols=columns, handlelength=2.6,
        borderpad=0, borderaxespad=0.3,
    ).set_in_layout(False)  # fmt: skip
    _keep_free(figure, below + 0.012 + _LEGEND * math.ceil(len(found) / columns))


@dataclass(frozen=True)
class Curve:
    """What is drawn of one model: values [T] at x [T], where not finite means that it diverged."""

    x: np.ndarray
    values: np.ndarray
    color: str
    label: str


def curve(axis: Axes, x: np.ndarray, values: np.ndarray, color: str, label: str, style: str = "-", **options: Any) -> Curve:
    """Draw a line; see `in_view`."""
    shown = np.where(np.isfinite(values) & (np.abs(values) < LARGEST), values, np.nan)
    axis.plot(x, shown, style, color=color, label=label, **{"lw": 1.6} | options)
    return Curve(np.asarray(x), np.asarray(values, dtype=float), color, label)


def band(
    axis: Axes, x: np.ndarray, values: Tensor, color: str, label: str, style: str = "-", shaded: bool = True, mean: bool = True
) -> Curve:
    """Draw mean, or median, and 10th to 90th percentile over the first dimension of values [n, T].

    What is not finite counts as larger than everything else, so that a mean leaves the axis where one row diverges, and a
    median where half of them do.
    """
    values = values.double()
    values = torch.where(values.isfinite() & (values.abs() < LARGEST), values, math.inf).sort(dim=0).values
    low, middle, high = (values[round(q * (len(values) - 1))].numpy() for q in (0.1, 0.5, 0.9))
    if shaded:
        axis.fill_between(x, np.minimum(low, LARGEST), np.minimum(high, LARGEST), color=color, alpha=0.13, lw=0)
    return curve(axis, x, values.mean(dim=0).numpy() if mean else middle, color, label, style)


def in_view(axis: Axes, curves: Sequence[Curve], what: str = "step", scale: str = "linear", always: float = 0.0) -> None:
    """Set the vertical axis so that no diverging curve rules it, and write of each that leaves it where it does.

    The axis reaches `always`, where a curve does; from there, or from the middle one of the curves' largest sizes (the lower
    of two), it goes up to the next as long as that is at most `ROOM` times as high. It is logarithmic, if
    `scale` says "log", where positive values differ by more than ten times.
    """
    tops = sorted(top for top in (_top(curve.values) for curve in curves) if top > 0)
    least = min((_least(curve.values) for curve in curves), default=math.inf)
    scale = "log" if scale == "log" and tops and tops[-1] > 10 * least else "linear"
    axis.set_yscale(scale)
    limit = reach(tops, scale, always)
    inside = [top for top in tops if top <= limit]
    leaving = [curve for curve in curves if not (np.isfinite(curve.values).all() and _top(curve.values) <= limit)]
    if inside:
        room = 0.06 + 0.07 * len(leaving)  # for what is written of those that leave
        if scale == "log":
            span = max(math.log10(inside[-1] / least), 0.5)
            axis.set_ylim(least / 10 ** (0.06 * span), inside[-1] * 10 ** (room * span))
        else:
            seen = np.concatenate([[0.0], *(curve.values[np.abs(curve.values) <= inside[-1]] for curve in curves)])
            span = float(np.ptp(seen))
            axis.set_ylim(seen.min() - (0.06 * span if seen.min() < 0 else 0.0), seen.max() + room * span)
    for row, gone in enumerate(leaving):
        outside = ~(np.abs(gone.values) <= (inside[-1] if inside else limit) * (1 + 1e-9))
        top, first = _top(gone.values), gone.x[np.argmax(outside)]
        largest = f", largest {top:.1e}" if np.isfinite(gone.values).all() else ", then diverges"
        _note(axis, row, f"{gone.label}: off the axis from {what} {first:g}{largest}", gone.color)


def _note(axis: Axes, row: int, text: str, color: str) -> None:
    """Write at the top of an axis, the first row highest, over what is drawn there."""
    axis.text(
        0.02, 0.985 - 0.065 * row, text, color=color, fontsize=7.5, va="top", transform=axis.transAxes, parse_math=False,
        zorder=10, bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def reach(tops: Sequence[float], scale: str, always: float = 0.0) -> float:
    """Where an axis ends for values in rising order; see `in_view`. Infinite where there are none."""
    if not tops:
        return math.inf
    limit = max(always, tops[(len(tops) - 1) // 2])
    for top in tops:
        if limit < top <= ROOM[scale] * limit:
            limit = top
    return limit


def _top(values: np.ndarray) -> float:
    """The largest size of a finite value; 0 without any."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def _least(values: np.ndarray) -> float:
    """The smallest positive finite value; infinity without any."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.min()) if positive.size else math.inf


def around(axis: Axes, reference: np.ndarray, others: Sequence[tuple[np.ndarray, str, str]], what: str = "step") -> None:
    """Set both axes to a reference path [n, 2] and to as much of other paths as lies near it, saying of each that leaves.

    Each of `others` is a path [m, 2], a colour and a label. Near is within the reference's own extent to every side.
    """
    low, high = reference.min(axis=0), reference.max(axis=0)
    extent = np.maximum(high - low, 1e-3 * max(1.0, float(np.abs(reference).max())))
    low, high = low - extent, high + extent
    paths = [np.where(np.isfinite(path), path, np.inf) for path, *_ in others]
    inside = [path[((path >= low) & (path <= high)).all(axis=1)] for path in paths]
    seen = np.concatenate([reference, *inside])
    margin = 0.08 * np.maximum(np.ptp(seen, axis=0), extent / 10)
    axis.set_xlim(seen[:, 0].min() - margin[0], seen[:, 0].max() + margin[0])
    within = [((path >= low) & (path <= high)).all(axis=1) for path in paths]
    top = np.ptp(seen[:, 1]) * 0.075 * sum(not here.all() for here in within)
    axis.set_ylim(seen[:, 1].min() - margin[1], seen[:, 1].max() + margin[1] + top)
    row = 0
    for here, (_, color, label) in zip(within, others, strict=True):
        if not here.all():
            _note(axis, row, f"{label}: out of view from {what} {int(np.argmin(here))}", color)
            row += 1
