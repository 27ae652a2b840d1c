"""A small encoder that needs no download: untrained random features, not V-JEPA 2 weights.

It has the V-JEPA 2 architecture with random weights from a fixed seed (`make.py` makes them). Its latents carry what
random features carry; no number obtained with it says anything about V-JEPA 2.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder of the encoder's `config.json` and `model.safetensors`."""
