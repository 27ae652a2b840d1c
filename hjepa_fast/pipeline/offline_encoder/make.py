"""Make the offline encoder: `python -m hjepa_fast.pipeline.offline_encoder.make OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SEED = 42
# Transformers' default range of 0.02 would leave the tokens nearly unmixed by attention and MLPs.
INITIALIZER_RANGE = 0.1


def make(out: Path) -> None:
    """Write `config.json` and `model.safetensors` (float16, under 4 MiB) to the folder `out`."""
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        patch_size=16,
        crop_size=128,
        frames_per_clip=16,
        tubelet_size=2,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        mlp_ratio=4.0,
        initializer_range=INITIALIZER_RANGE,
        # The predictor is never run; the architecture wants one.
        pred_hidden_size=6,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=0,
        pred_num_mask_tokens=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = VJEPA2Model(config)
    model.half().save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {__spec__.name} OUT")
    make(Path(sys.argv[1]))
