"""Videos: synthetic ones with their ground truth, colliding balls and the smooth scenes, and reading anybody's videos."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MissingDependencyError, UsageError, VideoError
from . import controls, drawing, files, scenes, untrusted
from .config import VideoConfig
from .scenes import Scene

USUAL_SUFFIXES = (".mp4", ".avi", ".mov")
SUFFIXES = (
    *USUAL_SUFFIXES, ".m4v", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"
)  # fmt: skip
OTHER_SUFFIXES = (
    ".gif", ".apng", ".webp", ".m3u8", ".mpd", ".h264", ".264", ".h265", ".hevc", ".asf", ".f4v", ".3g2", ".divx", ".dv",
    ".mj2", ".mjpeg", ".mxf", ".ogg", ".rm", ".rmvb", ".vob", ".y4m",
)  # fmt: skip
"""Files that hold pictures in motion, or lists of such files, and that `find_videos` leaves out."""
FORMATS = (
    "mov,mp4,avi,matroska,webm,mpegts,mpeg,asf,flv,live_flv,ogg,gif,apng,mxf,dv,rm,nut,ivf,yuv4mpegpipe,"
    "h264,hevc,m4v,mpegvideo,mjpeg,av1,obu,vvc"
)
"""Containers as FFmpeg names them. None of them can make it read another file, as playlists can."""
MAX_PIXELS = 2**27
"""Pixels of the largest frame that is decoded: 16384 x 8192, 400 MB as RGB."""
ATTACHED_PICTURE = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
PQ, HLG = 16, 18  # FFmpeg's AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67
MOST_BYTES = 2**34
"""Of the frames of a synthetic video, which is made in memory."""
SOURCE = "synthetic: bouncing balls"
TRUTH = ("positions", "velocities", "radii")
"""What is written of a video's `Trajectories` beside it."""
STATE = ("q", "p")
"""What is written besides of a smooth scene."""
TOUCHING = 1e-9  # overlap in pixels that counts as none; halving at a wall gets below it in 35 passes
PASSES = 100
LEAST_DRAG = 1e-6  # below it, the share of a force that drag leaves is lost in rounding
LAYOUTS, TRIES = 20, 500


@dataclass(frozen=True)
class Trajectories:
    """Motion of the balls; x grows to the right, y down, and pixel (0, 0) has its centre at the origin.

    Of a smooth scene they are what the canonical state looks like; the pendulum's one ball is its bob.

    Attributes
    ----------
    positions : float64 [T, balls, 2], (x, y) in pixels
    velocities : float64 [T, balls, 2], pixels per frame
    radii : float64 [balls], pixels
    force : float64 [T, m] or None
        What pushes, held from each frame to the next, in the units of `scenes.PUSHES`. None where there is none, and of a
        video that was read back, whose control file has it (`controls`).
    q, p : float64 [T, n] or None
        Canonical coordinates and momenta of a smooth scene, in the units of `scene`.
    scene : Scene or None
        None of collisions.
    """

    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray
    force: np.ndarray | None = None
    q: np.ndarray | None = None
    p: np.ndarray | None = None
    scene: Scene | None = None


@dataclass(frozen=True)
class Video:
    """Decoded frames, uint8 [T, H, W, 3] RGB; `fps` is the average frame rate."""

    frames: np.ndarray
    fps: float
    path: Path


def simulate(config: VideoConfig, rng: np.random.Generator) -> Trajectories:
    """The motion of one video: of a smooth scene as `scenes` says, or of balls in a box.

    In the box: collisions (mass ~ radius^2), overlap split evenly, walls reflect.

    Two equal balls start as published, scaled to the frame: (64, 128) moving right and (192, 128) moving left of 256,
    horizontal speeds 2 + U(0, 1), vertical U(-1, 1). Any others start at random places without overlap, with speed
    2 + U(0, 1) in a random direction. Frame 0 is the initial state.

    From each frame to the next the balls fly by v' = f - drag v, which is solved exactly, with a force per mass f that is the
    same for every ball, as if the box was tilted: its size is `force`, its direction is drawn anew every `force_frames` frames.
    Then they collide: the normal speed after a collision is `restitution` times that before it, so that a ball of mass m loses
    (1 - e^2) m v_n^2 / 2 at a wall, and a pair of reduced mass mu loses (1 - e^2) mu v_n^2 / 2.

    Raises
    ------
    UsageError
        The configuration cannot be used, or the balls do not fit in the box.
    """
    radii = _check(config)
    if (scene := scenes.of(config)) is not None:
        return _move(scene, config, rng)
    positions = np.empty((config.n_frames, len(radii), 2))
    velocities = np.empty_like(positions)
    if _published_start(radii):
        position = np.array([[64.0, 128.0], [192.0, 128.0]]) * (config.size / 256)
        velocity = np.array([[2 + rng.random(), rng.uniform(-1, 1)], [-2 - rng.random(), rng.uniform(-1, 1)]])
    else:
        position = _place(radii, config.size, rng)
        speed, angle = 2 + rng.random(len(radii)), rng.uniform(0, 2 * math.pi, len(radii))
        velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    force = _draw_force(config, rng) if config.force else None
    for frame in range(config.n_frames):
        if frame:
            _fly(position, velocity, None if force is None else force[frame - 1], config.drag)
            _reflect(position, velocity, radii, config.size, config.restitution)
            for _ in range(PASSES):  # pushing balls apart can push them into a wall or a third ball
                if not _collide(position, velocity, radii, config.restitution):
                    break
                _reflect(position, velocity, radii, config.size, config.restitution)
        positions[frame], velocities[frame] = position, velocity
    return Trajectories(positions, velocities, radii, force)


def _move(scene: Scene, config: VideoConfig, rng: np.random.Generator) -> Trajectories:
    """A random motion of a smooth scene; the pendulum's torque is the horizontal part of a force of random direction."""
    push = _draw_force(config, rng)[:, : scene.push_dim] * (scene.push / config.force) if config.force else None
    q, p = scene.draw(rng, config.n_frames, push)
    return Trajectories(scene.positions(q), scene.velocities(q, p), np.array(scene.radii), push, q, p, scene)


def _check(config: VideoConfig) -> np.ndarray:
    """Refuse what cannot be simulated; return one radius per ball."""
    for name, least in (
        ("n_videos", 1), ("n_frames", 1), ("n_balls", 1), ("fps", 1), ("video_seed", 0), ("restitution", 0), ("drag", 0),
        ("force", 0), ("force_frames", 1),
    ):  # fmt: skip
        value = getattr(config, name)
        if not value >= least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
    if not config.restitution <= 1:
        raise UsageError(f"restitution is {config.restitution}, expected at most 1: collisions make no energy")
    if 0 < config.drag < LEAST_DRAG:
        raise UsageError(f"drag is {config.drag}, expected 0 or at least {LEAST_DRAG}")
    scene = scenes.of(config)
    if scene is None and len(config.radius) not in (1, config.n_balls):
        raise UsageError(f"radius has {len(config.radius)} values, expected 1 or one per ball (n_balls is {config.n_balls})")
    if config.background not in ("black", "gradient"):
        raise UsageError(f"background is {config.background!r}, expected 'black' or 'gradient'")
    n_balls = config.n_balls if scene is None else len(scene.radii)
    radii = np.broadcast_to(np.asarray(config.radius, dtype=np.float64), (n_balls,)).copy()
    if not (np.isfinite(radii).all() and (radii >= 1).all()):
        raise UsageError(f"radius is {_text(config.radius)}, expected at least 1 pixel")
    # the published start needs the balls clear of the walls and of each other at a quarter and three quarters of the box
    least = math.ceil(4 * radii.max() if scene is None and _published_start(radii) else 2 * radii.max() + 2)
    if config.size % 2 or config.size < least:
        raise UsageError(
            f"size is {config.size}, expected an even number of at least {least + least % 2} "
            f"for {n_balls} ball(s) of radius {_text(config.radius)}"
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


def _draw_force(config: VideoConfig, rng: np.random.Generator) -> np.ndarray:
    """[n_frames, 2], of the size `force`, each direction held for `force_frames` frames."""
    angle = rng.uniform(0, 2 * math.pi, -(-config.n_frames // config.force_frames))
    force = config.force * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.repeat(force, config.force_frames, axis=0)[: config.n_frames]


def _fly(position: np.ndarray, velocity: np.ndarray, force: np.ndarray | None, drag: float) -> None:
    """One frame of v' = force - drag v."""
    push = np.zeros(2) if force is None else force
    # of a velocity, and of a force's impulse, after one frame: (1 - exp(-drag)) / drag and its mean over the frame's rest
    moved = -math.expm1(-drag) / drag if drag else 1.0
    pushed = (1 - moved) / drag if drag else 0.5
    position += velocity * moved + push * pushed
    velocity[...] = velocity * math.exp(-drag) + push * moved


def _reflect(position: np.ndarray, velocity: np.ndarray, radii: np.ndarray, size: int, restitution: float = 1.0) -> None:
    low, high = radii[:, None], size - radii[:, None]
    outward = ((position < low) & (velocity < 0)) | ((position > high) & (velocity > 0))
    velocity[...] = np.where(outward, -restitution * velocity, velocity)
    np.clip(position, low, high, out=position)


def _collide(position: np.ndarray, velocity: np.ndarray, radii: np.ndarray, restitution: float = 1.0) -> bool:
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
            if approach > 0:  # equal masses and no loss: an exchange of the normal velocities
                share = (1 + restitution) * approach / (mass[i] + mass[j])
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
    """Filled discs on the background, uint8 [T, size, size, 3] RGB: ball 1 cyan, ball 2 red, then other colours.

    A smooth scene's discs have smooth rims, and rods and springs are drawn, see `drawing`.
    """
    if trajectories.scene is not None:
        return drawing.draw(trajectories.scene, trajectories.positions, background(config))
    frames = np.repeat(background(config)[None], len(trajectories.positions), axis=0)
    y, x = np.ogrid[: config.size, : config.size]
    for ball, radius in enumerate(trajectories.radii):
        colour = drawing.colour(ball)
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
    """Decode a whole video of any size and rate; `VideoReader` says what is read, how, and what is refused.

    `each`, if given, is applied to every frame [H, W, 3] as it is decoded, so that full-size frames need not be kept.

    Warns
    -----
    UserWarning
        For each of the reader's `notes`.

    Raises
    ------
    VideoError
        As `VideoReader`.
    """
    reader = VideoReader(path)
    frames = [image if each is None else each(image) for image in reader]
    for note in reader.notes:
        warnings.warn(note, stacklevel=2)
    return Video(np.stack(frames), reader.fps, reader.path)


def middle_frame(path: Path) -> np.ndarray:
    """The frame in the middle of a video, as its declared length says, uint8 [H, W, 3]; errors as `VideoReader`."""
    reader = VideoReader(path)
    for image in reader:  # noqa: B007
        if reader.n_frames > reader.expected // 2:
            break
    return image


class VideoReader:
    """The frames of a video, uint8 [H, W, 3] RGB, decoded one after the other while it is iterated over, once.

    Frames look as players show them: turned and mirrored as the display matrix says (phones and front cameras write
    one), and with square pixels (the shorter side of each pixel is stretched, unless that is less than 1 %).
    Frames that an edit list hides are left out. Containers that declare neither a number of frames nor a duration
    (ts, mpg, ogv, wmv, flv with sound, and what was never finished) cannot be checked for missing frames.

    Attributes
    ----------
    path : Path
    n_frames : int
        Frames decoded so far.
    expected : int
        Frames that the file declares or that its duration suggests; 0 before the first frame, and if nothing is known.
    fps : float
        Average frame rate; 0.0 until the last frame has been decoded.
    notes : list of str
        What a user should know of a video that was read: several video streams, a variable frame rate, interlaced or
        HDR frames. Complete after the last frame.
    altered : bool
        Whether any frame so far was mirrored or stretched, which is more than turning it.

    Raises
    ------
    VideoError
        On iteration: the file is missing, empty, not a regular file, not a video (a playlist, say), or without a video
        stream (a cover picture is none); frames are larger than MAX_PIXELS or transparent; its frame size changes, or
        its display matrix is no turn or mirror. After the last frame: the video is cut short, damaged, or without a rate.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.n_frames = self.expected = 0
        self.fps = 0.0
        self.notes: list[str] = []
        self.altered = False

    def __iter__(self) -> Iterator[np.ndarray]:
        av = _av()
        check_regular(self.path)
        shape: tuple[int, ...] | None = None
        damaged = interlaced = uneven = 0
        time: float | None = None
        step = 0.0
        hdr = unread_matrix = False
        with self._readable_errors(av):
            if self.path.stat().st_size == 0:
                raise VideoError(f"video is empty (0 bytes): {self.path}")
            options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
            # an absolute path cannot be taken for a URL; `options` would crash PyAV 12 where a header lists no streams
            with av.open(str(self.path.absolute()), container_options=options, metadata_errors="replace") as container:
                stream = self._stream(container)
                self._check_size(stream.codec_context.width or 0, stream.codec_context.height or 0)
                stream.codec_context.options = {"max_pixels": str(2 * MAX_PIXELS)}  # FFmpeg counts its margins
                rate = float(stream.average_rate or stream.guessed_rate or 0)
                seconds = _announced_seconds(container, stream)
                self.expected = _declared(container, stream) or round(seconds * rate)
                for frame in container.decode(stream):
                    self._check_size(*_square(stream, frame))
                    matrix = _display_matrix(frame)
                    unread_matrix |= matrix is None
                    image = self._oriented(self._image(stream, frame), matrix, frame)
                    if shape is not None and shape != image.shape:
                        sizes = " and ".join(f"{size[1]} x {size[0]}" for size in sorted([shape, image.shape]))
                        raise VideoError(f"{self.path} changes its frame size: {sizes}")
                    shape = image.shape
                    self.n_frames += 1
                    damaged += frame.is_corrupt
                    interlaced += frame.interlaced_frame
                    hdr |= getattr(frame, "color_trc", None) in (PQ, HLG)
                    # an avi tells no times, and what stands in for them is not in order where frames are not
                    if time is not None and frame.time is not None and container.format.name != "avi":
                        step = max(step, frame.time - time)
                        uneven += not 0.5 < (frame.time - time) * rate < 1.5
                    time = frame.time
                    yield image
                declared = _declared(container, stream)
                rate = float(stream.average_rate or stream.guessed_rate or 0)
        self._check_end(declared, damaged, rate)
        if seconds and time is not None and seconds - time > 1.5 * max(step, 1 / rate):
            raise VideoError(
                f"{self.path} is truncated: it declares {seconds:.3g} s and its last frame is shown at {time:.3g} s. "
                "Copy it again, or export it again"
            )
        if uneven:
            self.notes.append(
                f"{self.path} has a variable frame rate: {uneven} of {self.n_frames - 1} intervals are far from the mean of "
                f"{1000 / rate:.3g} ms. Clips count frames, not time; export it at a constant frame rate"
            )
        if interlaced:
            self.notes.append(f"{self.path} is interlaced: rows of {interlaced} frames are of two moments. Deinterlace it")
        if hdr:
            self.notes.append(f"{self.path} is HDR video: its colours are taken as they are, paler than players show them")
        if unread_matrix:
            self.notes.append(
                f"{self.path}: this version of PyAV cannot read its display matrix; frames are taken as upright. "
                "A newer version may read it"
            )
        self.fps = rate

    @contextlib.contextmanager
    def _readable_errors(self, av: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VideoError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (av.error.FFmpegError, IndexError) as error:
            raise VideoError(
                f"cannot read {self.path}: not a video, cut short, or with frames of more than {MAX_PIXELS} pixels ({error})"
            ) from error

    def _stream(self, container: Any) -> Any:
        streams = [stream for stream in container.streams.video if not _is_cover(container, stream)]
        if not streams:
            covers = ", only a cover picture" if container.streams.video else ""
            raise VideoError(f"no video stream in {self.path}{covers}")
        best = container.streams.best("video") if hasattr(container.streams, "best") else None
        chosen = next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])
        if chosen.codec_context is None:
            raise VideoError(f"no decoder here for the video stream of {self.path}")
        if len(streams) > 1:
            self.notes.append(f"{self.path} has {len(streams)} video streams: only stream {chosen.index} is read")
        return chosen

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise VideoError(f"{self.path} has frames of {width} x {height}, expected at most {MAX_PIXELS} pixels")

    def _image(self, stream: Any, frame: Any) -> np.ndarray:
        width, height = _square(stream, frame)
        if any(component.is_alpha for component in frame.format.components):
            alpha = frame.to_ndarray(format="rgba")[..., 3]
            if (alpha != 255).any():
                raise VideoError(
                    f"{self.path} has transparent pixels, and nothing says what is behind them. Export it without transparency"
                )
        if (width, height) == (frame.width, frame.height):
            return frame.to_ndarray(format="rgb24")
        self.altered = True
        return frame.to_ndarray(format="rgb24", width=width, height=height)

    def _oriented(self, image: np.ndarray, matrix: tuple[int, ...] | None, frame: Any) -> np.ndarray:
        """`image` as the display matrix maps it: (x, y) to (a x + c y, b x + d y), x to the right and y down."""
        if matrix is None:
            if frame.rotation:
                raise VideoError(
                    f"{self.path} is turned or mirrored, and this version of PyAV cannot read its display matrix. "
                    "Install a newer version, or export the video again"
                )
            return image
        fixed = [value / 2**16 for value in matrix]
        a, b, c, d = (round(fixed[i]) for i in (0, 1, 3, 4))
        exact = all(abs(fixed[i] - value) < 1e-3 for i, value in ((0, a), (1, b), (3, c), (4, d)))
        # u, v and w are 2.30 fixed point; the place x, y on a screen does not matter
        flat = matrix[2] == matrix[5] == 0 and matrix[8] == 2**30
        if not (exact and flat and sorted((abs(a), abs(b))) == [0, 1] and abs(d) == abs(a) and abs(c) == abs(b)):
            values = ", ".join(f"{fixed[i]:.4g}" for i in (0, 1, 3, 4))
            raise VideoError(
                f"{self.path} is to be shown through the matrix [{values}; {matrix[2]}, {matrix[5]}, {matrix[8]}]: "
                "expected a turn by a multiple of 90 degrees, a mirror, or both. Export it again without it"
            )
        self.altered |= a * d < b * c
        if b:
            image, a, d = image.swapaxes(0, 1), c, b
        return np.ascontiguousarray(image[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])

    def _check_end(self, declared: int, damaged: int, rate: float) -> None:
        if not self.n_frames or (declared and self.n_frames != declared):
            raise VideoError(
                f"{self.path} is truncated or skips frames: it declares {declared} frames and {self.n_frames} can be decoded. "
                "Copy it again, or export it again at a constant frame rate"
            )
        if damaged:
            raise VideoError(
                f"{self.path} is damaged: {damaged} of {self.n_frames} frames are corrupt. Copy or export it again"
            )
        if not rate > 0:
            raise VideoError(f"{self.path} declares no frame rate. Export it again at a constant frame rate")


def check_regular(path: Path) -> None:
    """VideoError unless `path` is a file, or a link to one: reading a pipe or a device might never end."""
    try:
        path.stat()
    except FileNotFoundError as error:
        raise VideoError(f"video not found: {path}") from error
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror or error}") from error
    if not path.is_file():
        raise VideoError(f"cannot read {path}: it is a {'directory' if path.is_dir() else 'device or pipe'}, not a file")


def _is_cover(container: Any, stream: Any) -> bool:
    disposition = getattr(stream, "disposition", None)
    if disposition is not None:
        return bool(getattr(disposition, "value", disposition) & ATTACHED_PICTURE)  # PyAV 17 has a flag that is no int
    # PyAV 12 does not tell: next to sound, a stream of still pictures is a cover
    return bool(container.streams.audio) and stream.name in ("mjpeg", "png", "bmp", "gif", "webp")


def _declared(container: Any, stream: Any) -> int:
    """How many frames the container says it has; 0 if it does not."""
    if "mp4" in container.format.name.split(","):
        # the sample table counts what an edit list hides; its index says which frames are shown
        entries = getattr(stream, "index_entries", None)
        if entries is not None:
            return sum(not entry.is_discard for entry in entries)
    return int(stream.frames)


def _announced_seconds(container: Any, stream: Any) -> float:
    """When the last frame ends, as the container's header says; 0 if it does not."""
    if not {"matroska", "flv"} & set(container.format.name.split(",")):
        return 0.0  # counted frames are better, and FFmpeg's other durations are of what is there
    if tag := re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", "")):
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    # the container's own duration is that of its longest stream
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _square(stream: Any, frame: Any) -> tuple[int, int]:
    """Width and height of a frame after its pixels have been made square, none lost."""
    aspect = stream.sample_aspect_ratio or 1
    if aspect <= 0 or abs(math.log(aspect)) < 0.01:
        return frame.width, frame.height
    return max(frame.width, round(frame.width * aspect)), max(frame.height, round(frame.height / aspect))


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The nine numbers of the display matrix that comes with a frame; None if they cannot be read."""
    from av.sidedata import sidedata

    container: Any = sidedata.SideDataContainer
    try:
        # frame.side_data would be a cycle of references, and keep frames until the garbage collector runs
        data = container(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not list side data if it lacks a name for any of it
        return None
    if data is None:
        return 2**16, 0, 0, 0, 2**16, 0, 0, 0, 2**30
    return struct.unpack("=9i", bytes(data))


def find_videos(folder: Path) -> list[Path]:
    """Videos directly in `folder`, video_2 before video_10; unfinished files are ignored.

    Hidden files, what is no file, and what looks like a video and is not read (gif, playlists, raw streams) are left
    out, with a warning that names them. So is an mkv beside an mp4 of the same name (recorders write both), and other
    such pairs.

    Raises
    ------
    VideoError
        The folder is missing, is a file, cannot be listed, or has no video.
    """
    folder = Path(folder)
    if not folder.exists():
        raise VideoError(f"video folder not found: {folder}")
    videos, left_out = _list(folder)
    if left_out:
        warnings.warn(f"left out of {folder}: " + "; ".join(left_out), stacklevel=2)
    if not videos:
        raise VideoError(f"no videos in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return videos


def _list(folder: Path) -> tuple[list[Path], list[str]]:
    """The videos of a folder, and what was left out and why."""
    found, left_out = [], {}
    try:
        entries = sorted(folder.iterdir(), key=files.natural_order)
        usual = {p.stem for p in entries if p.suffix.lower() in USUAL_SUFFIXES and not p.name.startswith(".") and p.is_file()}
        for path in entries:
            suffix = path.suffix.lower()
            if path.name.startswith((files.PARTIAL, "._")) or suffix not in SUFFIXES + OTHER_SUFFIXES:
                continue  # macOS writes ._NAME beside each NAME on foreign disks
            if path.name.startswith("."):
                left_out[path.name] = "hidden"
            elif not path.is_file():
                left_out[path.name] = "not a file"
            elif suffix in OTHER_SUFFIXES:
                left_out[path.name] = f"{suffix} is not read, convert it to mp4"
            elif suffix not in USUAL_SUFFIXES and path.stem in usual:
                left_out[path.name] = "another video has its name"
            else:
                found.append(path)
    except NotADirectoryError as error:
        raise VideoError(f"expected a folder of videos, found a file: {folder}") from error
    except OSError as error:
        raise VideoError(f"cannot list {folder}: {error.strerror}") from error
    reasons = {reason: [repr(name)[1:-1] for name in left_out if left_out[name] == reason] for reason in left_out.values()}
    return found, [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({reason})"
        for reason, names in reasons.items()
    ]


def generate(folder: Path, config: VideoConfig, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Write video_000.mp4, ... and their ground truth; finished videos of the same settings are left alone.

    Video i is drawn from the seed [video_seed, i], whatever n_videos is. Beside it, video_i.safetensors holds the
    trajectories (float64), of a smooth scene with q and p, and, as metadata, `settings` (JSON; their `scene` has all constants
    of a smooth one) and `source`; with a force, video_i.control.json holds that (see `controls`).
    `progress(done, total)` is called after each video.

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
    label, source = _label(config, radii), SOURCE if config.scene == "collisions" else f"synthetic: {config.scene}"
    wanted = [folder / f"video_{index:03d}.mp4" for index in range(config.n_videos)]
    finished = _finished(folder, wanted, label)
    if config.force:
        finished = {path for path in finished if controls.path_of(path).exists()}
    for index, path in enumerate(wanted):
        if path not in finished:
            trajectories = simulate(config, np.random.default_rng([config.video_seed, index]))
            data = _encode(path, render(trajectories, config), config.fps)
            if path.exists() and path.read_bytes() != data:
                raise _mixed(folder, f"{path.name} is without ground truth and not what these settings make")
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(data)
            if trajectories.force is not None:
                force = torch.from_numpy(trajectories.force)
                controls.write(controls.path_of(path), force, scenes.PUSHES[force.shape[1]])
            # last: its presence says that the video is complete
            written = TRUTH if trajectories.scene is None else TRUTH + STATE
            tensors = {name: torch.from_numpy(getattr(trajectories, name)) for name in written}
            files.save_tensors(path.with_suffix(".safetensors"), tensors, {"settings": label, "source": source})
        if progress is not None:
            progress(index + 1, len(wanted))
    return wanted


def _label(config: VideoConfig, radii: np.ndarray) -> str:
    """The settings that make a video, as text."""
    settings = dataclasses.asdict(config) | {"radius": radii.tolist()}
    del settings["n_videos"]  # does not change any one video
    for field in dataclasses.fields(config):  # a world without losses and forces is what older versions knew
        if field.name in ("restitution", "drag", "force") and settings[field.name] == field.default:
            del settings[field.name]
    if not config.force:
        del settings["force_frames"]
    del settings["scene"]
    if (scene := scenes.of(config)) is not None:
        settings |= {"scene": scene.to_dict(), "n_balls": len(radii)}
    return json.dumps(settings, sort_keys=True)


def _finished(folder: Path, wanted: list[Path], label: str) -> set[Path]:
    """Videos that need no work; raises if the folder holds any that do not belong."""
    present = _list(folder)[0] if folder.exists() else []
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
    tensors, metadata = files.load_tensors(path, "ground truth")
    if missing := [name for name in TRUTH if name not in tensors]:
        raise VideoError(f"{path} is not the ground truth of a video: it has no {', '.join(missing)}")
    positions, velocities, radii = (tensors[name] for name in TRUTH)
    fits = positions.ndim == 3 and positions.shape[2] == 2 and velocities.shape == positions.shape
    if not fits or radii.shape != positions.shape[1:2] or not positions.numel():
        shapes = [list(tensors[name].shape) for name in TRUTH]
        raise VideoError(f"{path} is not the ground truth of a video: expected [T, n, 2], [T, n, 2], [n], found {shapes}")
    if not all(tensors[name].is_floating_point() and tensors[name].isfinite().all() for name in TRUTH):
        raise VideoError(f"{path} is not the ground truth of a video: its numbers must be finite floating-point ones")
    found: dict[str, Any] = {name: tensors[name].numpy() for name in TRUTH}
    settings = _settings(metadata, path) if any(name in tensors for name in STATE) else {}
    return Trajectories(**found, **(_state(tensors, settings.get("scene"), found, path) if settings else {}))


def read_settings(video_path: Path) -> dict[str, Any]:
    """The settings that a generated video was made with, of which `size` and `fps` are checked.

    Raises
    ------
    HJEPAError
        There is no ground truth beside the video, or it has no such settings.
    """
    path = Path(video_path).with_suffix(".safetensors")
    return _settings(files.read_metadata(path) or {}, path)


def _settings(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    from . import schemas

    settings = untrusted.parse_json(metadata.get("settings", "null"), f"{path}: settings")
    return schemas.check(schemas.VideoSettings, settings, f"{path}: settings", VideoError)


def _state(tensors: dict[str, torch.Tensor], scene: Any, found: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """The canonical state in a file of ground truth, which must be what its positions and velocities show."""
    known = scenes.read(scene, str(path), VideoError)
    frames = len(found["positions"])
    for name in STATE:
        x = tensors.get(name)
        if x is None or x.dtype != torch.float64 or x.shape != (frames, known.n) or not x.isfinite().all():
            what = "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
            raise VideoError(f"{path}: expected {name} of {known.name}, finite float64 [{frames}, {known.n}], found {what}")
    q, p = (tensors[name].numpy() for name in STATE)
    same = found["radii"].tolist() == list(known.radii)
    if not same or any(
        found[name].shape != shown.shape or np.abs(found[name] - shown).max() > 1e-6 * known.size
        for name, shown in (("positions", known.positions(q)), ("velocities", known.velocities(q, p)))
    ):
        raise VideoError(f"{path}: q and p are not the states of scene {known.name} that its positions and velocities show")
    return {"q": q, "p": p, "scene": known}
