"""Dreams in motion: what is written can be read, with the right frames, and shows what it says."""

from __future__ import annotations

import dataclasses

import av
import numpy as np
import pytest
import torch

from hjepa_fast.cli import main
from hjepa_fast.errors import LatentError
from hjepa_fast.pipeline import animation, checkpoints, figures, files, latents, stage
from hjepa_fast.pipeline.animation import Motion
from hjepa_fast.pipeline.videos import Trajectories
from synthetic import write_latents

STEPS = 4
SIZE = (800, 448)


def motion(**changes):
    path = np.stack([np.linspace(20, 60, STEPS + 1), np.full(STEPS + 1, 32.0)], axis=1)[:, None]
    images = [np.zeros((64, 64, 3), dtype=np.uint8), np.full((64, 64, 3), 255, dtype=np.uint8)]
    known = Motion(path, path[:3] + 1, images, (64.0, 64.0), (6.0,), "a title $_{", "about", "dream", "the true clip", 0.2)
    return dataclasses.replace(known, **changes)


def decoded(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), float(rate)


def test_both_files_are_read_back(tmp_path):
    paths = animation.write(tmp_path / "a.b", motion())
    assert [path.name for path in paths] == ["a.b.mp4", "a.b.gif"]
    for path in paths:
        frames, rate = decoded(path)
        assert frames.shape == (STEPS + 1, SIZE[1], SIZE[0], 3)
        assert rate == pytest.approx(5)
        right = frames[:, 100:300, 500:750].reshape(STEPS + 1, -1, 3)
        # a black frame, a white one, then none
        assert right[0].mean() < 20 < 235 < right[1].mean()
        blue = [(np.abs(frame.astype(int) - [0, 114, 178]).sum(axis=2) < 110).nonzero()[1].mean() for frame in frames]
        assert np.diff(blue).min() > 20, "the body moves to the right"


def test_what_is_not_there_is_not_shown():
    alone = motion(images=[], true=None, size=None, radii=(), seconds=None)
    frames = animation.render(alone)
    assert len(frames) == STEPS + 1
    assert frames[0].shape == (SIZE[1], SIZE[0], 3)
    beside = np.stack(animation.render(motion(true=None, size=None, radii=())))
    right = beside[:, 100:300, 500:750].reshape(STEPS + 1, -1, 3)
    assert right[0].mean() < 20 < 235 < right[1].mean(), "a clip is seen beside latents that are no pixels"
    broken = motion().predicted.copy()
    broken[3] = np.nan
    assert len(animation.render(motion(predicted=broken, images=[]))) == STEPS + 1


def test_a_probe_reads_positions_that_are_linear_in_the_latents(tmp_path):
    videos = latents.load_latents(write_latents(tmp_path, n_videos=7))
    rng = np.random.default_rng(0)
    weights, offset = rng.normal(size=(6, 4)), rng.normal(size=4)

    def truth(video):
        """Positions that are linear in states that go on turning within a clip; their means are then linear in its latent."""
        q, p = video.latents[0].double().chunk(2)
        phase = torch.atan2(p, q)
        angle = phase + 0.1 * torch.arange(video.metadata["n_frames"])[:, None]
        states = torch.cat([angle.cos(), angle.sin()], dim=1).numpy()
        return (states @ weights + offset).reshape(-1, 2, 2)

    found = latents.readout(videos, [Trajectories(truth(v), np.zeros_like(truth(v)), np.ones(2)) for v in videos])
    assert found.weights.shape == (6, 4)
    assert found.r2 > 0.9999
    wanted = latents.clip_means(videos[0], truth(videos[0]))
    np.testing.assert_allclose(found(videos[0].latents.double().numpy()), wanted, atol=1e-2)
    truths = [Trajectories(truth(v)[:, : 1 + (v.name != "video_004")], truth(v)[:, :1], np.ones(2)) for v in videos]
    with pytest.raises(LatentError, match="ground truth of video_004 is of another number of bodies than that of video_000"):
        latents.readout(videos, truths)


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A run of a pendulum by its true states."""
    out = tmp_path_factory.mktemp("runs") / "pendulum"
    options = ("--n-frames", 44, "--epochs", 1, "--models", "baseline", "--quiet", "--window", 4, "--batch-size", 8,
               "--extended-steps", 12, "--timing-runs", 1, "--timing-warmup", 0)  # fmt: skip
    scene = ("--scene", "pendulum", "--encoder", "state", "--n-videos", 5, "--size", 64, "--radius", 6)
    save = figures.save
    with pytest.MonkeyPatch.context() as patch:  # the other figures are those of every run, and take most of the time
        patch.setattr(figures, "save", lambda figure, stem: save(figure, stem) if stem.name == "motion" else [])
        assert main(list(map(str, ("reproduce", *scene, *options, "--out", out)))) == 0
    return out


def dream(out, *options):
    return main(list(map(str, ("dream", *options, "--steps", 8, "--out", out))))


def test_a_dream_of_true_states_stands_beside_the_exact_motion(pendulum, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(animation, "write", lambda stem, motion: seen.append(motion) or [])
    run = pendulum
    checkpoint = run / "models" / "baseline" / "best.safetensors"
    assert dream(tmp_path / "d", checkpoint, "--latents", run / "latents" / "video_002.safetensors", "--index", 2) == 0
    assert dream(tmp_path / "v", checkpoint, "--video", run / "videos" / "video_002.mp4", "--index", 2) == 0
    truth = files.load_tensors(run / "videos" / "video_002.safetensors", "truth")[0]["positions"].numpy()
    states = files.load_tensors(tmp_path / "d.safetensors", "dream")[0]["states"]
    for shown in seen:
        assert shown.true.shape == shown.predicted.shape == (9, 1, 2)
        np.testing.assert_allclose(shown.true, truth[8:41:4], atol=1e-3)
        assert len(shown.images) == 9
    # the pendulum hangs from the middle of 64 pixels; its angle is q
    arm = seen[0].predicted[:, 0] - 31.5
    np.testing.assert_allclose(np.arctan2(arm[:, 0], arm[:, 1]), states[:, 0].numpy(), atol=1e-4)
    summary = files.read_json(run / "summary.json", "summary")
    assert summary["motion"]["horizons"] == [3, 12]
    assert (run / "figures" / "motion.png").exists()
    assert (run / "summary.md").read_text().startswith("**")
    assert summary["step"] == {"frames": 4, "fps": 30.0, "seconds": pytest.approx(4 / 30)}


def test_a_long_dream_skips_steps(pendulum, monkeypatch):
    monkeypatch.setattr(stage, "MOST_FRAMES", 3)
    path = pendulum / "models" / "baseline" / "best.safetensors"
    sequence = latents.read_latents(pendulum / "latents" / "video_001.safetensors")
    states = sequence.latents[:9].clone()
    shown = stage.of(checkpoints.load(path), path, states, sequence, 0, "t", 0.1)
    assert (shown.every, len(shown.predicted), len(shown.true), len(shown.images)) == (3, 3, 3, 3)
    monkeypatch.setattr(stage, "MOST_PIXELS", 16)
    thin = stage.of(checkpoints.load(path), path, states, sequence, 0, "t", 0.1)
    assert (thin.images[0].shape, thin.size) == ((16, 16, 3), (64, 64))
    torch.testing.assert_close(torch.from_numpy(shown.predicted), torch.from_numpy(shown.true), atol=1e-3, rtol=0)
