"""The hidden-space loop on NVIDIA GPUs: a rollout is one kernel launch, written in Triton (see `kernels`).

Triton is imported when a rollout first needs it. What the kernels do not do is the PyTorch loop's: programs (terms of q or p
alone, and thin networks by pairs of factors), mixed sub-steps, a linear H, float64, nothing to do.

A call can be captured in a CUDA graph once the same call has run before: that compiles the kernels and copies the scheme's
coefficients to the device. Nothing else here waits for the device (`hidden_space` does where it checks that implicit steps
have converged), but for the first call of a size, which times a few shapes of the kernel's program. HJEPA_FAST_TUNE=0 in the
environment takes the shape from a table instead: then another process on the same chip finds the same bits.
"""

from ..torch import product, run, run_back
from .launch import available, backward, forward, require, why_not

__all__ = ["available", "backward", "forward", "product", "require", "run", "run_back", "why_not"]
