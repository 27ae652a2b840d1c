"""Frames of the smooth scenes, and the colours of all synthetic videos."""

from __future__ import annotations

import itertools

import numpy as np

from .scenes import Scene

CYAN, RED = (0, 255, 255), (255, 0, 0)
PALETTE = np.array([CYAN, RED, (255, 255, 0), (0, 255, 0), (255, 0, 255), (255, 128, 0), (255, 255, 255), (128, 128, 255)])
ROD = np.array([150, 150, 150])
ROD_WIDTH, PIVOT_RADIUS, WIRE_WIDTH, COIL_RADIUS = 0.02, 0.02, 0.01, 0.03
"""Shares of the frame's side."""
TURNS = 7
"""Of a spring, however long it is."""


def colour(ball: int) -> np.ndarray:
    """Of a ball, uint8 [3]; where there are more balls than colours, the next round is darker."""
    return (PALETTE[ball % len(PALETTE)] * 0.7 ** (ball // len(PALETTE))).astype(np.uint8)


def draw(scene: Scene, positions: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """Frames with smooth rims, uint8 [T, size, size, 3] RGB: rods and springs behind the balls.

    Parameters
    ----------
    positions : float64 [T, balls, 2]
        Centres of the balls in pixels, as `Scene.positions` gives them; a frame in which any is not finite has none.
    background : uint8 [size, size, 3], optional
        By default black.
    """
    if background is None:
        background = np.zeros((scene.size, scene.size, 3), dtype=np.uint8)
    frames = np.repeat(background[None], len(positions), axis=0)
    pivot = np.full(2, scene.middle)
    for frame, balls in zip(frames, positions, strict=True):
        if not np.isfinite(balls).all():
            continue
        if scene.name == "pendulum":
            _segment(frame, pivot, balls[0], ROD_WIDTH * scene.size / 2, ROD)
            _segment(frame, pivot, pivot, PIVOT_RADIUS * scene.size, ROD)
        if scene.name == "springs":
            for i, (start, end) in enumerate(itertools.pairwise(balls)):
                _spring(frame, start, end, scene.radii[i : i + 2], scene.size)
        for ball, (centre, radius) in enumerate(zip(balls, scene.radii, strict=True)):
            _segment(frame, centre, centre, radius, colour(ball))
    return frames


def _spring(frame: np.ndarray, start: np.ndarray, end: np.ndarray, radii: tuple[float, ...], size: int) -> None:
    """A zigzag from rim to rim."""
    distance = np.linalg.norm(end - start)
    if distance <= sum(radii):
        return
    along = (end - start) / distance
    start, end = start + radii[0] * along, end - radii[1] * along
    shares = np.concatenate([[0.0], (np.arange(2 * TURNS) + 0.5) / (2 * TURNS), [1.0]])[:, None]
    sides = np.concatenate([[0.0], np.resize([1.0, -1.0], 2 * TURNS), [0.0]])[:, None]
    corners = start + shares * (end - start) + COIL_RADIUS * size * sides * np.array([-along[1], along[0]])
    for first, second in itertools.pairwise(corners):
        _segment(frame, first, second, WIRE_WIDTH * size / 2, ROD)


def _segment(frame: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float, paint: np.ndarray) -> None:
    """All within `radius` of the line from start to end, a disc where they are one point; a pixel takes the share it covers."""
    most = frame.shape[1::-1]
    low = np.clip(np.floor(np.minimum(start, end) - radius - 1), 0, most).astype(int)
    high = np.clip(np.ceil(np.maximum(start, end) + radius + 2), 0, most).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]]
    along, offset = end - start, np.stack([x - start[0], y - start[1]], axis=-1)
    length = along @ along
    nearest = np.clip(offset @ along / length, 0, 1)[..., None] * along if length else 0.0
    share = np.clip(radius + 0.5 - np.linalg.norm(offset - nearest, axis=-1), 0, 1)[..., None]
    part = frame[low[1] : high[1], low[0] : high[0]]
    part[...] = np.rint(part + share * (paint - part.astype(float)))
