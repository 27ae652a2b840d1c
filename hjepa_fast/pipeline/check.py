"""What the integrators make of a trained model: `diagnostics` on a checkpoint, as a table, JSON and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import api, diagnostics
from ..diagnostics import Report, Verdict
from ..errors import LatentError, UsageError
from ..integrators import SymplecticIntegrator
from ..names import Backend, Integrator
from . import checkpoints, files, zoo
from .checkpoints import Checkpoint
from .latents import read_latents
from .plotting import (
    INTEGRATOR_COLORS,
    LARGEST,
    PALETTE,
    Curve,
    check_available,
    curve,
    in_view,
    legend,
    new_figure,
    own_style,
    save,
)
from .run_folder import output
from .train import how_trained, load_identified

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED = 0
"""Of the normal latents that stand in for a file of latents."""
_COLUMNS = {
    "symplectic": "symplecticity",
    "volume": "volume",
    "reversible": "reversal",
    "order": "order",
    "energy": "energy growth",
    "gradients": "gradients",
}
_MARKS = {"passed": "ok", "failed": "FAILED", "not claimed": "-", "not measured": "?"}
_LEGEND = (
    "ok: holds; FAILED: is claimed and does not hold; -: is not claimed; ?: could not be measured.\n"
    "symplecticity: max |J^T Omega J - Omega| of a step; volume: |det J - 1|; reversal: what is lost there and back;\n"
    "order: slope of the error against dt; energy growth: the energy error of the last tenth of the steps over that of the\n"
    "second tenth; gradients: difference from finite differences."
)
SUFFIXES = (".json", ".png", ".pdf")
"""Of the files that a check writes."""
_POINTS = 200
"""Steps of the energy drift that the JSON file holds."""


@dataclass(frozen=True)
class Check:
    """What a check found, in words and as reports, and where it was written."""

    text: str
    reports: list[Report]
    paths: list[Path]

    @property
    def failed(self) -> list[str]:
        """Integrators and properties that contradict what is claimed, such as "leapfrog: order"."""
        return [f"{report.integrator}: {verdict.name}" for report in self.reports for verdict in report.failed]


def check(
    checkpoint: Path,
    out: Path,
    *,
    integrators: Sequence[Integrator] | None = None,
    dt: float | None = None,
    n_steps: int = 1000,
    n_states: int = 8,
    latents: Path | None = None,
    backend: Backend = "auto",
) -> Check:
    """Measure what integrators keep of a trained model's dynamics, in float64; see `diagnostics.check`.

    Of a model with friction or a control it is its H alone that is measured, and the report says so.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint of a model with a Hamiltonian, written by `train`.
    out : Path
        Stem of the files written: `.json`, `.png`, `.pdf`.
    integrators : sequence of str, optional
        By default the model's own, then "implicit-leapfrog".
    dt : float, optional
        Step size, by default the model's.
    n_steps : int
        Of the energy drift.
    n_states : int
        How many states to start from.
    latents : Path, optional
        Start from latents of this file, evenly spread, instead of standard normal ones.
    backend : str
        See `hjepa_fast.rollout`.

    Raises
    ------
    UsageError
        A model without a Hamiltonian, or a value that cannot be used.
    LatentError
        Latents of another size, or of another encoder than the model's.
    CheckpointError
        The checkpoint cannot be read.
    HJEPAError
        Another process writes into the run that `out` lies in, or a file cannot be written.
    """
    check_available()
    if n_states < 1:
        raise UsageError(f"a check needs at least 1 state, found {n_states}")
    if n_steps < diagnostics.PIECES:
        raise UsageError(f"a check of the energy drift needs at least {diagnostics.PIECES} steps, found {n_steps}")
    if dt is not None and (dt == 0 or not math.isfinite(dt)):
        raise UsageError(f"dt must be finite and not 0, found {dt}")
    for name in integrators or ():
        if name not in api.INTEGRATORS:
            raise UsageError(f"integrator must be one of {', '.join(api.INTEGRATORS)}; found {name!r}")
    with output(out, SUFFIXES, (checkpoint, latents)):
        pass  # refused before anything is measured
    loaded, digest = load_identified(checkpoint)
    model = checkpoints.restore(loaded, checkpoint).eval()
    title = zoo.title(loaded.facts["model"], model)
    if not isinstance(model, SymplecticIntegrator):
        raise UsageError(
            f"{checkpoint} is a {title}, which has no Hamiltonian to check; expected one of {_hamiltonian_models()}"
        )
    port = zoo.port_of(model)
    model = zoo.without_port(model)
    z0, source = _states(loaded, checkpoint, latents, n_states)
    try:
        api.choose_backend(backend, z0)
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    try:
        reports = diagnostics.check(model, z0, dt, integrators=integrators, n_steps=n_steps, backend=backend)
    except ValueError as error:  # such as an integrator that the model's kind of network has not
        raise UsageError(f"{checkpoint} cannot be checked so: {error}") from error

    about = f"{title}, {loaded.facts['latent_dim']} dimensions, dt {reports[0].dt:.4g}, {len(z0)} {source}"
    trained = how_trained(checkpoint, loaded.facts)
    about += f"; {trained}" if trained else ""
    about += "" if port is None else "; H alone, without its friction and control"
    json_path = out.with_name(f"{out.name}.json")
    of = {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": digest,
        "model": loaded.facts["model"],
        "trained": trained,
    }
    with output(out, SUFFIXES, (checkpoint, latents)):
        files.write_json(json_path, of | {"states": f"{len(z0)} {source}"} | summary(reports))
        paths = [json_path, *save(check_figure(reports, about), out)]
    text = "\n\n".join((about, f"{table(reports)}\n{_LEGEND}", *map(diagnostics.plain_words, reports)))
    return Check(text, reports, paths)


def table(reports: Sequence[Report]) -> str:
    """A line for each integrator, a column for each property, as aligned text."""
    rows = [["", *_COLUMNS.values()]]
    for report in reports:
        rows.append([report.integrator, *(_cell(report[name]) for name in _COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(reports: Sequence[Report]) -> dict[str, Any]:
    """The reports as plain values for JSON; numbers that are not finite become None."""
    return {"integrators": [_plain(report) for report in reports]}


@own_style
def check_figure(reports: Sequence[Report], title: str) -> Figure:
    """Energy drift against steps, errors against step size with their slopes, and the defects beside what is let pass."""
    figure, axes = new_figure(_finding(reports), title, 1, 3)
    others = [color for color in PALETTE if color not in INTEGRATOR_COLORS.values()]
    drifts: list[Curve] = []
    found = 0  # integrators without a colour of their own
    for i, report in enumerate(reports):
        color, style = INTEGRATOR_COLORS.get(report.integrator), "-"
        if color is None:
            color, style = others[found % len(others)], ("-", "--", ":")[found // len(others) % 3]
            found += 1
        drifts += _drift_panel(axes[0, 0], report, color, style)
        _order_panel(axes[0, 1], report, color, style)
        _defect_panel(axes[0, 2], report, color, (i + 0.5) / len(reports) - 0.5, label_limits=i == 0)
    axes[0, 0].set(xlabel="step", ylabel="mean |H(z(t)) - H(z(0))| (units of H)", title="energy drift")
    in_view(axes[0, 0], drifts, scale="log", always=1.0)
    axes[0, 1].set(xlabel="dt", ylabel="relative error", xscale="log", yscale="log", title="order")
    axes[0, 2].set(ylabel="defect (bars: what is let pass)", yscale="log", title="structure and gradients")
    axes[0, 2].set_xticks(range(len(_DEFECTS)), [_COLUMNS[name] for name in _DEFECTS], rotation=15)
    sizes = sorted({size for report in reports if report.order for size in report.order.step_sizes.tolist()})
    axes[0, 1].set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    axes[0, 1].minorticks_off()
    legend(figure, 4)
    return figure


def _finding(reports: Sequence[Report]) -> str:
    """What of the claims does not hold, in a sentence."""
    failed = [f"{report.integrator}: {', '.join(_COLUMNS[verdict.name] for verdict in report.failed)}"
              for report in reports if report.failed]  # fmt: skip
    if failed:
        return f"Claimed, and does not hold: {'; '.join(failed)}"
    names = ", ".join(report.integrator for report in reports)
    unmeasured = any(verdict.outcome == "not measured" for report in reports for verdict in report.verdicts)
    return f"All holds that is claimed of {names}{', as far as it could be measured' if unmeasured else ''}"


_DEFECTS = ("symplectic", "volume", "reversible", "gradients")
_SMALLEST = 1e-18
"""Where an exact zero is drawn on an axis of logarithms."""


def _label(report: Report) -> str:
    if report.order is None or math.isnan(report.order.slope):
        return report.integrator
    return f"{report.integrator} (order {report.order.slope:.2f})"


def _drift_panel(axis: Axes, report: Report, color: str, style: str) -> list[Curve]:
    if report.drift is None:
        return []
    mean = report.drift.mean[1:].numpy()
    shown = np.where(mean < LARGEST, np.maximum(mean, _SMALLEST), np.inf)
    return [curve(axis, np.arange(1, len(mean) + 1), shown, color, _label(report), style, lw=1.2)]


def _order_panel(axis: Axes, report: Report, color: str, style: str) -> None:
    if report.order is not None and (report.order.errors < LARGEST).all():
        errors = report.order.errors.clamp(min=_SMALLEST).numpy()
        axis.plot(report.order.step_sizes.numpy(), errors, f"o{style}", color=color, label=_label(report), lw=1.2, ms=4)


def _defect_panel(axis: Axes, report: Report, color: str, offset: float, label_limits: bool) -> None:
    for position, name in enumerate(_DEFECTS):
        verdict = report[name]
        x = position + 0.7 * offset
        if math.isfinite(verdict.value):
            axis.plot(x, max(verdict.value, _SMALLEST), "o", color=color, ms=6)
        if label_limits and math.isfinite(verdict.threshold):
            axis.hlines(verdict.threshold, position - 0.4, position + 0.4, color="#000000", lw=1, zorder=1)


def _states(loaded: Checkpoint, checkpoint: Path, latents: Path | None, n_states: int) -> tuple[Tensor, str]:
    """Initial states [n, d] in the model's units, float64, and what they are."""
    dim = loaded.facts["latent_dim"]
    if latents is None:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(n_states, dim, generator=generator, dtype=torch.float64), "standard normal states"
    sequence = read_latents(latents)
    found, label = sequence.latents.shape[1], sequence.metadata.get("label")
    if found != dim or label != loaded.facts["encoder"]:
        raise LatentError(
            f"{checkpoint} was trained on {dim} dimensions of {loaded.facts['encoder']}; {latents} gives {found} of {label}"
        )
    rows = torch.linspace(0, len(sequence.latents) - 1, min(n_states, len(sequence.latents))).round().long()
    return ((sequence.latents[rows] - loaded.mean) / loaded.std).double(), f"states of {latents.name}"


def _hamiltonian_models() -> str:
    return ", ".join(name for name, spec in zoo.MODELS.items() if spec.integrator is not None)


def _cell(verdict: Verdict) -> str:
    value = "" if math.isnan(verdict.value) else f"{verdict.value:.2f} " if verdict.name == "order" else f"{verdict.value:.1e} "
    return f"{value}{_MARKS[verdict.outcome]}"


def _plain(report: Report) -> dict[str, Any]:
    order, drift = report.order, report.drift
    return {
        "integrator": report.integrator,
        "source": report.source,
        "dt": report.dt,
        "n_steps": report.n_steps,
        "separability_defect": report.separability,
        "claimed": report.claimed._asdict(),
        "verdicts": [
            {key: _number(value) if isinstance(value, float) else value for key, value in verdict._asdict().items()}
            for verdict in report.verdicts
        ],
        "order": None if order is None else {"step_sizes": _numbers(order.step_sizes), "errors": _numbers(order.errors)},
        "energy_drift": None if drift is None else _plain_drift(drift),
        "plain_words": diagnostics.plain_words(report),
    }


def _plain_drift(drift: diagnostics.Drift) -> dict[str, Any]:
    steps = torch.linspace(0, len(drift.mean) - 1, min(_POINTS + 1, len(drift.mean))).round().long()
    return {
        "growth": _number(drift.growth),
        "slope": _number(drift.slope),
        "path": _number(drift.path),
        "diverged_at": drift.diverged_at,
        "steps": steps.tolist(),
        "mean": _numbers(drift.mean[steps]),
        "max": _numbers(drift.maximum[steps]),
    }


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
