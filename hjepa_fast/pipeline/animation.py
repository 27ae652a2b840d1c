"""A dream in motion: predicted positions beside the true clip, as mp4 and GIF."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import files
from .plotting import PALETTE, SIZE, TRUE, own_style, titled
from .videos import write_video

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

SUFFIXES = (".mp4", ".gif")
"""Of the files that are written."""
SPEED = 8.0
"""Frames a second where it is not known how long a step is."""
DPI = 80
TRAIL = 12
"""Frames for which a body's path stays in sight."""


@dataclass(frozen=True)
class Motion:
    """What is to be seen, frame by frame.

    Attributes
    ----------
    predicted : float [n, bodies, 2], (x, y)
        Where the bodies are in the rollout.
    true : float [m, bodies, 2] or None
        Where they really are, for as many frames as are known.
    images : sequence of uint8 [H, W, 3]
        Those of the true clip, for as many as there are; of any size, they fill the frame.
    size : (float, float) or None
        Width and height of the frame in pixels; None where x and y are no pixels, but components of latents.
    radii : sequence of float
        Of the bodies in pixels; empty for points.
    title, about : str
        What is shown, and how it was made.
    predicted_title, true_title : str
        Of the two pictures.
    seconds : float or None
        That a step takes.
    every : int
        Steps from frame to frame.
    """

    predicted: np.ndarray
    true: np.ndarray | None
    images: Sequence[np.ndarray]
    size: tuple[float, float] | None
    radii: Sequence[float]
    title: str
    about: str
    predicted_title: str
    true_title: str
    seconds: float | None
    every: int = 1


def write(stem: Path, motion: Motion) -> list[Path]:
    """Write `stem`.mp4 and `stem`.gif, in the time that the motion takes; atomically.

    Raises
    ------
    MissingDependencyError
        PyAV or matplotlib is not installed.
    HJEPAError
        A file cannot be written.
    """
    frames = np.stack(list(render(motion)))
    seconds = motion.every * (motion.seconds or 1 / SPEED)
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in SUFFIXES]
    write_video(paths[0], frames, 1 / seconds)
    with files.atomic_path(paths[1]) as temporary:
        temporary.write_bytes(_gif(frames, seconds))
    return paths


def _gif(frames: np.ndarray, seconds: float) -> bytes:
    from PIL import Image  # matplotlib needs it as well

    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    buffer = io.BytesIO()
    # a GIF counts hundredths of a second, and players slow down what is shorter than two
    duration = max(20, round(100 * seconds) * 10)
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False)
    return buffer.getvalue()


@own_style
def render(motion: Motion) -> list[np.ndarray]:
    """The frames, uint8 [H, W, 3] of even height and width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = titled(motion.title, motion.about)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    left, right = figure.subplots(1, 2)
    for axis, title in ((left, motion.predicted_title), (right, motion.true_title)):
        if axis is left or not motion.images:
            _frame(axis, motion)
        axis.set_title(title)
    moving: list[_Bodies | _Clip] = [_Bodies(left, motion, motion.predicted), _Clip(right, motion)]
    if motion.true is not None:
        moving.append(_Bodies(left, motion, motion.true, rings=True))
        left.set_title(f"{motion.predicted_title} (rings: the truth)")
    clock = left.text(0.02, 0.02, "", transform=left.transAxes, fontsize=9, zorder=9)
    width, height = (round(side * DPI) // 2 * 2 for side in SIZE)
    frames: list[np.ndarray] = []
    for number in range(len(motion.predicted)):
        for part in moving:
            part.show(number)
        step, last = (motion.every * at for at in (number, len(motion.predicted) - 1))
        passed = "" if motion.seconds is None else f", {step * motion.seconds:.2f} s"
        clock.set_text(f"step {step} of {last}{passed}")
        canvas.draw()
        if not frames:
            figure.set_layout_engine("none")  # nothing moves from here on but the bodies
        frames.append(np.asarray(canvas.buffer_rgba())[:height, :width, :3].copy())
    return frames


def _frame(axis: Axes, motion: Motion) -> None:
    axis.set_aspect("equal")
    if motion.size is not None:
        width, height = motion.size
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xlabel="x (pixels)", ylabel="y (pixels)")
        return
    paths = [motion.predicted, *([] if motion.true is None else [motion.true])]
    points = np.concatenate([path.reshape(-1, 2) for path in paths])
    middle, half = (points.max(axis=0) + points.min(axis=0)) / 2, 0.55 * max(float(np.ptp(points, axis=0).max()), 1e-6)
    axis.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    axis.set(xlabel="first component (latent units)", ylabel="second component")


class _Bodies:
    """Discs or points with their recent paths, or rings without."""

    def __init__(self, axis: Axes, motion: Motion, path: np.ndarray, rings: bool = False) -> None:
        from matplotlib.patches import Circle

        self.path = path
        self.discs: list[Circle] = []
        self.trails: list[Line2D] = []
        reach = float(np.ptp(axis.get_xlim()))
        for body in range(path.shape[1]):
            color = TRUE if rings else PALETTE[body % len(PALETTE)]
            radius = motion.radii[body] if body < len(motion.radii) else reach / 80
            looks: dict[str, Any] = {"fill": False, "lw": 1.2, "ls": "--"} if rings else {"alpha": 0.85}
            disc = Circle((0.0, 0.0), radius, color=color, **looks)
            axis.add_patch(disc)
            self.discs.append(disc)
            self.trails.append(axis.plot([], [], "-", color=color, lw=0 if rings else 1.2, alpha=0.6)[0])

    def show(self, number: int) -> None:
        """What is past the end is not shown."""
        there = number < len(self.path)
        for body, (disc, trail) in enumerate(zip(self.discs, self.trails, strict=True)):
            past = self.path[max(0, number - TRAIL) : number + 1, body] if there else np.empty((0, 2))
            disc.set_visible(there and bool(np.isfinite(self.path[number, body]).all()))
            if disc.get_visible():
                disc.set_center(self.path[number, body])
            trail.set_data(*past.T)


class _Clip:
    """The true clip: its frames, or else its bodies; and a word where it has ended."""

    def __init__(self, axis: Axes, motion: Motion) -> None:
        self.motion = motion
        self.image: Any = None
        if motion.images:
            width, height = motion.size or motion.images[0].shape[1::-1]
            self.image = axis.imshow(motion.images[0], extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            axis.set(xlabel="x (pixels)", ylabel="y (pixels)")
        self.bodies = _Bodies(axis, motion, motion.true) if motion.true is not None and not motion.images else None
        self.word = axis.text(0.5, 0.5, "", transform=axis.transAxes, ha="center", va="center", fontsize=9, zorder=9)
        self.length = len(motion.images) or (0 if motion.true is None else len(motion.true))

    def show(self, number: int) -> None:
        over = number >= self.length
        if self.image is not None:
            self.image.set_visible(not over)
            if not over:
                self.image.set_data(self.motion.images[number])
        if self.bodies is not None:
            self.bodies.show(number)
        self.word.set_text("" if not over else "the clip has ended" if self.length else "not known")
