"""Video frames to the encoder's input, bit for bit as transformers' `VJEPA2VideoProcessor` makes it."""

from __future__ import annotations

import platform

import numpy as np
import torch
from torch import Tensor

from ..errors import VideoError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
VERSION = "shortest edge to int(crop * 256 / 224), antialiased bilinear on uint8; centre crop; ImageNet mean and std"
"""What is done to a frame; recorded beside every latent."""

EXTREME = 16
"""Long side over short side from which only what the crop needs is resized; elsewhere the whole frame, as published."""


def resized_shape(height: int, width: int, crop: int) -> tuple[int, int]:
    """Height and width that a frame is resized to before a centre crop of `crop` pixels."""
    short = int(crop * 256 / 224)
    long = int(short * max(height, width) / min(height, width))
    return (long, short) if width <= height else (short, long)


def preprocess(frames: Tensor | np.ndarray, crop: int) -> Tensor:
    """Resize, centre-crop and normalise frames: uint8 [T, H, W, 3] RGB to float32 [T, 3, crop, crop]."""
    return normalize(resize_and_crop(frames, crop))


def resize_and_crop(frames: Tensor | np.ndarray, crop: int) -> Tensor:
    """The square part of each frame that the encoder sees.

    Parameters
    ----------
    frames : uint8 tensor or array, [T, H, W, 3]
        RGB frames.
    crop : int
        Side of the encoder's square input in pixels.

    Returns
    -------
    uint8 tensor, [T, 3, crop, crop]
        Of frames more than EXTREME times longer than wide (or wider than long), equal to the processor's within the
        rounding of its two passes, a grey level each.

    Raises
    ------
    VideoError
        `frames` is not uint8 of that shape, or is empty.
    """
    video = torch.as_tensor(frames)
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.numel() == 0:
        raise VideoError(f"frames must be uint8 of shape [T, H, W, 3] and not empty, found {video.dtype} {tuple(video.shape)}")
    video = video.permute(0, 3, 1, 2)
    height, width = video.shape[-2:]
    if max(height, width) > EXTREME * min(height, width):
        return _crop_first(video, crop)
    video = _resize(video, crop)
    top, left = ((size - crop) // 2 for size in video.shape[-2:])
    return video[..., top : top + crop, left : left + crop]


def normalize(frames: Tensor) -> Tensor:
    """`(x - 255 mean) / (255 std)` with ImageNet's statistics: uint8 [..., 3, H, W] to float32, on the same device."""
    # Mean and std are scaled in float32, as the processor does; scaling them in float64 first changes the last bit.
    mean, std = ((torch.tensor(values) * 255.0).view(3, 1, 1).to(frames.device) for values in (MEAN, STD))
    return frames.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def _resize(video: Tensor, crop: int) -> Tensor:
    height, width = video.shape[-2:]
    shape = resized_shape(height, width, crop)
    if shape == (height, width):
        return video
    # torchvision interpolates uint8 itself only where torch has vectorised code for it, and rounds floats elsewhere.
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    video = video if native else video.to(torch.float32)
    video = torch.nn.functional.interpolate(video, size=shape, mode="bilinear", align_corners=False, antialias=True)
    return video if native else video.round_().to(torch.uint8)


def _crop_first(video: Tensor, crop: int) -> Tensor:
    """The processor's two passes for the pixels of the crop alone: the resized frame would be thousands of times as large."""
    height, width = video.shape[-2:]
    rows, columns = (
        _weights(size, target, crop) for size, target in zip((height, width), resized_shape(height, width, crop), strict=True)
    )
    (top, bottom), (left, right) = (_span(weights) for weights in (rows, columns))
    part = video[..., top:bottom, left:right].to(torch.float32)
    for weights in (columns[:, left:right].T, rows[:, top:bottom].T):
        part = (part @ weights).round_().clamp_(0, 255).transpose(-1, -2)
    return part.to(torch.uint8)


def _weights(size: int, target: int, crop: int) -> Tensor:
    """Antialiased bilinear weights, float32 [crop, size], of the central `crop` of `target` pixels made of `size`."""
    scale = size / target
    first = (target - crop) // 2
    centre = (torch.arange(first, first + crop, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centre).abs() / max(scale, 1.0)
    weights = (1 - distance).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(torch.float32)


def _span(weights: Tensor) -> tuple[int, int]:
    used = weights.any(dim=0).nonzero()
    return int(used[0]), int(used[-1]) + 1
