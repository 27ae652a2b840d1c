"""Small latent folders with simple dynamics, for tests of what comes after encoding."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hjepa_fast.pipeline import files

LABEL = "test encoder"


def write_latents(folder: Path, n_videos: int = 5, n_clips: int = 12, dim: int = 6, seed: int = 0) -> Path:
    """Latents that turn at a constant rate in each plane (q_i, p_i), from random starts."""
    generator = torch.Generator().manual_seed(seed)
    for video in range(n_videos):
        phase = torch.rand(dim // 2, generator=generator) * 6.28
        angle = phase + 0.4 * torch.arange(n_clips)[:, None]
        latents = torch.cat((angle.cos(), angle.sin()), dim=1)
        write_one(folder / f"video_{video:03d}.safetensors", latents)
    return folder


def write_one(path: Path, latents: torch.Tensor, **provenance: object) -> None:
    recipe = {"model": "test", "clip_frames": 16, "clip_stride": 4, "source": path.stem, **provenance}
    files.save_tensors(
        path,
        {"latents": latents.float(), "start_frame": torch.arange(len(latents)) * 4},
        {"provenance": json.dumps(recipe), "label": LABEL, "fps": "30.0", "n_frames": str(len(latents) * 4 + 12)},
    )
