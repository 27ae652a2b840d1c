"""Windows, splits without a leak, standardisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hjepa_fast.errors import LatentError, UsageError
from hjepa_fast.pipeline import controls
from hjepa_fast.pipeline.config import DataConfig
from hjepa_fast.pipeline.latents import load_latents
from hjepa_fast.pipeline.windows import prepare
from synthetic import LABEL, write_latents, write_one

RAW = DataConfig(window=4, standardize=False)


def counted(folder, n_videos, n_clips, dim=2):
    """Latents that name their place: the first number is the video, the second the clip."""
    for video in range(n_videos):
        clips = torch.arange(n_clips).float()
        write_one(folder / f"v{video}.safetensors", torch.stack([torch.full_like(clips, video), clips], dim=1))
    return load_latents(folder)


def test_windows_are_consecutive_latents(tmp_path):
    data = prepare(counted(tmp_path, 5, 7), RAW)
    windows = torch.cat((data.train, data.test))
    assert windows.shape == (5 * 4, 4, 2)
    assert torch.equal(windows[:, :, 1], windows[:, :1, 1] + torch.arange(4.0))
    assert (windows[:, :, 0] == windows[:, :1, 0]).all()
    assert len({tuple(w[0].tolist()) for w in windows}) == 20
    for window, name, start in zip(data.test, data.test_videos, data.test_starts, strict=True):
        assert (name, start) == (f"v{int(window[0, 0])}", int(window[0, 1]))


def test_published_sizes(tmp_path):
    """50 videos of 34 latents give 950 windows: 760 for training and 190 for testing, whichever the split."""
    latents = counted(tmp_path, 50, 34)
    for split in ("video", "window"):
        data = prepare(latents, DataConfig(split=split, standardize=False))
        assert (len(data.train), len(data.test)) == (760, 190)


def test_split_by_video_does_not_leak(tmp_path):
    latents = counted(tmp_path, 10, 7)
    data = prepare(latents, RAW)
    videos = [set(part[:, 0, 0].tolist()) for part in (data.train, data.test)]
    assert not videos[0] & videos[1]
    assert len(videos[1]) == 2
    by_window = prepare(latents, dataclasses.replace(RAW, split="window"))
    assert set(by_window.train[:, 0, 0].tolist()) & set(by_window.test[:, 0, 0].tolist())


def test_split_depends_on_its_seed_only(tmp_path):
    latents = counted(tmp_path, 10, 7)
    first, same = prepare(latents, RAW), prepare(latents, RAW)
    assert torch.equal(first.test, same.test)
    assert first.fingerprint() == same.fingerprint()
    others = [prepare(latents, dataclasses.replace(RAW, split_seed=seed)) for seed in range(4)]
    assert len({other.fingerprint() for other in others}) > 1


def test_standardisation_uses_training_statistics(tmp_path):
    latents = load_latents(write_latents(tmp_path, n_videos=10))
    raw, data = prepare(latents, RAW), prepare(latents, DataConfig(window=4))
    torch.testing.assert_close(data.train.mean(dim=(0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.std(dim=(0, 1)), torch.ones(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.test * data.std + data.mean, raw.test)
    centre = raw.train.mean(dim=(0, 1))
    assert raw.variance == pytest.approx((raw.test[:, 1:] - centre).square().mean().item(), rel=1e-6)
    assert (data.label, data.encoding["model"]) == (LABEL, "test")


def test_a_constant_dimension_is_not_blown_up(tmp_path):
    for video in range(5):
        latents = torch.randn(6, 4)
        latents[:, 2] = 7.0
        write_one(tmp_path / f"v{video}.safetensors", latents)
    data = prepare(load_latents(tmp_path), DataConfig(window=3))
    assert data.std[2] == 1
    assert data.test[:, :, 2].abs().max() < 1e-5


def test_short_videos_are_left_out_and_said(tmp_path):
    write_latents(tmp_path)
    write_one(tmp_path / "short.safetensors", torch.randn(3, 6))
    with pytest.warns(UserWarning, match="1 videos have fewer than 4 latents and are left out: short"):
        data = prepare(load_latents(tmp_path), RAW)
    assert len(data.train) + len(data.test) == 5 * 9


def test_the_control_of_a_step_is_the_mean_over_its_frames():
    """By the sums as written, and by what it is for: clip means of a velocity with v' = u change by stride * u."""
    control = torch.randn(23, 2, dtype=torch.float64)
    starts, length = torch.tensor([0, 4, 8, 15]), 6
    found = controls.of_steps(control, starts, length, "x")
    velocity = torch.cat((torch.zeros(1, 2, dtype=torch.float64), control.cumsum(0)))  # at frame t: the sum of what was held
    for i in range(3):
        a, b = starts[i].item(), starts[i + 1].item()
        sums = sum(control[t] for k in range(length) for t in range(a + k, b + k))
        torch.testing.assert_close(found[i], sums / (length * (b - a)))
        change = velocity[b : b + length].mean(0) - velocity[a : a + length].mean(0)
        torch.testing.assert_close(found[i] * (b - a), change)
    assert controls.of_steps(control[:3], starts[:1], length, "x").shape == (0, 2)  # a video shorter than its clip
    for wrong in ([0, 4, 4], [4, 0], [0, 18]):
        with pytest.raises(LatentError, match="x: expected clips of 6 frames"):
            controls.of_steps(control, torch.tensor(wrong), length, "x")


def recorded(folder, n_videos=5, n_frames=60, size=2):
    """A control beside every video: component m of frame t is (video + 1) (t + 1) (-1)^m."""
    for video in range(n_videos):
        rows = (video + 1) * torch.arange(1, n_frames + 1.0)[:, None] * torch.tensor([1.0, -1.0, 1.0])[:size]
        controls.write(folder / f"video_{video:03d}.control.json", rows.double(), "test")
    return folder


@pytest.mark.parametrize("standardize", [True, False])
def test_controls_go_with_their_windows(tmp_path, standardize):
    latents, videos = load_latents(write_latents(tmp_path / "l")), recorded(tmp_path / "v")
    config = dataclasses.replace(RAW, control="recorded", standardize=standardize)
    data = prepare(latents, config, videos)
    assert data.control_dim == 2
    assert data.train_control.shape == (*data.train.shape[:1], 3, 2)
    raw = data.test_control * data.control_scale
    for control, video, start in zip(raw, data.test_videos, data.test_starts, strict=True):
        # frames a .. a + 18 of a control linear in time, where a clip of 16 frames moves by 4: its value at a + 9
        first = torch.tensor([start, start + 1, start + 2]) * 4 + 9 + 1.0
        torch.testing.assert_close(control[:, 0], (int(video[-3:]) + 1) * first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(control[:, 1], -control[:, 0])
    rms = data.train_control.square().mean((0, 1)).sqrt()
    torch.testing.assert_close(rms if standardize else data.control_scale, torch.ones(2))
    plain = prepare(latents, dataclasses.replace(config, control="none"))
    assert plain.control_dim == 0
    assert torch.equal(plain.train, data.train)
    assert plain.fingerprint() != data.fingerprint()  # other controls are other data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no control of video_003: expected .*video_003.control.json"),
        (lambda path: path.write_text('{"control": [[1, 2], [3, 4]]}'), "has 2 rows, expected one for each of the 60 frames"),
        (lambda path: controls.write(path, torch.ones(60, 3), ""), "video_000 has 2 numbers a row, video_003 3"),
        (lambda path: path.write_text('{"control": [[1, 2], [3]]}'), "found 2 in row 0 and 1 in row 1"),
    ],
)
def test_controls_that_do_not_fit_are_named(tmp_path, spoil, message):
    latents, videos = load_latents(write_latents(tmp_path / "l")), recorded(tmp_path / "v")
    config = dataclasses.replace(RAW, control="recorded")
    with pytest.raises(UsageError, match="name their folder with --videos"):
        prepare(latents, config)
    spoil(videos / "video_003.control.json")
    with pytest.raises(LatentError, match=message):
        prepare(latents, config, videos)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 1}, UsageError, "at least 2 latents .* found 1"),
        ({"window": 13}, LatentError, "too few clips .* 13 latents: the longest video has 12"),
        ({"test_fraction": 1.0}, UsageError, "between 0 and 1, found 1.0"),
        ({"test_fraction": 0.01}, UsageError, "5 would be left for training and 0 for testing"),
    ],
)
def test_settings_that_leave_nothing_are_named(tmp_path, change, error, message):
    latents = load_latents(write_latents(tmp_path))
    with pytest.raises(error, match=message):
        prepare(latents, dataclasses.replace(RAW, **change))
