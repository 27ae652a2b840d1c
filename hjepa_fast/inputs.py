"""What enters a Hamiltonian beside the state: a control u, which may change from step to step; a condition c, which may not.

H(z, u, c) is a network whose first layer reads [z, u, c], so each adds a row of numbers to the first pre-activation:

    a = W z + U u + C c + b

and U u + C c + b is a bias, one for each sample: nothing else about a rollout changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("control", "condition")


def product(x: Tensor, W: Tensor) -> Tensor:
    """x W^T in the dtype of the factors, under autocast too, where a rollout runs in float32."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x @ W.T
    with torch.autocast(device, enabled=False):
        return x @ W.T


def checked(value: Tensor, name: str, size: int, z: Tensor, n_steps: int | None = None) -> Tensor:
    """The value, which must fit states z [..., 2d] as `validation.as_state` gave them; under autocast in their dtype.

    A control or condition must be [..., size] or, where there are steps, [..., n_steps, size].

    Raises
    ------
    TypeError, ValueError
        Another type, dtype, device or shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(value).__name__}")
    held = n_steps is None or value.ndim <= z.ndim
    wanted = f"[..., {size}]" if n_steps is None else f"[..., {size}] held throughout, or [..., {n_steps}, {size}]"
    sizes = () if held else (n_steps,)
    tail = tuple(value.shape[len(value.shape) - len(sizes) - 1 :])
    if not 0 < value.ndim <= z.ndim + (not held) or tail != (*sizes, size):
        raise ValueError(f"{name} must be {wanted} for states {list(z.shape)}, found {list(value.shape)}")
    device = z.device.type
    if value.dtype in AUTOCAST and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        value = value.to(z.dtype)
    if value.dtype != z.dtype or value.device != z.device:
        raise TypeError(
            f"{name} and the states must share one dtype and device, found {value.dtype} on {value.device} and {z.dtype} "
            f"on {z.device}"
        )
    lead = value.shape[: value.ndim - len(sizes) - 1]
    try:
        torch.broadcast_shapes(lead, z.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} {list(value.shape)} and states {list(z.shape)} must agree in their leading sizes, found {list(lead)} "
            f"and {list(z.shape[:-1])}"
        ) from None
    return value


def joined(module: nn.Module, x: Tensor, control: Tensor | None, condition: Tensor | None) -> Tensor:
    """[x, u, c], what a network reads whose module says `control_dim` and `condition_dim`; x is [..., n].

    Raises
    ------
    ValueError
        One that the module does not take, or takes and is not given; another size.
    """
    parts = [x]
    for name, value in zip(NAMES, (control, condition), strict=True):
        size: int = getattr(module, f"{name}_dim")
        check_given(type(module).__name__, name, value, size)
        if value is not None:
            if value.shape[-1:] != (size,):
                raise ValueError(f"{name} must be [..., {size}], found {list(value.shape)}")
            parts.append(value)
    if len(parts) == 1:
        return x
    lead = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
    return torch.cat([part.expand(*lead, -1) for part in parts], dim=-1)


def check_given(owner: str, name: str, value: Tensor | None, size: int) -> None:
    """That a control or condition is there exactly where there is a place for it.

    Raises
    ------
    ValueError
    """
    if value is None and size:
        raise ValueError(f"{owner} takes a {name} of {size} numbers, and none was given")
    if value is not None and not size:
        place = "no port or control_dim for it; see hjepa_fast.PortHNN(control_dim=)"
        raise ValueError(f"{name} was given, and {owner} has {place if name == 'control' else f'no {name}_dim for it'}")


def steps(value: Tensor, lead: torch.Size, changes: bool) -> Tensor:
    """A control [..., m], or [..., n_steps, m] where it changes, as [1 or B, 1 or n_steps, m] for states so shaped."""
    if not changes:
        value = value[..., None, :]
    n, m = value.shape[-2:]
    if value.numel() == n * m:
        return value.reshape(1, n, m)
    return value.expand(*lead, n, m).reshape(-1, n, m)


def rows(value: Tensor | None, lead: torch.Size) -> Tensor | None:
    """A held input [..., m] as [m], where one serves for all, or as [B, m], one for each state of this leading shape."""
    if value is None:
        return None
    if value.numel() == value.shape[-1]:
        return value.reshape(-1)
    return value.expand(*lead, value.shape[-1]).reshape(-1, value.shape[-1])
