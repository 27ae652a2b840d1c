"""A run's folder: where each result lies, and the stages that make one from another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HJEPAError
from . import checkpoints, evaluate, files, zoo
from .config import OFFLINE_ENCODER, Config
from .encoders import resolve_device
from .latents import encode_videos, load_latents, probe
from .progress import Progress
from .tables import summary_table
from .train import train
from .videos import find_videos, generate, load_ground_truth
from .windows import Dataset, prepare

Say = Callable[[str], None]

QUICK: dict[str, dict[str, Any]] = {
    "videos": {"n_videos": 10, "background": "gradient"},
    "encode": {"encoder": OFFLINE_ENCODER},
    "train": {"epochs": 3},
    "evaluate": {"timing_runs": 20},
}
"""Settings of `--quick`: the whole pipeline in less than two minutes on two cores. Too short to mean anything."""


@dataclass(frozen=True)
class Run:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def inputs(self) -> Path:
        """JSON naming the folders of videos and latents that the run uses."""
        return self.root / "inputs.json"

    @property
    def arrays(self) -> Path:
        return self.root / "evaluation.safetensors"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def table(self) -> Path:
        return self.root / "summary.md"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def model(self, name: str) -> Path:
        """Folder of one model's checkpoints."""
        return self.root / "models" / name

    def trained(self) -> dict[str, Path]:
        """Best checkpoint of every model that has one, in the zoo's order."""
        paths = {name: self.model(name) / "best.safetensors" for name in zoo.MODELS}
        return {name: path for name, path in paths.items() if path.is_file()}

    def read_config(self) -> Config:
        """Raises HJEPAError if the folder is no run."""
        if not self.root.is_dir():
            raise HJEPAError(f"run folder not found: {self.root}")
        return Config.from_dict(files.read_json(self.config, "the run's configuration"), str(self.config))

    def read_inputs(self) -> dict[str, Path | None]:
        """The folders `videos` (None if unknown) and `latents`."""
        found = files.read_json(self.inputs, "the run's list of inputs")
        return {key: None if value is None else (self.root / value) for key, value in found.items()}

    def start(self, config: Config, videos: Path | None, latents: Path) -> None:
        """Record configuration and inputs, or check that they are those recorded before.

        Raises
        ------
        HJEPAError
            The folder holds a run with other settings.
        """
        recorded = {"videos": None if videos is None else self._relative(videos), "latents": self._relative(latents)}
        for path, value, what in (
            (self.config, config.to_dict(), "settings"),
            (self.inputs, recorded, "inputs"),
        ):
            if path.exists():
                _refuse_difference(files.read_json(path, f"the run's {what}"), value, what, self.root)
            else:
                files.write_json(path, value)

    def _relative(self, folder: Path) -> str:
        # a run that holds its inputs can be moved as a whole
        return (
            os.path.relpath(folder, self.root)
            if folder.resolve().is_relative_to(self.root.resolve())
            else str(folder.resolve())
        )


def _refuse_difference(found: Any, expected: Any, what: str, root: Path) -> None:
    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}{name}.").items()}
        return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}

    old, new = flat(found), flat(expected)
    differing = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    if differing:
        changes = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in differing)
        raise HJEPAError(f"{root} holds a run with other {what}: {changes}. Choose another --out, or delete that folder.")


def make_videos(folder: Path, config: Config, show: bool) -> list[Path]:
    """Generate the synthetic videos of a configuration; what is already there is kept."""
    with Progress("videos", config.videos.n_videos, unit="video", enabled=show) as progress:
        return generate(folder, config.videos, progress.callback)


def encode(videos: Path, latents: Path, config: Config, device: str, show: bool) -> list[Path]:
    """Encode a folder of videos; what is already there with the same provenance is kept."""
    paths = find_videos(videos)
    with Progress("latents", 0, unit="clip", enabled=show) as progress:
        return encode_videos(paths, latents, config.encode, device, progress.callback)


def probe_latents(videos: Path, latents: Path) -> dict[str, Any] | None:
    """How much of the balls' true motion a linear map reads from the latents; None without ground truth."""
    truths = {path.stem: truth for path in find_videos(videos) if (truth := load_ground_truth(path)) is not None}
    encoded = [item for item in load_latents(latents) if item.name in truths]
    return probe(encoded, [truths[item.name] for item in encoded]) if encoded else None


def train_models(run: Run, names: Sequence[str], dataset: Dataset, config: Config, device: str, show: bool, say: Say) -> None:
    """Train the named models one after the other; finished ones are kept, interrupted ones go on."""
    zoo.check_models(tuple(names))
    target = resolve_device(device)
    for name in names:
        with Progress(name, config.train.epochs, unit="epoch", enabled=show) as progress:

            def log(row: dict[str, Any], progress: Progress = progress) -> None:
                fields = {"loss": row["train_loss"], "test": row["test_mse"], "lambda": row["energy_weight"], "dt": row["dt"]}
                shown = {name: value for name, value in fields.items() if value is not None}
                progress.update(row["epoch"] - progress.done, **shown)

            best = train(name, dataset, run.model(name), config.train, config.data, target, log)
        facts = checkpoints.load(best).facts
        say(f"{zoo.MODELS[name].title}: best test MSE {facts['history'][-1]['test_mse']:.4f} in epoch {facts['epoch']}")


def evaluate_run(run: Run, device: str, show: bool) -> dict[str, Any]:
    """Evaluate every trained model of a run and write its summary, table and arrays.

    Raises
    ------
    HJEPAError
        The run has no trained model, or its checkpoints and latents do not belong together.
    """
    config, inputs = run.read_config(), run.read_inputs()
    latents, videos = inputs["latents"], inputs["videos"]
    assert latents is not None
    trained = run.trained()
    if not trained:
        raise HJEPAError(f"{run.root} has no trained model: run 'hjepa-fast train' first")
    dataset = prepare(load_latents(latents), config.data)
    resolved = resolve_device(device)
    models = {}
    for name, path in trained.items():
        checkpoint = checkpoints.load(path)
        if checkpoint.facts["data_fingerprint"] != dataset.fingerprint():
            raise HJEPAError(f"{path} was trained on other data than {latents} now holds; train again in another folder")
        models[name] = checkpoints.restore(checkpoint, path).to(resolved).eval()
    with Progress("evaluation", len(models) + 1, unit="model", enabled=show) as progress:
        evaluation = evaluate.evaluate(models, dataset, config.evaluate, resolved, progress.callback)
    summary = {
        "encoder": dataset.label,
        "split": config.data.split,
        "standardized": config.data.standardize,
        "n_train": len(dataset.train),
        "n_test": len(dataset.test),
        "latent_dim": dataset.latent_dim,
        "n_steps": config.data.window - 1,
        "extended_steps": config.evaluate.extended_steps,
        "epochs": config.train.epochs,
        "probe": _probe(videos, latents),
        "hardware": evaluate.hardware(resolved),
        "models": evaluation.rows,
    }
    files.save_tensors(run.arrays, evaluation.arrays, {"encoder": dataset.label})
    files.write_json(run.summary, summary)
    files.write_text(run.table, summary_table(summary))
    return summary


def _probe(videos: Path | None, latents: Path) -> dict[str, Any] | None:
    if videos is None:
        return None
    try:
        return probe_latents(videos, latents)
    except HJEPAError as error:
        warnings.warn(f"the probe is left out of the summary: {error}", stacklevel=2)
        return None


def reproduce(
    config: Config, out: Path, videos: Path | None, names: Sequence[str], device: str, show: bool, say: Say
) -> dict[str, Any]:
    """The whole pipeline into one folder: videos, latents, training, evaluation, figures.

    Parameters
    ----------
    videos : Path, optional
        A folder of own videos to use instead of synthetic ones.

    Returns
    -------
    dict
        The summary, as written to `summary.json`.
    """
    from .figures import draw

    zoo.check_models(tuple(names))
    target = resolve_device(device)
    say(f"device: {target}" + (", no GPU found" if device == "auto" and target.type == "cpu" else ""))
    if config.encode.encoder == OFFLINE_ENCODER:
        say(f"encoder: {OFFLINE_ENCODER}, small and untrained; its results are not the published system's")
    run = Run(out)
    latents = out / "latents"
    run.start(config, videos or out / "videos", latents)
    if videos is None:
        videos = out / "videos"
        make_videos(videos, config, show)
    encode(videos, latents, config, device, show)
    dataset = prepare(load_latents(latents), config.data)
    say(f"{len(dataset.train)} training and {len(dataset.test)} test windows, split by {config.data.split}")
    train_models(run, names, dataset, config, device, show, say)
    summary = evaluate_run(run, device, show)
    draw(run)
    return summary
