"""Controls: what acted on the system in a video, a file beside it, and what of that falls on each step between two latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LatentError
from . import files

if TYPE_CHECKING:
    from .latents import Latents

SUFFIX = ".control.json"


def path_of(video: Path) -> Path:
    """Where a video's control lies: beside it, NAME.control.json."""
    return video.with_name(f"{video.stem}{SUFFIX}")


def write(path: Path, control: Tensor, about: str) -> None:
    """Write a control [n_frames, m], whose row t is held from frame t to the next, as JSON, atomically.

    The file holds `control`, a list of lists of m finite numbers, and `about`, what they are in words.
    """
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in control.tolist())
    files.write_text(path, f'{{\n "about": {json.dumps(about)},\n "control": [\n{rows}\n ]\n}}\n')


def read(path: Path) -> Tensor:
    """A control [n_frames, m], float64, as `write` writes it; `about` may be missing.

    Raises
    ------
    HJEPAError
        The file is missing, unreadable, or not a control: a list of lists of numbers, all of one length.
    """
    from . import schemas

    found = schemas.check(schemas.Control, files.read_json(path, "control"), str(path))["control"]
    sizes = [len(row) for row in found]
    if other := next((t for t, size in enumerate(sizes) if size != sizes[0]), 0):
        raise LatentError(
            f"{path}: expected as many numbers in each row, found {sizes[0]} in row 0 and {sizes[other]} in row {other}"
        )
    return torch.tensor(found, dtype=torch.float64)


def of_latents(latents: Latents, videos: Path) -> Tensor:
    """The control of each step between two latents of a video, float32 [n_latents - 1, m]; see `of_steps`.

    Parameters
    ----------
    videos : Path
        The folder of the videos that the latents were made of, where NAME.control.json lies.

    Raises
    ------
    HJEPAError
        The control is missing or unreadable.
    LatentError
        It has not one row for each frame of the video.
    """
    path = path_of(Path(videos) / f"{latents.name}.mp4")
    if not path.exists():
        raise LatentError(
            f'no control of {latents.name}: expected {path}, JSON with one row a frame, {{"control": [[u, ...], ...]}}'
        )
    control, n_frames = read(path), latents.metadata["n_frames"]
    if len(control) != n_frames:
        raise LatentError(f"{path} has {len(control)} rows, expected one for each of the {n_frames} frames of {latents.name}")
    return of_steps(control, latents.start_frame, latents.metadata["provenance"]["clip_frames"], str(latents.path)).float()


def of_steps(control: Tensor, starts: Tensor, clip_frames: int, source: str) -> Tensor:
    """The control of each step between clips: [n_frames, m] to [n_clips - 1, m].

    Row t of a control is held from frame t to frame t + 1. A step from the clip that starts at frame a to the one that starts
    at b moves each of the clip's C frames, from a + k to b + k. Its control is the mean over them of what was held meanwhile:

        u = 1/C sum_{k < C} 1/(b - a) sum_{a + k <= t < b + k} control[t]

    If v' is proportional to the control, the clips' mean of v changes by exactly (b - a) times that.

    Parameters
    ----------
    starts : Tensor [n_clips], int64
        First frame of each clip.
    source : str
        Names the clips in error messages.

    Raises
    ------
    LatentError
        Clips that do not start one after the other, or of which one ends after the last frame.
    """
    if len(starts) == 1:  # perhaps of a video that is shorter than its clip
        return control.new_zeros(0, control.shape[1])
    ordered = bool((starts.diff() > 0).all())
    if not ordered or int(starts[-1]) + clip_frames > len(control):
        raise LatentError(
            f"{source}: expected clips of {clip_frames} frames that start one after the other and end within "
            f"{len(control)} frames, found starts {starts[:3].tolist()} ... {int(starts[-1])}"
        )
    total = torch.cat((control.new_zeros(1, control.shape[1]), control.cumsum(dim=0)))
    means = total[: len(control)].unfold(0, clip_frames, 1).mean(dim=-1)[starts]
    return means.diff(dim=0) / starts.diff()[:, None]
