"""Encoder "state", which is none: the true canonical state (q, p) of generated videos as their latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EncoderError, LatentError
from . import files
from .config import STATE_ENCODER, EncodeConfig, shown
from .latents import is_current
from .places import Place
from .videos import VideoReader, load_ground_truth, read_settings

LABEL = "state (ground truth, no encoder)"


def encode(
    targets: Mapping[Path, Place],
    hashes: Mapping[Path, str],
    config: EncodeConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[Place]:
    """Write the true states of each video to its target, every `clip_stride` frames from the first frame on.

    A clip is one frame: the control of a step between two latents (`controls.of_steps`) is then the mean of what acted between
    just these two states. Files that hold the same states already are kept.

    Parameters
    ----------
    targets, hashes : mapping
        From each video to its file of latents, and to the SHA-256 of its bytes.
    config : EncodeConfig
        Of which `clip_stride` alone is used.
    progress : callable, optional
        Called as progress(done_clips, total_clips).

    Returns
    -------
    list of Path, or of places behind an address, in the order of `targets`

    Raises
    ------
    EncoderError
        A video has no ground truth beside it.
    LatentError
        Two videos are of different scenes.
    HJEPAError
        A file cannot be read or written, or is not what it should be.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    done = 0
    for index, (video, target) in enumerate(targets.items()):
        q, p, scene, fps = _truth(video)
        first = first or (video, scene)
        if scene != first[1]:
            raise LatentError(
                f"{first[0]} and {video} are of different scenes: {shown(first[1])} and {shown(scene)}. "
                "Their states are not of one system; encode them apart"
            )
        states = np.concatenate([q, p], axis=1)
        recipe = {
            "model": STATE_ENCODER,
            "clip_frames": 1,
            "clip_stride": config.clip_stride,
            "scene": scene,
            "source": video.name,
            "source_sha256": hashes[video],
            "source_state_sha256": hashlib.sha256(states.tobytes()).hexdigest(),
        }
        starts = torch.arange(0, len(states), config.clip_stride)
        if not is_current(target, recipe, video):
            _check_length(video, len(states))
            tensors = {"latents": torch.from_numpy(states)[starts].float(), "start_frame": starts}
            metadata = {"provenance": json.dumps(recipe), "label": LABEL, "fps": repr(fps), "n_frames": str(len(states))}
            files.save_tensors(target, tensors, metadata)
        done += len(starts)
        if progress is not None:
            progress(done, round(done / (index + 1) * len(targets)))
    return list(targets.values())


def _truth(video: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any], float]:
    """q and p [n_frames, n], the scene that they are of, and the frame rate.

    Balls that collide have q = (x_1, y_1, x_2, ...) from the middle of the box and p = m v, with masses like areas.
    """
    truth = load_ground_truth(video)
    if truth is None:
        raise EncoderError(
            f"encoder {STATE_ENCODER}: no ground truth {video.stem}.safetensors beside {video}, as generated videos have"
        )
    settings = read_settings(video)
    if truth.scene is not None:
        assert truth.q is not None
        assert truth.p is not None
        return truth.q, truth.p, truth.scene.to_dict(), float(settings["fps"])
    areas = truth.radii**2
    q = truth.positions - settings["size"] / 2
    p = truth.velocities * (areas / areas.mean())[:, None]
    scene = {"name": "collisions", "size": settings["size"], "radii": truth.radii.tolist()}
    return q.reshape(len(q), -1), p.reshape(len(p), -1), scene, float(settings["fps"])


def _check_length(video: Path, n_frames: int) -> None:
    """The states must be those of the video that they lie beside, which says how long it is before it is decoded."""
    reader = VideoReader(video)
    next(iter(reader))
    if reader.expected and reader.expected != n_frames:
        raise LatentError(f"{video} has {reader.expected} frames, and the ground truth beside it {n_frames}")
