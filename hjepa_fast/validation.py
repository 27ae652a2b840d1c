"""Argument checks of the public functions; each message shows the value that was found."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .hamiltonian import Hamiltonian
from .inputs import AUTOCAST

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LARGEST = 2**31
"""Above every number of steps."""


def as_state(z: Tensor, H: Hamiltonian, name: str) -> Tensor:
    """z [..., 2d], which must be of the network's dtype and on its device.

    Under autocast, where latents come out of other layers in a low precision, z may have any of autocast's dtypes; it is
    returned in float32, in which a rollout then runs.

    Raises
    ------
    TypeError
        Not a tensor, or a dtype other than float32, float64, bfloat16 or than the network's.
    ValueError
        Another last dimension, or another device than the network's.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(z).__name__}")
    weight = next((t for t in H.tensors if t.is_floating_point() or t.is_complex()), z)
    device = z.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = autocast and z.dtype in AUTOCAST and weight.dtype in AUTOCAST
    if autocast:
        z = z.float()
    if z.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64 or bfloat16, found {z.dtype}")
    if z.ndim == 0 or z.shape[-1] != H.latent_dim:
        raise ValueError(f"{name} must be [..., {H.latent_dim}] for this Hamiltonian, found {list(z.shape)}")
    if H.latent_dim < 2 or H.latent_dim % 2:
        raise ValueError(f"{name} must be [..., 2d], states z = [q, p] of an even size, found {list(z.shape)}")
    if z.dtype != weight.dtype and not autocast:
        raise TypeError(f"{name} and the Hamiltonian must share one dtype, found {z.dtype} and {weight.dtype}")
    if z.device != weight.device:
        raise ValueError(f"{name} and the Hamiltonian must be on one device, found {z.device} and {weight.device}")
    return z


def as_count(n: int, name: str, least: int = 0) -> int:
    """n as an int >= `least`. What is an integer by its type will do, NumPy's among them.

    Raises
    ------
    TypeError, ValueError
        Not an integer; too small.
    """
    if isinstance(n, (bool, float, Tensor)) or not (isinstance(n, int) or hasattr(n, "__index__")):
        raise TypeError(f"{name} must be an int, found {type(n).__name__} {n!r}")
    if not isinstance(n, int) and not isinstance(n, torch.SymInt):
        n = operator.index(n)
    if n < least:
        raise ValueError(f"{name} must be {f'>= {least}' if least != 1 else 'positive'}, found {n}")
    if n >= LARGEST:
        raise ValueError(f"{name} must be below 2^31, found {n if n < 2**64 else f'an int of {n.bit_length()} bits'}")
    return n


def as_flag(value: bool, name: str) -> bool:
    """value as a bool; 0 and 1 and NumPy's will do.

    Raises
    ------
    TypeError
        Anything else.
    """
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name} must be True or False, found {value!r}")
    return bool(value)


def as_number(x: float, name: str, what: str = "number") -> float:
    """x as a finite float. What is a real number by its type will do, NumPy's among them.

    Raises
    ------
    TypeError, ValueError
        Not a real number; not finite, or too large for a float.
    """
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a {what}, found {type(x).__name__}")
    try:
        x = float(x)
    except OverflowError:
        raise ValueError(f"{name} must be finite, found an int of {int(x).bit_length()} bits") from None
    if not -math.inf < x < math.inf:  # torch.compile traces this, but not math.isfinite of a number that it takes as dynamic
        raise ValueError(f"{name} must be finite, found {x}")
    return x


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
        dt, dtype = as_number(dt, "dt", "number or a tensor"), torch.promote_types(z0.dtype, torch.float32)
        if not -torch.finfo(dtype).max <= dt <= torch.finfo(dtype).max:
            raise ValueError(f"dt must be finite in {dtype}, found {dt}")
        return torch.full((1, 1), dt, dtype=dtype, device=z0.device)
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
    if not isinstance(value, str) or value not in choices:
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
    tolerance = as_number(tolerance, "tolerance")
    if not eps <= tolerance < 1:
        raise ValueError(f"tolerance must be from one unit of rounding ({eps:.1e} for {dtype}) to 1, found {tolerance}")
    return tolerance
