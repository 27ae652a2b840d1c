from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from hjepa_fast.errors import HJEPAError, MissingDependencyError, UsageError, VideoError
from hjepa_fast.pipeline import controls, files, videos
from hjepa_fast.pipeline.config import VideoConfig

av = pytest.importorskip("av", reason="the extra dev, which brings av, is not installed")

SMALL = VideoConfig(n_videos=3, n_frames=12, size=96, radius=(10.0,), fps=25, video_seed=7)
MIXED = VideoConfig(n_frames=250, n_balls=4, radius=(12.0, 18.0, 24.0, 10.0), size=320)
SEEDS = st.integers(0, 2**32 - 1)


def simulated(config: VideoConfig, seed: int = 0) -> videos.Trajectories:
    return videos.simulate(config, np.random.default_rng(seed))


def pair_gaps(trajectories: videos.Trajectories) -> np.ndarray:
    """Distance between the rims of each pair, [T, pairs]."""
    i, j = np.triu_indices(len(trajectories.radii), 1)
    distance = np.linalg.norm(trajectories.positions[:, i] - trajectories.positions[:, j], axis=2)
    return distance - trajectories.radii[i] - trajectories.radii[j]


def moving_square(n_frames: int, height: int, width: int) -> np.ndarray:
    frames = np.full((n_frames, height, width, 3), 40, dtype=np.uint8)
    for t in range(n_frames):
        frames[t, 8:24, t : t + 16] = (250, 250, 250)
    return frames


def noise(n_frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n_frames, height, width, 3), dtype=np.uint8)


def contents(folder: Path) -> dict[str, object]:
    """Every file by name; of safetensors the values, since their metadata has no fixed order."""
    return {
        path.name: path.read_bytes()
        if path.suffix != ".safetensors"
        else ({name: t.numpy().tobytes() for name, t in files.load_tensors(path, "")[0].items()}, files.read_metadata(path))
        for path in folder.iterdir()
    }


def encode(
    path: Path, frames: np.ndarray, codec: str, pixels: str = "yuv420p", container_options: dict[str, str] | None = None
) -> None:
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# motion


def test_published_start() -> None:
    for seed in range(20):
        first = simulated(VideoConfig(), seed)
        assert first.positions.shape == first.velocities.shape == (150, 2, 2)
        assert first.positions.dtype == first.velocities.dtype == first.radii.dtype == np.float64
        np.testing.assert_array_equal(first.positions[0], [[64, 128], [192, 128]])
        np.testing.assert_array_equal(first.radii, [20, 20])
        (vx1, vy1), (vx2, vy2) = first.velocities[0]
        assert 2 <= vx1 <= 3
        assert -3 <= vx2 <= -2
        assert abs(vy1) <= 1
        assert abs(vy2) <= 1
    starts = np.array([simulated(dataclasses.replace(VideoConfig(), n_frames=1), s).velocities[0] for s in range(200)])
    # uniform draws have mean 2.5 (or 0) and variance 1/12 (or 1/3); four standard errors of 200 draws
    np.testing.assert_allclose(starts.mean(0)[:, 0], [2.5, -2.5], atol=4 * np.sqrt(1 / 12 / 200))
    np.testing.assert_allclose(starts.mean(0)[:, 1], 0, atol=4 * np.sqrt(1 / 3 / 200))


def test_start_scales_with_the_frame() -> None:
    half = simulated(VideoConfig(size=128, radius=(10.0,)))
    np.testing.assert_array_equal(half.positions[0], [[32, 64], [96, 64]])


@pytest.mark.parametrize(
    "config", [VideoConfig(n_frames=400), MIXED, VideoConfig(n_balls=1), VideoConfig(n_balls=9, radius=(14.0,))]
)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_conservation_walls_and_overlap(config: VideoConfig, seed: int) -> None:
    run = simulated(config, seed)
    mass = run.radii**2
    kinetic = 0.5 * (mass[:, None] * run.velocities**2).sum((1, 2))
    np.testing.assert_allclose(kinetic, kinetic[0], rtol=1e-10)

    assert (run.positions >= run.radii[:, None]).all()
    assert (run.positions <= config.size - run.radii[:, None]).all()
    assert pair_gaps(run).min(initial=np.inf) > -1e-6

    # no ball met a wall in a step that ends further from every wall than twice the fastest ball's move (pushes included)
    margin = np.minimum(run.positions, config.size - run.positions) - run.radii[:, None]
    reach = 2 * np.linalg.norm(run.velocities, axis=2).max()
    free = margin[1:].min((1, 2)) > reach
    momentum = (mass[:, None] * run.velocities).sum(1)
    np.testing.assert_allclose(momentum[1:][free], momentum[:-1][free], atol=1e-9 * mass.sum())

    # balls clear of everything move uniformly
    clear = free & (pair_gaps(run)[:-1].min(1, initial=np.inf) > reach)
    np.testing.assert_array_equal(run.velocities[1:][clear], run.velocities[:-1][clear])
    np.testing.assert_allclose((run.positions[1:] - run.positions[:-1])[clear], run.velocities[:-1][clear], atol=1e-12)


def test_published_collision_exchanges_normal_velocities() -> None:
    run = simulated(VideoConfig(n_frames=40))
    change = np.flatnonzero((run.velocities[1:] != run.velocities[:-1]).any((1, 2)))
    hit = change[0] + 1
    # before anything else the balls close 128 - 40 px at 4 to 6 px per frame
    assert 88 / 6 <= hit <= 88 / 4 + 2
    before, after = run.velocities[hit - 1], run.velocities[hit]
    normal = run.positions[hit, 1] - run.positions[hit, 0]
    normal /= np.linalg.norm(normal)
    tangent = np.array([-normal[1], normal[0]])
    np.testing.assert_allclose(after @ normal, (before @ normal)[::-1], atol=1e-12)
    np.testing.assert_allclose(after @ tangent, before @ tangent, atol=1e-12)
    # an even split leaves the centre of mass where free flight takes it
    flight = run.positions[hit - 1] + before
    np.testing.assert_allclose(run.positions[hit].mean(0), flight.mean(0), atol=1e-10)


def test_unequal_masses_collide_elastically() -> None:
    config = VideoConfig(n_frames=600, radius=(10.0, 30.0), size=200)
    hits = 0
    for seed in range(5):
        run = simulated(config, seed)
        step = np.diff(run.velocities, axis=0)
        margin = np.minimum(run.positions, config.size - run.positions) - run.radii[:, None]
        inside = margin[1:].min((1, 2)) > 20
        for t in np.flatnonzero(inside & (step != 0).any((1, 2))):
            hits += 1
            # opposite impulses in the ratio of the masses 1 : 9
            np.testing.assert_allclose(step[t, 0], -9 * step[t, 1], atol=1e-10)
    assert hits > 0


def test_separating_balls_keep_their_velocities() -> None:
    position, velocity = np.array([[50.0, 50.0], [56.0, 58.0]]), np.array([[-1.0, 0.5], [1.0, 0.5]])
    kept = velocity.copy()
    assert videos._collide(position, velocity, np.array([10.0, 10.0]))
    np.testing.assert_array_equal(velocity, kept)
    # 10 apart along (0.6, 0.8), 20 needed: each moves by 5
    np.testing.assert_allclose(position, [[47, 46], [59, 62]], atol=1e-12)
    assert not videos._collide(position, velocity, np.array([10.0, 10.0]))


def test_random_starts_use_the_published_speeds() -> None:
    config = VideoConfig(n_balls=5, radius=(10.0,), n_frames=1)
    velocities = np.concatenate([simulated(config, seed).velocities[0] for seed in range(40)])
    speed = np.linalg.norm(velocities, axis=1)
    assert speed.min() >= 2
    assert speed.max() <= 3
    angle = np.arctan2(velocities[:, 1], velocities[:, 0])
    assert np.histogram(angle, bins=4, range=(-np.pi, np.pi))[0].min() > 20


def flown(config: VideoConfig, run: videos.Trajectories, t: int, ball: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Where a ball flies from frame t in one frame, how fast then, and per mass: the work on it and what drag took."""
    force = np.zeros(2) if run.force is None else run.force[t]

    def rates(_: float, y: np.ndarray) -> np.ndarray:
        v = y[2:4]
        return np.concatenate([v, force - config.drag * v, [force @ v, config.drag * v @ v]])

    start = np.concatenate([run.positions[t, ball], run.velocities[t, ball], [0, 0]])
    y = solve_ivp(rates, (0, 1), start, rtol=1e-11, atol=1e-12).y[:, -1]
    return y[:2], y[2:4], y[4], y[5]


def kinetic(velocity: np.ndarray) -> float:
    return float((velocity**2).sum() / 2)


@pytest.mark.parametrize(
    "config",
    [
        VideoConfig(n_balls=1, n_frames=70, drag=0.02, restitution=0.7, force=0.15, force_frames=9),
        VideoConfig(n_balls=1, n_frames=70, force=0.3),
        VideoConfig(n_balls=1, n_frames=70, drag=0.03, restitution=0.0),
    ],
)
def test_energy_balance_of_one_ball(config: VideoConfig) -> None:
    """Work of the force, drag and losses at walls account for the kinetic energy of every frame."""
    run = simulated(config, 3)
    flights = hits = 0
    for t in range(config.n_frames - 1):
        position, velocity, work, dragged = flown(config, run, t, 0)
        np.testing.assert_allclose(kinetic(velocity) - kinetic(run.velocities[t]), work - dragged, atol=1e-9)
        low, high = position < 20, position > config.size - 20
        outward = (low & (velocity < 0)) | (high & (velocity > 0))
        flights, hits = flights + 1, hits + int(outward.any())
        np.testing.assert_allclose(run.positions[t + 1, 0], position.clip(20, config.size - 20), atol=1e-8)
        lost = (1 - config.restitution**2) / 2 * (velocity[outward] ** 2).sum()
        assert kinetic(run.velocities[t + 1]) == pytest.approx(kinetic(velocity) - lost, abs=1e-8)
        np.testing.assert_allclose(run.velocities[t + 1, 0][~outward], velocity[~outward], atol=1e-9)
    assert 0 < hits < flights


def test_pairs_lose_energy_and_keep_momentum() -> None:
    config = VideoConfig(n_frames=120, radius=(12.0, 24.0), size=200, restitution=0.6)
    mass, hits = np.array([144.0, 576.0]), 0
    for seed in range(15):
        run = simulated(config, seed)
        margin = np.minimum(run.positions, config.size - run.positions) - run.radii[:, None]
        inside = margin[1:].min((1, 2)) > 20
        for t in np.flatnonzero(inside & (np.diff(run.velocities, axis=0) != 0).any((1, 2))):
            before, after = run.velocities[t], run.velocities[t + 1]
            normal = run.positions[t + 1, 1] - run.positions[t + 1, 0]
            approach = (before[0] - before[1]) @ normal / np.linalg.norm(normal)
            np.testing.assert_allclose(mass @ after, mass @ before, atol=1e-9)
            lost = (mass[:, None] * (before**2 - after**2)).sum() / 2
            assert lost == pytest.approx((1 - 0.6**2) / 2 * (144 * 576 / 720) * approach**2, rel=1e-9)
            hits += 1
    assert hits > 2


def test_the_force_is_held_and_of_one_size() -> None:
    config = VideoConfig(n_frames=25, force=0.2, force_frames=10)
    run, undriven = simulated(config, 2), simulated(VideoConfig(n_frames=25), 2)
    assert run.force is not None
    assert undriven.force is None
    np.testing.assert_array_equal(run.velocities[0], undriven.velocities[0])  # the same start
    assert run.force.shape == (25, 2)
    np.testing.assert_allclose(np.linalg.norm(run.force, axis=1), 0.2)
    assert np.flatnonzero(np.diff(run.force, axis=0).any(1)).tolist() == [9, 19]


def test_seed_decides_the_motion() -> None:
    for config in (VideoConfig(), MIXED):
        np.testing.assert_array_equal(simulated(config, 3).positions, simulated(config, 3).positions)
        assert (simulated(config, 3).velocities[0] != simulated(config, 4).velocities[0]).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_balls": 0}, ["n_balls is 0", "at least 1"]),
        ({"n_frames": 0}, ["n_frames is 0"]),
        ({"n_videos": 0}, ["n_videos is 0"]),
        ({"fps": 0}, ["fps is 0"]),
        ({"video_seed": -1}, ["video_seed is -1"]),
        ({"radius": (10.0, 10.0, 10.0)}, ["radius has 3", "n_balls is 2"]),
        ({"radius": ()}, ["radius has 0"]),
        ({"radius": (0.0,)}, ["radius is 0", "at least 1"]),
        ({"radius": (float("nan"),)}, ["radius is nan"]),
        ({"radius": (float("inf"),)}, ["radius is inf"]),
        ({"size": 255}, ["size is 255", "even", "80"]),
        ({"size": 78}, ["size is 78", "at least 80"]),
        ({"n_balls": 1, "radius": (40.0,), "size": 80}, ["size is 80", "at least 82"]),
        ({"n_balls": 30}, ["of n_balls 30", "size 256"]),
        ({"background": "blue"}, ["blue", "gradient"]),
        ({"restitution": 1.1}, ["restitution is 1.1", "at most 1"]),
        ({"restitution": float("nan")}, ["restitution is nan"]),
        ({"drag": -0.1}, ["drag is -0.1", "at least 0"]),
        ({"drag": 1e-9}, ["drag is 1e-09", "1e-06"]),
        ({"force": -1.0}, ["force is -1.0", "at least 0"]),
        ({"force_frames": 0}, ["force_frames is 0", "at least 1"]),
    ],
)
def test_bad_configurations(change: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        simulated(dataclasses.replace(VideoConfig(), **change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_crowded_box_says_how_many_fit() -> None:
    # discs of radius 20 in a 100 px box: nine cannot fit, as 9 pi 20^2 exceeds the box; one always does
    with pytest.raises(UsageError, match=r"only [1-5] of n_balls 9 fit"):
        simulated(VideoConfig(n_balls=9, size=100))


# pictures


def test_render_discs() -> None:
    config = VideoConfig(n_balls=3, n_frames=40, radius=(20.0, 14.0, 9.0))
    run = simulated(config, 5)
    frames = videos.render(run, config)
    assert frames.shape == (40, 256, 256, 3)
    assert frames.dtype == np.uint8
    for t in (0, 17, 39):
        assert len(np.unique(frames[t].reshape(-1, 3), axis=0)) == 4
        for ball, colour in enumerate([(0, 255, 255), (255, 0, 0)]):
            y, x = np.nonzero((frames[t] == colour).all(2))
            assert len(x) == pytest.approx(np.pi * run.radii[ball] ** 2, rel=0.03)
            np.testing.assert_allclose([x.mean(), y.mean()], run.positions[t, ball], atol=0.2)
        # a disc on the rim of the frame loses at most one row or column
        third = len(np.nonzero(frames[t].any(2))[0]) - np.pi * (20**2 + 14**2)
        assert third == pytest.approx(np.pi * 9**2, abs=40)


def test_many_balls_have_distinct_colours() -> None:
    config = VideoConfig(n_balls=12, radius=(6.0,), n_frames=1)
    frame = videos.render(simulated(config), config)[0]
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) == 13


def test_backgrounds() -> None:
    assert not videos.background(VideoConfig()).any()
    config = VideoConfig(background="gradient")
    image = videos.background(config).astype(int)
    assert image.shape == (256, 256, 3)
    assert (np.diff(image[:, :, 0], axis=1) >= 0).all()
    assert (np.diff(image[:, :, 1], axis=0) >= 0).all()
    assert np.abs(np.diff(image, axis=0)).max() <= 1
    assert np.abs(np.diff(image, axis=1)).max() <= 1
    assert image[0, -1, 0] - image[0, 0, 0] > 50
    assert image[-1, 0, 1] - image[0, 0, 1] > 50
    for ball in ((0, 255, 255), (255, 0, 0)):
        assert np.linalg.norm(image - ball, axis=2).min() > 150
    frames = videos.render(simulated(config), config)
    covered = (frames[0] != image).any(2).sum()
    assert covered == pytest.approx(2 * np.pi * 20**2, rel=0.03)


# files


@pytest.mark.parametrize("background", ["black", "gradient"])
def test_mp4_round_trip(tmp_path: Path, background: str) -> None:
    config = VideoConfig(n_frames=60, background=background)  # type: ignore[arg-type]
    run = simulated(config, 1)
    frames = videos.render(run, config)
    videos.write_video(tmp_path / "a.mp4", frames, config.fps)
    video = videos.read_video(tmp_path / "a.mp4")
    assert video.frames.shape == frames.shape
    assert video.frames.dtype == np.uint8
    assert video.fps == 30
    assert video.path == tmp_path / "a.mp4"
    assert np.abs(video.frames.astype(int) - frames).mean() < 3
    for ball, colour in enumerate([(0, 255, 255), (255, 0, 0)]):
        for t in (0, 29, 59):
            y, x = np.nonzero(np.linalg.norm(video.frames[t].astype(float) - colour, axis=2) < 120)
            np.testing.assert_allclose([x.mean(), y.mean()], run.positions[t, ball], atol=1)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_published_length_survives_b_frames(tmp_path: Path) -> None:
    videos.write_video(tmp_path / "a.mp4", moving_square(150, 64, 176), 30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert any(frame.pict_type == av.video.frame.PictureType.B for frame in container.decode(video=0))
    frames = videos.read_video(tmp_path / "a.mp4").frames
    assert len(frames) == 150
    assert [int(frame[16, :, 0].argmax()) // 8 for frame in frames[::40]] == [t // 8 for t in range(0, 150, 40)]


def test_writing_is_deterministic(tmp_path: Path) -> None:
    frames = moving_square(20, 256, 96)
    videos.write_video(tmp_path / "a.mp4", frames, 30)
    videos.write_video(tmp_path / "b.mp4", frames, 30)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes()
    assert b" threads=1 " in data  # x264 notes its settings in the stream; its choices depend on the thread count


def test_fractional_rate(tmp_path: Path) -> None:
    videos.write_video(tmp_path / "a.mp4", moving_square(5, 64, 96), 30000 / 1001)
    assert videos.read_video(tmp_path / "a.mp4").fps == pytest.approx(29.97, abs=0.001)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "libx264", "yuv420p"),
        ("a.MOV", "mpeg4", "yuv420p"),
        ("odd.avi", "mjpeg", "yuvj420p"),
        ("odd.mp4", "libx264", "yuv444p"),
    ],
)
def test_reads_other_videos(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    frames = moving_square(30, 63, 97) if "odd" in name else moving_square(30, 64, 96)
    encode(tmp_path / name, frames, codec, pixels)
    video = videos.read_video(tmp_path / name)
    assert video.frames.shape == frames.shape
    assert video.fps == 25
    assert np.abs(video.frames.astype(int) - frames).mean() < 6


def put_matrix(source: Path, target: Path, *matrix: int) -> None:
    """Copy an mp4 or mov with `matrix`, 16.16 and 2.30 fixed point, in its track header."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    target.write_bytes(data)


def with_matrix(source: Path, target: Path, a: int, b: int, c: int, d: int) -> None:
    put_matrix(source, target, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


ORIENTATIONS = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (-1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, 1, -1, 0),
    (0, -1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize(("a", "b", "c", "d"), ORIENTATIONS)
def test_all_orientations(tmp_path: Path, a: int, b: int, c: int, d: int) -> None:
    encode(tmp_path / "a.mov", noise(3, 64, 96), "libx264")
    plain = videos.read_video(tmp_path / "a.mov").frames
    with_matrix(tmp_path / "a.mov", tmp_path / "turned.mov", a, b, c, d)
    turned = videos.read_video(tmp_path / "turned.mov").frames
    # by definition the matrix maps (x, y) to (a x + c y, b x + d y), y down, wherever that is on the screen
    y, x = np.mgrid[:64, :96]
    column, row = a * x + c * y, b * x + d * y
    expected = np.zeros((3, *((96, 64) if b else (64, 96)), 3), np.uint8)
    expected[:, row - row.min(), column - column.min()] = plain
    np.testing.assert_array_equal(turned, expected)
    # what is applied to each frame sees it turned, and as memory that torch takes
    corners = videos.read_video(tmp_path / "turned.mov", lambda frame: torch.from_numpy(frame)[:9, :7].numpy()).frames
    np.testing.assert_array_equal(corners, turned[:, :9, :7])


def test_a_mirror_is_no_turn(tmp_path: Path) -> None:
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, :, :48] = 255
    frames[:, 40:, :48] = (255, 0, 0)
    encode(tmp_path / "a.mp4", frames, "libx264", "yuv444p")
    with_matrix(tmp_path / "a.mp4", tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    mirrored = videos.read_video(tmp_path / "mirrored.mp4").frames[1]
    assert (mirrored[:, :40] < 60).all()
    assert (mirrored[:32, 56:] > 200).all()
    assert (mirrored[48:, 56:, 0] > 200).all()
    assert (mirrored[48:, 56:, 1:] < 60).all()


def test_place_and_rounding_do_not_matter(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", noise(3, 64, 96), "libx264")
    put_matrix(tmp_path / "a.mp4", tmp_path / "b.mp4", 3, 65535, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30)
    with_matrix(tmp_path / "a.mp4", tmp_path / "c.mp4", 0, 1, -1, 0)
    found, expected = (videos.read_video(tmp_path / name).frames for name in ("b.mp4", "c.mp4"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "matrix",
    [
        (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30),
        (65536, 0, 0, 6554, 65536, 0, 0, 0, 1 << 30),
        (32768, 0, 0, 0, 32768, 0, 0, 0, 1 << 30),
        (131072, 0, 0, 0, 65536, 0, 0, 0, 1 << 30),
        (65536, 65536, 0, 0, 0, 0, 0, 0, 1 << 30),
        (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 29),
        (65536, 0, 1 << 20, 0, 65536, 0, 0, 0, 1 << 30),
        (0,) * 9,
    ],
    ids=["45 degrees", "shear", "half size", "twice as wide", "flat", "half by w", "perspective", "zero"],
)
def test_other_matrices_are_refused(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    encode(tmp_path / "a.mp4", moving_square(3, 64, 96), "libx264")
    put_matrix(tmp_path / "a.mp4", tmp_path / "odd.mp4", *matrix)
    check_refused(tmp_path / "odd.mp4", "matrix", "90 degrees")


@pytest.mark.parametrize("orientation", [1, 2, 4, 6])
def test_orientation_of_jpeg_frames_is_not_guessed(tmp_path: Path, orientation: int) -> None:
    """PyAV 18 cannot list what comes with such frames; a later version may apply the orientation."""
    image = pytest.importorskip("PIL.Image", reason="the extra dev, which brings PIL.Image, is not installed")
    exif, jpeg = image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    image.fromarray(moving_square(1, 64, 96)[0]).save(jpeg, "jpeg", exif=exif)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for number in range(3):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            container.mux(packet)
    stored = np.asarray(image.open(io.BytesIO(jpeg.getvalue()))).astype(int)
    shown = {1: stored, 2: stored[:, ::-1], 4: stored[::-1], 6: np.rot90(stored, -1)}[orientation]
    reader = videos.VideoReader(tmp_path / "a.avi")
    try:
        found = next(iter([*reader]))
    except VideoError as error:
        said = str(error)
    else:
        said = " ".join(reader.notes)
    assert "display matrix" in said or np.abs(found - shown).mean() < 3


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(16, 11), (140, 64)), (Fraction(1, 2), (96, 128)), (Fraction(405, 404), (96, 64))]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_are_square(tmp_path: Path, name: str, aspect: Fraction, size: tuple[int, int]) -> None:
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, 16:48, 24:72] = 255  # the half in the middle
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = videos.read_video(tmp_path / name).frames
    width, height = size
    assert found.shape == (3, height, width, 3)
    bright = found[1, :, :, 0] > 128
    assert np.flatnonzero(bright.any(0))[[0, -1]] == pytest.approx([width / 4, width * 3 / 4 - 1], abs=1)
    assert np.flatnonzero(bright.any(1))[[0, -1]] == pytest.approx([height / 4, height * 3 / 4 - 1], abs=1)


def test_edit_list_is_not_a_truncation(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(50, 64, 96), "libx264")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.find(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    assert duration == 2000  # milliseconds: 50 frames of 25 per second
    data[at : at + 8] = struct.pack(">Ii", 1000, start)
    (tmp_path / "trimmed.mp4").write_bytes(data)
    assert len(videos.read_video(tmp_path / "trimmed.mp4").frames) == 25


def check_refused(path: Path, *words: str) -> None:
    with pytest.raises(VideoError) as caught:
        videos.read_video(path)
    message = str(caught.value)
    assert str(path) in message
    assert all(word in message for word in words), message


def test_unreadable_files(tmp_path: Path) -> None:
    check_refused(tmp_path / "missing.mp4", "not found")
    (tmp_path / "empty.mp4").touch()
    check_refused(tmp_path / "empty.mp4", "empty")
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    check_refused(tmp_path / "garbage.mp4", "not a video")
    (tmp_path / "text.avi").write_text("not a video\n" * 100)
    check_refused(tmp_path / "text.avi", "not a video")
    (tmp_path / "folder.mp4").mkdir()
    check_refused(tmp_path / "folder.mp4", "directory")


def test_truncated_mp4(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(30, 64, 96), "libx264")
    data = (tmp_path / "a.mp4").read_bytes()
    for keep in (0.02, 0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * keep)])
        check_refused(tmp_path / "cut.mp4", "cut short")


def test_truncated_mp4_with_its_index_first(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(30, 64, 96), "mpeg4", container_options={"movflags": "faststart"})
    assert len(videos.read_video(tmp_path / "a.mp4").frames) == 30
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.8)])
    check_refused(tmp_path / "cut.mp4", "declares 30 frames")


def test_truncated_avi(tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", noise(30, 64, 96), "mpeg4")
    data = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: int(len(data) * 0.6)])
    with av.open(str(tmp_path / "cut.avi")) as container:
        decoded = sum(1 for _ in container.decode(video=0))
    assert 0 < decoded < 30  # the trap: fewer frames and no error
    check_refused(tmp_path / "cut.avi", "declares 30 frames", f"{decoded} can be decoded")


def test_wrong_declared_count(tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", moving_square(30, 64, 96), "mpeg4")
    data = bytearray((tmp_path / "a.avi").read_bytes())
    at = data.find(b"strh") + 8 + 32
    assert struct.unpack("<I", data[at : at + 4]) == (30,)
    data[at : at + 4] = struct.pack("<I", 33)
    (tmp_path / "wrong.avi").write_bytes(data)
    check_refused(tmp_path / "wrong.avi", "33", "30")


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", noise(30, 64, 96), "mpeg4")
    assert len(videos.read_video(tmp_path / "a.mp4").frames) == 30
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 3 : len(data) // 3 + 20] = bytes(20)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with av.open(str(tmp_path / "damaged.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 30  # the decoder conceals the damage
    check_refused(tmp_path / "damaged.mp4", "damaged", "of 30 frames")


def test_unknown_codec(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(5, 64, 96), "libx264")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.count(b"avc1") == 2  # brand and sample entry
    (tmp_path / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    check_refused(tmp_path / "unknown.mp4", "decoder")


def test_audio_only(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    check_refused(tmp_path / "sound.mp4", "no video stream")


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = videos.ATTACHED_PICTURE
        sound = container.add_stream("aac", rate=44100, layout="mono")
        container.mux(cover.encode(av.VideoFrame.from_ndarray(noise(1, 64, 64)[0], format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(tmp_path / "song.mp4")) as container:
        assert container.streams.best("video") is not None  # the trap
    check_refused(tmp_path / "song.mp4", "no video stream", "cover picture")


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.m4v", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.ts", "mpeg2video"),
        ("a.flv", "flv"),
        ("a.wmv", "wmv2"),
    ],
)
def test_reads_other_containers(tmp_path: Path, name: str, codec: str, recwarn: pytest.WarningsRecorder) -> None:
    frames = moving_square(30, 64, 96)
    with av.open(str(tmp_path / name), "w", format="mp4" if name == "a.m4v" else None) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert videos.find_videos(tmp_path) == [tmp_path / name]
    video = videos.read_video(tmp_path / name)
    assert video.frames.shape == frames.shape
    assert video.fps == pytest.approx(25)
    assert np.abs(video.frames.astype(int) - frames).mean() < 6
    assert not recwarn


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.flv", "flv")])
def test_truncated_by_its_duration(tmp_path: Path, name: str, codec: str) -> None:
    encode(tmp_path / name, noise(50, 64, 96), codec)
    data = (tmp_path / name).read_bytes()
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(data[: int(len(data) * 0.6)])
    with av.open(str(cut)) as container:
        assert 0 < sum(1 for _ in container.decode(video=0)) < 50
    check_refused(cut, "truncated" if name != "a.flv" else "Copy")


def test_a_duration_that_is_no_number_is_not_believed(tmp_path: Path) -> None:
    encode(tmp_path / "a.mkv", noise(5, 64, 96), "libx264")
    data = (tmp_path / "a.mkv").read_bytes()
    assert data.count(b"00:00:00.200000000") == 1
    for text in (b"00:00:nan0000000\0\0", b"1e999:00:infinity0", b"\xff" * 18):
        (tmp_path / "b.mkv").write_bytes(data.replace(b"00:00:00.200000000", text))
        assert len(videos.read_video(tmp_path / "b.mkv").frames) == 5


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile a.avi\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.avi\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["concat", "hls", "sdp"],
)
def test_lists_of_other_files_are_refused(tmp_path: Path, text: str) -> None:
    encode(tmp_path / "a.avi", moving_square(5, 64, 96), "mpeg4")
    for name in ("list.mp4", "list.mov", "list.ts"):
        (tmp_path / name).write_text(text)
        check_refused(tmp_path / name, "not a video")


def test_a_playlist_is_refused_by_its_format(tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", moving_square(5, 64, 96), "mpeg4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.avi\n")
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5  # the trap: another file's frames
    check_refused(tmp_path / "list.mp4", "not a video")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    check_refused(tmp_path / "pipe.mp4", "pipe")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    check_refused(tmp_path / "zero.mp4", "device")
    (tmp_path / "text").write_text("root:x:0:0\n" * 100)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "text")
    check_refused(tmp_path / "link.mp4", "not a video")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    check_refused(tmp_path / "dangling.mp4", "not found")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    check_refused(tmp_path / "loop.mp4", "cannot read")


def test_large_frames_are_refused_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path / "a.avi", moving_square(3, 64, 96), "mpeg4")
    monkeypatch.setattr(videos, "MAX_PIXELS", 16 * 64 * 96)  # room for the decoder's margins
    assert len(videos.read_video(tmp_path / "a.avi").frames) == 3
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 96 - 1)
    check_refused(tmp_path / "a.avi", "96 x 64", "6143 pixels")
    # pixels nine times as high as wide make 64 rows 576
    with av.open(str(tmp_path / "tall.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(1, 9)
        for frame in moving_square(3, 64, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    check_refused(tmp_path / "tall.mp4", "32 x 576", "6143 pixels")


def test_claimed_sizes_are_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", moving_square(2, 64, 96), "rawvideo", "bgr24")
    data = bytearray((tmp_path / "a.avi").read_bytes())
    at = data.find(b"strf") + 12
    assert struct.unpack("<2i", data[at : at + 8]) == (96, -64)  # from the bottom upwards
    for width, height in ((20000, 20000), (100000, 100000), (2**31 - 1, 2**31 - 1)):
        data[at : at + 8] = struct.pack("<2i", width, height)
        (tmp_path / "claims.avi").write_bytes(data)
        check_refused(tmp_path / "claims.avi")


def test_transparency(tmp_path: Path) -> None:
    for name, alpha in (("opaque.mkv", 255), ("clear.mkv", 254)):
        frames = np.concatenate([noise(3, 64, 96), np.full((3, 64, 96, 1), alpha, np.uint8)], axis=3)
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "bgra"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
            container.mux(stream.encode())
    np.testing.assert_array_equal(videos.read_video(tmp_path / "opaque.mkv").frames, noise(3, 64, 96))
    check_refused(tmp_path / "clear.mkv", "transparent")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_frame_rate_is_said(tmp_path: Path, name: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for number, image in enumerate(moving_square(20, 64, 96)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number + 10 * (number > 7), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.warns(UserWarning, match=r"a\.m.*variable frame rate: [1-9]\d* of 19 intervals"):
        video = videos.read_video(tmp_path / name)
    assert len(video.frames) == 20


@pytest.mark.parametrize("rate", [24, Fraction(24000, 1001), 30, Fraction(30000, 1001), 50, 60, 120])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_constant_frame_rate_is_not_called_variable(tmp_path: Path, name: str, rate: Fraction) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in moving_square(20, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    reader = videos.VideoReader(tmp_path / name)
    assert len(list(reader)) == 20
    assert reader.notes == []
    assert reader.fps == pytest.approx(float(rate), rel=0.01)


def test_two_video_streams_are_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in moving_square(10, 64, 96):
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    with pytest.warns(UserWarning, match="2 video streams: only stream 0"):
        assert len(videos.read_video(tmp_path / "a.mkv").frames) == 10


def test_hdr_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "transfer=smpte2084"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
        for image in moving_square(3, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with pytest.warns(UserWarning, match="HDR"):
        videos.read_video(tmp_path / "a.mp4")


def test_interlaced_frames_are_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "interlaced=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in moving_square(3, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with pytest.warns(UserWarning, match="interlaced: rows of 3 frames"):
        videos.read_video(tmp_path / "a.mp4")


def test_many_small_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's generic index holds 43,690 entries and then drops every second one; none of the frames may be lost."""
    monkeypatch.setattr(videos.VideoReader, "_image", lambda *_: np.zeros((16, 16, 3), np.uint8))  # most of the time
    count = 45_000
    frame = av.VideoFrame(16, 16, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    for name in ("a.mp4", "a.avi"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=30)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for number in range(count):
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        reader = videos.VideoReader(tmp_path / name)
        assert sum(1 for _ in reader) == reader.n_frames == reader.expected == count


def test_the_reader_counts_while_it_reads(tmp_path: Path) -> None:
    videos.write_video(tmp_path / "a.mp4", moving_square(20, 64, 96), 25)
    reader = videos.VideoReader(tmp_path / "a.mp4")
    frames = iter(reader)
    first = next(frames)
    assert (reader.n_frames, reader.expected, reader.fps) == (1, 20, 0.0)
    assert len(list(frames)) == 19
    assert (reader.n_frames, reader.fps, reader.notes) == (20, 25.0, [])
    whole = videos.read_video(tmp_path / "a.mp4").frames
    np.testing.assert_array_equal(first, whole[0])
    np.testing.assert_array_equal(videos.middle_frame(tmp_path / "a.mp4"), whole[10])


def test_changing_frame_size(tmp_path: Path) -> None:
    for name, width in (("a", 96), ("b", 128)):
        encode(tmp_path / f"{name}.h264", moving_square(5, 64, width), "libx264")
    joined = (tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes()
    (tmp_path / "joined.mp4").write_bytes(joined)
    check_refused(tmp_path / "joined.mp4", "96 x 64", "128 x 64")


@pytest.mark.parametrize(
    ("frames", "word"),
    [
        (np.zeros((2, 63, 64, 3), np.uint8), "64 x 63"),
        (np.zeros((2, 64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint8), "[64, 64, 3]"),
        (np.zeros((0, 64, 64, 3), np.uint8), "[0, 64, 64, 3]"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path: Path, frames: np.ndarray, word: str) -> None:
    with pytest.raises(VideoError) as caught:
        videos.write_video(tmp_path / "a.mp4", frames, 30)
    assert word in str(caught.value)
    assert "a.mp4" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_rate_or_suffix(tmp_path: Path) -> None:
    frames = moving_square(2, 64, 64)
    for fps in (0, float("nan"), -1.0):
        with pytest.raises(VideoError, match="fps"):
            videos.write_video(tmp_path / "a.mp4", frames, fps)
    with pytest.raises(VideoError, match=r"\.mp4"):
        videos.write_video(tmp_path / "a.avi", frames, 30)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def interrupted(path: Path, data: bytes) -> None:
        write(path, data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        videos.write_video(tmp_path / "a.mp4", moving_square(5, 64, 96), 30)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HJEPAError, match="file"):
        videos.write_video(tmp_path / "file" / "a.mp4", moving_square(5, 64, 96), 30)


def test_missing_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hjepa_fast\[pipeline\]'"):
        videos.read_video(tmp_path / "a.mp4")


# folders


@pytest.mark.filterwarnings("ignore:left out")
def test_find_videos(tmp_path: Path) -> None:
    names = ["video_10.mp4", "video_2.MP4", "a.avi", "B.Mov", "video_1.mov"]
    for name in [*names, ".hidden.mp4", f"{files.PARTIAL}x.mp4", "notes.txt", "video_1.safetensors", "mp4"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    found = videos.find_videos(tmp_path)
    assert [path.name for path in found] == ["a.avi", "B.Mov", "video_1.mov", "video_2.MP4", "video_10.mp4"]
    assert all(path.parent == tmp_path for path in found)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    names = ["a.mp4", "b.mkv", "c.webm", "d.M4V", "e.TS", "f.gif", "g.m3u8", ".h.mp4", "a.mkv", "readme.txt", "a.safetensors"]
    for name in [*names, "._a.mp4", f"{files.PARTIAL}x.mp4", *(f"{i}.GIF" for i in range(5))]:
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mkv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mov")
    with pytest.warns(UserWarning, match="left out of") as caught:
        found = videos.find_videos(tmp_path)
    assert [path.name for path in found] == ["a.mp4", "b.mkv", "c.webm", "d.M4V", "e.TS", "link.mp4"]
    (message,) = [str(warning.message) for warning in caught]
    for part in (
        "0.GIF, 1.GIF, 2.GIF and 3 more (.gif is not read",
        "g.m3u8 (.m3u8 is not read",
        ".h.mp4 (hidden)",
        "a.mkv (another video has its name)",
        "dangling.mkv, folder.mp4, pipe.mov (not a file)",
        str(tmp_path),
    ):
        assert part in message, message
    assert not any(word in message for word in ("readme", "safetensors", "._", files.PARTIAL))


def test_nothing_left_out_is_silent(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name in ("a.mp4", "b.mkv", "notes.txt", "a.safetensors", "a.srt", ".DS_Store"):
        (tmp_path / name).touch()
    assert len(videos.find_videos(tmp_path)) == 2
    assert not recwarn


def test_find_videos_refuses(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="nowhere"):
        videos.find_videos(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match=r"found a file: .*file"):
        videos.find_videos(tmp_path / "file")
    with pytest.raises(VideoError, match=r"no videos in .*\.mp4, \.avi, \.mov") as caught:
        videos.find_videos(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_generate(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = videos.generate(tmp_path / "new" / "videos", SMALL, lambda done, total: calls.append((done, total)))
    assert [path.name for path in made] == ["video_000.mp4", "video_001.mp4", "video_002.mp4"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert videos.find_videos(made[0].parent) == made
    assert len(list(made[0].parent.iterdir())) == 6
    truths = [videos.load_ground_truth(path) for path in made]
    for path, truth in zip(made, truths, strict=True):
        assert truth is not None
        video = videos.read_video(path)
        assert video.frames.shape == (12, 96, 96, 3)
        assert video.fps == 25
        assert truth.positions.shape == truth.velocities.shape == (12, 2, 2)
        assert truth.positions.dtype == np.float64
        y, x = np.nonzero(video.frames[-1, :, :, 0] > 128)
        np.testing.assert_allclose([x.mean(), y.mean()], truth.positions[-1, 1], atol=1)
    assert len({truth.velocities.tobytes() for truth in truths if truth}) == 3
    metadata = files.read_metadata(made[0].with_suffix(".safetensors"))
    assert metadata is not None
    assert json.loads(metadata["settings"])["video_seed"] == 7
    assert metadata["source"]


def test_a_force_is_recorded_beside_its_video(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, n_videos=2, force=0.1)
    made = videos.generate(tmp_path, config)
    assert videos.find_videos(tmp_path) == made
    for index, path in enumerate(made):
        force = videos.simulate(config, np.random.default_rng([7, index])).force
        np.testing.assert_array_equal(controls.read(controls.path_of(path)), force)
    before = contents(tmp_path)
    controls.path_of(made[1]).unlink()  # as an interruption between its files leaves it
    videos.generate(tmp_path, config)
    assert contents(tmp_path) == before
    with pytest.raises(VideoError, match="other settings"):
        videos.generate(tmp_path, dataclasses.replace(config, force=0.2))


def test_elastic_videos_are_known_by_the_settings_that_older_versions_wrote(tmp_path: Path) -> None:
    made = videos.generate(tmp_path, dataclasses.replace(SMALL, n_videos=1))
    metadata = files.read_metadata(made[0].with_suffix(".safetensors"))
    assert metadata is not None
    assert json.loads(metadata["settings"]) == {
        "n_frames": 12, "n_balls": 2, "radius": [10.0, 10.0], "size": 96, "fps": 25, "background": "black", "video_seed": 7
    }  # fmt: skip
    assert os.listdir(tmp_path).count("video_000.control.json") == 0
    with pytest.raises(VideoError, match="other settings"):
        videos.generate(tmp_path, dataclasses.replace(SMALL, n_videos=1, drag=0.1))


def test_generate_does_not_depend_on_the_number(tmp_path: Path) -> None:
    videos.generate(tmp_path / "many", SMALL)
    videos.generate(tmp_path / "one", dataclasses.replace(SMALL, n_videos=1))
    many, one = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert len(one) == 2
    assert one == {name: many[name] for name in one}
    assert many["video_000.mp4"] != many["video_001.mp4"]


def test_generate_resumes_and_grows(tmp_path: Path) -> None:
    made = videos.generate(tmp_path, dataclasses.replace(SMALL, n_videos=2))
    before = contents(tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    # video 1 as an interruption between its two files leaves it
    made[1].with_suffix(".safetensors").unlink()
    # a radius for each ball is the same setting as one for all
    videos.generate(tmp_path, dataclasses.replace(SMALL, radius=(10.0, 10.0)))
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 6
    assert made[0].stat().st_mtime == 1
    assert made[0].with_suffix(".safetensors").stat().st_mtime == 1
    assert made[1].with_suffix(".safetensors").stat().st_mtime > 1
    made[0].unlink()
    videos.generate(tmp_path, SMALL)
    assert contents(tmp_path) == after


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"video_seed": 8}, "other settings"),
        ({"background": "gradient"}, "other settings"),
        ({"n_frames": 13}, "other settings"),
        ({"n_videos": 2}, "video_002.mp4"),
    ],
)
def test_generate_refuses_to_mix(tmp_path: Path, change: dict, word: str) -> None:
    videos.generate(tmp_path, SMALL)
    before = contents(tmp_path)
    with pytest.raises(VideoError) as caught:
        videos.generate(tmp_path, dataclasses.replace(SMALL, **change))
    for part in (str(tmp_path), word, "another folder", "delete"):
        assert part in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["video_000.mp4", "holiday.mov"])
def test_generate_never_overwrites_own_videos(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(VideoError, match=name):
        videos.generate(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"mine"


def test_interrupted_generation_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = files.save_tensors

    def fail_on_second(path: Path, *rest: object) -> None:
        if path.name == "video_001.safetensors":
            raise KeyboardInterrupt
        save(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_tensors", fail_on_second)
        with pytest.raises(KeyboardInterrupt):
            videos.generate(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video_000.mp4", "video_000.safetensors", "video_001.mp4"]
    made = videos.generate(tmp_path, SMALL)
    assert all(videos.load_ground_truth(path) is not None for path in made)


def test_generate_checks_the_configuration_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="size"):
        videos.generate(tmp_path / "new", dataclasses.replace(SMALL, size=95))
    assert not (tmp_path / "new").exists()


def test_ground_truth_of_own_videos(tmp_path: Path) -> None:
    assert videos.load_ground_truth(tmp_path / "mine.mp4") is None
    files.save_tensors(tmp_path / "mine.safetensors", {"positions": torch.zeros(1)}, {})
    with pytest.raises(VideoError, match="velocities"):
        videos.load_ground_truth(tmp_path / "mine.mp4")
    (tmp_path / "mine.safetensors").write_bytes(b"garbage")
    with pytest.raises(HJEPAError, match="ground truth"):
        videos.load_ground_truth(tmp_path / "mine.mp4")
