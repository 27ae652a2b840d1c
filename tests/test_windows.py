"""Windows, splits without a leak, standardisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hjepa_fast.errors import LatentError, UsageError
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
