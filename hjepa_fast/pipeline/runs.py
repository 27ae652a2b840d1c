"""The stages of a run, each from files to files, and all of them in one go."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..api import choose_backend
from ..errors import HJEPAError, UsageError
from . import checkpoints, controls, distributed, evaluate, figures, files, streaming, tensorboard, zoo
from .config import OFFLINE_ENCODER, RECIPES, STATE_ENCODER, Config, recipe_of
from .encoder_files import file_sha256
from .encoders import resolve_device
from .latents import encode_videos, load_latents, probe
from .places import Place
from .progress import Outlook, Progress, clock, part
from .run_folder import Run
from .tables import summary_table
from .train import (
    check_numbers,
    epoch_work,
    recorded_history,
    refuse_other_settings,
    settle,
    standing,
    train,
)
from .videos import find_videos, generate, load_ground_truth
from .windows import Dataset, read

Say = Callable[[str], None]

QUICK: dict[str, dict[str, Any]] = {
    "videos": {"n_videos": 10, "background": "gradient"},
    "encode": {"encoder": OFFLINE_ENCODER},
    "train": {"epochs": 3},
    "evaluate": {"timing_runs": 20, "extended_steps": 100},
}
"""Settings of `--quick`: the whole pipeline in less than two minutes on two cores. Too short to mean anything."""

DEMO_SCENE, DEMO_VIDEOS, DEMO_EPOCHS = "orbit", 80, 100
DEMO_MODELS = ("hnn", "hnn-separable", "baseline", "baseline-residual")
"""Of the demo on the true states of a smooth scene."""
DEMO_OFFLINE_VIDEOS, DEMO_OFFLINE_EPOCHS = 20, 10
DEMO_OFFLINE_MODELS = ("hnn", "baseline", "baseline-residual")
"""Of the demo on collisions as the offline encoder sees them."""
DEMO: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = {
    DEMO_SCENE: (
        {
            "videos": {"scene": DEMO_SCENE, "n_videos": DEMO_VIDEOS, "background": "gradient"},
            "encode": {"encoder": STATE_ENCODER},
            "train": RECIPES["smooth"]["train"] | {"epochs": DEMO_EPOCHS},
            "evaluate": {"timing_runs": 20},
        },
        DEMO_MODELS,
    ),
    "collisions": (
        {
            "videos": {"n_videos": DEMO_OFFLINE_VIDEOS, "background": "gradient"},
            "encode": {"encoder": OFFLINE_ENCODER},
            "train": {"epochs": DEMO_OFFLINE_EPOCHS},
            "evaluate": {"timing_runs": 20},
        },
        DEMO_OFFLINE_MODELS,
    ),
}
"""Runs of the demo, by the folder that each goes to: settings and models. Together less than six minutes on two cores."""


def make_videos(folder: Path, config: Config, show: bool) -> list[Path]:
    """Generate the synthetic videos of a configuration; what is already there is kept."""
    with files.locked(folder, needed=False), Progress("videos", config.videos.n_videos, unit="video", enabled=show) as progress:
        return generate(folder, config.videos, progress.callback)


def encode(videos: Path, latents: Place, config: Config, device: str, show: bool, fetch: bool = True) -> list[Place]:
    """Encode a folder of videos; what is already there with the same provenance is kept. `fetch`: see `load_encoder`."""
    paths = find_videos(videos)
    distributed.on_first(lambda: files.refuse_if_locked(videos))
    with (
        distributed.by_first(files.locked(latents, needed=False)),
        Progress("latents", 0, unit="clip", enabled=show) as progress,
    ):
        return encode_videos(paths, latents, config.encode, device, progress.callback, fetch=fetch)


def read_windows(latents: Place, config: Config, videos: Path | None, show: bool) -> Dataset:
    """The windows of a folder of latents as a configuration wants them; see `windows.read`."""
    streamed = config.data.stream != "off"
    with Progress("reading latents", 0, unit="file", enabled=show and streamed) as progress:
        return read(latents, config.data, videos, progress.callback)


def probe_latents(videos: Path, latents: Place, most: int | None = None) -> dict[str, Any] | None:
    """How much of the balls' true motion a linear map reads from the latents; None without ground truth or if they are it.

    `most`: see `load_latents`.
    """
    truths = {path.stem: truth for path in find_videos(videos) if (truth := load_ground_truth(path)) is not None}
    found = load_latents(latents, most)
    encoded = [item for item in found if item.name in truths and item.metadata["provenance"].get("scene") is None]
    return probe(encoded, [truths[item.name] for item in encoded]) if encoded else None


def check_settings(config: Config, names: Sequence[str]) -> None:
    """Settings that training or evaluation would refuse later are refused now, before anything is made or recorded.

    Raises
    ------
    UsageError
        The message names the option, its value and what was expected.
    """
    for name in zoo.chosen(names, config.train, config.data):
        zoo.spec_in(name, config.train, int(config.data.control != "none"))
    check_numbers(config.train)
    evaluate.check_config(config.evaluate)


def train_models(
    run: Run,
    names: Sequence[str],
    dataset: Dataset,
    config: Config,
    device: str,
    show: bool,
    say: Say,
    curves: bool = False,
) -> None:
    """Train the named models one after the other; finished ones are kept, interrupted ones go on.

    With `curves` the histories also go to TensorBoard, into a folder for each model in `tensorboard` of the run.
    """
    check_settings(config, names)
    target = resolve_device(device)
    _say_what_compiles(config, dataset, target, say)
    work = epoch_work(config.data.window - 1, config.train)
    outlook = Outlook(dict.fromkeys(names, work))
    histories = {name: recorded_history(run.model(name)) for name in names}
    for name, history in histories.items():
        for row in history[: config.train.epochs]:
            outlook.add(name, row["seconds"])

    def left() -> dict[str, str]:
        return {} if outlook.left is None else {"left in all models": clock(outlook.left)}

    for number, name in enumerate(names, start=1):
        history = histories[name]
        with contextlib.ExitStack() as stack:
            title = f"model {number} of {len(names)}, {name}"
            progress = stack.enter_context(
                Progress(title, config.train.epochs, unit="epoch", enabled=show, initial=len(history))
            )
            progress.announce(**left())
            written = None
            if curves and distributed.is_first():
                written = tensorboard.Curves(run.own(run.root / "tensorboard" / name), history)
                stack.callback(written.close)

            def log(
                row: dict[str, Any],
                name: str = name,
                progress: Progress = progress,
                written: tensorboard.Curves | None = written,
            ) -> None:
                outlook.add(name, row["seconds"])
                fields = {"loss": row["train_loss"], "test": row["test_mse"], "lambda": row["energy_weight"], "dt": row["dt"]}
                shown = {name: value for name, value in fields.items() if value is not None}
                progress.update(row["epoch"] - progress.done, **shown, **left())
                if written is not None:
                    written.add(row)

            best = train(name, dataset, run.model(name), config.train, config.data, target, log)
        facts, title = checkpoints.load(best).facts, zoo.spec_in(name, config.train, dataset.control_dim).title
        if facts["history"]:  # the folder may be anybody's
            say(f"{title}: best test MSE {facts['history'][-1]['test_mse']:.4g} in epoch {facts['epoch']}")


def _say_what_compiles(config: Config, dataset: Dataset, device: torch.device, say: Say) -> None:
    """Triton compiles its kernels, and tries several of each, when a shape is first used, without a word of its own."""
    if (
        device.type == "cuda"
        and choose_backend(config.train.backend, torch.empty(1, dataset.latent_dim, device=device)) == "triton"
    ):
        say(
            "the first epoch of a model with a Hamiltonian compiles its Triton kernels, which can take minutes; "
            "Triton's cache keeps them"
        )


def evaluate_run(run: Run, device: str, show: bool) -> dict[str, Any]:
    """Evaluate every trained model of a run and write its summary, table and arrays.

    Models whose training was interrupted are evaluated as they are; the summary says how far each got: for each row
    `train.standing`'s values, and `epochs` (the fewest that a model has done), `epochs_asked`, `finished`, `missing`, the
    models that were to be trained and have no checkpoint, and `checkpoints`, the SHA-256 of each file.

    Raises
    ------
    HJEPAError
        The run has no trained model, its configuration, checkpoints and latents do not belong together, or another process
        writes into it.
    """
    run.read_config()  # a folder that is no run is left as it is
    with distributed.by_first(run.locked()):
        return _evaluate(run, device, show)


def _evaluate(run: Run, device: str, show: bool) -> dict[str, Any]:
    config, inputs = run.read_config(), run.read_inputs()
    latents, videos = inputs["latents"], inputs["videos"]
    assert latents is not None
    asked = run.asked()
    distributed.on_first(lambda: _settle(run, asked))
    trained = run.trained()
    if not trained:
        raise HJEPAError(f"{run.root} has no trained model: run 'hjepa-fast train' first")
    distributed.on_first(lambda: files.refuse_if_locked(latents))
    dataset = read_windows(latents, config, videos, show)
    resolved = resolve_device(device)
    models, standings = {}, {}
    for name, path in trained.items():
        checkpoint = checkpoints.load(path)
        refuse_other_settings(path, checkpoint.facts, name, config.train, config.data)
        standings[name] = standing(run.model(name))
        if checkpoint.facts["data_fingerprint"] != dataset.fingerprint():
            raise HJEPAError(f"{path} was trained on other data than {latents} now holds; train again in another folder")
        models[name] = checkpoints.restore(checkpoint, path).to(resolved).eval()
    with Progress("evaluation", len(models) + 1, unit="model", enabled=show) as progress:
        evaluation = evaluate.evaluate(models, dataset, config.evaluate, resolved, progress.callback)
    if not distributed.is_first():
        return distributed.broadcast({})
    summary = {
        "encoder": dataset.label,
        "split": config.data.split,
        "standardized": config.data.standardize,
        "n_train": len(dataset.train),
        "n_test": len(dataset.test),
        "latent_dim": dataset.latent_dim,
        "n_steps": config.data.window - 1,
        "extended_steps": config.evaluate.extended_steps,
        "extended_windows": evaluation.extended_windows,
        "epochs": min(found["epochs_done"] for found in standings.values()),
        "epochs_asked": config.train.epochs,
        "recipe": recipe_of(config.train),
        "finished": len(trained) == len(asked) and all(found["finished"] for found in standings.values()),
        "missing": [name for name in asked if name not in trained],
        "probe": _probe(videos, latents, None if config.data.stream == "off" else streaming.HELD),
        "step": evaluate.step_units(streaming.open_latents(latents)),
        "motion": evaluation.motion,
        "hardware": evaluate.hardware(resolved),
        "checkpoints": {name: file_sha256(path) for name, path in trained.items()},
        "models": [row | standings.get(row["name"], {}) for row in evaluation.rows],
        "integrators": evaluation.integrators,
    }
    files.save_tensors(run.arrays, evaluation.arrays, {"encoder": dataset.label})
    summary["arrays_sha256"] = file_sha256(run.arrays)
    run.table.unlink(missing_ok=True)  # the table of an earlier summary never stands beside a new one
    files.write_json(run.summary, summary)
    files.write_text(run.table, summary_table(summary))
    return distributed.broadcast(summary)


def _settle(run: Run, names: Sequence[str]) -> None:
    """A kill may have come between an epoch and what follows from it."""
    for name in names:
        if (run.model(name) / "last.safetensors").exists():
            settle(run.model(name))


def _probe(videos: Path | None, latents: Place, most: int | None) -> dict[str, Any] | None:
    if videos is None:
        return None
    try:
        return probe_latents(videos, latents, most)
    except HJEPAError as error:
        warnings.warn(f"the probe is left out of the summary: {error}", stacklevel=2)
        return None


def reproduce(
    config: Config,
    out: Path,
    videos: Path | None,
    names: Sequence[str],
    device: str,
    show: bool,
    say: Say,
    fetch: bool = True,
    curves: bool = False,
) -> dict[str, Any]:
    """The whole pipeline into one folder: videos, latents, training, evaluation, figures.

    Parameters
    ----------
    videos : Path, optional
        A folder of own videos to use instead of synthetic ones.
    fetch : bool
        See `load_encoder`.
    curves : bool
        See `train_models`.

    Returns
    -------
    dict
        The summary, as written to `summary.json`.
    """
    check_settings(config, names)
    if curves:
        tensorboard.check_available()
    _check_controls(config, videos)
    target = resolve_device(device)
    figures.check_available()
    say(f"device: {target}" + (", no GPU found" if device == "auto" and target.type == "cpu" else ""))
    if config.encode.encoder == OFFLINE_ENCODER:
        say(f"encoder: {OFFLINE_ENCODER}, small and untrained; its results are not the published system's")
    if config.encode.encoder == STATE_ENCODER:
        say(f"encoder: none, the latents are the true states of the videos ({STATE_ENCODER}); results are of the models alone")
    run = Run(out)
    with distributed.by_first(run.locked()):
        return _reproduce(run, config, videos, names, device, show, say, fetch, curves)


def _check_controls(config: Config, videos: Path | None) -> None:
    """Controls that will be missing are missed before anything is made, not after the encoder has run."""
    if config.data.control == "none":
        return
    if videos is None and not config.videos.force:
        raise UsageError("control recorded: synthetic videos have a control only with a --force above 0, found 0")
    if videos is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are left out, which the encoder's stage says
            paths = find_videos(videos)
        for path in paths:
            controls.read(controls.path_of(path))


def _reproduce(
    run: Run,
    config: Config,
    videos: Path | None,
    names: Sequence[str],
    device: str,
    show: bool,
    say: Say,
    fetch: bool,
    curves: bool,
) -> dict[str, Any]:
    out, latents = run.root, run.own(run.root / "latents")
    distributed.on_first(lambda: run.start(config, videos or out / "videos", latents, names))
    n_stages, made = (5, 1) if videos is None else (4, 0)
    if videos is None:
        videos = run.own(out / "videos")
        with part(f"stage 1 of {n_stages}"):
            distributed.on_first(lambda: make_videos(videos, config, show))
    with part(f"stage {made + 1} of {n_stages}"):
        encode(videos, latents, config, device, show, fetch)
    dataset = read_windows(latents, config, videos, show)
    say(f"{len(dataset.train)} training and {len(dataset.test)} test windows, split by {config.data.split}")
    with part(f"stage {made + 2} of {n_stages}"):
        train_models(run, names, dataset, config, device, show, say, curves)
    with part(f"stage {made + 3} of {n_stages}"):
        summary = _evaluate(run, device, show)
    say(f"\n{summary_table(summary)}")  # before a figure can fail
    with part(f"stage {n_stages} of {n_stages}"):
        distributed.on_first(lambda: _draw(run, show))
    return summary


def _draw(run: Run, show: bool) -> None:
    with Progress("figures", enabled=show, unit="file") as progress:
        progress.announce()
        progress.update(len(figures.draw_locked(run)))


def demo(out: Path, device: str, show: bool, say: Say) -> list[tuple[Run, dict[str, Any]]]:
    """The runs of `DEMO`, each into a folder of its own in `out`, with settings and errors as of `reproduce`.

    Returns
    -------
    list of (Run, dict)
        Each run and its summary.
    """
    found = []
    for number, (folder, (settings, names)) in enumerate(DEMO.items(), start=1):
        config = Config.from_dict(settings, f"the demo's {folder}")
        with part(f"run {number} of {len(DEMO)}"):
            found.append((Run(out / folder), reproduce(config, out / folder, None, names, device, show, say)))
    return found
