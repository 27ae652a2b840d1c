"""Rollouts of a separable H that can be undone to the last bit: the state lives on a lattice of integers.

Floating-point addition rounds to a grid that depends on the sum, so p - x + x need not be p. Integers have no such grid:

    kick   p <- p - round(c grad V(q) / quantum)
    drift  q <- q + round(c grad T(p) / quantum)

Each adds integers that depend only on the half of the state it leaves alone; undoing it computes the same ones again and
subtracts them (Levesque and Verlet, J. Stat. Phys. 72, 519 (1993); JANUS: Rein and Tamayo, MNRAS 473, 3351 (2018)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import hamiltonian, validation
from .hamiltonian import Term
from .hidden_space.network import evaluate_term
from .models import SeparableHNN
from .names import Integrator
from .schemes import SCHEMES, SubStep, for_separable

STATE_LIMIT = 2**62
"""Largest |n| of a state. int64 has room for as much again, see `_MOVES_UNCHECKED`."""
MOVE_LIMIT = 2**53
"""Largest |change| of one kick or drift: every integer up to here is a float64."""
_MOVES_UNCHECKED = (2**63 - 1 - STATE_LIMIT) // MOVE_LIMIT
"""A state within its limit cannot wrap around in so many moves, each within its own."""


class _Move(NamedTuple):
    """A kick (changes p, reads q) or a drift (changes q, reads p)."""

    kick: bool
    scale: float
    """|c| / quantum; with its sign apart, moves by c and by -c round alike."""
    sign: int
    """Of what is added."""


def _moves(integrator: str) -> tuple[SubStep, ...] | None:
    """The integrator as kicks and drifts, or None if it has a sub-step that is neither: it moves q and p by gradients at the
    same (q, p), so that where it came from is an equation to be solved."""
    stages = for_separable(SCHEMES[integrator])
    return None if stages is None or any(s.kick and s.drift for s in stages) else stages


INTEGRATORS = tuple(name for name in SCHEMES if _moves(name) is not None)
"""Those that are kicks and drifts, one after the other, where H = T(p) + V(q)."""


class BitReversible:
    """Fixed-point dynamics of a separable H: n steps and then -n steps return the same bits, for any n.

    A step is the integrator's list of kicks and drifts, a step back the same list from its end to its beginning, every one
    undone. Each is a bijection of the lattice, so the number of lattice points in a set, its volume, is kept exactly.
    Symplecticity, order and accuracy are those of the floating-point method up to the rounding of each move to 2^-bits, whose
    sum grows like a random walk. The dynamics amplifies it like any other error.

    The same bits in q must give the same bits in grad V(q). This is assumed of PyTorch with the same build, processor, number
    of threads and batch; on another batch size, say, a matrix product may add in another order.

    Parameters
    ----------
    hnn : SeparableHNN
        Its parameters are copied in float64 here; later changes to them are not seen.
    dt : float
        Step size; a negative one goes back in time.
    integrator : str
        One of `INTEGRATORS`, as in `hjepa_fast.rollout`.
    bits : int
        Fractional bits, 1 to 62: the lattice's spacing is `.quantum` = 2^-bits, the largest |z| is 2^(62 - bits).

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it.
    """

    def __init__(self, hnn: SeparableHNN, dt: float, *, integrator: Integrator = "leapfrog", bits: int = 40) -> None:
        if not isinstance(hnn, SeparableHNN):
            raise TypeError(f"only H = T(p) + V(q), a SeparableHNN, is bit-reversible; found {type(hnn).__name__}")
        H = hamiltonian.from_module(hnn)
        assert isinstance(H, hamiltonian.SumHamiltonian)
        dt = validation.as_number(dt, "dt")
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"bits must be an int, found {type(bits).__name__}")
        if not 1 <= bits <= 62:
            raise ValueError(f"bits must be 1 to 62, found {bits}")
        validation.check_choice(integrator, tuple(SCHEMES), "integrator")
        stages = _moves(integrator)
        if stages is None:
            raise ValueError(
                f'"{integrator}" is not bit-reversible: it is not kicks and drifts one after the other. '
                f"Those that are: {', '.join(INTEGRATORS)}"
            )
        self.latent_dim, self.dt, self.integrator, self.bits = H.latent_dim, float(dt), integrator, bits
        self.quantum = 2.0**-bits
        self._V, self._T = ([_in_float64(term) for term in H.terms if term.reads == side] for side in "qp")
        self._device = H.tensors[0].device
        self._step: list[_Move] = []
        for s in stages:
            c = (-s.kick or s.drift) * self.dt
            self._step.append(_Move(bool(s.kick), abs(c) / self.quantum, 1 if c > 0 else -1))
        kicks = sum(move.kick for move in self._step)
        self._check_every = _MOVES_UNCHECKED // max(kicks, len(stages) - kicks)

    def encode(self, z: Tensor) -> Tensor:
        """The nearest lattice point: a floating-point z [..., 2d] to int64 [..., 2d].

        Raises
        ------
        TypeError, ValueError
            Not a floating-point tensor, another last dimension or device; a value that is not finite.
        OverflowError
            |z| over 2^(62 - bits).
        """
        self._check(z, "z")
        if not z.is_floating_point():
            raise TypeError(f"z must be a floating-point tensor, found {z.dtype}")
        if not bool(z.isfinite().all()):
            raise ValueError(f"z must be finite, found {z[~z.isfinite()][0].item()}")
        scaled = z.detach().double() / self.quantum
        if bool((scaled.abs() > STATE_LIMIT).any()):
            raise OverflowError(
                f"|z| must be at most {STATE_LIMIT * self.quantum:g} with {self.bits} fractional bits, "
                f"found {z.abs().max().item():g}; take fewer bits"
            )
        return scaled.round_().long()

    def decode(self, n: Tensor) -> Tensor:
        """The state at lattice points: int64 [..., 2d] to float64 [..., 2d], exact where |n| <= 2^53, else rounded.

        Raises
        ------
        TypeError, ValueError
            Not an int64 tensor; another last dimension or device.
        """
        self._check_lattice(n)
        return n.double() * self.quantum

    @torch.no_grad()
    def rollout(self, n: Tensor, n_steps: int) -> Tensor:
        """The lattice point after `n_steps` steps from n, both int64 [..., 2d]; -n_steps steps undo them exactly.

        Raises
        ------
        TypeError, ValueError
            An argument that cannot be used; the message shows it.
        FloatingPointError
            A gradient that is not finite.
        OverflowError
            A move by more than 2^53 quanta, or a state beyond 2^62. The latter is looked for so often (at least at the end)
            that no state wraps around unnoticed. That could be undone as well, but its values would mean nothing.
        """
        self._check_lattice(n)
        if isinstance(n_steps, (bool, float, Tensor)):
            raise TypeError(f"n_steps must be an int, found {type(n_steps).__name__} {n_steps!r}")
        if n.numel() == 0:
            return n.clone()
        # of one layout, whatever n's: a product may add in another order for another one
        q, p = (half.clone(memory_format=torch.contiguous_format) for half in n.reshape(-1, self.latent_dim).chunk(2, dim=1))
        self._check_range(q, p, 0)
        step = self._step if n_steps >= 0 else [move._replace(sign=-move.sign) for move in reversed(self._step)]
        last: tuple[bool, float] | None = None
        change = q
        for t in range(1, abs(n_steps) + 1):
            for kick, scale, sign in step:
                # what a kick reads stays until a drift, so the last of a step and the first of the next add the same integers
                if last != (kick, scale):
                    terms, x = (self._V, q) if kick else (self._T, p)
                    gradient = sum(evaluate_term(term, x.double() * self.quantum).gradient for term in terms)
                    assert isinstance(gradient, Tensor)
                    moved = gradient * scale
                    if not torch.linalg.vector_norm(moved, math.inf) <= MOVE_LIMIT:  # "not": so that NaN is refused too
                        self._refuse(gradient, moved, kick, t)
                    change = moved.round_().long()
                    last = kick, scale
                (p if kick else q).add_(change, alpha=sign)
            if t % self._check_every == 0:
                self._check_range(q, p, t)
        self._check_range(q, p, abs(n_steps))
        return torch.cat((q, p), dim=1).reshape(n.shape)

    def _check(self, x: Tensor, name: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] != self.latent_dim:
            raise ValueError(f"{name} must be [..., {self.latent_dim}] for this Hamiltonian, found {list(x.shape)}")
        if x.device != self._device:
            raise ValueError(f"{name} and the Hamiltonian must be on one device, found {x.device} and {self._device}")

    def _check_lattice(self, n: Tensor) -> None:
        self._check(n, "n")
        if n.dtype != torch.int64:
            raise TypeError(f"n must be int64, found {n.dtype}; encode(z) gives a state's lattice point")

    def _check_range(self, q: Tensor, p: Tensor, t: int) -> None:
        for name, half in (("q", q), ("p", p)):
            low, high = (int(x) for x in half.aminmax())  # not abs: int64's lowest has none
            if max(-low, high) > STATE_LIMIT:
                sample, i = divmod(int(half.argmax() if high > STATE_LIMIT else half.argmin()), half.shape[1])
                raise OverflowError(
                    f"{name}[{i}] of sample {sample} is {half[sample, i].item() * self.quantum:g} after {t} steps, beyond "
                    f"{STATE_LIMIT * self.quantum:g}, which is what {self.bits} fractional bits leave room for"
                )

    def _refuse(self, gradient: Tensor, moved: Tensor, kick: bool, t: int) -> None:
        infinite = ~gradient.isfinite()
        worst = infinite if bool(infinite.any()) else moved.abs()
        sample, i = divmod(int(worst.flatten().double().argmax()), moved.shape[1])
        where = f"{'p' if kick else 'q'}[{i}] of sample {sample}"
        if bool(infinite.any()):
            raise FloatingPointError(f"the gradient that would change {where} in step {t} is {gradient[sample, i].item()}")
        raise OverflowError(
            f"step {t} would change {where} by {moved[sample, i].item() * self.quantum:g} at once, beyond "
            f"{MOVE_LIMIT * self.quantum:g}, the limit with {self.bits} fractional bits; take a smaller dt or fewer bits"
        )


def _in_float64(term: Term) -> Term:
    """A copy of its own, so that a change to the module cannot make the way back another one."""

    def copy(t: Tensor) -> Tensor:
        return t.detach().to(torch.float64, copy=True)

    return term._replace(
        weights=tuple(map(copy, term.weights)),
        biases=tuple(map(copy, term.biases)),
        stiffness=None if term.stiffness is None else copy(term.stiffness),
    )
