"""Videos: synthetic bouncing balls with their ground truth, and reading anybody's mp4, avi or mov."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MissingDependencyError, UsageError, VideoError
from . import files
from .config import VideoConfig

SUFFIXES = (".mp4", ".avi", ".mov")
CYAN, RED = (0, 255, 255), (255, 0, 0)
MOST_BYTES = 2**34
"""Of the frames of a synthetic video, which is made in memory."""
PALETTE = np.array([CYAN, RED, (255, 255, 0), (0, 255, 0), (255, 0, 255), (255, 128, 0), (255, 255, 255), (128, 128, 255)])
SOURCE = "synthetic: bouncing balls"
TOUCHING = 1e-9  # overlap in pixels that counts as none; halving at a wall gets below it in 35 passes
PASSES = 100
LAYOUTS, TRIES = 20, 500


@dataclass(frozen=True)
class Trajectories:
    """Motion of the balls; x grows to the right, y down, and pixel (0, 0) has its centre at the origin.

    Attributes
    ----------
    positions : float64 [T, balls, 2], (x, y) in pixels
    velocities : float64 [T, balls, 2], pixels per frame
    radii : float64 [balls], pixels
    """

    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray


@dataclass(frozen=True)
class Video:
    """Decoded frames, uint8 [T, H, W, 3] RGB; `fps` is the average frame rate."""

    frames: np.ndarray
    fps: float
    path: Path


def simulate(config: VideoConfig, rng: np.random.Generator) -> Trajectories:
    """Balls in a box: elastic collisions (mass ~ radius^2), overlap split evenly, walls reflect.

    Two equal balls start as published, scaled to the frame: (64, 128) moving right and (192, 128) moving left of 256,
    horizontal speeds 2 + U(0, 1), vertical U(-1, 1). Any others start at random places without overlap, with speed
    2 + U(0, 1) in a random direction. Frame 0 is the initial state.

    Raises
    ------
    UsageError
        The configuration cannot be used, or the balls do not fit in the box.
    """
    radii = _check(config)
    positions = np.empty((config.n_frames, len(radii), 2))
    velocities = np.empty_like(positions)
    if _published_start(radii):
        position = np.array([[64.0, 128.0], [192.0, 128.0]]) * (config.size / 256)
        velocity = np.array([[2 + rng.random(), rng.uniform(-1, 1)], [-2 - rng.random(), rng.uniform(-1, 1)]])
    else:
        position = _place(radii, config.size, rng)
        speed, angle = 2 + rng.random(len(radii)), rng.uniform(0, 2 * math.pi, len(radii))
        velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for frame in range(config.n_frames):
        if frame:
            position += velocity
            _reflect(position, velocity, radii, config.size)
            for _ in range(PASSES):  # pushing balls apart can push them into a wall or a third ball
                if not _collide(position, velocity, radii):
                    break
                _reflect(position, velocity, radii, config.size)
        positions[frame], velocities[frame] = position, velocity
    return Trajectories(positions, velocities, radii)


def _check(config: VideoConfig) -> np.ndarray:
    """Refuse what cannot be simulated; return one radius per ball."""
    for name, least in (("n_videos", 1), ("n_frames", 1), ("n_balls", 1), ("fps", 1), ("video_seed", 0)):
        value = getattr(config, name)
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
    if len(config.radius) not in (1, config.n_balls):
        raise UsageError(f"radius has {len(config.radius)} values, expected 1 or one per ball (n_balls is {config.n_balls})")
    if config.background not in ("black", "gradient"):
        raise UsageError(f"background is {config.background!r}, expected 'black' or 'gradient'")
    radii = np.broadcast_to(np.asarray(config.radius, dtype=np.float64), (config.n_balls,)).copy()
    if not (np.isfinite(radii).all() and (radii >= 1).all()):
        raise UsageError(f"radius is {_text(config.radius)}, expected at least 1 pixel")
    # the published start needs the balls clear of the walls and of each other at a quarter and three quarters of the box
    least = math.ceil(4 * radii.max() if _published_start(radii) else 2 * radii.max() + 2)
    if config.size % 2 or config.size < least:
        raise UsageError(
            f"size is {config.size}, expected an even number of at least {least + least % 2} "
            f"for {config.n_balls} ball(s) of radius {_text(config.radius)}"
        )
    size = config.n_frames * config.size**2 * 3
    if size > MOST_BYTES:
        raise UsageError(
            f"a video of {config.n_frames} frames of size {config.size} has {size:.3g} bytes, at most {MOST_BYTES:.3g}"
        )
    return radii


def _text(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _published_start(radii: np.ndarray) -> bool:
    return len(radii) == 2 and radii[0] == radii[1]


def _place(radii: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    most = 0
    order = np.argsort(-radii, kind="stable")  # large balls first: small ones still find gaps
    for _ in range(LAYOUTS):
        position = np.zeros((len(radii), 2))
        for placed, ball in enumerate(order):
            tries = rng.uniform(radii[ball], size - radii[ball], (TRIES, 2))
            gaps = np.linalg.norm(tries[:, None] - position[order[:placed]], axis=2) - radii[order[:placed]] - radii[ball]
            free = np.flatnonzero((gaps >= 0).all(axis=1))
            if not len(free):
                most = max(most, placed)
                break
            position[ball] = tries[free[0]]
        else:
            return position
    raise UsageError(
        f"only {most} of n_balls {len(radii)} fit without overlap in a box of size {size}: "
        "expected fewer or smaller balls, or a larger size"
    )


def _reflect(position: np.ndarray, velocity: np.ndarray, radii: np.ndarray, size: int) -> None:
    low, high = radii[:, None], size - radii[:, None]
    velocity[...] = np.where(position < low, np.abs(velocity), np.where(position > high, -np.abs(velocity), velocity))
    np.clip(position, low, high, out=position)


def _collide(position: np.ndarray, velocity: np.ndarray, radii: np.ndarray) -> bool:
    """Resolve each overlapping pair once; False if there was none."""
    found = False
    mass = radii**2
    for i in range(len(radii)):
        for j in range(i + 1, len(radii)):
            offset = position[j] - position[i]
            distance = math.hypot(*offset)
            overlap = radii[i] + radii[j] - distance
            if overlap <= TOUCHING:
                continue
            found = True
            normal = offset / distance if distance > 0 else np.array([1.0, 0.0])
            position[i] -= overlap / 2 * normal
            position[j] += overlap / 2 * normal
            approach = (velocity[i] - velocity[j]) @ normal
            if approach > 0:  # equal masses: an exchange of the normal velocities
                share = 2 * approach / (mass[i] + mass[j])
                velocity[i] -= share * mass[j] * normal
                velocity[j] += share * mass[i] * normal
    return found


def background(config: VideoConfig) -> np.ndarray:
    """The static frame behind the balls, uint8 [size, size, 3]; every video of a configuration has the same.

    A gradient has red growing with x, green with y and blue towards the lower left, from 15 to 95 of 255,
    so that position can be read from colour and the balls stay far brighter.
    """
    if config.background == "black":
        return np.zeros((config.size, config.size, 3), dtype=np.uint8)
    y, x = np.meshgrid(*[np.linspace(0, 1, config.size)] * 2, indexing="ij")
    return np.rint(15 + 80 * np.stack([x, y, (1 - x + y) / 2], axis=2)).astype(np.uint8)


def render(trajectories: Trajectories, config: VideoConfig) -> np.ndarray:
    """Filled discs on the background, uint8 [T, size, size, 3] RGB: ball 1 cyan, ball 2 red, then other colours."""
    frames = np.repeat(background(config)[None], len(trajectories.positions), axis=0)
    y, x = np.ogrid[: config.size, : config.size]
    for ball, radius in enumerate(trajectories.radii):
        # more balls than colours: the next round is darker
        colour = (PALETTE[ball % len(PALETTE)] * 0.7 ** (ball // len(PALETTE))).astype(np.uint8)
        for frame, (cx, cy) in zip(frames, trajectories.positions[:, ball], strict=True):
            frame[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = colour
    return frames


def _av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise MissingDependencyError("reading and writing videos needs PyAV: pip install 'hjepa_fast[pipeline]'") from error
    return av


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write `frames`, uint8 [T, H, W, 3] RGB with even H and W, as H.264 mp4 (crf 18, yuv420p), atomically.

    The bytes depend only on the frames, the rate and the version of the encoder.

    Raises
    ------
    VideoError
        The frames or the rate cannot be encoded, or the suffix is not .mp4.
    HJEPAError
        The file cannot be written.
    """
    path = Path(path)
    data = _encode(path, frames, fps)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _encode(path: Path, frames: np.ndarray, fps: float) -> bytes:
    # in memory first: the operating system's write errors then come from Python, none is lost in the muxer
    av = _av()
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"cannot write {path}: videos are written as .mp4")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise VideoError(f"cannot write {path}: expected uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"cannot write {path}: H.264 needs an even width and height, found {width} x {height}")
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"cannot write {path}: fps is {fps}, expected a positive number")
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            # x264 decides differently with another thread count or instruction set
            options = {"crf": "18", "threads": "1", "x264-params": "cpu-independent=1"}
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"cannot write {path}: the encoder failed: {error}") from error
    return buffer.getvalue()


def read_video(path: Path, each: Callable[[np.ndarray], np.ndarray] | None = None) -> Video:
    """Decode a whole mp4, avi or mov of any size and rate.

    `each`, if given, is applied to every frame [H, W, 3] as it is decoded, so that full-size frames need not be kept.

    A rotation by a multiple of 90 degrees that the file asks for (phones do) is applied; mirroring is not. Frames that
    an edit list hides are left out. A container that declares no frame count (mkv) cannot be checked for missing frames.

    Raises
    ------
    VideoError
        The file is missing, empty, not a video, without video stream, cut short, damaged, or its frame size changes.
    """
    av = _av()
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"video is empty (0 bytes): {path}")
        # an absolute path cannot be taken for a URL
        with av.open(str(path.absolute())) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(f"no video stream in {path}")
            if stream.codec_context is None:
                raise VideoError(f"no decoder here for the video stream of {path}")
            frames, sizes, damaged = [], set(), 0
            for frame in container.decode(stream):
                damaged += frame.is_corrupt
                image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                sizes.add(image.shape[:2])
                frames.append(image if each is None else each(image))
            declared = stream.frames
            if "mp4" in container.format.name.split(","):
                # the sample table counts what an edit list hides; its index says which frames are shown
                declared = sum(not entry.is_discard for entry in stream.index_entries)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
    except FileNotFoundError as error:
        raise VideoError(f"video not found: {path}") from error
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror or error}") from error
    except (av.error.FFmpegError, IndexError) as error:
        raise VideoError(f"cannot read {path}: not a video, or cut short ({error})") from error
    if not frames or (declared and len(frames) != declared):
        raise VideoError(
            f"{path} is truncated or skips frames: it declares {declared} frames and {len(frames)} can be decoded. "
            "Copy it again, or export it again at a constant frame rate"
        )
    if damaged:
        raise VideoError(f"{path} is damaged: {damaged} of {len(frames)} frames are corrupt. Copy or export it again")
    if not fps > 0:
        raise VideoError(f"{path} declares no frame rate. Export it again at a constant frame rate")
    if len(sizes) > 1:
        raise VideoError(f"{path} changes its frame size: {' and '.join(f'{w} x {h}' for h, w in sorted(sizes))}")
    return Video(np.stack(frames), fps, path)


def find_videos(folder: Path) -> list[Path]:
    """Videos directly in `folder`, video_2 before video_10; hidden and unfinished files are ignored.

    Raises
    ------
    VideoError
        The folder is missing, is a file, cannot be listed, or has no video.
    """
    folder = Path(folder)
    if not folder.exists():
        raise VideoError(f"video folder not found: {folder}")
    videos = _list(folder)
    if not videos:
        raise VideoError(f"no videos in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return videos


def _list(folder: Path) -> list[Path]:
    try:
        # the leading dot covers files.PARTIAL too
        found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    except NotADirectoryError as error:
        raise VideoError(f"expected a folder of videos, found a file: {folder}") from error
    except OSError as error:
        raise VideoError(f"cannot list {folder}: {error.strerror}") from error
    return sorted(found, key=files.natural_order)


def generate(folder: Path, config: VideoConfig, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Write video_000.mp4, ... and their ground truth; finished videos of the same settings are left alone.

    Video i is drawn from the seed [video_seed, i], whatever n_videos is. Beside it, video_i.safetensors holds the
    trajectories (float64) and, as metadata, `settings` (JSON) and `source`. `progress(done, total)` is called after
    each video.

    Raises
    ------
    UsageError
        The configuration cannot be used.
    VideoError
        The folder holds videos that this configuration would not make, which would be mixed in.
    HJEPAError
        A file cannot be written.
    """
    radii = _check(config)
    folder = Path(folder)
    settings = dataclasses.asdict(config) | {"radius": radii.tolist()}
    del settings["n_videos"]  # does not change any one video
    label = json.dumps(settings, sort_keys=True)
    wanted = [folder / f"video_{index:03d}.mp4" for index in range(config.n_videos)]
    finished = _finished(folder, wanted, label)
    for index, path in enumerate(wanted):
        if path not in finished:
            trajectories = simulate(config, np.random.default_rng([config.video_seed, index]))
            data = _encode(path, render(trajectories, config), config.fps)
            if path.exists() and path.read_bytes() != data:
                raise _mixed(folder, f"{path.name} is without ground truth and not what these settings make")
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(data)
            # last: its presence says that the video is complete
            tensors = {name: torch.from_numpy(value) for name, value in vars(trajectories).items()}
            files.save_tensors(path.with_suffix(".safetensors"), tensors, {"settings": label, "source": SOURCE})
        if progress is not None:
            progress(index + 1, len(wanted))
    return wanted


def _finished(folder: Path, wanted: list[Path], label: str) -> set[Path]:
    """Videos that need no work; raises if the folder holds any that do not belong."""
    present = _list(folder) if folder.exists() else []
    if stale := [path.name for path in present if path not in set(wanted)]:
        raise _mixed(folder, f"{len(stale)} videos there are not among the {len(wanted)} asked for ({stale[0]})")
    found = {path: files.read_metadata(path.with_suffix(".safetensors")) for path in present}
    for path, metadata in found.items():
        if metadata is not None and metadata.get("settings") != label:
            raise _mixed(folder, f"{path.name} was generated with other settings")
    return {path for path, metadata in found.items() if metadata is not None}


def _mixed(folder: Path, reason: str) -> VideoError:
    return VideoError(f"cannot generate videos in {folder}: {reason}. Choose another folder, or delete this one")


def load_ground_truth(video_path: Path) -> Trajectories | None:
    """The trajectories beside a generated video, or None if there is no such file (a video of one's own).

    Raises
    ------
    HJEPAError
        The file is there and is not ground truth.
    """
    path = Path(video_path).with_suffix(".safetensors")
    if not path.exists():
        return None
    tensors, _ = files.load_tensors(path, "ground truth")
    names = [field.name for field in dataclasses.fields(Trajectories)]
    if missing := [name for name in names if name not in tensors]:
        raise VideoError(f"{path} is not the ground truth of a video: it has no {', '.join(missing)}")
    positions, velocities, radii = (tensors[name] for name in names)
    fits = positions.ndim == 3 and positions.shape[2] == 2 and velocities.shape == positions.shape
    if not fits or radii.shape != positions.shape[1:2] or not positions.numel():
        shapes = [list(tensors[name].shape) for name in names]
        raise VideoError(f"{path} is not the ground truth of a video: expected [T, n, 2], [T, n, 2], [n], found {shapes}")
    if not all(tensors[name].is_floating_point() and tensors[name].isfinite().all() for name in names):
        raise VideoError(f"{path} is not the ground truth of a video: its numbers must be finite floating-point ones")
    return Trajectories(**{name: tensors[name].numpy() for name in names})
