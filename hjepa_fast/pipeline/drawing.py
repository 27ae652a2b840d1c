"""Frames of the smooth scenes, and the colours of all synthetic videos."""

from __future__ import annotations

import itertools

import numpy as np

from .scenes import Scene

CYAN, RED = (0, 255, 255), (255, 0, 0)
PALETTE = np.array([CYAN, RED, (255, 255, 0), (0, 255, 0), (255, 0, 255), (255, 128, 0), (255, 255, 255), (128, 128, 255)])
ROD = np.array([150, 150, 150])
ROD_WIDTH, PIVOT_RADIUS = 0.02, 0.02
"""Shares of the frame's side."""


def colour(ball: int) -> np.ndarray:
    """Of a ball, uint8 [3]; where there are more balls than colours, the next round is darker."""
    return (PALETTE[ball % len(PALETTE)] * 0.7 ** (ball // len(PALETTE))).astype(np.uint8)


def draw(scene: Scene, positions: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Frames with smooth rims, uint8 [T, size, size, 3] RGB: rods and springs behind the balls.

    Parameters
    ----------
    positions : float64 [T, balls, 2]
        Centres of the balls in pixels, as `Scene.positions` gives them.
    background : uint8 [size, size, 3]
    """
    frames = np.repeat(background[None], len(positions), axis=0)
    width, pivot = ROD_WIDTH * scene.size, np.full(2, scene.middle)
    for frame, balls in zip(frames, positions, strict=True):
        if scene.name == "pendulum":
            _segment(frame, pivot, balls[0], width / 2, ROD)
            _segment(frame, pivot, pivot, PIVOT_RADIUS * scene.size, ROD)
        if scene.name == "springs":
            for start, end in itertools.pairwise(balls):
                _segment(frame, start, end, width / 2, ROD)
        for ball, (centre, radius) in enumerate(zip(balls, scene.radii, strict=True)):
            _segment(frame, centre, centre, radius, colour(ball))
    return frames


def _segment(frame: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float, paint: np.ndarray) -> None:
    """All within `radius` of the line from start to end, a disc where they are one point; a pixel takes the share it covers."""
    low = np.maximum(np.floor(np.minimum(start, end) - radius - 1).astype(int), 0)
    high = np.minimum(np.ceil(np.maximum(start, end) + radius + 2).astype(int), frame.shape[1::-1])
    if (low >= high).any():
        return
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]]
    along, offset = end - start, np.stack([x - start[0], y - start[1]], axis=-1)
    length = along @ along
    nearest = np.clip(offset @ along / length, 0, 1)[..., None] * along if length else 0.0
    share = np.clip(radius + 0.5 - np.linalg.norm(offset - nearest, axis=-1), 0, 1)[..., None]
    part = frame[low[1] : high[1], low[0] : high[0]]
    part[...] = np.rint(part + share * (paint - part.astype(float)))
