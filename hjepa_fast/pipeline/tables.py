"""The tables of a run in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import evaluate, findings, zoo
from .evaluate import PERSISTENCE


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _measured(value: float | None, form: str = ".3g", std: float | None = None) -> str:
    """A number that is there for this row, so that None means that the rollouts left the finite numbers."""
    if value is None:
        return "diverged"
    return format(value, form) if std is None else f"{format(value, form)} ± {_number(std)}"


def _unsolved(row: Mapping[str, Any]) -> bool:
    return row["converged"] is not None and row["converged"] < 1


def _solved(share: float) -> str:
    return f"{share:.1%} of the implicit steps could be solved; dt is too large for the others."


def _markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def unfinished(summary: Mapping[str, Any]) -> list[str]:
    """The models of a `summary.json` whose training did not end, and how far each got, in words."""
    trained = [
        f"{row['title']}: {row['epochs_done']} of {row['epochs_asked']} epochs"
        for row in summary["models"]
        if not row.get("finished", True)
    ]
    return trained + [f"{zoo.MODELS[name].title}: not trained" for name in summary.get("missing", ())]


def summary_table(summary: Mapping[str, Any]) -> str:
    """Markdown of a `summary.json`: the table, what its numbers were measured on, and the comparison of integrators.

    Where the training of a model did not end, the table has a column that says how far each one got.
    """
    extended = summary["extended_steps"]
    open_ended = unfinished(summary)
    rows: list[tuple[str, ...]] = [
        (
            "model",
            "MSE",
            "MSE / variance",
            "energy drift",
            f"drift, {extended} steps",
            "drift, true latents",
            "std of H",
            "parameters",
            "dt",
            "ms/step",
        )
    ]
    for row in summary["models"]:
        has_energy = row["energy_std"] is not None
        rows.append(
            (
                row["title"],
                _measured(row["mse_mean"], ".4g", row["mse_std"]),
                _measured(row["mse_relative"], ".3f"),
                _measured(row["drift_mean"], ".4g", row["drift_std"]) if has_energy else "-",
                _measured(row["drift_extended_mean"]) if has_energy else "-",
                _number(row["drift_true_mean"]),
                _number(row["energy_std"]),
                f"{row['params']:,}",
                _number(row["dt"], ".3f"),
                _number(row["ms_per_step"], ".3f"),
            )
        )
    if open_ended:
        done = ["epochs", *(_epochs(row) for row in summary["models"])]
        rows = [(row[0], cell, *row[1:]) for row, cell in zip(rows, done, strict=True)]
    epochs = f"{summary['epochs']} epochs"
    recipe = f"; recipe {summary['recipe']}" if "recipe" in summary else ""
    if open_ended:
        epochs = f"at least {summary['epochs']} of {summary['epochs_asked']} epochs"
    leak = " (windows of one video overlap, so the test set is not new)" if summary["split"] == "window" else ""
    probe = summary["probe"]
    machine = summary["hardware"]
    notes = [
        f"Encoder: {summary['encoder']}; latents of {summary['latent_dim']} dimensions, "
        + ("standardised with training statistics." if summary["standardized"] else "not standardised."),
        f"{summary['n_train']} training and {summary['n_test']} test windows, split by {summary['split']}{leak}; "
        f"{epochs}{recipe}; {summary['n_steps']}-step rollouts; mean ± standard deviation over test windows.",
        f"Energy drift: max |H(z_t) - H(z_0)| of a rollout; over {extended} steps, the mean over {summary['extended_windows']} "
        "test windows, evenly spread. Diverged: some rollout leaves the finite numbers.",
        "The checkpoint with the best test MSE is kept, as published, so MSE is optimistic. "
        "Models without a Hamiltonian are measured with the full model's H.",
        f"ms/step: batch 1, {summary['n_steps']} steps, on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}.",
    ]
    if open_ended:
        notes.insert(0, f"**Training is not finished.** {'; '.join(open_ended)}.")
    if probe:
        notes.append(
            "Linear probe of the latents on held-out videos: "
            f"R² {probe['position_r2']:.2f} for ball positions, {probe['velocity_r2']:.2f} for velocities."
        )
    notes += [f"{row['title']}: {_solved(row['converged'])}" for row in summary["models"] if _unsolved(row)]
    text = (
        _motion_table(summary)
        + _markdown(rows)
        + "\n\n"
        + "\n".join(f"- {note}" for note in notes)
        + "\n"
        + _ports_table(summary)
    )
    return text + _integrators_table(summary) if summary["integrators"] else text


def _motion_table(summary: Mapping[str, Any]) -> str:
    """The finding and how every model compares with the true motion; "" where that is not known."""
    motion = summary.get("motion")
    if not motion:
        return ""
    horizons, seconds = motion["horizons"], (summary.get("step") or {}).get("seconds")
    last, total = horizons[-1], summary["extended_windows"]
    rows: list[tuple[str, ...]] = [
        (
            "model",
            *(f"error, {step:,} steps" + (f" ({step * seconds:.3g} s)" if seconds else "") for step in horizons),
            f"true energy's drift, {last:,} steps",
            "left the motion",
            "drift of its own H",
        )
    ]
    for row in sorted(summary["models"], key=lambda row: row["name"] == PERSISTENCE):
        found = row["motion"]
        own = findings.relative_drift(row) if findings.has_hamiltonian(row) else None
        rows.append(
            (
                row["title"],
                *(_measured(found["error"][str(step)], ".2g") for step in horizons),
                _measured(found["energy_drift"], ".2g"),
                f"{found['lost'][str(last)]} of {total}",
                _measured(own, ".2g") if findings.has_hamiltonian(row) else "-",
            )
        )
    law = "E(z_0)" if motion["conservative"] else "its value in the true motion at that step"
    notes = [
        f"Free rollouts from {total} test windows, without a control, beside the exact motion. Error: the mean squared error "
        "over so many steps by the data's variance, the median over windows; 1 is that of the mean, and 2 about that of the "
        "right motion at a wrong time.",
        f"True energy's drift: largest difference of the true energy E(z_t) of predicted states from {law}, by the median of "
        f"|E| where rollouts start, {findings.shown(motion['energy_scale'])}; the median over windows.",
        f"Left the motion: windows with an error of {evaluate.LOST:g} and more at some step, or not finite; medians count them "
        'as the largest. "diverged": half of the windows are not finite.',
        "Drift of its own H: by the standard deviation of that H over the true test states, the mean over windows.",
    ]
    return (
        "".join(f"**{line}**\n" for line in findings.motion(summary).splitlines())
        + f"\n{_markdown(rows)}\n\n"
        + "".join(f"- {note}\n" for note in notes)
        + f"\nOver the {summary['n_steps']} steps that models are trained on, and the energy as each model has learned it:\n\n"
    )


def _ports_table(summary: Mapping[str, Any]) -> str:
    """What friction and control do in the models that have them; "" without any."""
    found = [(row["title"], row["port"]) for row in summary["models"] if row.get("port")]
    if not found:
        return ""
    n_steps = summary["n_steps"]
    rows: list[tuple[str, ...]] = [
        ("model", "friction", "g", "lost", "supplied", "change of H", "true latents", "largest rise", "contraction defect")
    ]
    for title, port in found:
        numbers = (port[key] for key in ("lost", "supplied", "change", "change_true", "largest_rise", "contraction_defect"))
        kind = f"{port['friction'] or 'none'}{', per dimension' if port['per_dimension'] else ''}"
        rows.append((title, kind, _number(port["coefficient"], ".4g"), *(_number(value) for value in numbers)))
    notes = [
        "For models with friction or a control, and those measured with their H, energy drift above is what is left of "
        "H(z_t) - H(z_0) after what the control has put in and friction has taken out, Hp . G u and Hp . g p (conformal) or "
        "Hp . g Hp (rayleigh), by the trapezoidal rule over the states: 0 for exact solutions. Over "
        f"{summary['extended_steps']} steps they are without a control.",
        f"Lost, supplied and the change of H: over {n_steps} steps of predictions, mean over test windows; along the true "
        "latents beside it. Conformal friction takes momentum, and energy only where Hp . p > 0; Rayleigh's always does. A "
        "model without a control does not know the recorded one, baselines among them.",
        f"Largest rise of H in a step, over {n_steps} steps without a control. Contraction defect: "
        "max |J^T Omega J - exp(-g dt) Omega| of a step; rounding where the integrator is symplectic for the model's H.",
    ]
    return f"\nFriction and control:\n\n{_markdown(rows)}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _epochs(row: Mapping[str, Any]) -> str:
    if "epochs_done" not in row:
        return "-"
    return f"{row['epochs_done']} of {row['epochs_asked']}"


def _full_has_port(summary: Mapping[str, Any]) -> bool:
    return any(row["name"] == zoo.FULL_MODEL and row.get("port") for row in summary["models"])


def _integrators_table(summary: Mapping[str, Any]) -> str:
    n_steps, extended = summary["n_steps"], summary["extended_steps"]
    rows: list[tuple[str, ...]] = [
        (
            "integrator",
            f"drift, {n_steps} steps",
            f"drift, {extended} steps",
            "of the published step's",
            "gradients/step",
            "ms/step",
            f"s, {extended} steps",
        )
    ]
    for row in summary["integrators"]:
        rows.append(
            (
                row["integrator"],
                _measured(row["drift_mean"]),
                _measured(row["drift_extended_mean"]),
                _number(row["drift_ratio"], ".2g"),
                _number(row["evaluations_per_step"], ".1f"),
                _number(row["ms_per_step"], ".3f"),
                _number(row["seconds_extended"], ".2f"),
            )
        )
    trained = next(row["integrator"] for row in summary["integrators"] if row["trained"])
    alone = "Its friction and control are left out here. " if _full_has_port(summary) else ""
    notes = [
        f"The network was trained with {trained}. {alone}Rollouts with its dt from "
        f"{summary['extended_windows']} test windows, evenly spread; max |H(z_t) - H(z_0)|, mean over windows, in float64, "
        "since the rounding of float32 would hide it; the last column is the time of those rollouts. ms/step: as above.",
    ]
    for row in summary["integrators"]:
        if _unsolved(row):
            notes.append(f"{row['integrator']}: {_solved(row['converged'])}")
        if row["diverged"]:
            notes.append(f"{row['integrator']}: {row['diverged']:.1%} of the rollouts diverge.")
    return (
        "\nThe full model's network under other integrators:\n\n"
        + _markdown(rows)
        + "\n\n"
        + "\n".join(f"- {note}" for note in notes)
        + "\n"
    )
