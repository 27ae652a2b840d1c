"""What the trained models do on the test windows: errors, energy drift, extended and free rollouts, time per step."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import api
from ..api import energy
from ..diagnostics import Balance, energy_balance, energy_growth, symplecticity_defect
from ..errors import ConvergenceError, UsageError
from ..integrators import SymplecticIntegrator
from ..models import SeparableHNN
from ..names import Integrator
from ..schemes import SCHEMES
from . import distributed, zoo
from .config import EvaluateConfig
from .latents import Latents
from .streaming import Rows
from .windows import Dataset

PERSISTENCE = "persistence"
EXAMPLE = 0
"""Index of the test window that trajectories are kept of."""
EXTENDED_WINDOWS = 32
"""Extended rollouts start from no more test windows than this, evenly spread: they are long."""
COMPARED: tuple[Integrator, ...] = ("leapfrog", "euler", "implicit-leapfrog", "implicit-midpoint")
"""Integrators that the full model's network is rolled out with, the published one first."""
HORIZONS = (100, 1000)
"""Steps over which errors against the true motion are reported, beside the windows' own."""
LOST = 100.0
"""From this error on, in the data's variance, a rollout has left the motion: ten standard deviations away."""
NUMBERS_AT_ONCE = 2**22
"""How many numbers of states a long rollout holds where it must hold some: 16 MiB of float32."""

Rollout = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Rows of both tables, and the arrays that the figures draw."""

    rows: list[dict[str, Any]]
    integrators: list[dict[str, Any]]
    """The full model's network under other integrators; empty without that model."""
    arrays: dict[str, Tensor]
    extended_windows: int
    """How many test windows extended rollouts start from."""
    motion: dict[str, Any] | None = None
    """Of the comparison with the true motion: horizons, conservative, energy_scale; None where it is not known."""


def evaluate(
    models: Mapping[str, zoo.Model],
    dataset: Dataset,
    config: EvaluateConfig,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure every model, and persistence (z0 for ever), on the test windows.

    A model without a Hamiltonian is measured with the full model's H, as published; without that model its energy
    columns stay empty. Where that H has friction or a control, "energy" below is H less what the control has put in and plus
    what friction has taken out by then, so that its drift is the error of `diagnostics.energy_balance`: 0 for exact solutions,
    as the drift of H is without them.

    All numbers are in the space the models are trained in (standardised, unless that is off). Extended rollouts start from at
    most `EXTENDED_WINDOWS` test windows, evenly spread, and only their energies are kept. They are without a control, as are
    free rollouts after a window's last step. Rollouts that leave the finite numbers, and implicit steps that cannot be solved,
    are counted and not refused.

    Processes that work together (see `distributed.joined`) share the models out. What is timed the first one does alone, while
    the others wait, and it alone has the result: theirs is empty.

    Parameters
    ----------
    models : mapping of zoo names to trained models, on `device`

    Returns
    -------
    Evaluation
        `rows`: name, title, integrator, mse_mean and mse_std over windows, mse_relative (to the variance of the test
        latents), mse_per_step, drift_mean and drift_std of max_t |E_t - E_0| of the energy over the windows' steps,
        drift_true_mean (the same along the true latents), drift_extended_mean (over the extended steps), diverged (the
        share of extended rollouts whose H is not finite somewhere), energy_std (of H over the true test latents),
        step_length (mean |z_{t+1} - z_t| of a free rollout), params, dt, converged (the share of implicit steps that were
        solved), ms_per_step.
        With a truth, `motion`: see `_motion`.
        What does not apply is None, and so is what is not finite. A model with friction or a control has `port`, see `_port`.
        `integrators`: see `compare_integrators`.
        `arrays`: `<name>/step_mse` [n, T], `<name>/energy` [n, T + 1], `<name>/energy_extended` [m, extended + 1],
        `<name>/energy_true` [n, T + 1], `<name>/example` [longest + 1, d], `true/example` [T + 1, d],
        `integrators/<integrator>/energy` [m, extended + 1], and of a model with friction or a control `<name>/change` and
        `<name>/change_true` [n, T + 1], H(z_t) - H(z_0) of the predictions and along the true latents.
        With a truth `<name>/motion` [extended + 1, d], `<name>/motion_error` and `<name>/motion_energy` [m, extended + 1], of
        the true motion `true/motion` and `true/motion_energy`.
    """
    check_config(config)
    full = models.get(zoo.FULL_MODEL)
    setting = Setting.of(dataset, config, full if isinstance(full, SymplecticIntegrator) else None, device)
    arrays = {"true/example": dataset.test[EXAMPLE]}
    if setting.motion is not None:
        assert dataset.truth is not None
        arrays |= {"true/motion": setting.motion[EXAMPLE], "true/motion_energy": dataset.truth.energy(setting.motion)}
    rows = []
    entries: list[tuple[str, zoo.Model | None]] = [(PERSISTENCE, None), *models.items()]
    compared = integrators_of(full) if isinstance(full, SymplecticIntegrator) else ()
    total = len(entries) + len(compared)
    counter = distributed.Counter()

    def measured(entry: tuple[str, zoo.Model | None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        row, found = evaluate_model(*entry, setting)
        if progress:
            progress(counter.add(1), total)
        return row, {name: tensor.cpu() for name, tensor in found.items()}

    parts = distributed.shared_out(entries, measured)
    if not distributed.is_first():
        return Evaluation([], [], {}, len(setting.starts))
    for (_, model), (row, found) in zip(entries, parts, strict=True):
        if model is not None:
            row["ms_per_step"] = _ms_per_step(model, setting)
        rows.append(row)
        arrays |= found
    comparison: list[dict[str, Any]] = []
    if isinstance(full, SymplecticIntegrator):
        for done, (row, H) in enumerate(
            compare_integrators(full, setting.starts, setting.n_steps, config), start=len(entries) + 1
        ):
            arrays[f"integrators/{row['integrator']}/energy"] = H
            reference = comparison[0] if comparison else row  # the published step comes first
            ratio = _ratio(row["drift_extended_mean"], reference["drift_extended_mean"])
            comparison.append({key: _finite(value) for key, value in (row | {"drift_ratio": ratio}).items()})
            if progress:
                progress(done, total)
    kept = {name: tensor.cpu() for name, tensor in arrays.items()}
    return Evaluation(rows, comparison, kept, len(setting.starts), setting.of_motion())


@dataclass(frozen=True)
class Setting:
    """What every model is measured on."""

    dataset: Dataset
    config: EvaluateConfig
    full: SymplecticIntegrator | None
    """The full model, whose H measures what has none."""
    windows: Tensor
    """The test windows [n, T + 1, d], on the models' device, as all that follows."""
    control: Tensor | None
    starts: Tensor
    """Where extended rollouts start from, [m, d]."""
    motion: Tensor | None
    """The true motion from there, float64 [m, extended + 1, d]; None where it is not known."""

    @classmethod
    def of(
        cls, dataset: Dataset, config: EvaluateConfig, full: SymplecticIntegrator | None, device: torch.device | str = "cpu"
    ) -> Setting:
        windows = dataset.test.to(device)
        control = None if dataset.test_control is None else dataset.test_control.to(device)
        starts = windows[_spread(len(windows), EXTENDED_WINDOWS), 0]
        steps = max(config.extended_steps, windows.shape[1] - 1)
        motion = None if dataset.truth is None else dataset.truth.rollout(starts, steps).to(device)
        return cls(dataset, config, full, windows, control, starts, motion)

    @property
    def n_steps(self) -> int:
        return self.windows.shape[1] - 1

    def of_motion(self) -> dict[str, Any] | None:
        """What `Evaluation.motion` holds."""
        truth = self.dataset.truth
        if truth is None or self.motion is None:
            return None
        scale = energy_scale(truth.energy(self.motion))
        return {"horizons": self.horizons, "conservative": truth.conservative, "energy_scale": scale}

    @property
    def horizons(self) -> list[int]:
        """The steps of `HORIZONS` that extended rollouts reach, the windows' own before them, and the last."""
        last = max(self.config.extended_steps, self.n_steps)
        return sorted({self.n_steps, *(step for step in HORIZONS if self.n_steps < step < last), last})


def evaluate_model(name: str, model: zoo.Model | None, setting: Setting) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model's row of the table, without its time, and its arrays, or those of persistence (None); see `evaluate`."""
    dataset, config, windows, control = setting.dataset, setting.config, setting.windows, setting.control
    n_steps, starts = setting.n_steps, setting.starts
    predictor = _Predictor(model)
    meter = model if isinstance(model, SymplecticIntegrator) else setting.full
    longest = max(config.dream_steps, n_steps)
    extended = None
    with torch.no_grad():
        step_mse, found, true = _measure(predictor, meter, windows, control)
        if meter is not None:
            extended = predictor.energies(meter, starts, config.extended_steps)
        known = None if control is None else control[EXAMPLE : EXAMPLE + 1]
        example = predictor.states(windows[EXAMPLE : EXAMPLE + 1, 0], longest, _continued(known, longest))[0]
    arrays = {f"{name}/step_mse": step_mse, f"{name}/example": example}
    port = None
    if meter is not None and found is not None and true is not None and extended is not None:
        arrays[f"{name}/energy"], arrays[f"{name}/energy_true"] = found.kept, true.kept
        arrays[f"{name}/energy_extended"] = extended
        if meter is model and found.balance is not None and true.balance is not None:
            arrays[f"{name}/change"], arrays[f"{name}/change_true"] = found.balance.change, true.balance.change
            port = _port(meter, starts, n_steps, found.balance, true.balance)
    mse = step_mse.mean(dim=1)
    title = "Persistence" if model is None else zoo.title(name, model)
    _warn_unsolved(title, predictor)
    row: dict[str, Any] = {
        "name": name,
        "title": title,
        "integrator": model.integrator if isinstance(model, SymplecticIntegrator) else None,
        "mse_mean": mse.mean().item(),
        "mse_std": mse.std(correction=0).item(),
        "mse_relative": mse.mean().item() / dataset.variance,
        "mse_per_step": step_mse.mean(dim=0).tolist(),
        **_drift(found, true, extended),
        "step_length": example[: config.dream_steps + 1].diff(dim=0).norm(dim=1).mean().item(),
        "params": 0 if model is None else _count_parameters(model),
        "dt": model.step_size.item() if isinstance(model, SymplecticIntegrator) else None,
        "converged": predictor.converged,
        "ms_per_step": None,
    }
    if port is not None:
        row["port"] = {key: _finite(value) for key, value in port.items()}
    if setting.motion is not None:
        with torch.no_grad():
            row["motion"], found_motion = _motion(predictor, setting, setting.motion)
        arrays |= {f"{name}/{key}": values for key, values in found_motion.items()}
    return {key: _finite(value) for key, value in row.items()}, arrays


def _ms_per_step(model: zoo.Model, setting: Setting) -> float:
    control = None if setting.control is None else setting.control[:1]
    timed = functools.partial(_Predictor(model).states, control=control)
    return time_per_step(timed, setting.windows[:1, 0], setting.n_steps, setting.config) * 1e3


def _motion(predictor: _Predictor, setting: Setting, true: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How free rollouts compare with the true motion [m, n + 1, d], and what becomes of the true energy along them.

    Returns
    -------
    dict
        error: for each of the horizons the median over windows of the mean squared error up to that step over the data's
        variance, None where half of the windows are not finite by then; lost: how many windows have left the motion by then,
        see `LOST`; energy_drift: the median over windows of max_t |E(z_t) - E_t| over all steps, by the energy's scale, where E
        is the true energy and E_t its value in the true motion (E(z_0) if nothing drives or damps it); None as for the error.
    dict
        motion [n + 1, d] of one window, motion_error [m, n + 1], motion_energy [m, n + 1].
    """
    truth = setting.dataset.truth
    assert truth is not None
    states = predictor.states(setting.starts, true.shape[1] - 1)
    error = (states.double() - true).square().mean(dim=-1) / setting.dataset.variance
    energies, exact = truth.energy(states), truth.energy(true)
    expected = energies[:, :1] if truth.conservative else exact
    drift = (energies - expected).abs().amax(dim=1) / energy_scale(exact)
    lost = ~(error < LOST)
    facts = {
        "error": {str(step): _finite(_median(error[:, 1 : step + 1].mean(dim=1))) for step in setting.horizons},
        "lost": {str(step): int(lost[:, : step + 1].any(dim=1).sum()) for step in setting.horizons},
        "energy_drift": _finite(_median(drift)),
    }
    return facts, {"motion": states[EXAMPLE], "motion_error": error, "motion_energy": energies}


def energy_scale(exact: Tensor) -> float:
    """What relative drifts of the true energy [m, n + 1] are relative to: the median of its size where rollouts start."""
    return exact[:, 0].abs().median().item() or 1.0


def _median(values: Tensor) -> float:
    """The median of values [m], the upper of two, where what is not finite is larger than all else."""
    values = values.double()
    return torch.where(values.isfinite(), values, math.inf).sort().values[len(values) // 2].item()


def integrators_of(full: SymplecticIntegrator) -> tuple[Integrator, ...]:
    """The integrators that the full model's network is compared under: the published step first, and always its own."""
    return tuple(dict.fromkeys((*COMPARED, full.integrator)))


def compare_integrators(
    full: SymplecticIntegrator, z0: Tensor, n_steps: int, config: EvaluateConfig
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Roll the full model's network out under every integrator of `integrators_of`, with its dt, and yield what it costs.

    Friction and control are left out: what is compared is how the energy is kept.

    Energies are computed in float64: in float32 the drift of a symplectic method drowns in rounding. Evaluations and times
    are those of the model's own precision.

    Parameters
    ----------
    z0 : Tensor [m, d]
        Where rollouts start.

    Yields
    ------
    dict, Tensor
        integrator, trained (whether the model was trained with it), drift_mean and drift_extended_mean of
        max_t |H(z_t) - H(z_0)| over n_steps and over the extended steps, diverged and converged as in `evaluate`,
        seconds_extended (wall time of the rollouts in float64), evaluations_per_step (gradients of H, mean over n_steps),
        ms_per_step (batch 1); and H along the extended rollouts, [m, extended + 1].
    """
    full = zoo.without_port(full)
    double = copy.deepcopy(full).double()
    for integrator in integrators_of(full):
        exact = _Predictor(double, integrator)
        predictor = _Predictor(full, integrator)
        with torch.no_grad():
            started = _now(z0.device)
            H = exact.energies(double, z0.double(), max(config.extended_steps, n_steps))
            seconds = _now(z0.device) - started
            predictor.states(z0, n_steps)
        _warn_unsolved(f"the full model under {integrator}", exact)
        evaluations = predictor.evaluations_per_step  # before the timed rollouts count as well
        H, short = H[:, : config.extended_steps + 1], H[:, : n_steps + 1]
        yield (
            {
                "integrator": integrator,
                "trained": integrator == full.integrator,
                "drift_mean": _largest_drift(short).mean().item(),
                "drift_extended_mean": _largest_drift(H).mean().item(),
                "diverged": _diverged(H),
                "converged": exact.converged,
                "seconds_extended": seconds,
                "evaluations_per_step": evaluations,
                "ms_per_step": time_per_step(predictor.states, z0[:1], n_steps, config) * 1e3,
            },
            H,
        )


def check_config(config: EvaluateConfig) -> None:
    """Counts must be positive (warm-up may be 0).

    Raises
    ------
    UsageError
    """
    for name, least in (("extended_steps", 1), ("dream_steps", 1), ("timing_warmup", 0), ("timing_runs", 1)):
        if getattr(config, name) < least:
            raise UsageError(f"{name} must be at least {least}, found {getattr(config, name)}")


def time_per_step(rollout: Rollout, z0: Tensor, n_steps: int, config: EvaluateConfig) -> float:
    """Median seconds a step of a whole rollout from z0 [1, d] without gradients, synchronised."""
    times = []
    with torch.no_grad():
        for run in range(config.timing_warmup + config.timing_runs):
            started = _now(z0.device)
            rollout(z0, n_steps)
            if run >= config.timing_warmup:
                times.append(_now(z0.device) - started)
    return statistics.median(times) / n_steps


def step_units(latents: Sequence[Latents | Rows]) -> dict[str, float | int | None]:
    """How long a latent step is: `frames` from clip to clip, `fps` and `seconds`; None for what is unknown or differs."""
    frames = latents[0].metadata["provenance"].get("clip_stride")
    rates = {item.metadata["fps"] for item in latents}
    fps = rates.pop() if len(rates) == 1 else None
    return {"frames": frames, "fps": fps, "seconds": frames / fps if frames and fps else None}


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


class _Predictor:
    """Rolls a model out, or persistence, or a model's network with another integrator; counts implicit steps."""

    def __init__(self, model: zoo.Model | None, integrator: Integrator | None = None) -> None:
        self.model = model
        self.integrator = integrator or (model.integrator if isinstance(model, SymplecticIntegrator) else None)
        self.steps = self.solved = self.evaluations = 0

    @property
    def converged(self) -> float | None:
        """Share of the implicit steps so far that were solved; None if there were none."""
        return self.solved / self.steps if self.steps else None

    @property
    def evaluations_per_step(self) -> float | None:
        """Gradients of H a step."""
        if self.steps:
            return self.evaluations / self.steps
        # Tao's method has no stages: it moves two copies in turn, with four gradients
        sub_steps = self.model.sub_steps if isinstance(self.model, SymplecticIntegrator) else 1
        return None if self.integrator is None else float(sub_steps * (len(SCHEMES[self.integrator].stages) or 4))

    def states(self, z0: Tensor, n_steps: int, control: Tensor | None = None) -> Tensor:
        """[B, n_steps + 1, d] from z0 [B, d], under a control [B, n_steps, m] if the model has a port for it."""
        if self.model is None:
            return z0.unsqueeze(1).expand(-1, n_steps + 1, -1)
        if isinstance(self.model, SymplecticIntegrator):
            return self._trajectory(self.model, z0, n_steps, control=control if zoo.takes_control(self.model) else None).states
        return self.model.rollout(z0, n_steps)

    def energies(self, meter: SymplecticIntegrator, z0: Tensor, n_steps: int) -> Tensor:
        """The energy [B, n_steps + 1] along rollouts from z0 [B, d] without a control, as `_energies` has it, by the meter's H.

        Not all their states are held.
        """
        port = zoo.port_of(meter)
        if self.model is None and port is None:
            return energy(meter.hnn, z0)[:, None].expand(-1, n_steps + 1)
        if isinstance(self.model, SymplecticIntegrator) and not isinstance(meter.hnn, SeparableHNN) and port is None:
            H = self._trajectory(self.model, z0, n_steps, energy=True, states="final").energy
            assert H is not None
            return H
        # a separable H's rollouts, those with friction and an unconstrained predictor's keep every state they pass
        length = max(1, NUMBERS_AT_ONCE // z0.numel())
        parts = [energy(meter.hnn, z0)[:, None]]
        for start in range(0, n_steps, length):
            states = self.states(z0, min(length, n_steps - start))
            kept = _energies(meter, states, None).kept
            parts.append(kept[:, 1:] + (parts[-1][:, -1:] - kept[:, :1]) if port is not None else kept[:, 1:])
            z0 = states[:, -1]
        return torch.cat(parts, dim=1)

    def _trajectory(
        self, model: SymplecticIntegrator, z0: Tensor, n_steps: int, energy: bool = False, **options: Any
    ) -> api.Rollout:
        assert self.integrator is not None
        out = model.trajectory(z0, n_steps, energy=energy, integrator=self.integrator, unconverged="flag", **options)
        if out.solve is not None:
            self.steps += out.solve.converged.numel()
            self.solved += int(out.solve.converged.sum())
            self.evaluations += int(out.solve.evaluations.sum())
        return out


@dataclass(frozen=True)
class _Energies:
    """Along paths of states, [n, T + 1] each."""

    kept: Tensor
    """What exact solutions keep: H less what a control has put in, plus what friction has taken out."""
    balance: Balance | None
    """None without friction and control."""

    @property
    def H(self) -> Tensor:
        return self.kept if self.balance is None else self.kept[:, :1] + self.balance.change


def _energies(meter: SymplecticIntegrator, states: Tensor, control: Tensor | None) -> _Energies:
    """Energies of states [n, T + 1, d] by a model's H, friction and port, whatever rolled them out."""
    port = zoo.port_of(meter)
    if port is None:
        return _Energies(energy(meter.hnn, states), None)
    balance = energy_balance(port, states, meter.step_size, control if port.control_dim else None, backend=meter.backend)
    return _Energies(energy(port, states[:, :1]) + balance.error, balance)


def _measure(
    predictor: _Predictor, meter: SymplecticIntegrator | None, windows: Tensor, control: Tensor | None = None, batch: int = 256
) -> tuple[Tensor, _Energies | None, _Energies | None]:
    """Squared errors [n, T], and energies of the predictions and of the true windows."""
    errors, predicted, true = [], [], []
    for rows in torch.arange(len(windows), device=windows.device).split(batch):
        part, u = windows[rows], None if control is None else control[rows]
        states = predictor.states(part[:, 0], part.shape[1] - 1, u)
        errors.append((states[:, 1:] - part[:, 1:]).square().mean(dim=-1))
        if meter is not None:
            predicted.append(_energies(meter, states, u))
            true.append(_energies(meter, part, u))
    if meter is None:
        return torch.cat(errors), None, None
    return torch.cat(errors), _joined(predicted), _joined(true)


def _joined(parts: Sequence[_Energies]) -> _Energies:
    balances = [part.balance for part in parts if part.balance is not None]
    balance = Balance(*map(torch.cat, zip(*balances, strict=True))) if balances else None
    return _Energies(torch.cat([part.kept for part in parts]), balance)


def _continued(control: Tensor | None, n_steps: int) -> Tensor | None:
    """A control [B, n, m] cut to n_steps, or with no control after it."""
    if control is None:
        return None
    return F.pad(control, (0, 0, 0, max(n_steps - control.shape[1], 0)))[:, :n_steps]


def _port(model: SymplecticIntegrator, z0: Tensor, n_steps: int, found: Balance, true: Balance) -> dict[str, Any]:
    """What friction and control do in a model.

    Returns
    -------
    dict
        friction, its kind; per_dimension and coefficient, g or the mean of those of all momenta; over the windows' steps, means
        over windows of lost, supplied and change, H(z_T) - H(z_0), of predictions, and change_true along the true latents;
        largest_rise, of H in a step without a control, from z0 (see `diagnostics.energy_growth`): with Rayleigh's friction
        above 0 by the error of discretisation alone; and contraction_defect, of a step without a control with conformal
        friction of one coefficient: how far J^T Omega J is from exp(-g dt) Omega. What has no meaning for a model is None,
        and so is what needs an implicit step that cannot be solved.
    """
    port, dt = zoo.port_of(model), model.step_size.item()
    assert port is not None
    g = port.friction
    options: dict[str, Any] = {"integrator": model.integrator, "backend": model.backend}
    rise = defect = None
    with contextlib.suppress(ConvergenceError):
        if g is not None:
            rise = energy_growth(port, z0, dt, n_steps, **options).max().item()
        if g is not None and port.kind == "conformal" and not g.ndim:
            defect = symplecticity_defect(port, z0[:1], dt, contraction=g.detach().double() * dt, **options).max().item()
    return {
        "friction": port.kind,
        "per_dimension": g is not None and g.ndim > 0,
        "coefficient": None if g is None else g.mean().item(),
        "lost": None if g is None else found.lost[:, -1].mean().item(),
        "supplied": found.supplied[:, -1].mean().item() if port.control_dim else None,
        "change": found.change[:, -1].mean().item(),
        "change_true": true.change[:, -1].mean().item(),
        "largest_rise": rise,
        "contraction_defect": defect,
    }


def _drift(found: _Energies | None, true: _Energies | None, extended: Tensor | None) -> dict[str, float | None]:
    if found is None or true is None or extended is None:
        names = ("drift_mean", "drift_std", "drift_true_mean", "drift_extended_mean", "diverged", "energy_std")
        return dict.fromkeys(names)
    drift = _largest_drift(found.kept)
    return {
        "drift_mean": drift.mean().item(),
        "drift_std": drift.std(correction=0).item(),
        "drift_true_mean": _largest_drift(true.kept).mean().item(),
        "drift_extended_mean": _largest_drift(extended).mean().item(),
        "diverged": _diverged(extended),
        "energy_std": true.H.std(correction=0).item(),
    }


def _largest_drift(H: Tensor) -> Tensor:
    """max_t |H(z_t) - H(z_0)| of H [n, T + 1]: [n]; not finite where H is not."""
    return (H - H[:, :1]).abs().amax(dim=1)


def _diverged(H: Tensor) -> float:
    """Share of the rows of H [n, T + 1] that are not finite somewhere."""
    return (~H.isfinite()).any(dim=1).double().mean().item()


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _spread(n: int, most: int) -> Tensor:
    """At most `most` of the indices 0..n-1, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def _warn_unsolved(title: str, predictor: _Predictor) -> None:
    share = predictor.converged
    if share is not None and share < 1:
        warnings.warn(
            f"{title}: {predictor.steps - predictor.solved} of {predictor.steps} implicit steps could not be solved, so its "
            f"numbers are not all those of {predictor.integrator}; its dt is too large for the network's curvature",
            stacklevel=3,
        )


def _count_parameters(model: zoo.Model) -> int:
    """Weights and biases of the network; a learnable dt is reported apart."""
    return sum(p.numel() for name, p in model.named_parameters() if name != "dt")


def _finite(value: Any) -> Any:
    """A number that is not finite, from a rollout that diverged, as None: JSON has no NaN."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now(device: torch.device) -> float:
    """Seconds on a clock, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def processor_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
