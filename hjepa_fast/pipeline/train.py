"""Training: single steps, then multi-step rollouts, an energy loss that grows, AdamW; resumable to the same losses."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..diagnostics import energy_balance
from ..errors import CheckpointError, ConvergenceError, HJEPAError, TrainingError, UsageError
from ..integrators import SymplecticIntegrator, check_dt
from ..matching import STEPS, step_residual
from ..names import StepScheme
from . import checkpoints, distributed, files, streaming, zoo
from .checkpoints import Checkpoint
from .config import DataConfig, TrainConfig
from .encoder_files import file_sha256
from .run_folder import differences
from .windows import Dataset

Log = Callable[[dict[str, Any]], None]


def energy_weight(epoch: int, config: TrainConfig) -> float:
    """lambda(e) = start + (end - start) (e - 1) / (E - 1) for epoch e = 1..E."""
    share = (epoch - 1) / max(config.epochs - 1, 1)
    return config.energy_weight_start + (config.energy_weight_end - config.energy_weight_start) * share


def learning_rate(epoch: int, config: TrainConfig) -> float:
    """The schedule's learning rate in epoch e = 1..E.

    "cosine" anneals from `lr` in the first epoch to `lr_end` after the last, "constant" stays at `lr`, and "one-cycle" rises
    from `lr` / 25 and falls to `lr_end`, both along cosines. The first two start after W = `warmup` E epochs, in which the rate
    is lr e / (W + 1).
    """
    if config.lr_schedule == "one-cycle":
        last = config.epochs - 1
        peak = ONE_CYCLE_RISE * last
        if epoch - 1 < peak:
            return _between(config.lr / ONE_CYCLE_START, config.lr, epoch - 1, peak)
        return _between(config.lr, config.lr_end, epoch - 1 - peak, last - peak or 1)
    warmup = min(round(config.warmup * config.epochs), config.epochs - 1)
    if epoch <= warmup:
        return config.lr * epoch / (warmup + 1)
    if config.lr_schedule == "constant":
        return config.lr
    return _between(config.lr, config.lr_end, epoch - 1 - warmup, config.epochs - warmup)


ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 25.0
"""Share of the epochs in which a one-cycle schedule rises, and what it starts below its largest rate by (Smith and Topin,
2019)."""


def _between(first: float, last: float, done: float, of: float) -> float:
    """Along half a cosine from `first` to `last`, `done` of its length `of`."""
    return last + (first - last) * ((1 + math.cos(math.pi * done / of)) / 2)


def horizon(epoch: int, n_steps: int, config: TrainConfig) -> int:
    """Steps of the loss's rollouts in epoch e = 1..E, from windows of `n_steps` steps; 0 where single steps are matched.

    After the M = `matching` E epochs of matching it grows linearly over C = `horizon_curriculum` E epochs:
    ceil(n_steps (e - M) / C).
    """
    after = epoch - round(config.matching * config.epochs)
    growing = config.horizon_curriculum * config.epochs
    if after <= 0:
        return 0
    return n_steps if after >= growing else min(n_steps, math.ceil(n_steps * after / growing))


def cut(windows: Tensor, control: Tensor | None, n_steps: int, starts: str) -> tuple[Tensor, Tensor | None]:
    """What rollouts of `n_steps` steps are compared with: windows [B', n_steps + 1, d], and the control of their steps.

    With `starts` "first" those from each window's first state, B' = B; with "all" also those from where one ends, as many as
    the window holds.
    """
    whole = windows.shape[1] - 1
    offsets = range(0, whole - n_steps + 1, n_steps) if starts == "all" else (0,)
    if len(offsets) == 1:
        return windows[:, : n_steps + 1], None if control is None else control[:, :n_steps]
    pieces = torch.cat([windows[:, i : i + n_steps + 1] for i in offsets])
    return pieces, None if control is None else torch.cat([control[:, i : i + n_steps] for i in offsets])


def matching_loss(model: zoo.Model, windows: Tensor, control: Tensor | None = None) -> Tensor:
    """Mean squared residual of the model's step between all consecutive states of windows [B, window, d].

    Of a step that has one, it is `hjepa_fast.step_residual`, which needs no solve; of any other, a rollout of one step. So too
    with friction or a control: a rollout has halves of them around the step, the residual has them in the field.
    """
    z0, z1 = (x.flatten(0, 1) for x in (windows[:, :-1], windows[:, 1:]))
    u = None if control is None else control.flatten(0, 1)
    port = zoo.port_of(model)
    if isinstance(model, SymplecticIntegrator) and port is None and model.sub_steps == 1 and model.integrator in STEPS:
        scheme = cast(StepScheme, model.integrator)
        residual = step_residual(model.hnn, z0, z1, model.step_size, scheme=scheme, backend=model.backend)
    else:
        residual = z1 - zoo.states(model, z0, 1, None if u is None else u[:, None])[:, 1]
    return residual.square().mean()


def loss_terms(
    model: zoo.Model, windows: Tensor, config: TrainConfig, energy_loss: bool, control: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared error of a rollout from each window's first state, and the energy term (0 if not used).

    The energy term is mean |H(z_t) - H(z_r)| over the predicted states t = 1..T, with r = 1 as in the published
    notebook, or r = 0 as in the paper's equation (7). With friction or a control H does not stay, and what they take out and
    put in is left out of it: H(z_t) is the error of `diagnostics.energy_balance` then.

    Parameters
    ----------
    windows : Tensor [B, window, latent_dim]
    control : Tensor [B, window - 1, m], optional
        Of each step, for a model with a port.
    """
    z0, n_steps = windows[:, 0], windows.shape[1] - 1
    H = None
    port = zoo.port_of(model)
    if energy_loss and isinstance(model, SymplecticIntegrator) and port is None:
        states, H, *_ = model.trajectory(z0, n_steps, energy=True)
    else:
        states = zoo.states(model, z0, n_steps, control)
    if energy_loss and isinstance(model, SymplecticIntegrator) and port is not None:
        control = control if port.control_dim else None
        H = energy_balance(port, states, model.step_size, control, backend=model.backend).error
    mse = (states[:, 1:] - windows[:, 1:]).square().mean()
    if H is None:
        return mse, mse.new_zeros(())
    reference = H[:, 1:2] if config.energy_reference == "z1" else H[:, :1]
    return mse, (H[:, 1:] - reference).abs().mean()


def epoch_loss(
    model: zoo.Model, windows: Tensor, config: TrainConfig, epoch: int, energy_loss: bool, control: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The error and the energy term of an epoch: of single steps, without the latter, or of rollouts of its horizon."""
    n_steps = horizon(epoch, windows.shape[1] - 1, config)
    if not n_steps:
        mse = matching_loss(model, windows, control)
        return mse, mse.new_zeros(())
    windows, control = cut(windows, control, n_steps, config.starts)
    return loss_terms(model, windows, config, energy_loss, control)


def check_numbers(config: TrainConfig) -> None:
    """Numbers that no training can use are refused before anything starts.

    Raises
    ------
    UsageError
        The message names the option, its value and what was expected.
    """
    for name in ("epochs", "batch_size", "lr", "grad_clip", "gain", "sub_steps", "dt"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be positive, found {value}")
    for name in ("lr_end", "weight_decay", "energy_weight_start", "energy_weight_end"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} must not be negative, found {value}")
    for name in ("warmup", "matching", "horizon_curriculum"):
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(f"{name} must be a share of the epochs, from 0 to 1, found {getattr(config, name)}")
    if config.warmup and config.lr_schedule == "one-cycle":
        raise UsageError(f"warmup is for cosine and constant: one-cycle rises by itself, found {config.warmup}")
    if config.widths is not None and min(config.widths) < 1:
        raise UsageError(f"widths must be positive, found {', '.join(map(str, config.widths))}")
    if config.friction_per_dimension and config.friction == "none":
        raise UsageError("friction_per_dimension is of a friction, conformal or rayleigh, found none")
    try:
        check_dt(config.dt, config.dt_bounds, torch.float32)
    except ValueError as error:
        raise UsageError(f"{error} (on the command line: --dt-bounds LOW HIGH, or --dt-bounds none)") from error


def check_config(config: TrainConfig, dataset: Dataset) -> None:
    """As `check_numbers`, and the training set must fill a batch.

    Raises
    ------
    UsageError
        The message names the option, its value and what was expected.
    """
    check_numbers(config)
    if len(dataset.train) < config.batch_size:
        raise UsageError(
            f"batch_size {config.batch_size} is larger than the training set of {len(dataset.train)} windows; "
            "incomplete batches are dropped, so nothing would be trained"
        )


def train(
    name: str,
    dataset: Dataset,
    folder: Path,
    config: TrainConfig,
    data_config: DataConfig,
    device: torch.device | str = "cpu",
    log: Log | None = None,
) -> Path:
    """Train one model of the zoo and keep the checkpoint with the best test error.

    Writes into `folder`, each atomically: `last.safetensors`, which is what an epoch leaves, and all that follows from it,
    `best.safetensors` (both with their facts beside them as JSON) and `history.csv`, one row an epoch. If `last.safetensors`
    is there with the same settings and data, training goes on after its epoch, to the same losses as an uninterrupted run,
    and what was interrupted before it followed is written. No other process may write into `folder` meanwhile.

    Processes that work together (see `distributed.joined`) share every batch out, to the same losses but for rounding, and the
    first of them writes. What it writes does not depend on their number, so that another number of them can go on.

    Parameters
    ----------
    name : str
        A key of `zoo.MODELS`.
    log : callable, optional
        Called with each epoch's row of the history.

    Returns
    -------
    Path
        `best.safetensors`.

    Raises
    ------
    TrainingError
        The loss is not finite, or an implicit step could not be solved (the message names the epoch), or `folder` holds a
        run with other settings. The last complete epoch's checkpoint stays.
    HJEPAError
        Another process trains in `folder`, or a file cannot be written.
    """
    check_config(config, dataset)
    if config.batch_size < distributed.size():
        raise UsageError(f"batch_size {config.batch_size} leaves some of {distributed.size()} processes without a window")
    with distributed.by_first(files.locked(folder)):
        return _train(name, dataset, Path(folder), config, data_config, device, log)


def _train(
    name: str,
    dataset: Dataset,
    folder: Path,
    config: TrainConfig,
    data_config: DataConfig,
    device: torch.device | str,
    log: Log | None,
) -> Path:
    spec = zoo.spec_in(name, config, dataset.control_dim)
    zoo.check_backend(config.backend, device)
    model = zoo.assemble(spec, dataset.latent_dim, config.dt, config.seed, config.backend, config.dt_bounds).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    facts: dict[str, Any] = {
        "model": name,
        "hamiltonian": spec.hamiltonian,
        "integrator": spec.integrator,
        "friction": spec.friction,
        "control_dim": spec.control_dim,
        "latent_dim": dataset.latent_dim,
        "encoder": dataset.label,
        "encoding": dataset.encoding,
        "train": _plain(config),
        "data": _plain(data_config),
        "data_fingerprint": dataset.fingerprint(),
    }
    history: list[dict[str, Any]] = []
    last = folder / "last.safetensors"
    if last.exists():
        history = _resume(last, facts, model, optimizer)
    distributed.check_same({"data_fingerprint": facts["data_fingerprint"], "history": history}, folder)

    train_windows, test_windows = dataset.train.to(device), dataset.test.to(device)
    train_control, test_control = (
        x.to(device) if x is not None and spec.control_dim else None for x in (dataset.train_control, dataset.test_control)
    )
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    network = [parameter for name, parameter in learned if name != "dt"]
    step_sizes = [parameter for name, parameter in learned if name == "dt"]
    losses = distributed.data_parallel(model, epoch_loss, varying=config.matching > 0)
    for epoch in range(len(history) + 1, config.epochs + 1):
        started = time.perf_counter()
        lr, weight = learning_rate(epoch, config), energy_weight(epoch, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, device=device)
        n_batches = 0
        with _explained(name, spec, model, epoch):
            own = distributed.own(config.batch_size)
            batches = _batches(len(train_windows), config.batch_size, config.seed, epoch, streaming.order_of(train_windows))
            for rows, windows in streaming.read_ahead(train_windows, (batch[own] for batch in batches)):
                n_batches += 1
                optimizer.zero_grad(set_to_none=True)
                control = None if train_control is None else train_control[rows]
                with _autocast(config, device, model):
                    mse, energy_term = losses(windows, config, epoch, spec.energy_loss, control)
                    loss = mse + weight * energy_term
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"{spec.title}: the loss is {loss.item()} in epoch {epoch}, batch {n_batches} "
                        f"(MSE {mse.item():.4g}, energy term {energy_term.item():.4g}, dt {_dt(model):.4g}). "
                        f"{_kept(epoch)}; try a smaller --lr or --dt."
                    )
                share = len(rows) / config.batch_size
                # gradients are averaged over processes, whatever their shares of the batch
                (loss * (share * distributed.size())).backward()
                nn.utils.clip_grad_norm_(network, config.grad_clip)
                if step_sizes:
                    nn.utils.clip_grad_norm_(step_sizes, config.grad_clip)
                optimizer.step()
                sums += share * torch.stack((mse.detach().float(), energy_term.detach().float()))
            test_mse = rollout_error(model, test_windows, test_control)
        train_mse, train_energy = (distributed.summed(sums) / n_batches).tolist()
        row = {
            "epoch": epoch,
            "lr": lr,
            "energy_weight": weight if spec.energy_loss else 0.0,
            "train_loss": train_mse + (weight * train_energy if spec.energy_loss else 0.0),
            "train_mse": train_mse,
            "train_energy": train_energy,
            "test_mse": test_mse,
            "dt": _dt(model) if isinstance(model, SymplecticIntegrator) else None,
            "seconds": time.perf_counter() - started,
        }
        if not math.isfinite(row["test_mse"]):
            raise TrainingError(f"{spec.title}: the test error is {row['test_mse']} after epoch {epoch}; try a smaller --lr")
        history.append(row)
        if distributed.is_first():
            _save(folder, model, optimizer, dataset, {**facts, "epoch": epoch, "history": history})
            if log:
                log(row)
    return folder / "best.safetensors"


def _recorded(found: Any, default: Any) -> Any:
    """Recorded settings; fields that an older version did not write have their defaults."""
    return _plain(default) | json.loads(json.dumps(found)) if isinstance(found, dict) else found


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as it comes back from JSON."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


@contextlib.contextmanager
def _explained(name: str, spec: zoo.ModelSpec, model: zoo.Model, epoch: int) -> Iterator[None]:
    """Turn an implicit step that was not solved into an error that says where it happened and what to do."""
    try:
        yield
    except ConvergenceError as error:
        other = "with another --integrator" if name == zoo.FULL_MODEL else f"leave {name} out of --models"
        raise TrainingError(
            f"{spec.title}: {spec.integrator} could not solve a step in epoch {epoch}: dt {_dt(model):.4g} is too large for "
            f"the network's curvature. {_kept(epoch)}; try a smaller --dt or --lr in another folder, or {other}."
        ) from error


def _kept(epoch: int) -> str:
    return f"last.safetensors holds epoch {epoch - 1}" if epoch > 1 else "Nothing was saved yet"


def rollout_error(model: zoo.Model, windows: Tensor, control: Tensor | None = None) -> float:
    """Mean squared error of rollouts over all windows [n, window, latent_dim], without gradients.

    `control` is [n, window - 1, m], for a model with a port. Processes that work together share the windows out.
    """
    n_steps, total = windows.shape[1] - 1, 0.0
    own = torch.arange(len(windows), device=windows.device)[distributed.own(len(windows))]
    with torch.no_grad():
        for rows in own.split(256) if len(own) else ():
            found = zoo.states(model, windows[rows, 0], n_steps, None if control is None else control[rows])
            total += (found[:, 1:] - windows[rows, 1:]).square().mean().item() * len(rows)
    return distributed.summed(torch.tensor(total, dtype=torch.float64)).item() / len(windows)


def _batches(n: int, size: int, seed: int, epoch: int, order: streaming.Order) -> Iterator[Tensor]:
    """Shuffled index batches; a function of seed and epoch alone, so that a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return iter(order(n, generator)[: n - n % size].split(size))


def _autocast(config: TrainConfig, device: torch.device | str, model: zoo.Model) -> contextlib.AbstractContextManager[Any]:
    # rollouts run in float32 anyway; energy balances and forces, which are no rollouts, would be rounded
    if config.amp == "off" or zoo.port_of(model) is not None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, config.amp))


def _dt(model: zoo.Model) -> float:
    return model.step_size.item() if isinstance(model, SymplecticIntegrator) else math.nan


def _save(folder: Path, model: zoo.Model, optimizer: torch.optim.Optimizer, dataset: Dataset, facts: dict[str, Any]) -> None:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{names[index]}/{key}": tensor
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    scale = dataset.control_scale if facts["control_dim"] else None
    last = Checkpoint(facts, state, dataset.mean, dataset.std, moments, scale)
    # the rename of this one file is what makes the epoch count: whatever interrupts, all else can be made from it
    checkpoints.save(folder / "last.safetensors", last)
    settle(folder, last)


def settle(folder: Path, last: Checkpoint | None = None) -> None:
    """Write what follows from `last.safetensors` and is not there yet: the best checkpoint, facts as JSON, `history.csv`.

    Parameters
    ----------
    last : Checkpoint, optional
        What `last.safetensors` holds; read if not given.

    Raises
    ------
    CheckpointError
        A checkpoint cannot be read, or the best one is of another training than the last one.
    HJEPAError
        A file cannot be written.
    """
    if last is None:
        last = checkpoints.load(folder / "last.safetensors")
    history = last.facts["history"]
    best, wanted = folder / "best.safetensors", best_epoch(history)
    facts = _facts(best)
    if wanted == len(history):
        if not _agree(facts, last.facts):
            checkpoints.save(best, dataclasses.replace(last, optimizer={}))
            facts = last.facts
    # earlier versions wrote the best checkpoint first, so that it may be one epoch ahead
    elif facts.get("epoch") not in (wanted, len(history) + 1):
        found = f"of epoch {facts['epoch']}" if "epoch" in facts else "missing or unreadable"
        raise CheckpointError(
            f"{best} is {found}; by last.safetensors beside it, epoch {wanted} of {len(history)} was the best. "
            f"Delete {folder} to train again."
        )
    for path, written in ((best, facts), (folder / "last.safetensors", last.facts)):
        if not _agree(_read_facts(path.with_suffix(".json")), written):
            files.write_json(path.with_suffix(".json"), {"format": checkpoints.FORMAT} | written)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    path = folder / "history.csv"
    if not path.is_file() or path.read_bytes() != table.getvalue().encode():
        files.write_text(path, table.getvalue())


def _facts(path: Path) -> dict[str, Any]:
    """The facts in a checkpoint's metadata; empty if it is missing or unreadable."""
    try:
        return dict(json.loads((files.read_metadata(path) or {}).get("hjepa_fast", "{}")))
    except (ValueError, TypeError):
        return {}


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(path, "facts"))
    except (HJEPAError, ValueError, TypeError):
        return {}


def _agree(found: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether `found`, read from JSON, says what `facts` says, as far as the version that wrote it said it."""
    facts = json.loads(json.dumps(facts))
    return "history" in found and all(facts.get(key) == value for key, value in found.items() if key != "format")


def standing(folder: Path) -> dict[str, Any]:
    """How far the training in `folder` got.

    Returns
    -------
    dict
        epochs_done, epochs_asked, finished and best_epoch (of `best.safetensors`). Without `last.safetensors`, what was done
        after the best epoch is not known and not counted.

    Raises
    ------
    CheckpointError
        A checkpoint cannot be read, or the two are not of one training.
    """
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    facts = checkpoints.load(best).facts
    done = facts["epoch"]
    if last.exists():
        newest = checkpoints.load(last).facts
        common = min(len(facts["history"]), len(newest["history"]))
        changing = ("epoch", "history", "format")
        if facts["history"][:common] != newest["history"][:common] or any(
            facts.get(key) != newest.get(key) for key in facts.keys() | newest.keys() if key not in changing
        ):
            raise CheckpointError(
                f"{best} and {last.name} beside it are of different trainings. Delete {folder} to train again."
            )
        done = max(done, newest["epoch"])
    asked = facts["train"]["epochs"]
    return {
        "epochs_done": done,
        "epochs_asked": asked,
        "finished": done >= asked,
        "best_epoch": facts["epoch"],
    }


def how_trained(path: Path, facts: dict[str, Any]) -> str:
    """A checkpoint's epoch in words, and how far its training got if that is known not to have ended; "" if unknown."""
    epoch, asked = facts.get("epoch"), facts.get("train", {}).get("epochs")
    if epoch is None or asked is None:
        return ""
    done = epoch
    with contextlib.suppress(CheckpointError):  # what lies beside it may be of another training
        done = standing(path.parent)["epochs_done"] if path.name == "best.safetensors" else epoch
    text = f"epoch {epoch} of {asked}"
    known = path.name == "last.safetensors" or path.with_name("last.safetensors").exists()
    return f"{text}, training not finished ({done} epochs done)" if known and done < asked else text


def load_identified(path: Path) -> tuple[Checkpoint, str]:
    """A checkpoint, and the SHA-256 of its file.

    Raises
    ------
    CheckpointError
        As `checkpoints.load`, or it was replaced meanwhile.
    """
    path = Path(path)
    before = path.stat().st_mtime_ns if path.exists() else None
    loaded, digest = checkpoints.load(path), file_sha256(path)
    if path.stat().st_mtime_ns != before:
        raise CheckpointError(f"{path} was replaced while it was read, as training does after an epoch: try again")
    return loaded, digest


def refuse_other_settings(path: Path, facts: dict[str, Any], name: str, config: TrainConfig, data_config: DataConfig) -> None:
    """A checkpoint that was not trained as a run's configuration says is refused.

    Raises
    ------
    CheckpointError
        The message names what differs.
    """
    found = {"model": facts["model"], "train": _recorded(facts["train"], TrainConfig()),
             "data": _recorded(facts["data"], DataConfig())}  # fmt: skip
    expected = {"model": name, "train": _plain(config), "data": _plain(data_config)}
    if changes := differences(found, expected):
        raise CheckpointError(
            f"{path} was not trained as the run's configuration says: {changes}. Train again in another folder, or delete "
            f"{path.parent}."
        )


def recorded_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of the epochs that were done in `folder`; empty where nothing readable is."""
    history = _facts(folder / "last.safetensors").get("history")
    return history if isinstance(history, list) and all(isinstance(row, dict) for row in history) else []


def epoch_work(n_steps: int, config: TrainConfig) -> list[float]:
    """About how much work each epoch is, in steps of a window: those of its loss, and of the test error's rollouts."""
    return [max(horizon(epoch, n_steps, config), 1) + n_steps / 4 for epoch in range(1, config.epochs + 1)]


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The last of the epochs with the lowest test error, from 1."""
    lowest = min(row["test_mse"] for row in history)
    return max(row["epoch"] for row in history if row["test_mse"] == lowest)


def _resume(last: Path, facts: dict[str, Any], model: zoo.Model, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    checkpoint = checkpoints.load(last)
    for key, value in facts.items():
        found = checkpoint.facts.get(key)
        if key in ("train", "data"):
            found = _recorded(found, TrainConfig() if key == "train" else DataConfig())
        if found != value:
            raise TrainingError(
                f"{last.parent} holds a run with another {key}: found {found!r}, expected {value!r}. "
                "Choose another folder, or delete this one to start again."
            )
    distributed.on_first(lambda: settle(last.parent, checkpoint))
    checkpoints.load_state(model, checkpoint.model, last)
    state = optimizer.state_dict()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        moments = {key.rpartition("/")[2]: t for key, t in checkpoint.optimizer.items() if key.rpartition("/")[0] == name}
        if moments:
            state["state"][index] = {
                # AdamW keeps its step counter on the CPU
                key: t if key == "step" else t.to(parameter.device)
                for key, t in moments.items()
            }
    optimizer.load_state_dict(state)
    return list(checkpoint.facts["history"])
