"""What a dream is seen as: positions of bodies, and the true clip beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError
from . import streaming, truth
from .animation import Motion
from .checkpoints import Checkpoint
from .encoder_files import file_sha256
from .figures import principal_plane
from .latents import Latents, Readout, clip_means, load_latents, readout
from .run_folder import run_around
from .truth import Truth
from .videos import Trajectories, VideoReader, find_videos, load_ground_truth

MOST_FRAMES = 240
"""Of an animation; a longer rollout is shown at every so manieth step."""
MOST_PIXELS = 640
"""Of a side of the true clip's frames, as they are held."""


def of(
    loaded: Checkpoint,
    checkpoint: Path,
    states: Tensor,
    sequence: Latents,
    index: int,
    title: str,
    seconds: float | None,
    video: Path | None = None,
) -> Motion:
    """What is seen of a rollout [n + 1, d], in units of the latents, that starts from one of a video's latents.

    Parameters
    ----------
    checkpoint : Path
        The run that it lies in, if any, says where videos and ground truth for the probe are.
    seconds : float, optional
        That a step takes.
    video : Path, optional
        Where the video is, by default looked for in that run.
    """
    n_steps = len(states) - 1
    every = -(-len(states) // MOST_FRAMES)
    shown, encoded = states[::every], sequence.latents[index : index + n_steps + 1 : every]
    clip = video if video is not None else _video_of(sequence, checkpoint)
    true = None if clip is None else _ground_truth(clip, sequence)
    known = None if true is None else clip_means(sequence, true.positions)[index : index + n_steps + 1 : every]
    images, size = ([], None) if clip is None else _images(clip, sequence, index, n_steps, every)
    encoding = loaded.facts["encoding"] or {}
    scene = truth.of(encoding, loaded.mean, loaded.std, str(checkpoint))
    if scene is not None:
        predicted = scene.positions((shown - loaded.mean) / loaded.std).numpy()
        exact = _exact(scene, (sequence.latents[index:] - loaded.mean) / loaded.std, n_steps)[::every]
        return Motion(
            predicted, scene.positions(exact).numpy(), images, (scene.size, scene.size), scene.radii, title, "",
            "dream, by the true states", "the true clip", seconds, every,
        )  # fmt: skip
    probe = None if true is None or not images else _probe(sequence, checkpoint)
    if probe is None or true is None or known is None:
        path = principal_plane(torch.cat([shown, encoded]))[:, None]
        return Motion(
            path[: len(shown)], path[len(shown) :], images, None, (), title,
            "no ground truth of other videos to read positions from latents with",
            "dream, latents in their largest plane", "the true clip" if images else "the latents encoded", seconds, every,
        )  # fmt: skip
    predicted = probe(shown.double().numpy()).reshape(len(shown), -1, 2)
    about = (
        f"positions: means over a clip by a linear probe, R\u00b2 {probe.r2:.2f} on held-out videos, fitted without this one"
    )
    return Motion(
        predicted, known.reshape(len(known), -1, 2), images, size, true.radii.tolist(), title, about, "dream, read by a probe",
        "the true clip", seconds, every,
    )  # fmt: skip


def _exact(scene: Truth, encoded: Tensor, n_steps: int) -> Tensor:
    """The true states from the first of those encoded [m, d] on: exact motion, or where something pushes what was recorded."""
    return encoded[: n_steps + 1] if scene.scene.push else scene.rollout(encoded[:1], n_steps)[0]


def _folders(checkpoint: Path) -> tuple[Path | None, Path | None]:
    """The videos and latents of the run that a checkpoint lies in, as far as they are known."""
    run = run_around(checkpoint.parent)
    if run is None:
        return None, None
    try:
        inputs = run.read_inputs()
    except HJEPAError:
        return None, None
    return inputs["videos"], inputs["latents"]


def _video_of(sequence: Latents, checkpoint: Path) -> Path | None:
    """The very video that latents are of, if the run has it."""
    provenance, (folder, _) = sequence.metadata["provenance"], _folders(checkpoint)
    source = provenance.get("source")
    if folder is None or not source or Path(source).name != source:
        return None
    path = folder / source
    try:
        return path if path.is_file() and file_sha256(path) == provenance.get("source_sha256") else None
    except OSError:
        return None


def _ground_truth(video: Path, sequence: Latents) -> Trajectories | None:
    try:
        found = load_ground_truth(video)
    except HJEPAError:
        return None
    return found if found is not None and len(found.positions) == sequence.metadata["n_frames"] else None


def _probe(sequence: Latents, checkpoint: Path) -> Readout | None:
    """A readout of positions from the run's other videos; None where there are too few with ground truth."""
    videos, folder = _folders(checkpoint)
    if videos is None or folder is None:
        return None
    try:
        truths = {path.stem: found for path in find_videos(videos) if (found := load_ground_truth(path)) is not None}
        others = [item for item in load_latents(folder, streaming.HELD) if item.name in truths and item.name != sequence.name]
        return readout(others, [truths[item.name] for item in others]) if others else None
    except HJEPAError:
        return None


def _images(
    video: Path, sequence: Latents, index: int, n_steps: int, every: int
) -> tuple[list[np.ndarray], tuple[int, int] | None]:
    """The frame in the middle of every so manieth step's clip, for as long as the video goes on, and the width and height.

    Large frames lose rows and columns: no more than `MOST_PIXELS` are left of a side.
    """
    provenance = sequence.metadata["provenance"]
    stride, middle = provenance.get("clip_stride"), provenance["clip_frames"] // 2
    if stride is None:
        return [], None
    first = int(sequence.start_frame[index]) + middle
    wanted = range(first, first + stride * n_steps + 1, stride * every)
    found: list[np.ndarray] = []
    size = None
    try:
        for number, image in enumerate(VideoReader(video)):
            if number in wanted:
                size = image.shape[1], image.shape[0]
                thinned = -(-max(size) // MOST_PIXELS)
                found.append(image[::thinned, ::thinned].copy())
            if number >= wanted[-1]:
                break
    except HJEPAError:
        pass  # what was read before is shown
    return found, size
