"""How a move of the state reaches the first layers: through h x h products (dense), or through the state itself (a pair).

Multiplications of one row and move: dense h^2, pair 2 h d. Once a call: dense h^2 d for K, thrice that with gradients, and
2 h d a wanted state; of a pair nothing, since the state is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import program
from .program import Form, stages_of

forced: str | None = None
"""For tests and measurements: the coupling wherever both can be taken."""


def possible(forms: Sequence[Form], integrator: str) -> tuple[str, ...]:
    """The couplings that can be taken."""
    if not program.covers(forms, stages_of(integrator, forms)):
        return ("dense",)
    return ("dense", "pair") if program.closes(forms) else ("pair",)


_PREDICTION = 0.01
"""What K counts for without gradients: it is remembered from call to call, and only compared. With this the published network
takes K from 6 steps on at batch 1, where 15 steps by K took 0.83 of the time that they take by the pair."""


def choose(
    forms: tuple[Form, ...],
    widths: tuple[int, ...],
    d: int,
    integrator: str,
    batch: int,
    n_steps: int,
    every_state: bool,
    differentiate: bool,
) -> str:
    """ "dense" or "pair", whichever takes fewer multiplications.

    Parameters
    ----------
    widths : of each term's first layer; of a quadratic form anything
    d : size of q
    batch, n_steps, every_state : rows, steps, and whether the states after all of them are wanted
    differentiate : whether there is a backward pass
    """
    if forced and forced in possible(forms, integrator):
        return str(forced)
    return _choose(forms, widths, d, integrator, batch, n_steps, every_state, differentiate)


@functools.lru_cache(maxsize=1024)
def _choose(
    forms: tuple[Form, ...],
    widths: tuple[int, ...],
    d: int,
    integrator: str,
    batch: int,
    n_steps: int,
    every_state: bool,
    differentiate: bool,
) -> str:
    able = possible(forms, integrator)
    if len(able) == 1:
        return able[0]
    stages, n_kept = stages_of(integrator, forms), n_steps if every_state else 1
    networks = [(form, h) for form, h in zip(forms, widths, strict=True) if not form.quadratic]
    dense = once = pair = states = 0.0
    for side, other in (("q", "p"), ("p", "q")):
        moves = sum(1 for s in stages if (s.kick if side == "q" else s.drift))
        for form, h in networks:
            if form.sees(side):
                readers = sum(n for f, n in networks if f.sees(other) or any(g.quadratic for g in forms))
                dense += moves * h * readers
                once += h * readers * d
                pair += moves * h * d
                states += h * d
            if form.sees(other):
                pair += moves * h * d
    if len(networks) == 1 and networks[0][0].reads == "z":
        once /= 2  # one K and its transpose
    once *= 3 if differentiate else _PREDICTION
    return "dense" if batch * (n_steps * (pair - dense) - n_kept * states) > once else "pair"


_products: list[tuple[list[Tensor], Tensor]] = []
_MOST_PRODUCTS, _LARGEST_WEIGHT = 4, 2**22


def remembered(product: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """product(*factors), remembered for prediction on a CPU.

    K takes as many multiplications as 128 sub-steps of one sample of the published network: 1.4 ms, about as long as its
    15 steps at batch 1. Comparing the first layer's weights with a copy of those that K was made from takes 0.06 ms and
    cannot be wrong, which the version counters of parameters can (`p.data.copy_` does not move them).
    """
    if any(W.device.type != "cpu" or W.numel() > _LARGEST_WEIGHT for W in factors):
        return product(*factors)
    values = [W.detach().numpy() for W in factors]
    for copies, K in tuple(_products):
        if [x.dtype for x in copies] == [W.dtype for W in factors] and all(
            np.array_equal(x.numpy(), y) for x, y in zip(copies, values, strict=True)
        ):
            return K
    K = product(*factors)
    _products.insert(0, ([W.detach().clone() for W in factors], K))
    del _products[_MOST_PRODUCTS:]
    return K


def of_halves(W: Tensor, other: Tensor) -> Tensor:
    """W other^T, [h, h']."""
    product: Tensor = torch.mm(W, other.T)
    return product
