"""The smooth scenes: their law, their videos, their states as latents, and the truth that models are measured against."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import ellipk

from hjepa_fast.cli import main
from hjepa_fast.errors import EncoderError, HJEPAError, LatentError, UsageError, VideoError
from hjepa_fast.pipeline import checkpoints, controls, files, scenes
from hjepa_fast.pipeline.config import WORLDS, DataConfig, EncodeConfig, VideoConfig, world
from hjepa_fast.pipeline.encoders import load_encoder
from hjepa_fast.pipeline.latents import encode_videos, load_latents
from hjepa_fast.pipeline.truth import Truth
from hjepa_fast.pipeline.truth import of as truth_of
from hjepa_fast.pipeline.videos import generate, load_ground_truth, read_video, render, simulate
from hjepa_fast.pipeline.windows import prepare
from synthetic import write_one

pytest.importorskip("av", reason="the extra dev, which brings av, is not installed")

NAMES = ("pendulum", "springs", "orbit")


def scene_of(name: str, **changes: object) -> scenes.Scene:
    found = scenes.of(VideoConfig(scene=name, **changes))  # type: ignore[arg-type]
    assert found is not None
    return found


def crossings(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Times at which a motion in steps of 1 crosses zero upwards, by cubic Hermite interpolation."""
    found = []
    for i in np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0)):
        c = [x[i], v[i], 3 * (x[i + 1] - x[i]) - 2 * v[i] - v[i + 1], 2 * (x[i] - x[i + 1]) + v[i] + v[i + 1]]
        found.append(i + next(r.real for r in np.roots(c[::-1]) if abs(r.imag) < 1e-12 and 0 <= r.real <= 1))
    return np.array(found)


# the law


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, {"n_balls": 3, "radius": (8.0, 14.0, 11.0)}])
def test_pull_is_minus_the_gradient_of_the_potential(name, changes):
    if changes and name != "springs":
        changes = {"radius": (12.0,) if name == "pendulum" else (12.0, 19.0)}
    scene = scene_of(name, **changes)
    q, _ = scene.start(np.random.default_rng(1))
    h = 1e-5
    slopes = [(scene.potential(q + h * e) - scene.potential(q - h * e)) / (2 * h) for e in np.eye(scene.n)]
    np.testing.assert_allclose(scene.pull(q), -np.array(slopes), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_energy_is_kept(name):
    """To 1e-11 of itself over 1,000 steps of the pendulum and 250 of the others, whose pull is slower to compute."""
    scene = scene_of(name)
    q, p = scene.start(np.random.default_rng(3))
    H = scene.energy(*scene.path(np.stack([q, 0.9 * q]), np.stack([p, p]), 1001 if name == "pendulum" else 251, stride=4))
    assert np.abs(H / H[0] - 1).max() < 1e-11


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drag", [0.0, 0.01, 1.0])
def test_the_motion_is_an_independent_integrators(name, drag):
    """DOP853 of scipy at its tightest tolerance; a push that is held adds to p' as it says."""
    scene = scene_of(name, drag=drag, force=0.02)
    q, p = scene.start(np.random.default_rng(2))
    push = 0.5 * scene.push * np.ones(scene.push_dim)
    found = scene.path(q, p, 401, np.tile(push, (401, 1)))

    def law(t, y):
        v = y[scene.n :] / scene.masses
        return np.concatenate([v, scene.pull(y[: scene.n]) - drag * y[scene.n :] + scene.masses * np.resize(push, scene.n)])

    true = solve_ivp(law, (0, 400), np.concatenate([q, p]), method="DOP853", rtol=3e-14, atol=1e-13).y[:, -1]
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(np.concatenate([found[0][-1], found[1][-1]]), true, atol=1e-9 * scale)


def test_the_pendulums_period_is_the_elliptic_integrals():
    scene = scene_of("pendulum")
    for amplitude in (1e-4, 1.0, 2.2):
        q, p = scene.path(np.array([-amplitude]), np.zeros(1), 400)
        period = np.diff(crossings(q[:, 0], p[:, 0])).mean()
        assert period == pytest.approx(4 * ellipk(math.sin(amplitude / 2) ** 2) / scene.frequency, rel=1e-5)
    assert 2 * math.pi / scene.frequency == pytest.approx(52)
    assert 10 < 52 / 4 < 4 * ellipk(math.sin(1.1) ** 2) / scene.frequency / 4 < 20  # periods in steps of 4 frames


def test_bodies_without_hold_and_softening_obey_keplers_third_law():
    scene = dataclasses.replace(scene_of("orbit", radius=(15.0, 20.0)), hold=0.0, softening=0.0)
    gravity = scene.attraction * (scene.masses[0] + scene.masses[2])
    axes = np.array([60.0, 80.0, 110.0])
    apart = axes * (1 - np.array([0.0, 0.3, 0.25]))  # at the closest, by vis-viva
    speed = np.sqrt(gravity * (2 / apart - 1 / axes))
    shares = np.array([-scene.masses[2], scene.masses[0]]) / (scene.masses[0] + scene.masses[2])
    none = np.zeros(3)
    q = np.stack([shares[0] * apart, none, shares[1] * apart, none], axis=1)
    v = np.stack([none, shares[0] * speed, none, shares[1] * speed], axis=1)
    q, p = scene.path(q, scene.masses * v, 200)
    for i, axis in enumerate(axes):
        v = p[:, i] / scene.masses
        period = np.diff(crossings(q[:, i, 3] - q[:, i, 1], v[:, 3] - v[:, 1])).mean()
        assert period**2 == pytest.approx(4 * math.pi**2 * axis**3 / gravity, rel=1e-4)


# the truth


@pytest.mark.parametrize("name", NAMES)
def test_truth_in_the_units_of_latents(name):
    scene = scene_of(name)
    q, p = scene.draw(np.random.default_rng(0), 41, None)
    std = torch.tensor([3.0] * scene.n + [0.25] * scene.n, dtype=torch.float64)
    z = torch.from_numpy(np.concatenate([q, p], axis=1)) / std
    truth = Truth(scene, torch.zeros(2 * scene.n), std, 4)
    np.testing.assert_allclose(truth.energy(z), scene.energy(q, p), rtol=1e-13)
    path = truth.rollout(z[[0, 4]], 9)
    assert path.shape == (2, 10, 2 * scene.n)
    assert path.dtype == torch.float64
    torch.testing.assert_close(path[0], z[0:40:4], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(path[1], z[4:44:4], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(truth.positions(z), scene.positions(q))
    assert truth.conservative
    assert truth.rollout(z[:0], 2).shape == (0, 3, 2 * scene.n)
    assert truth.energy(z.reshape(1, 41, -1).float()).shape == (1, 41)
    assert truth.energy(torch.full((3, 2 * scene.n), math.nan)).isnan().all()
    with pytest.raises(UsageError, match=f"have {2 * scene.n} numbers, found"):
        truth.energy(z[..., :-1])


# worlds


@pytest.mark.parametrize("name", NAMES)
def test_what_drag_takes_and_a_push_gives_is_what_the_energy_changes_by(name):
    """dH/dt = -drag sum p^2 / m + push . v m, integrated by Simpson's rule within every frame, in which the push is held."""
    config = VideoConfig(scene=name, drag=0.002, force=0.02, force_frames=6, n_frames=60)
    run = simulate(config, np.random.default_rng(5))
    scene = run.scene
    half = scenes.of(dataclasses.replace(config, n_frames=2))
    assert scene == half
    assert run.force.shape == (60, scene.push_dim)
    assert len(np.unique(run.force, axis=0)) == 10
    work = 0.0
    for frame in range(59):
        # the same motion in a finer unit of time: two halves of a frame give the middle
        _, p = scene._extrapolate(run.q[frame], run.p[frame], scene.masses * np.resize(run.force[frame], scene.n), 0.5)
        power = [
            (-scene.drag * x * x / scene.masses + np.resize(run.force[frame], scene.n) * x).sum()
            for x in (run.p[frame], p, run.p[frame + 1])
        ]
        work += (power[0] + 4 * power[1] + power[2]) / 6
    H = scene.energy(run.q, run.p)
    assert H[-1] - H[0] == pytest.approx(work, rel=1e-4)
    assert abs(work) > 1e-4 * np.abs(H).max()
    assert not scene.conservative


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", WORLDS)
def test_each_world_of_each_scene_stays_in_the_frame(name, of):
    config = VideoConfig(scene=name, n_frames=60, **world(of, name)["videos"])
    run = simulate(config, np.random.default_rng(0))
    assert (np.minimum(run.positions, 255 - run.positions) >= 20).all()
    assert (run.scene.drag > 0, run.scene.push > 0) == (of == "damped", of == "driven")
    assert (run.force is None) == (of != "driven")
    assert (of == "elastic") == (np.ptp(run.scene.energy(run.q, run.p)) < 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scene": "orbit", "restitution": 0.9}, "restitution is 0.9: in scene orbit nothing collides"),
        ({"scene": "orbit", "n_balls": 3}, "n_balls is 3, expected 2 in scene orbit"),
        ({"scene": "pendulum", "n_balls": 3}, "n_balls is 3, expected 1 in scene pendulum"),
        ({"scene": "pendulum", "radius": (9.0, 9.0)}, "radius has 2 values, expected 1"),
        ({"scene": "springs", "n_balls": 1}, "scene springs has 1 ball, expected at least 2"),
        ({"scene": "springs", "n_balls": 9}, "springs of 19.2 pixels between balls of radius 20: expected fewer or smaller"),
        ({"scene": "orbit", "force": 50.0}, "none of 192 random motions of scene orbit can be shown.* or force \\(50\\)"),
        ({"scene": "pendulum", "drag": 5.0}, "drag is 5 per frame, expected at most 4"),
        ({"scene": "pendulum", "radius": (60.0,)}, "none of 192 random motions"),
        ({"scene": "pendulum", "size": 63}, "size is 63, expected an even number"),
    ],
)
def test_what_a_scene_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        simulate(VideoConfig(n_frames=20, **changes), np.random.default_rng(0))


# videos and their ground truth


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_the_state(name, tmp_path):
    """The centroid of each ball's colour, in frames as they are drawn and as they are read back, is where the state says."""
    config = VideoConfig(scene=name, n_videos=1, n_frames=8, size=128, radius=(10.0,))
    path = generate(tmp_path, config)[0]
    truth = load_ground_truth(path)
    drawn = render(truth, config)
    decoded = read_video(path).frames
    assert drawn.shape == decoded.shape == (8, 128, 128, 3)
    y, x = np.mgrid[:128, :128]
    for frames, tolerance, loss in ((drawn, 0.05, 0.01), (decoded, 0.3, 0.1)):  # colours lose at rims as mp4
        for ball, channel in enumerate([0, 2][: len(truth.radii)]):  # red of cyan on black is 0, blue of red
            for frame, centre in zip(frames.astype(float), truth.scene.positions(truth.q)[:, ball], strict=True):
                # of a pixel, what is the ball's colour alone: rods are grey
                share = np.clip((frame.max(axis=2) - frame[..., channel]) / 255, 0, 1)
                share *= np.hypot(x - centre[0], y - centre[1]) < 14
                assert share.sum() == pytest.approx(math.pi * 10**2, rel=loss)
                found = (share * x).sum() / share.sum(), (share * y).sum() / share.sum()
                np.testing.assert_allclose(found, centre, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_files_alone_tell_energy_and_continuation(name, tmp_path):
    config = VideoConfig(scene=name, n_videos=2, n_frames=12, size=64, radius=(5.0,), drag=0.001, force=0.005, force_frames=3)
    paths = generate(tmp_path, config)
    run, other = (load_ground_truth(path) for path in paths)
    assert run.q.dtype == run.p.dtype == np.float64
    assert not np.array_equal(run.q[0], other.q[0])
    push = controls.read(controls.path_of(paths[0])).numpy()
    assert push.shape == (12, run.scene.push_dim)
    q, p = run.scene.path(run.q[4], run.p[4], 8, push[4:])
    np.testing.assert_allclose(q, run.q[4:], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(p, run.p[4:], rtol=1e-12, atol=1e-12)
    again = simulate(config, np.random.default_rng([config.video_seed, 1]))
    assert again.q.tobytes() == other.q.tobytes()
    other_seed = simulate(dataclasses.replace(config, video_seed=1), np.random.default_rng([1, 1]))
    assert not np.array_equal(other_seed.q[0], other.q[0])
    v = np.gradient(run.positions, axis=0)[1:-1]
    np.testing.assert_allclose(v, run.velocities[1:-1], atol=0.1 * np.abs(run.velocities).max())


def test_generating_goes_on_and_refuses_another_scene(tmp_path):
    config = VideoConfig(scene="orbit", n_videos=3, n_frames=6, size=64, radius=(5.0,))
    paths = generate(tmp_path, config)
    whole = [path.read_bytes() for path in paths]
    truth = files.load_tensors(paths[1].with_suffix(".safetensors"), "")[0]
    paths[1].with_suffix(".safetensors").unlink()
    paths[2].unlink()
    paths[2].with_suffix(".safetensors").unlink()
    before = paths[0].stat().st_mtime_ns
    assert generate(tmp_path, config) == paths
    assert [path.read_bytes() for path in paths] == whole
    assert paths[0].stat().st_mtime_ns == before
    again = files.load_tensors(paths[1].with_suffix(".safetensors"), "")[0]
    assert all(torch.equal(again[key], truth[key]) for key in ("q", "p", "positions", "velocities", "radii"))
    for change in ({"scene": "springs"}, {"drag": 0.001}, {"scene": "collisions"}):
        with pytest.raises(VideoError, match="was generated with other settings"):
            generate(tmp_path, dataclasses.replace(config, **change))


def spoil(path: Path, tensors: dict[str, torch.Tensor | None], scene: dict[str, object]) -> Path:
    """Write the ground truth beside a video again, with other tensors and other constants of its scene."""
    path = path.with_suffix(".safetensors")
    found, metadata = files.load_tensors(path, "")
    settings = json.loads(metadata["settings"])
    settings["scene"] |= scene
    settings["scene"] = {key: value for key, value in settings["scene"].items() if value is not None}
    held = {key: value for key, value in (found | tensors).items() if value is not None}
    files.save_tensors(path, held, metadata | {"settings": json.dumps(settings)})
    return path.with_suffix(".mp4")


@pytest.mark.parametrize(
    ("tensors", "scene", "message"),
    [
        ({"p": None}, {}, "expected p of springs, finite float64 \\[6, 4\\], found nothing"),
        ({"q": torch.zeros(6, 4)}, {}, "expected q of springs.* found torch.float32"),
        ({"q": torch.full((6, 4), math.inf).double()}, {}, "expected q of springs, finite"),
        ({"p": torch.zeros(6, 6).double()}, {}, "expected p of springs.* found torch.float64 \\[6, 6\\]"),
        ({"q": torch.zeros(6, 4).double()}, {}, "q and p are not the states of scene springs that its positions"),
        ({}, {"radii": [6.0, 5.0]}, "q and p are not the states of scene springs that its positions"),
        ({}, {"name": "double pendulum"}, "expected a scene named pendulum, springs, orbit, found 'double pendulum'"),
        ({}, {"stiffness": None}, "springs has size, radii, .* found"),
        ({}, {"wind": 1.0}, "springs has size, radii, .* found .*'wind'"),
        ({}, {"stiffness": -1.0}, "stiffness is -1.0, expected at least 0"),
        ({}, {"stiffness": 1e6}, "per frame, expected at most 4"),
        ({}, {"hold": "0.1"}, "hold: expected float, found '0.1'"),
        ({}, {"radii": []}, "radii: expected a list of numbers"),
        ({}, {"size": 10**6}, "a frame of size 1000000"),
    ],
)
def test_ground_truth_that_is_none_is_refused(spring_video, tmp_path, tensors, scene, message):
    for suffix in (".mp4", ".safetensors"):
        shutil.copy(spring_video.with_suffix(suffix), tmp_path)
    with pytest.raises(VideoError, match=message):
        load_ground_truth(spoil(tmp_path / spring_video.name, tensors, scene))


@pytest.fixture(scope="module")
def spring_video(tmp_path_factory):
    config = VideoConfig(scene="springs", n_videos=1, n_frames=6, size=64, radius=(5.0,))
    return generate(tmp_path_factory.mktemp("springs"), config)[0]


# states as latents

STATES = EncodeConfig(encoder="state")


@pytest.mark.parametrize("name", [*NAMES, "collisions"])
def test_latents_are_the_states_of_every_fourth_frame(name, tmp_path):
    config = VideoConfig(scene=name, n_videos=5, n_frames=30, size=96, radius=(6.0,))
    videos = generate(tmp_path / "v", config)
    seen = []
    encode_videos(videos, tmp_path / "l", STATES, progress=lambda *x: seen.append(x))
    assert seen[-1] == (40, 40)
    latents = load_latents(tmp_path / "l")
    for video, item in zip(videos, latents, strict=True):
        truth = load_ground_truth(video)
        assert item.metadata["label"] == "state (ground truth, no encoder)"
        assert (item.metadata["fps"], item.metadata["n_frames"]) == (30, 30)
        assert item.start_frame.tolist() == list(range(0, 30, 4))
        if name == "collisions":
            q, p = (truth.positions - 48).reshape(30, 4), truth.velocities.reshape(30, 4)
        else:
            q, p = truth.q, truth.p
        np.testing.assert_array_equal(item.latents, np.concatenate([q, p], axis=1)[::4].astype(np.float32))

    data = prepare(latents, DataConfig(window=4, test_fraction=0.4))
    n = data.latent_dim // 2
    assert not data.mean.any()
    assert data.std.unique().numel() == 2
    for part in (data.train[..., :n], data.train[..., n:]):  # one scale each, in which their root mean square is 1
        assert part.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert data.std[:n].unique().numel() == data.std[n:].unique().numel() == 1
    raw = prepare(latents, DataConfig(window=4, test_fraction=0.4, standardize=False))
    torch.testing.assert_close(data.test * data.std, raw.test)
    if name == "collisions":
        assert data.truth is None
        return
    for found in (data, raw):
        path = found.truth.rollout(found.test[:, 0], 3)
        torch.testing.assert_close(path, found.test.double(), rtol=0, atol=2e-5)
        H = found.truth.energy(found.test)
        torch.testing.assert_close(H, H[:, :1].expand_as(H), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(data.truth.energy(data.test), raw.truth.energy(raw.test), rtol=1e-5, atol=1e-7)
    first = load_ground_truth(tmp_path / "v" / f"{data.test_videos[0]}.mp4")
    shown = data.truth.positions(data.test[0])
    np.testing.assert_allclose(shown, first.positions[4 * data.test_starts[0] :][:16:4], atol=1e-4)
    drawn = data.truth.frames(data.test[0])
    assert np.abs(drawn.astype(int) - render(first, config)[4 * data.test_starts[0] :][:16:4]).max() <= 1
    assert not data.truth.frames(torch.full((1, 2 * n), math.inf)).any()


def test_a_driven_pendulums_control_is_what_acted_between_two_states(tmp_path):
    """Without gravity, the rate of a pendulum changes by just the sum of the torques: the recorded mean times the frames."""
    config = VideoConfig(scene="pendulum", n_videos=3, n_frames=30, size=64, radius=(4.0,), force=0.1, force_frames=7)
    videos = generate(tmp_path / "v", config)
    encode_videos(videos, tmp_path / "l", STATES)
    data = prepare(load_latents(tmp_path / "l"), DataConfig(window=4, test_fraction=0.34, control="recorded"), tmp_path / "v")
    assert data.control_dim == 1
    assert not data.truth.conservative
    free = dataclasses.replace(data.truth.scene, frequency=1e-9)
    truth = load_ground_truth(tmp_path / "v" / f"{data.test_videos[0]}.mp4")
    push = controls.read(controls.path_of(tmp_path / "v" / f"{data.test_videos[0]}.mp4")).numpy()
    start = 4 * data.test_starts[0]
    p = free.path(truth.q[start], truth.p[start], 13, push[start:])[1][::4]
    np.testing.assert_allclose(4 * data.test_control[0] * data.control_scale, np.diff(p, axis=0), rtol=1e-5, atol=1e-9)


def test_states_are_kept_remade_and_refused(tmp_path, monkeypatch):
    config = VideoConfig(scene="pendulum", n_videos=3, n_frames=9, size=64, radius=(4.0,))
    videos = generate(tmp_path / "v", config)
    latents = encode_videos(videos, tmp_path / "l", STATES)
    before = [path.stat().st_mtime_ns for path in latents]
    latents[1].unlink()
    encode_videos(videos, tmp_path / "l", STATES)
    after = [path.stat().st_mtime_ns for path in latents]
    assert (before[0], before[2]) == (after[0], after[2])
    encode_videos(videos, tmp_path / "l", dataclasses.replace(STATES, clip_stride=2))
    assert [len(item.latents) for item in load_latents(tmp_path / "l")] == [5] * 3
    other = generate(tmp_path / "w", dataclasses.replace(config, drag=0.01, n_videos=4))
    with pytest.raises(LatentError, match="are of different scenes: .*'drag': 0.0.* and .*'drag': 0.01"):
        encode_videos([*videos, other[3]], tmp_path / "x", STATES)
    with pytest.warns(UserWarning, match="also holds latents of 3 other videos"):
        encode_videos(other[3:], tmp_path / "l", dataclasses.replace(STATES, clip_stride=2))
    with pytest.raises(LatentError, match="encoded differently: scene is"):
        load_latents(tmp_path / "l")
    videos[0].with_suffix(".safetensors").rename(tmp_path / "kept")
    with pytest.raises(EncoderError, match="encoder state: no ground truth video_000.safetensors beside .*video_000.mp4"):
        encode_videos(videos, tmp_path / "y", STATES)
    short = generate(tmp_path / "s", dataclasses.replace(config, n_frames=5))
    shutil.copy(short[0].with_suffix(".safetensors"), videos[0].with_suffix(".safetensors"))
    with pytest.raises(LatentError, match="has 9 frames, and the ground truth beside it 5"):
        encode_videos(videos, tmp_path / "y", STATES)
    with pytest.raises(EncoderError, match="'state' stands for the true states of generated videos and no encoder"):
        load_encoder("state")


def test_a_latent_file_that_lies_about_its_scene_is_refused(tmp_path):
    scene = scene_of("orbit").to_dict()
    for index in range(3):
        write_one(tmp_path / f"{index}.safetensors", torch.randn(6, 6), scene=scene)
    with pytest.raises(HJEPAError, match="0.safetensors: states of scene orbit have 8 numbers, found \\[6\\]"):
        prepare(load_latents(tmp_path), DataConfig(window=3))
    for index in range(3):
        write_one(tmp_path / f"{index}.safetensors", torch.randn(6, 8), scene=scene | {"attraction": 1e12})
    with pytest.raises(HJEPAError, match="0.safetensors: scene: attraction: expected at most"):
        prepare(load_latents(tmp_path), DataConfig(window=3))


def test_the_command_line_from_scene_to_dream(tmp_path, capsys):
    small = ["--n-videos", "5", "--n-frames", "40", "--size", "64", "--radius", "5", "--window", "5", "--epochs", "1"]
    small += ["--batch-size", "4", "--timing-runs", "1", "--timing-warmup", "1", "--extended-steps", "10", "--models", "hnn"]
    run = tmp_path / "run"
    command = ["reproduce", "--scene", "pendulum", "--world", "damped", "--encoder", "state", *small, "--out", str(run)]
    assert main([*command, "--quiet", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "encoder: none, the latents are the true states of the videos (state)" in printed
    assert "state (ground truth, no encoder)" in printed
    assert json.loads((run / "summary.json").read_text())["probe"] is None
    config = json.loads((run / "config.json").read_text())
    assert (config["videos"]["scene"], config["videos"]["drag"], config["videos"]["restitution"]) == ("pendulum", 0.01, 1.0)
    assert config["train"]["friction"] == "conformal"
    best = run / "models" / "hnn" / "best.safetensors"
    checkpoint = checkpoints.load(best)
    assert not checkpoint.mean.any()
    found = truth_of(checkpoint.facts["encoding"], checkpoint.mean, checkpoint.std, "x")
    assert found.scene == load_ground_truth(run / "videos" / "video_000.mp4").scene
    trained = best.stat().st_mtime_ns
    again = ["train", str(run / "latents"), "--videos", str(run / "videos"), "--config", str(run / "config.json")]
    assert main([*again, "--models", "hnn", "--out", str(run), "--quiet", "--device", "cpu"]) == 0
    assert best.stat().st_mtime_ns == trained
    for source in (
        ["--latents", str(run / "latents" / "video_001.safetensors")],
        ["--video", str(run / "videos" / "video_001.mp4")],
    ):
        assert main(["dream", str(best), *source, "--steps", "3", "--out", str(tmp_path / source[0]), "--device", "cpu"]) == 0
    same = [files.load_tensors(tmp_path / f"{name}.safetensors", "")[0]["states"] for name in ("--latents", "--video")]
    assert torch.equal(*same)
    capsys.readouterr()
    assert main(["generate", "--scene", "orbit", "--restitution", "0.5", "--out", str(tmp_path / "n")]) == 2
    assert "nothing collides" in capsys.readouterr().err
    assert main(["encode", str(run / "videos"), "--encoder", "state", "--out", str(tmp_path / "l2"), "--quiet"]) == 0
