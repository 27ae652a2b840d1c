"""Latents to training windows: cutting, splitting without a leak, standardising."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LatentError, UsageError
from . import controls, distributed, latents, streaming, truth
from .config import DataConfig
from .latents import Latents
from .places import Place
from .streaming import Windows
from .truth import Truth


@dataclass(frozen=True)
class Dataset:
    """Train and test windows, in the space that models are trained in."""

    train: Tensor | Windows
    """[n_train, window, latent_dim] float32; streamed ones are read when they are asked for."""
    test: Tensor
    """[n_test, window, latent_dim] float32."""
    mean: Tensor
    """[latent_dim]: latents = windows * std + mean."""
    std: Tensor
    """[latent_dim], ones without standardisation."""
    test_videos: tuple[str, ...]
    """Name of the video each test window is from."""
    test_starts: tuple[int, ...]
    """Index of each test window's first latent in its video."""
    label: str
    """What the latents are, in words: the encoder."""
    encoding: dict[str, Any]
    """How they were made: encoder, clip length and stride."""
    train_control: Tensor | None = None
    """[n_train, window - 1, m] float32: the control of each step of a window. None without a control."""
    test_control: Tensor | None = None
    """[n_test, window - 1, m] float32."""
    control_scale: Tensor | None = None
    """[m]: recorded controls = controls here * scale; ones without standardisation."""
    identity: str | None = None
    """A hash of streamed latents, which `fingerprint` is then."""
    truth: Truth | None = None
    """The true energy, motion and picture of latents here; None where they are not the canonical states of a smooth scene."""

    @property
    def latent_dim(self) -> int:
        return self.train.shape[-1]

    @property
    def control_dim(self) -> int:
        """m; 0 without a control."""
        return 0 if self.train_control is None else self.train_control.shape[-1]

    @property
    def variance(self) -> float:
        """Mean squared distance of the test targets from the training mean, per dimension."""
        centre = self.train.mean(dim=(0, 1)) if isinstance(self.train, Tensor) else self.train.centre
        return (self.test[:, 1:] - centre).square().mean().item()

    def fingerprint(self) -> str:
        """A hash of every number in it; a training run resumes only on the same data."""
        if self.identity is not None or not isinstance(self.train, Tensor):
            return str(self.identity)
        digest = hashlib.sha256()
        controls = (x for x in (self.train_control, self.test_control) if x is not None)
        for tensor in (self.train, self.test, *controls):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def prepare(latents: Sequence[Latents], config: DataConfig, videos: Path | None = None) -> Dataset:
    """Cut every video's latents into overlapping windows (stride 1), split them, and standardise.

    Controls are cut with them (see `controls.of_steps`). Standardised, they are divided by their root mean square over the
    training windows, so that no control stays 0.

    True states (encoder "state") are divided by the root mean square of all q and of all p, whose mean stays, so that they are
    canonical in the new units too.

    A split by video keeps a video's windows on one side. A split by window is the published one: neighbouring windows
    share all but one latent, so the test set is not new to the model.

    Parameters
    ----------
    videos : Path, optional
        The folder of the videos, beside which controls are recorded.

    Raises
    ------
    UsageError
        A window of fewer than 2 latents, a test fraction that leaves one side empty, or a control without `videos`.
    LatentError
        No video has enough latents for a window; a video has no control, or one of another length or size than is expected.
    """
    long_enough = [latents[i] for i in _long_enough([(video.name, len(video.latents)) for video in latents], config)]
    windows = torch.cat([_cut(video.latents, config.window) for video in long_enough])
    control = _controls(long_enough, config, videos)
    counts = torch.tensor([len(video.latents) - config.window + 1 for video in long_enough])
    video_of = torch.repeat_interleave(torch.arange(len(long_enough)), counts)
    start_of = torch.cat([torch.arange(count) for count in counts.tolist()])

    unit_of = video_of if config.split == "video" else torch.arange(len(windows))
    n_units = len(long_enough) if config.split == "video" else len(windows)
    is_test = torch.isin(unit_of, _held_out(n_units, config))

    train, test = windows[~is_test], windows[is_test]
    mean, std = torch.zeros(windows.shape[-1]), torch.ones(windows.shape[-1])
    encoding = _encoding(long_enough[0].metadata)
    if config.standardize and encoding.get("scene") is not None:
        # one scale for q and one for p: the structure is canonical in any other units only if these are alike in all dimensions
        std = train.square().unflatten(-1, (2, -1)).mean(dim=(0, 1, 3)).sqrt().repeat_interleave(train.shape[-1] // 2)
        std = torch.where(std > 0, std, torch.ones_like(std))
    elif config.standardize:
        mean, std = train.mean(dim=(0, 1)), _usable(train.std(dim=(0, 1)))
    scale = None
    if control is not None:
        scale = torch.ones(control.shape[-1])
        if config.standardize:
            rms = control[~is_test].square().mean(dim=(0, 1)).sqrt()
            scale = torch.where(rms > 0, rms, scale)
        control = control / scale
    return Dataset(
        train=((train - mean) / std).contiguous(),
        test=((test - mean) / std).contiguous(),
        mean=mean,
        std=std,
        test_videos=tuple(long_enough[i].name for i in video_of[is_test].tolist()),
        test_starts=tuple(start_of[is_test].tolist()),
        label=long_enough[0].metadata["label"],
        encoding=encoding,
        train_control=None if control is None else control[~is_test].contiguous(),
        test_control=None if control is None else control[is_test].contiguous(),
        control_scale=scale,
        truth=truth.of(encoding, mean, std, str(long_enough[0].path)),
    )


def _long_enough(videos: Sequence[tuple[str, int]], config: DataConfig) -> list[int]:
    """Which of the videos, by name and number of latents, have a window."""
    if config.window < 2:
        raise UsageError(f"window must be at least 2 latents (one to start from, one to predict), found {config.window}")
    if not 0 < config.test_fraction < 1:
        raise UsageError(f"test_fraction must lie between 0 and 1, found {config.test_fraction}")
    found = [i for i, (_, length) in enumerate(videos) if length >= config.window]
    short = [name for name, length in videos if length < config.window]
    if not found:
        longest = max(length for _, length in videos)
        raise LatentError(
            f"too few clips for a window of {config.window} latents: the longest video has {longest}. "
            "Use longer videos, a smaller --clip-stride, or a smaller --window."
        )
    if short:
        names = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        warnings.warn(f"{len(short)} videos have fewer than {config.window} latents and are left out: {names}", stacklevel=3)
    return found


def _held_out(n_units: int, config: DataConfig) -> Tensor:
    """Which of n videos or windows are for testing."""
    n_test = round(config.test_fraction * n_units)
    if not 0 < n_test < n_units:
        raise UsageError(
            f"a split by {config.split} with test_fraction {config.test_fraction} needs more than {n_units} "
            f"{config.split}s: {n_units - n_test} would be left for training and {n_test} for testing"
        )
    return torch.randperm(n_units, generator=torch.Generator().manual_seed(config.split_seed))[:n_test]


def _usable(std: Tensor) -> Tensor:
    # a dimension that never changes carries nothing; dividing by its rounding noise would make it carry a lot
    return torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))


def read(
    folder: Place, config: DataConfig, videos: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Dataset:
    """The windows of a folder of latents, all in memory or streamed, as the settings say; see `prepare`.

    Streamed, they are the same windows, split alike and, but for rounding, standardised alike; files are read once before
    training, which processes that work together share out. Of the test windows at most `streaming.HELD` bytes are used, evenly
    spread over all, and a warning says how many.

    Parameters
    ----------
    videos : Path, optional
        See `prepare`.
    progress : callable, optional
        Called as progress(files_read, files) where latents are streamed.

    Raises
    ------
    UsageError
        What `prepare` refuses; streamed, also a split by window, a control, and the true states of a scene.
    LatentError
        What `load_latents` or `prepare` refuses.
    """
    if config.stream == "off":
        return prepare(latents.load_latents(folder), config, videos)
    for name, value, expected in (("split", config.split, "video"), ("control", config.control, "none")):
        if value != expected:
            raise UsageError(f"stream {config.stream} needs {name} {expected}, found {value}")
    found = streaming.open_latents(folder)
    found = [found[i] for i in _long_enough([(rows.name, len(rows)) for rows in found], config)]
    encoding = _encoding(found[0].metadata)
    if encoding.get("scene") is not None:
        raise UsageError(f"stream {config.stream} is of encoders' latents, found the true states of a scene: give --stream off")
    held_out = set(_held_out(len(found), config).tolist())
    counter = distributed.Counter()

    def scan(rows: streaming.Rows) -> streaming.Scan:
        result = streaming.scan(rows, config.window)
        done = counter.add(1)
        if progress is not None:
            progress(done, len(found))
        return result

    scans = distributed.shared_out(found, scan)
    train = [rows for i, rows in enumerate(found) if i not in held_out]
    moments = functools.reduce(operator.add, (scan.moments for i, scan in enumerate(scans) if i not in held_out))
    mean, std, centre = torch.zeros(found[0].d), torch.ones(found[0].d), moments.mean.float()
    if config.standardize:
        mean, std = moments.mean.float(), _usable((moments.squares / (moments.count - 1)).sqrt().float())
        centre = torch.zeros_like(mean)
    test = Windows([rows for i, rows in enumerate(found) if i in held_out], config.window, mean, std, False, centre)
    chosen = torch.arange(len(test))
    most = max(1, streaming.HELD // (4 * config.window * found[0].d))
    if len(test) > most:
        chosen = torch.linspace(0, len(test) - 1, most, dtype=torch.float64).round().long()
        warnings.warn(
            f"{most} of {len(test)} test windows are used, evenly spread over all: as many as memory is for", stacklevel=2
        )
    places = [test.place_of(row) for row in chosen.tolist()]
    facts = [[scan.digest for scan in scans], sorted(held_out), len(chosen), dataclasses.asdict(config)]
    return Dataset(
        train=Windows(train, config.window, mean, std, config.stream == "blocks", centre),
        test=test[chosen],
        mean=mean,
        std=std,
        test_videos=tuple(rows.name for rows, _ in places),
        test_starts=tuple(start for _, start in places),
        label=found[0].metadata["label"],
        encoding=encoding,
        identity=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _encoding(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata["provenance"].items() if not key.startswith("source")}


def _cut(rows: Tensor, length: int) -> Tensor:
    """Every `length` consecutive rows [n, d]: [n - length + 1, length, d]."""
    return rows.unfold(0, length, 1).transpose(1, 2)


def _controls(latents: Sequence[Latents], config: DataConfig, videos: Path | None) -> Tensor | None:
    """The control of each step of each window, [n_windows, window - 1, m]."""
    if config.control == "none":
        return None
    if videos is None:
        raise UsageError("control recorded: the controls lie beside the videos; name their folder with --videos")
    found = [controls.of_latents(video, videos) for video in latents]
    for video, control in zip(latents, found, strict=True):
        if control.shape[1] != found[0].shape[1]:
            raise LatentError(
                f"controls differ in size: {latents[0].name} has {found[0].shape[1]} numbers a row, "
                f"{video.name} {control.shape[1]}"
            )
    return torch.cat([_cut(control, config.window - 1) for control in found])
