"""Latents to training windows: cutting, splitting without a leak, standardising."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LatentError, UsageError
from .config import DataConfig
from .latents import Latents


@dataclass(frozen=True)
class Dataset:
    """Train and test windows, in the space that models are trained in."""

    train: Tensor
    """[n_train, window, latent_dim] float32."""
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

    @property
    def latent_dim(self) -> int:
        return self.train.shape[-1]

    @property
    def variance(self) -> float:
        """Mean squared distance of the test targets from the training mean, per dimension."""
        centre = self.train.mean(dim=(0, 1))
        return (self.test[:, 1:] - centre).square().mean().item()

    def fingerprint(self) -> str:
        """A hash of every number in it; a training run resumes only on the same data."""
        digest = hashlib.sha256()
        for tensor in (self.train, self.test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def prepare(latents: Sequence[Latents], config: DataConfig) -> Dataset:
    """Cut every video's latents into overlapping windows (stride 1), split them, and standardise.

    A split by video keeps a video's windows on one side. A split by window is the published one: neighbouring windows
    share all but one latent, so the test set is not new to the model.

    Raises
    ------
    UsageError
        A window of fewer than 2 latents, or a test fraction that leaves one side empty.
    LatentError
        No video has enough latents for a window.
    """
    if config.window < 2:
        raise UsageError(f"window must be at least 2 latents (one to start from, one to predict), found {config.window}")
    if not 0 < config.test_fraction < 1:
        raise UsageError(f"test_fraction must lie between 0 and 1, found {config.test_fraction}")
    long_enough = [video for video in latents if len(video.latents) >= config.window]
    short = [video for video in latents if len(video.latents) < config.window]
    if not long_enough:
        longest = max(len(video.latents) for video in latents)
        raise LatentError(
            f"too few clips for a window of {config.window} latents: the longest video has {longest}. "
            "Use longer videos, a smaller --clip-stride, or a smaller --window."
        )
    if short:
        names = ", ".join(video.name for video in short[:5]) + (", ..." if len(short) > 5 else "")
        warnings.warn(f"{len(short)} videos have fewer than {config.window} latents and are left out: {names}", stacklevel=2)

    windows = torch.cat([video.latents.unfold(0, config.window, 1).transpose(1, 2) for video in long_enough])
    counts = torch.tensor([len(video.latents) - config.window + 1 for video in long_enough])
    video_of = torch.repeat_interleave(torch.arange(len(long_enough)), counts)
    start_of = torch.cat([torch.arange(count) for count in counts.tolist()])

    unit_of = video_of if config.split == "video" else torch.arange(len(windows))
    n_units = len(long_enough) if config.split == "video" else len(windows)
    n_test = round(config.test_fraction * n_units)
    if not 0 < n_test < n_units:
        raise UsageError(
            f"a split by {config.split} with test_fraction {config.test_fraction} needs more than {n_units} "
            f"{config.split}s: {n_units - n_test} would be left for training and {n_test} for testing"
        )
    order = torch.randperm(n_units, generator=torch.Generator().manual_seed(config.split_seed))
    is_test = torch.isin(unit_of, order[:n_test])

    train, test = windows[~is_test], windows[is_test]
    mean, std = torch.zeros(windows.shape[-1]), torch.ones(windows.shape[-1])
    if config.standardize:
        mean, std = train.mean(dim=(0, 1)), train.std(dim=(0, 1))
        # a dimension that never changes carries nothing; dividing by its rounding noise would make it carry a lot
        std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
    return Dataset(
        train=((train - mean) / std).contiguous(),
        test=((test - mean) / std).contiguous(),
        mean=mean,
        std=std,
        test_videos=tuple(long_enough[i].name for i in video_of[is_test].tolist()),
        test_starts=tuple(start_of[is_test].tolist()),
        label=long_enough[0].metadata["label"],
        encoding={key: value for key, value in long_enough[0].metadata["provenance"].items() if not key.startswith("source")},
    )
