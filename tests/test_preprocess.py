"""Preprocessing equals transformers' own video processor, and an independent filter in numpy."""

from __future__ import annotations

import hashlib
import json
import platform
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_fast.errors import VideoError
from hjepa_fast.pipeline import preprocess as module
from hjepa_fast.pipeline.preprocess import MEAN, STD, preprocess, resized_shape

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "preprocess_reference.json").read_text())
make_frames = runpy.run_path(str(DATA / "make_preprocess_reference.py"))["make_frames"]
GREY_LEVEL = 1 / 255 / min(STD) * 1.001
"""A grey level after normalisation, with room for rounding."""


def _id(case):
    return f"{case['shape'][1]}x{case['shape'][2]}-{case['crop']}"


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=_id)
def test_equals_the_checkpoints_own_processor(case):
    pixels = preprocess(make_frames(*case["shape"][:3]), case["crop"])
    for *place, value in case["samples"]:
        assert abs(pixels[tuple(place)].item() - value) <= GREY_LEVEL
    # Without these vector instructions torch interpolates uint8 in floating point, and so does torchvision.
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and platform.machine() in ("x86_64", "AMD64"):
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == case["sha256"]


def _triangle_weights(size: int, target: int) -> np.ndarray:
    """[target, size]: a triangle as wide as the larger pixel, centred on each target pixel, normalised."""
    scale = size / target
    centre = (np.arange(target)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(size)[None] + 0.5 - centre) / max(scale, 1), 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "target"),
    [(256, 256, (292, 292)), (240, 320, (292, 389)), (97, 131, (292, 394)), (512, 512, (292, 292)), (300, 200, (438, 292))],
)
def test_agrees_with_an_independent_filter(height, width, target):
    frames = make_frames(2, height, width)
    assert resized_shape(height, width, 256) == target
    rows, columns = _triangle_weights(height, target[0]), _triangle_weights(width, target[1])
    resized = np.einsum("ij,tjkc,lk->tcil", rows, frames.astype(np.float64), columns, optimize=True)
    top, left = (target[0] - 256) // 2, (target[1] - 256) // 2
    crop = resized[:, :, top : top + 256, left : left + 256]
    grey = preprocess(frames, 256).double().numpy() * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    # each of the two passes rounds to a whole grey level: half a level twice, and the weights' fixed-point error
    assert np.abs(grey * 255 - crop).max() <= 1.01


@settings(max_examples=20, deadline=None)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    height=st.integers(20, 150),
    width=st.integers(20, 150),
    crop=st.sampled_from([16, 32, 64]),
)
def test_a_constant_image_stays_constant(colour, height, width, crop):
    frames = np.broadcast_to(np.array(colour, dtype=np.uint8), (2, height, width, 3)).copy()
    expected = (np.array(colour) / 255 - np.array(MEAN)) / np.array(STD)
    pixels = preprocess(frames, crop)
    assert pixels.shape == (2, 3, crop, crop)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), np.broadcast_to(expected[:, None, None], pixels.shape), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(146, 146), (146, 181), (211, 146)])
def test_the_crop_is_central_and_an_equal_size_is_not_resized(height, width):
    # 128 asks for a shortest edge of 146: these frames keep their pixels, so every value shows where it came from
    top, left = int((height - 128) / 2), int((width - 128) / 2)
    y, x = np.mgrid[:height, :width]
    frames = np.stack([y, x, 0 * x], axis=2).astype(np.uint8)[None]
    grey = preprocess(frames, 128).numpy() * np.array(STD)[:, None, None] * 255 + np.array(MEAN)[:, None, None] * 255
    np.testing.assert_allclose(grey[0, 0], y[top : top + 128, left : left + 128], atol=1e-3)
    np.testing.assert_allclose(grey[0, 1], x[top : top + 128, left : left + 128], atol=1e-3)


@pytest.mark.parametrize("crop", [32, 64])
@pytest.mark.parametrize(
    ("height", "width"), [(10, 170), (2, 300), (300, 2), (700, 11), (100, 1700), (1, 60), (36, 600), (1, 17)]
)
def test_only_the_crop_of_an_extreme_frame_is_resized(crop, height, width, monkeypatch):
    frames = make_frames(2, height, width)
    with monkeypatch.context() as patch:
        patch.setattr(module, "EXTREME", float("inf"))
        whole = module.resize_and_crop(frames, crop).int()
    part = module.resize_and_crop(frames, crop).int()
    assert part.shape == (2, 3, crop, crop)
    # a grey level for the fixed-point weights of each of the two passes
    assert (part - whole).abs().max() <= 2
    assert (part - whole).abs().float().mean() < 0.2
    rows, columns = (
        _triangle_weights(size, target)[(target - crop) // 2 :][:crop]
        for size, target in zip((height, width), resized_shape(height, width, crop), strict=True)
    )
    exact = np.einsum("ij,tjkc,lk->tcil", rows, frames.astype(np.float64), columns, optimize=True)
    assert np.abs(part.numpy() - exact).max() <= 1.01


@pytest.mark.parametrize(("height", "width"), [(1, 30000), (30000, 1), (4, 20000)])
def test_an_extreme_frame_is_never_resized_as_a_whole(height, width, monkeypatch):
    # 292 rows of 8.7 million columns would be 7.7 GB
    monkeypatch.setattr(module, "_resize", None)
    y, x = np.mgrid[:height, :width]
    grey = np.repeat(255 * (x / width if width > height else y / height)[None, :, :, None], 3, axis=3)
    found = module.resize_and_crop(grey.astype(np.uint8), 256)
    assert found.shape == (1, 3, 256, 256)
    assert found.min() >= 126
    assert found.max() <= 128


def test_frames_up_to_sixteen_times_as_wide_take_the_published_way(monkeypatch):
    monkeypatch.setattr(module, "_crop_first", None)
    for height, width in ((10, 160), (160, 10)):
        assert preprocess(make_frames(1, height, width), 32).shape == (1, 3, 32, 32)


def test_published_frames_lose_the_published_margin():
    # 256 px become 292 and lose 18 on each side: 15.8 px of the frame
    assert resized_shape(256, 256, 256) == (292, 292)
    assert pytest.approx(15.8, abs=0.05) == (292 - 256) / 2 * 256 / 292


def test_tensors_and_arrays_are_the_same_and_unchanged():
    frames = make_frames(2, 90, 120)
    before = frames.copy()
    assert torch.equal(preprocess(frames, 64), preprocess(torch.from_numpy(frames), 64))
    np.testing.assert_array_equal(frames, before)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
    ids=["float", "one frame", "channels first", "empty"],
)
def test_other_frames_are_refused(frames):
    with pytest.raises(VideoError, match="uint8 of shape"):
        preprocess(frames, 32)
