"""The summary table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("model", "MSE", "MSE / variance", "energy drift", "drift, true latents", "std of H", "parameters", "dt", "ms/step")


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _spread(mean: float | None, std: float | None) -> str:
    return "-" if mean is None else f"{_number(mean, '.4g')} ± {_number(std)}"


def _markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def summary_table(summary: Mapping[str, Any]) -> str:
    """Markdown of a `summary.json`: the table, and what its numbers were measured on."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for row in summary["models"]:
        rows.append(
            (
                row["title"],
                _spread(row["mse_mean"], row["mse_std"]),
                _number(row["mse_relative"], ".3f"),
                _spread(row["drift_mean"], row["drift_std"]),
                _number(row["drift_true_mean"]),
                _number(row["energy_std"]),
                f"{row['params']:,}",
                _number(row["dt"], ".3f"),
                _number(row["ms_per_step"], ".3f"),
            )
        )
    leak = " (windows of one video overlap, so the test set is not new)" if summary["split"] == "window" else ""
    probe = summary["probe"]
    machine = summary["hardware"]
    notes = [
        f"Encoder: {summary['encoder']}; latents of {summary['latent_dim']} dimensions, "
        + ("standardised with training statistics." if summary["standardized"] else "not standardised."),
        f"{summary['n_train']} training and {summary['n_test']} test windows, split by {summary['split']}{leak}; "
        f"{summary['epochs']} epochs; {summary['n_steps']}-step rollouts; mean ± standard deviation over test windows.",
        "The checkpoint with the best test MSE is kept, as published, so MSE is optimistic. "
        "Models without a Hamiltonian are measured with the full model's H.",
        f"ms/step: batch 1, {summary['n_steps']} steps, on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}.",
    ]
    if probe:
        notes.append(
            "Linear probe of the latents on held-out videos: "
            f"R² {probe['position_r2']:.2f} for ball positions, {probe['velocity_r2']:.2f} for velocities."
        )
    return _markdown(rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
