"""What the trained models do on the test windows: errors, energy drift, extended and free rollouts, time per step."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..api import energy
from ..errors import UsageError
from ..integrators import SymplecticIntegrator
from . import zoo
from .config import EvaluateConfig
from .windows import Dataset

PERSISTENCE = "persistence"
EXAMPLE = 0
"""Index of the test window that trajectories are kept of."""

Rollout = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Rows of the table, and the arrays that the figures draw."""

    rows: list[dict[str, Any]]
    arrays: dict[str, Tensor]


def evaluate(
    models: Mapping[str, zoo.Model],
    dataset: Dataset,
    config: EvaluateConfig,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure every model, and persistence (z0 for ever), on the test windows.

    A model without a Hamiltonian is measured with the full model's H, as published; without that model its energy
    columns stay empty. All numbers are in the space the models are trained in (standardised, unless that is off).

    Parameters
    ----------
    models : mapping of zoo names to trained models, on `device`

    Returns
    -------
    Evaluation
        `rows`: name, title, mse_mean and mse_std over windows, mse_relative (to the variance of the test latents),
        mse_per_step, drift_mean and drift_std of max_t |H(z_t) - H(z_0)| over the windows' steps, drift_true_mean (the
        same along the true latents), drift_extended_mean, energy_std (of H over the true test latents), step_length
        (mean |z_{t+1} - z_t| of a free rollout), params, dt, ms_per_step. What does not apply is None.
        `arrays`: `<name>/step_mse` [n, T], `<name>/energy` [n, extended + 1], `<name>/energy_true` [n, T + 1],
        `<name>/example` [longest + 1, d], and `true/example` [T + 1, d].
    """
    check_config(config)
    windows = dataset.test.to(device)
    full = models.get(zoo.FULL_MODEL)
    n_steps = windows.shape[1] - 1
    longest = max(config.extended_steps, config.dream_steps, n_steps)
    arrays = {"true/example": dataset.test[EXAMPLE]}
    rows = []
    entries: list[tuple[str, zoo.Model | None]] = [(PERSISTENCE, None), *models.items()]
    for done, (name, model) in enumerate(entries, start=1):
        rollout: Rollout = _persist if model is None else model.rollout
        owner = model if isinstance(model, SymplecticIntegrator) else full
        hnn = owner.hnn if isinstance(owner, SymplecticIntegrator) else None
        with torch.no_grad():
            step_mse, H, H_true = _measure(rollout, hnn, windows, max(config.extended_steps, n_steps))
            example = rollout(windows[EXAMPLE : EXAMPLE + 1, 0], longest)[0]
        arrays[f"{name}/step_mse"] = step_mse
        arrays[f"{name}/example"] = example
        if H is not None and H_true is not None:
            arrays[f"{name}/energy"], arrays[f"{name}/energy_true"] = H, H_true
        mse = step_mse.mean(dim=1)
        row: dict[str, Any] = {
            "name": name,
            "title": "Persistence" if model is None else zoo.MODELS[name].title,
            "mse_mean": mse.mean().item(),
            "mse_std": mse.std(correction=0).item(),
            "mse_relative": mse.mean().item() / dataset.variance,
            "mse_per_step": step_mse.mean(dim=0).tolist(),
            **_drift(H, H_true, n_steps),
            "step_length": example[: config.dream_steps + 1].diff(dim=0).norm(dim=1).mean().item(),
            "params": 0 if model is None else _count_parameters(model),
            "dt": model.step_size.item() if isinstance(model, SymplecticIntegrator) else None,
            "ms_per_step": None if model is None else time_per_step(model, windows[:1, 0], n_steps, config) * 1e3,
        }
        rows.append({key: _finite(value) for key, value in row.items()})
        if progress:
            progress(done, len(entries))
    return Evaluation(rows, {name: tensor.cpu() for name, tensor in arrays.items()})


def check_config(config: EvaluateConfig) -> None:
    """Counts must be positive (warm-up may be 0).

    Raises
    ------
    UsageError
    """
    for name, least in (("extended_steps", 1), ("dream_steps", 1), ("timing_warmup", 0), ("timing_runs", 1)):
        if getattr(config, name) < least:
            raise UsageError(f"{name} must be at least {least}, found {getattr(config, name)}")


def time_per_step(model: zoo.Model, z0: Tensor, n_steps: int, config: EvaluateConfig) -> float:
    """Median seconds a step of a whole rollout from z0 [1, d] without gradients, synchronised."""
    times = []
    with torch.no_grad():
        for run in range(config.timing_warmup + config.timing_runs):
            _synchronize(z0.device)
            started = time.perf_counter()
            model.rollout(z0, n_steps)
            _synchronize(z0.device)
            if run >= config.timing_warmup:
                times.append(time.perf_counter() - started)
    return statistics.median(times) / n_steps


def hardware(device: torch.device | str) -> dict[str, Any]:
    """What the times were measured on."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _measure(
    rollout: Rollout, hnn: nn.Module | None, windows: Tensor, n_steps: int, batch: int = 256
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squared errors [n, T], energies of predictions [n, n_steps + 1] and of the true windows [n, T + 1]."""
    errors, predicted, true = [], [], []
    for part in windows.split(batch):
        states = rollout(part[:, 0], n_steps)
        errors.append((states[:, 1 : part.shape[1]] - part[:, 1:]).square().mean(dim=-1))
        if hnn is not None:
            predicted.append(energy(hnn, states))
            true.append(energy(hnn, part))
    if hnn is None:
        return torch.cat(errors), None, None
    return torch.cat(errors), torch.cat(predicted), torch.cat(true)


def _drift(H: Tensor | None, H_true: Tensor | None, n_steps: int) -> dict[str, float | None]:
    if H is None or H_true is None:
        return dict.fromkeys(("drift_mean", "drift_std", "drift_true_mean", "drift_extended_mean", "energy_std"))
    distance = (H - H[:, :1]).abs()
    drift = distance[:, : n_steps + 1].amax(dim=1)
    return {
        "drift_mean": drift.mean().item(),
        "drift_std": drift.std(correction=0).item(),
        "drift_true_mean": (H_true - H_true[:, :1]).abs().amax(dim=1).mean().item(),
        "drift_extended_mean": distance.amax(dim=1).mean().item(),
        "energy_std": H_true.std(correction=0).item(),
    }


def _persist(z0: Tensor, n_steps: int) -> Tensor:
    return z0.unsqueeze(1).expand(-1, n_steps + 1, -1)


def _count_parameters(model: zoo.Model) -> int:
    """Weights and biases of the network; a learnable dt is reported apart."""
    return sum(p.numel() for name, p in model.named_parameters() if name != "dt")


def _finite(value: Any) -> Any:
    """A number that is not finite, from a rollout that diverged, as None: JSON has no NaN."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
