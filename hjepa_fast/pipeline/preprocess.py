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

    Raises
    ------
    VideoError
        `frames` is not uint8 of that shape, or is empty.
    """
    video = torch.as_tensor(frames)
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.numel() == 0:
        raise VideoError(f"frames must be uint8 of shape [T, H, W, 3] and not empty, found {video.dtype} {tuple(video.shape)}")
    video = _resize(video.permute(0, 3, 1, 2), crop)
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
