"""The hidden-space loop's GPU kernels; see `backends/torch.py` for the mathematics and `launch.py` for the caller.

A program owns ROWS samples and takes them through every step and sub-step, so that a rollout is one launch. What one layer
leaves for the next goes through a scratch of the program's own in global memory: tile by tile, with a barrier of the
program's threads between a phase that writes and the phase that reads.

Arrays of the kernels' own are padded with zeros: the widths to whole tiles, the samples to whole programs. The zeros of the
padded matrices keep the padding from reaching anything, so that only what the caller sees needs masks.

Layers are counted from 0 here: layer j has N[j] values padded and WIDTHS[j] real ones, and the first is the hidden space.
What is known when a kernel is compiled is the last argument, C: a `layout.Constants`.
"""

from .backward import backward_kernel
from .forward import forward_kernel
from .pack import pack_kernel

__all__ = ["backward_kernel", "forward_kernel", "pack_kernel"]
