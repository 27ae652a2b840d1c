"""The hidden-space loop on NVIDIA GPUs: a rollout is one kernel launch, written in Triton (see `kernels`).

Triton is imported when a rollout first needs it. What the kernels do not do is the PyTorch loop's: programs (terms of q or p
alone, and thin networks by pairs of factors), mixed sub-steps, a linear H, float64, nothing to do.

A call can be captured in a CUDA graph once the same call has run before: that compiles the kernels. Nothing is kept on the
device between calls, and nothing here waits for it (`hidden_space` does where it checks that implicit steps have converged).

The shape of the kernels' programs is a table's. HJEPA_FAST_TUNE=1 in the environment has the first call of a size time a few
instead; then another process on the same chip may find other bits.
"""

from ..torch import product, run, run_back
from .launch import available, backward, forward, require, why_not

__all__ = ["available", "backward", "forward", "product", "require", "run", "run_back", "why_not"]
