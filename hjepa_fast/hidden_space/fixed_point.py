"""x = G(x), for the points of implicit sub-steps and their adjoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import HJEPAError


class Solver(NamedTuple):
    """When the equations of implicit sub-steps count as solved."""

    tolerance: float
    """Largest |G(x) - x| of a sample, relative to its largest |x|, and for points to 1 if that is larger."""
    max_evaluations: int


def waits(x: Tensor) -> bool:
    """Whether reading a number of x back waits for a device."""
    return x.device.type != "cpu"


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be read back."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(x: Tensor, what: str, instead: str) -> None:
    """What must read x back cannot be captured in a CUDA graph.

    Raises
    ------
    HJEPAError
        One is being captured.
    """
    if capturing(x):
        raise HJEPAError(f"{what} reads from the device, which nothing may while a CUDA graph is captured; use {instead}")


_T = TypeVar("_T")
_DEPTH = 3
"""Earlier differences that Anderson's method combines."""
EXTRAPOLATION = ((), (1,), (2, -1), (3, -3, 1), (4, -6, 4, -1), (5, -10, 10, -5, 1))
"""Row n: the next value of a polynomial through the last n, the last one first. With all five, a step of a trained network
starts ten times closer to its solution than with two."""


def fixed_point(G: Callable[[Tensor], tuple[Tensor, _T]], x: Tensor, floor: float, solver: Solver) -> tuple[_T, Tensor, Tensor]:
    """Solve x = G(x) for every row of x [B, h] by Anderson's method (Walker and Ni, SIAM J. Numer. Anal. 49, 1715, 2011).

    A row that has converged stays as it is, so that it does not depend on the others, and one that is not finite is left.
    Whether all have is read back after every evaluation, but in the capture of a CUDA graph, where all evaluations are made.

    Parameters
    ----------
    G : gives G(x) and whatever else comes of it
    floor : what residuals are relative to at least

    Returns
    -------
    What else G gave at the solution; residual [B], relative; evaluations of G [B], int32
    """
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    evaluations = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    differences: list[tuple[Tensor, Tensor]] = []
    before: tuple[Tensor, Tensor] | None = None
    for n in range(1, solver.max_evaluations + 1):
        y, other = G(x)
        r = y - x
        residual = r.abs().amax(1) / x.abs().amax(1).clamp_min(floor)
        evaluations += active
        active = active & (residual > solver.tolerance) & residual.isfinite()
        if n == solver.max_evaluations or not (capturing(x) or active.any()):
            break
        if before is not None:
            differences = [*differences, (x - before[0], r - before[1])][-_DEPTH:]
        before = x, r
        x = torch.where(active[:, None], _anderson(x, r, differences), x)
    return other, residual, evaluations


def _anderson(x: Tensor, r: Tensor, differences: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """x + r corrected by the combination of earlier differences of x that makes r vanish best, by their differences of r."""
    if not differences:
        return x + r
    dx, dr = (torch.stack(d, dim=2) for d in zip(*differences, strict=True))
    gram = dr.mT @ dr
    tiny = torch.finfo(x.dtype).tiny
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).rsqrt()
    # differences that are almost parallel say nothing new: this keeps them from cancelling each other
    ridge = 10 * torch.finfo(x.dtype).eps * torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    right = (dr.mT @ r[:, :, None]) * scale[:, :, None]
    weights, _ = torch.linalg.solve_ex(scale[:, :, None] * gram * scale[:, None, :] + ridge, right)
    return x + r - ((dx + dr) @ (weights * scale[:, :, None])).squeeze(2)
