"""What a run found, in a sentence for each figure and table, computed from its numbers and true whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import zoo
from .evaluate import PERSISTENCE

Row = Mapping[str, Any]
Value = Callable[[Row], float | None]
HAMILTONIAN, OTHER = "Hamiltonian model", "MLP"
"""Kinds of models; those without a Hamiltonian are all perceptrons."""


def shown(value: float, digits: int = 3) -> str:
    """So many digits at most; powers of ten only where a plain number would be long."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        places = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.1e}"


def has_hamiltonian(row: Row) -> bool:
    """Whether a model has an H of its own."""
    spec = zoo.MODELS.get(row["name"])
    return row.get("integrator") is not None or (spec is not None and spec.integrator is not None)


def models(rows: Sequence[Row]) -> list[Row]:
    """The rows of what was trained."""
    return [row for row in rows if row["name"] != PERSISTENCE]


def least(rows: Sequence[Row], value: Value) -> tuple[Row, float] | None:
    """The row with the smallest finite value, the first of several, and that value; None where no row has one."""
    found = [(row, x) for row in rows if (x := value(row)) is not None and math.isfinite(x)]
    return min(found, key=lambda pair: pair[1], default=None)


def ranked(rows: Sequence[Row], value: Value) -> str | None:
    """ "A, 0.1; best MLP: B, 0.3 (3x)"; None if no trained model has a value.

    The second part is of the kind of models that the best one is not of, with or without a Hamiltonian, if there are any.
    """
    rows = models(rows)
    first = least(rows, value)
    if first is None:
        return None
    winner, x = first
    others = [row for row in rows if has_hamiltonian(row) != has_hamiltonian(winner)]
    text = f"{winner['title']}, {shown(x, 2)}"
    if not others:
        return text
    kind = OTHER if has_hamiltonian(winner) else HAMILTONIAN
    second = least(others, value)
    if second is None:
        return f"{text}; every {kind} diverges"
    ratio = second[1] / x if x > 0 else math.inf
    much = f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"
    times = f" ({much}x)" if 1.05 <= ratio < 1e4 else ""
    return f"{text}; best {kind}: {second[0]['title']}, {shown(second[1], 2)}{times}"


def relative_drift(row: Row, key: str = "drift_extended_mean") -> float | None:
    """Drift of the learned energy over the standard deviation of that H over the true test latents; None without one."""
    drift, scale = row.get(key), row.get("energy_std")
    return None if drift is None or not scale else drift / scale


def prediction(rows: Sequence[Row], n_steps: int) -> str:
    """Which model predicts best over a window, and how well."""
    text = ranked(rows, lambda row: row.get("mse_relative"))
    if text is None:
        return f"No model's prediction stays finite over {n_steps} steps"
    found = least(models(rows), lambda row: row.get("mse_relative"))
    assert found is not None
    text = f"Least error over {n_steps} steps, by the data's variance: {text}"
    return f"{text}. None is nearer than the data's mean (1)" if found[1] >= 1 else text


def energy(rows: Sequence[Row], n_steps: int, words: str = "Energy drift") -> str:
    """Which model keeps its energy best over the extended rollouts."""
    text = ranked(rows, relative_drift)
    if text is None:
        return f"{words} over {n_steps:,} steps: no model has one that stays finite"
    return f"Least {words[0].lower()}{words[1:]} over {n_steps:,} steps, by the standard deviation of H: {text}"


def integrators(rows: Sequence[Row], n_steps: int) -> str:
    """Which integrator keeps the full model's H best, and how that compares with the published step."""
    value: Value = lambda row: row.get("drift_extended_mean")  # noqa: E731
    found = least(rows, value)
    if found is None:
        return f"No integrator's rollouts of the full model's network stay finite over {n_steps:,} steps"
    best, drift = found
    text = f"{best['integrator']} keeps the full model's energy best over {n_steps:,} steps: it drifts by {shown(drift)}"
    published = rows[0]
    if best is published:
        second = least(rows[1:], value)
        return text if second is None else f"{text}; next {second[0]['integrator']}, {shown(second[1])}"
    reference = value(published)
    if reference is None or not math.isfinite(reference):
        return f"{text}; {published['integrator']}, the published step, diverges"
    return f"{text}; {published['integrator']}, the published step, by {shown(reference)}"


def dissipation(rows: Sequence[Row], n_steps: int) -> str:
    """How H changes in the first model with friction or a control."""
    row = next(row for row in rows if row.get("port"))
    port = row["port"]
    change, true = (_change(port.get(key)) for key in ("change", "change_true"))
    return f"{row['title']}: over {n_steps} steps H {change} on predictions and {true} along the true latents (means)"


def _change(value: float | None) -> str:
    if value is None:
        return "leaves the finite numbers"
    return f"{'rises' if value > 0 else 'falls'} by {shown(abs(value))}" if value else "stays as it is"


def window(title: str, error: float, standing: float, n_steps: int) -> str:
    """How a model does on one test window, in the data's variance, beside standing still."""
    if not math.isfinite(error):
        return f"{title} diverges on this test window within {n_steps} steps"
    verdict = "nearer to the truth than" if error < standing else "no nearer to the truth than"
    return (
        f"On this test window, {title} is {verdict} standing still: mean error over {n_steps} steps {shown(error)} of the "
        f"variance, against {shown(standing)}"
    )


def ablation(rows: Sequence[Row], n_steps: int, words: str) -> str:
    """Which models have the least error and the least drift over a window."""
    rows = models(rows)
    error, drift = least(rows, lambda row: row.get("mse_relative")), least(rows, lambda row: relative_drift(row, "drift_mean"))
    if error is None:
        return f"No model's prediction stays finite over {n_steps} steps"
    text = f"Over {n_steps} steps the least error is that of {error[0]['title']}, {shown(error[1])} of the variance"
    if drift is None:
        return text
    return f"{text}; the least {words} that of {drift[0]['title']}, {shown(drift[1])} standard deviations of H"


def dataset(n_videos: int, n_latents: int, step: float | None, spread: float, share: float) -> str:
    """How far neighbouring latents lie apart, and how flat the data is."""
    text = f"{n_latents:,} latents of {n_videos} video{'s' if n_videos != 1 else ''}"
    if not spread:
        return f"{text}, all the same"
    apart = "" if step is None else f": neighbours lie {shown(step / spread)} of the data's spread apart (median)"
    return f"{text}{apart}; two components hold {share:.0%} of the variance"


def dream(lengths: Sequence[float], energy: Sequence[float] | None, kept: bool) -> str:
    """How a free rollout moves, in standardised latents, and what becomes of its energy."""
    n_steps = len(lengths)
    steps = f"{n_steps} step{'s' if n_steps > 1 else ''}"
    first, last = lengths[0], lengths[-1]
    text = f"A free rollout of {steps}, of length {shown(first)}" + ("" if n_steps == 1 else f" first and {shown(last)} last")
    if energy is None:
        return text
    drift = max(abs(value - energy[0]) for value in energy)
    if kept:
        return f"{text}: H stays within {shown(drift)} of its start, {shown(energy[0])}"
    return f"{text}: H goes from {shown(energy[0])} to {shown(energy[-1])}"


def motion_horizon(summary: Mapping[str, Any]) -> int:
    """The number of steps over which the finding compares errors: the middle one of the horizons."""
    horizons: list[int] = summary["motion"]["horizons"]
    return horizons[len(horizons) // 2]


def motion(summary: Mapping[str, Any]) -> str:
    """Which model stays nearest to the true motion, and which keeps the true energy best, in two sentences."""
    rows, step = summary["models"], motion_horizon(summary)
    last = summary["motion"]["horizons"][-1]
    error = ranked(rows, lambda row: row["motion"]["error"][str(step)])
    drift = ranked(rows, lambda row: row["motion"]["energy_drift"])
    first = f"Least error over {step:,} steps: {error}." if error else f"No model's rollouts stay finite over {step:,} steps."
    return f"{first}\nLeast drift of the true energy over {last:,} steps: {drift}." if drift else first


def lost(summary: Mapping[str, Any]) -> str:
    """How many rollouts left the true motion, by model; "" if none did."""
    last, total = str(summary["motion"]["horizons"][-1]), summary["extended_windows"]
    counts = {row["title"]: row["motion"]["lost"][last] for row in models(summary["models"])}
    return ", ".join(f"{title} {count} of {total}" for title, count in counts.items() if count)
