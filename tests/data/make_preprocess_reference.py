"""Make preprocess_reference.json: what transformers' own video processor makes of deterministic frames.

Needs torch, torchvision, transformers and pillow. Run as `python make_preprocess_reference.py [OUT]`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

SIZES = [(256, 256), (240, 320), (300, 200), (97, 131), (512, 512), (292, 292), (146, 200)]
CROPS = [256, 128]
N_FRAMES = 3
PLACES = [(0, 0, 0, 0), (0, 1, 7, 11), (1, 2, 63, 40), (2, 0, -1, -1), (2, 1, 50, -2)]


def make_frames(n_frames: int, height: int, width: int) -> np.ndarray:
    """Gradients, fine texture and hard edges from integer arithmetic alone: uint8 [T, H, W, 3]."""
    t, y, x, c = np.ogrid[:n_frames, :height, :width, :3]
    gradient = (3 * x + 2 * y + 17 * t + 71 * c) % 256
    texture = (x * x * 31 + y * 57 * (x + 3) + 29 * t + 113 * c) // 5 % 256
    edges = 255 * ((x // 13 + y // 9 + t + c) % 2)
    return np.where((x + y) % 96 < 32, gradient, np.where((x + y) % 96 < 64, texture, edges)).astype(np.uint8)


def main(out: Path) -> None:
    import torch
    import torchvision
    import transformers
    from transformers.models.vjepa2.video_processing_vjepa2 import VJEPA2VideoProcessor

    cases = []
    for height, width in SIZES:
        for crop in CROPS:
            processor = VJEPA2VideoProcessor(crop_size=crop)
            frames = make_frames(N_FRAMES, height, width)
            pixels = processor(list(frames), return_tensors="pt")["pixel_values_videos"][0]
            assert pixels.shape == (N_FRAMES, 3, crop, crop), pixels.shape
            values = pixels.numpy()
            assert values.dtype == np.float32
            samples = [[*place, float(values[place])] for place in PLACES]
            digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
            cases.append({"shape": [N_FRAMES, height, width, 3], "crop": crop, "sha256": digest, "samples": samples})
    made_by = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    lines = ",\n".join("    " + json.dumps(case) for case in cases)
    out.write_text(f'{{\n  "made_by": {json.dumps(made_by)},\n  "cases": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("preprocess_reference.json"))
