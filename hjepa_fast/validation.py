"""Argument checks of the public functions; each message shows the value that was found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .hamiltonian import Hamiltonian

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_state(z: Tensor, H: Hamiltonian, name: str) -> None:
    """z must be [..., 2d] in the network's dtype and on its device.

    Raises
    ------
    TypeError
        Not a tensor, or a dtype other than float32, float64, bfloat16 or than the network's.
    ValueError
        Another last dimension, or another device than the network's.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(z).__name__}")
    if z.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64 or bfloat16, found {z.dtype}")
    if z.ndim == 0 or z.shape[-1] != H.latent_dim:
        raise ValueError(f"{name} must be [..., {H.latent_dim}] for this Hamiltonian, found {list(z.shape)}")
    weight = H.tensors[0]
    if z.dtype != weight.dtype:
        raise TypeError(f"{name} and the Hamiltonian must share one dtype, found {z.dtype} and {weight.dtype}")
    if z.device != weight.device:
        raise ValueError(f"{name} and the Hamiltonian must be on one device, found {z.device} and {weight.device}")


def check_steps(n_steps: int) -> None:
    """n_steps must be an int >= 0.

    Raises
    ------
    TypeError, ValueError
        Not an int; negative.
    """
    if isinstance(n_steps, (bool, float, Tensor)):
        raise TypeError(f"n_steps must be an int, found {type(n_steps).__name__} {n_steps!r}")
    if n_steps < 0:
        raise ValueError(f"n_steps must be >= 0, found {n_steps}")


def as_step_sizes(dt: float | Tensor, z0: Tensor, n_steps: int) -> Tensor:
    """dt as a tensor [1 or B, 1 or n_steps], B being the product of z0's leading sizes; float64 if z0 is, else float32.

    A number or 0-d tensor serves every step; [n_steps] is per step; [..., 1] per sample; [..., n_steps] both.
    A tensor is never read back to the host.

    Raises
    ------
    TypeError
        Not a number or floating-point tensor.
    ValueError
        A number that is not finite, a shape that does not broadcast, another device.
    """
    if not isinstance(dt, Tensor):
        if isinstance(dt, bool) or not isinstance(dt, (int, float)):
            raise TypeError(f"dt must be a number or a tensor, found {type(dt).__name__}")
        if not math.isfinite(dt):
            raise ValueError(f"dt must be finite, found {dt}")
        return torch.full((1, 1), dt, dtype=torch.promote_types(z0.dtype, torch.float32), device=z0.device)
    if not dt.is_floating_point():
        raise TypeError(f"dt must be a floating-point tensor, found {dt.dtype}")
    if dt.device != z0.device:
        raise ValueError(f"dt and z0 must be on one device, found {dt.device} and {z0.device}")
    target = (*z0.shape[:-1], n_steps)
    offset = len(target) - dt.ndim
    if offset < 0 or any(size not in (1, target[offset + i]) for i, size in enumerate(dt.shape)):
        raise ValueError(
            f"dt must be 0-d, [n_steps], [..., 1] per sample or [..., n_steps], that is, broadcast to {list(target)}; "
            f"found {list(dt.shape)}"
        )
    dt = dt.to(torch.promote_types(z0.dtype, torch.float32))
    if dt.ndim < 2:
        return dt.reshape(1, -1)
    return dt.expand(*z0.shape[:-1], dt.shape[-1]).reshape(math.prod(z0.shape[:-1]), dt.shape[-1])


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """`value` must be one of `choices`.

    Raises
    ------
    ValueError
        It is not; the message lists them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; found {value!r}")


def as_tolerance(tolerance: float | None, dtype: torch.dtype) -> float:
    """The tolerance given, or 4 units of rounding of `dtype`.

    Raises
    ------
    ValueError
        Not positive, or below one unit of rounding, which no solution can be sure to reach.
    """
    eps = torch.finfo(dtype).eps
    if tolerance is None:
        return 4 * eps
    if not eps <= tolerance < 1:
        raise ValueError(f"tolerance must be from one unit of rounding ({eps:.1e} for {dtype}) to 1, found {tolerance}")
    return tolerance


def check_positive(n: int, name: str) -> None:
    """n must be an int > 0.

    Raises
    ------
    TypeError, ValueError
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{name} must be an int, found {type(n).__name__} {n!r}")
    if n < 1:
        raise ValueError(f"{name} must be positive, found {n}")


def check_finite(x: float, name: str) -> None:
    """x must be a finite number.

    Raises
    ------
    ValueError
    """
    if not -math.inf < x < math.inf:  # torch.compile traces this, but not math.isfinite of a number it takes as dynamic
        raise ValueError(f"{name} must be finite, found {x}")
