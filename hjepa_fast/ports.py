"""Friction and control around a Hamiltonian: port-Hamiltonian systems.

    q' = Hp        p' = -Hq - friction + G u

with a control u through a port G, held over a step, and friction of one of two kinds:

    conformal   g p     The momenta decay by exp(-g dt). Around a symplectic step with a scalar g the symplectic form
                        contracts by exactly that (McLachlan and Perlmutter, J. Geom. Phys. 39, 276, 2001).
    rayleigh    g Hp    The power lost is Hp . (g Hp) >= 0, whatever H is.

A step is symmetric: half of the friction, half of the force, the integrator's step, half of the force, half of the friction. Or
both stand in the integrator's kicks, p <- p + c dt (-Hq - friction + G u), at the point where each takes its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hamiltonian, inputs, reader, transforms, validation
from .errors import NotFusedError
from .hamiltonian import Hamiltonian

FRICTIONS = ("conformal", "rayleigh")
SPLITTINGS = ("symmetric", "kicks")


class PortHNN(nn.Module):
    """A Hamiltonian with friction and a port for a control, both learnable.

    Parameters
    ----------
    H : nn.Module
        A Hamiltonian as `hjepa_fast.rollout` takes it.
    control_dim : int
        Size m of the control; 0 for none.
    friction : str, optional
        "conformal" or "rayleigh".
    per_dimension : bool
        A coefficient for each momentum; else one for all.
    initial_friction : float
        Where the coefficient starts, > 0.
    splitting : str
        Where friction and force stand in a rollout: "symmetric", half of them before and after each step of the integrator; or
        "kicks", in its own kicks, which takes an explicit integrator without mixed gradients ("rk4") and a fused backend.
    latent_dim : int, optional
        2d, where H is a class that cannot be read (see docs/hamiltonians.md).

    Attributes
    ----------
    port : nn.Parameter [d, m] or None
        G. Xavier-normal at first.
    friction : Tensor [] or [d], or None
        g >= 0, the softplus of a parameter.

    A subclass may have `friction`, a property, and `force(control)` [..., m] to [..., d] of its own; its forward must stay.
    """

    _acts_on_states = True

    def __init__(
        self,
        H: nn.Module,
        control_dim: int = 0,
        friction: str | None = None,
        per_dimension: bool = False,
        *,
        initial_friction: float = 0.1,
        splitting: str = "symmetric",
        latent_dim: int | None = None,
    ) -> None:
        super().__init__()
        validation.check_choice(splitting, SPLITTINGS, "splitting")
        self.splitting = splitting
        control_dim = validation.as_count(control_dim, "control_dim")
        if friction is not None:
            validation.check_choice(friction, FRICTIONS, "friction")
        if not validation.as_number(initial_friction, "initial_friction") > 0:
            raise ValueError(f"initial_friction must be positive, found {initial_friction}")
        try:
            size = hamiltonian.from_module(H).latent_dim
        except NotFusedError:
            if latent_dim is None:
                raise
            size = validation.as_count(latent_dim, "latent_dim", least=2)
        if latent_dim not in (None, size):
            raise ValueError(f"latent_dim must be {size} for this Hamiltonian, found {latent_dim}")
        d = size // 2
        self.d, self.H, self.kind, self.control_dim = d, H, friction, control_dim
        self.port = nn.Parameter(torch.empty(d, control_dim)) if control_dim else None
        if self.port is not None:
            nn.init.xavier_normal_(self.port)
        start = math.log(math.expm1(initial_friction))
        shape = (d,) if validation.as_flag(per_dimension, "per_dimension") else ()
        self.raw_friction = nn.Parameter(torch.full(shape, start)) if friction else None

    @property
    def friction(self) -> Tensor | None:
        return None if self.raw_friction is None else F.softplus(self.raw_friction)

    def forward(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [..., 1]."""
        value: Tensor = self.H(z)
        return value

    def force(self, control: Tensor) -> Tensor:
        """G u: [..., m] to [..., d]."""
        assert self.port is not None
        return inputs.product(control, self.port)


def hamiltonian_of(model: PortHNN) -> nn.Module:
    """H, if nothing stands around it: no hook, no forward of a subclass.

    Raises
    ------
    NotFusedError
        Something does, which no rollout would run.
    """
    reader.check_untouched(model, reader.name_of(model))
    if type(model).forward is not PortHNN.forward:
        raise NotFusedError(
            f"{reader.name_of(model)} has a forward of its own where a PortHNN's gives H; change its .H instead"
        )
    return model.H


def force_of(model: PortHNN, control: Tensor) -> Tensor:
    """The force of a control [..., m], [..., d], which a subclass may compute in its own way.

    Raises
    ------
    TypeError, ValueError
        That gives something else.
    """
    force = model.force(control)
    wanted = (*control.shape[:-1], model.d)
    if not isinstance(force, Tensor) or force.shape != wanted:
        found = list(force.shape) if isinstance(force, Tensor) else type(force).__name__
        raise ValueError(
            f"{reader.name_of(model)}.force must give {list(wanted)} for a control {list(control.shape)}, found {found}"
        )
    if force.dtype != control.dtype:
        raise TypeError(f"{reader.name_of(model)}.force must give the control's dtype {control.dtype}, found {force.dtype}")
    return force


def friction_of(model: PortHNN, like: Tensor) -> Tensor | None:
    """g >= 0, [], [1] or [d], of the dtype of the states, which a subclass may compute in its own way; None for none.

    Raises
    ------
    TypeError, ValueError
        Another shape or dtype, a negative one, or one without a kind.
    """
    g, owner = model.friction, reader.name_of(model)
    if (g is None) != (model.kind is None):
        found = "has a friction and no kind of it" if model.kind is None else f'is of kind "{model.kind}" and has no friction'
        raise ValueError(f"{owner} {found}; pass friction={' or '.join(map(repr, FRICTIONS))} to PortHNN.__init__, or None")
    if g is None:
        return None
    d = like.shape[-1] // 2
    if not isinstance(g, Tensor) or g.shape not in ((), (1,), (d,)):
        raise ValueError(f"{owner}.friction must be [] or [{d}], found {list(g.shape) if isinstance(g, Tensor) else g!r}")
    if g.dtype != like.dtype:
        raise TypeError(f"{owner}.friction and the states must share one dtype, found {g.dtype} and {like.dtype}")
    own = type(model).friction is not PortHNN.friction  # which is never negative
    if own and not torch.compiler.is_compiling() and bool((transforms.bare(g.detach()) < 0).any()):
        raise ValueError(f"{owner}.friction must not be negative, found {transforms.bare(g.detach()).min():.3g}")
    return g


def places_of(model: nn.Module, H: Hamiltonian, control: Tensor | None, condition: Tensor | None) -> tuple[bool, bool]:
    """Whether the control enters by the port, and whether H itself reads it.

    Raises
    ------
    ValueError
        A control or condition without a place, or a place that is given none; a port of another size than H's control.
    """
    m = model.control_dim if isinstance(model, PortHNN) else 0
    if m and H.control_dim and m != H.control_dim:
        raise ValueError(f"the port and the Hamiltonian must take one control, found sizes {m} and {H.control_dim}")
    owner = reader.name_of(model)
    # a port that is given no control exerts no force
    if control is not None or H.control_dim:
        inputs.check_given(owner, "control", control, m or H.control_dim)
    inputs.check_given(owner, "condition", condition, H.condition_dim)
    return bool(m) and control is not None, bool(H.control_dim)


def step(
    model: PortHNN,
    z: Tensor,
    h: Tensor,
    force: Tensor | None,
    one_step: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
) -> Tensor:
    """The integrator's step with half of the friction and of the force before and after it."""
    z = one_step(_half_step(model, z, h, force, gradient, force_first=False))
    return _half_step(model, z, h, force, gradient, force_first=True)


def friction_of_steps(model: PortHNN, steps: Tensor, d: int) -> Tensor:
    """E of `hidden_space.program.Drive` for steps [1 or B, 1 or n_steps]: [1 or B, 1 or n_steps, d]."""
    g = friction_of(model, steps.new_empty(2 * d))
    assert g is not None
    if model.splitting == "kicks":
        return (g * steps[..., None]).expand(*steps.shape, d)
    half = (g * steps[..., None] / 2).expand(*steps.shape, d)
    return torch.expm1(-half) if model.kind == "conformal" else half


def _half_step(
    model: PortHNN, z: Tensor, h: Tensor, force: Tensor | None, gradient: Callable[[Tensor], Tensor], force_first: bool
) -> Tensor:
    """Half a step of friction and force. z is [..., 2d], h [..., 1], force [..., d]; `gradient` gives Hp."""
    q, p = z.chunk(2, dim=-1)
    g = friction_of(model, z)

    def pushed(p: Tensor) -> Tensor:
        return p if force is None else p + h / 2 * force

    if force_first:
        p = pushed(p)
    if g is not None and model.kind == "conformal":
        p = torch.exp(-g * h / 2) * p
    elif g is not None:
        p = p - h / 2 * g * gradient(torch.cat((q, p), dim=-1))
    if not force_first:
        p = pushed(p)
    return torch.cat((q, p), dim=-1)


def added(model: PortHNN, z: Tensor, field: Tensor, control: Tensor | None) -> Tensor:
    """The vector field J grad H [..., 2d] with friction and force."""
    q_dot, p_dot = field.chunk(2, dim=-1)
    g = friction_of(model, z)
    if g is not None:
        p_dot = p_dot - g * (z.chunk(2, dim=-1)[1] if model.kind == "conformal" else q_dot)
    if control is not None:
        p_dot = p_dot + force_of(model, control)
    q_dot, p_dot = torch.broadcast_tensors(q_dot, p_dot)
    return torch.cat((q_dot, p_dot), dim=-1)
