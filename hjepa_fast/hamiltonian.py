"""A Hamiltonian as plain tensors: what every backend computes with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import inputs, reader, reading
from .activations import Activations
from .errors import NotFusedError, warn
from .models import LatentHNN, SeparableHNN
from .state_space import system
from .state_space.system import System


class Term(NamedTuple):
    """A function of q, of p, or of z = (q, p): an MLP, or a quadratic form (k x) . x / 2.

    An MLP is W_{L+1} s(... s(W_1 x + b_1) ...) + b_{L+1}, a scalar: `weights[l]` is [width_{l+1}, width_l], `biases[l]` is
    [width_{l+1}], and the last width is 1.
    """

    reads: str
    """"q", "p" or "z"."""
    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()
    activation: Activations | None = None
    stiffness: Tensor | None = None
    """k of a quadratic form, [d] or [1]; None of an MLP."""
    control_dim: int = 0
    """Columns of the first weights that read a control, after those that read the state."""
    condition_dim: int = 0
    """Columns that read a condition, the last ones."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases, *(() if self.stiffness is None else (self.stiffness,)))

    def value(self, z: Tensor) -> Tensor:
        """[..., 2d] to [...]."""
        d = z.shape[-1] // 2
        x = z if self.reads == "z" else z[..., :d] if self.reads == "q" else z[..., d:]
        if self.stiffness is not None:
            return 0.5 * (self.stiffness.to(x.dtype) * x * x).sum(-1)
        assert self.activation is not None
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if bias.ndim > 1:  # a bias for each sample, [B, h]: of states [B, 2d] or [B, n, 2d]
                x = F.linear(x, weight) + bias.reshape(len(bias), *[1] * (x.ndim - 2), -1)
            else:
                x = F.linear(x, weight, bias)
            if layer < last:
                x = self.activation.at(layer)(x)
        return x.squeeze(-1)

    @property
    def n_inputs(self) -> int:
        """Columns of the first weights that do not read the state."""
        return self.control_dim + self.condition_dim

    def columns_of_control(self) -> Tensor:
        """Of the first weights, [h, m]."""
        first = self.weights[0].shape[1] - self.n_inputs
        return self.weights[0][:, first : first + self.control_dim]

    def inputs(self, control: Tensor | None, condition: Tensor | None) -> Tensor:
        """[u, c] as far as this reads them, [m] or [B, m]."""
        found = [x for x, n in ((control, self.control_dim), (condition, self.condition_dim)) if n and x is not None]
        lead = torch.broadcast_shapes(*[x.shape[:-1] for x in found])
        return torch.cat([x.expand(*lead, -1) for x in found], dim=-1)

    def given(self, control: Tensor | None, condition: Tensor | None) -> Term:
        """This as a term of the state alone: its bias has the share of a control and a condition, [m] or [B, m]."""
        if not self.n_inputs:
            return self
        n = self.weights[0].shape[1] - self.n_inputs
        W, U = self.weights[0][:, :n], self.weights[0][:, n:]
        bias = self.biases[0] + inputs.product(self.inputs(control, condition), U)
        return Term(self.reads, (W, *self.weights[1:]), (bias, *self.biases[1:]), self.activation)


class SumHamiltonian:
    """H(z), the sum of its terms."""

    def __init__(self, terms: tuple[Term, ...], latent_dim: int) -> None:
        self.terms, self.latent_dim = terms, latent_dim
        self.tensors = tuple([t for term in terms for t in term.tensors])
        self.plans: dict[Any, Any] | None = None
        """See `plan.py`; None where this is read anew at every call."""
        self.control_dim = max([term.control_dim for term in terms])
        self.condition_dim = max([term.condition_dim for term in terms])

    @property
    def takes_inputs(self) -> bool:
        return self.control_dim + self.condition_dim > 0

    def given(self, control: Tensor | None, condition: Tensor | None) -> SumHamiltonian:
        """H of the state alone, under a control and a condition, [m] or [B, m]."""
        return SumHamiltonian(tuple([term.given(control, condition) for term in self.terms]), self.latent_dim)

    @property
    def separable(self) -> bool:
        """Whether H = T(p) + V(q)."""
        return all(term.reads != "z" for term in self.terms)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        first, *rest = self.terms
        value = first.value(z)
        for term in rest:
            value = value + term.value(z)
        return value


class OfStateAlone:
    """What takes no control and no condition."""

    control_dim = condition_dim = 0
    takes_inputs = False


class ModuleHamiltonian(OfStateAlone):
    """H(z) = module(z), whatever the module computes. Only backend="reference" runs it, by nested autograd."""

    def __init__(self, module: nn.Module, latent_dim: int) -> None:
        self.module, self.latent_dim = module, latent_dim

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.module.parameters(), *self.module.buffers())

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...].

        Raises
        ------
        TypeError, ValueError
            The module gives something else than one number a state.
        """
        rows = z.reshape(-1, z.shape[-1])
        # a graph made by module.compile() has no second derivative
        call = self.module if self.module._compiled_call_impl is None else self.module._call_impl
        try:
            H = call(rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            found = f"{list(rows.shape)} {rows.dtype}"
            raise ValueError(f"{reader.name_of(self.module)} cannot be called with states {found}: {error}") from error
        if not isinstance(H, Tensor):
            raise TypeError(f"a Hamiltonian gives a tensor, {reader.name_of(self.module)} gives {type(H).__name__}")
        if H.shape not in (rows.shape[:1], (len(rows), 1)):
            raise ValueError(
                f"a Hamiltonian gives one number a state, {reader.name_of(self.module)} gives {list(H.shape)} for states "
                f"{list(rows.shape)}"
            )
        return H.reshape(z.shape[:-1])


class MechanicalHamiltonian(OfStateAlone):
    """H(q, p) = p^T M^-1(q) p / 2 + V(q), which runs on its states: see `state_space`."""

    def __init__(self, parts: System) -> None:
        self.system, self.latent_dim, self.tensors = parts, 2 * parts.form.d, tuple(parts.tensors)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        return system.energy(self.system, z)


Hamiltonian = SumHamiltonian | MechanicalHamiltonian | ModuleHamiltonian


def of_any_module(module: nn.Module, z: Tensor, backend: str, with_inputs: bool = False) -> Hamiltonian:
    """What `from_module` reads, or else the module itself with its own forward, where `backend` leaves that open.

    With "auto" a warning says why nothing faster can be taken.

    Raises
    ------
    TypeError, ValueError
        As for `from_module`, and `NotFusedError` where another backend is asked for by name. A Hamiltonian that takes a control
        or a condition where there is none (`with_inputs` is false).
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    try:
        H = from_module(module)
        if H.takes_inputs and not with_inputs:
            for name in inputs.NAMES:
                inputs.check_given(reader.name_of(module), name, None, getattr(H, f"{name}_dim"))
        return H
    except NotFusedError as why:
        if backend not in ("auto", "reference"):
            raise NotFusedError(f'{why}, so backend "{backend}" would compute something else; {_REMEDIES}') from None
        if any(getattr(inner, "_acts_on_states", False) for inner in module.modules()):
            raise TypeError(
                f"{reader.name_of(module)} holds a Hamiltonian with friction or a control, which its forward leaves out; pass "
                "that to hjepa_fast.rollout, or its .H here"
            ) from None
        reader.check_takes_z(module)
        if backend == "auto":
            warn(
                f"{why}. Its own forward is differentiated by nested autograd instead, which is exact, and slower by a "
                f'factor; {_REMEDIES}; or pass backend="reference" to take this as it is'
            )
        return ModuleHamiltonian(module, z.shape[-1] if isinstance(z, Tensor) and z.ndim else 0)


_REMEDIES = (
    "for the fused backends let forward return self.net(z) unchanged, with scales and shifts in its Linear layers, or pass the "
    ".net itself, or set forward_is_net = True on the class if the two are equal whatever happens"
)


def from_module(module: nn.Module) -> SumHamiltonian | MechanicalHamiltonian:
    """Read the tensors out of a `SeparableHNN`, or out of any module that is, or holds as `.net`, an MLP Hamiltonian, or says
    what it computes.

    The module's forward is never run on states, so it must be known to compute what the tensors do: see `reader`.

    Raises
    ------
    NotFusedError
        The module is no such network, or computes something else than the layers that were found.
    TypeError, ValueError
        It is no Hamiltonian at all.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if torch.compiler.is_compiling() or not isinstance(module, nn.Module):
        return _read(module)
    H: SumHamiltonian | MechanicalHamiltonian | None = reading.recall(module)
    if H is None:
        H = _read(module)
        if any(hasattr(t, "device_mesh") for t in H.tensors):
            raise ValueError(
                f"the parameters of {reader.name_of(module)} are sharded (DTensor). FSDP gathers them for the forward of the "
                "module that it was given, and for methods named to torch.distributed.fsdp.register_fsdp_forward_method"
            )
        if reading.remember(module, H, H.tensors) and isinstance(H, SumHamiltonian):
            H.plans = {}
    return H


def _read(module: nn.Module) -> SumHamiltonian | MechanicalHamiltonian:
    parts = _terms_of(module)
    terms = [part for part in parts if isinstance(part, Term)]
    if len(terms) < len(parts):
        if len(parts) > 1:
            raise NotFusedError(f"{reader.name_of(module)} adds something to a mechanical system with M(q) or angles")
        assert isinstance(parts[0], System)
        return MechanicalHamiltonian(parts[0])
    sizes = [_size_of(term) for term in terms]
    known = {size for size in sizes if size}
    if len(known) != 1:
        found = ", ".join(f"{term.reads} of {size or 'any size'}" for term, size in zip(terms, sizes, strict=True))
        raise ValueError(
            f"the terms of {reader.name_of(module)} must be of states [q, p] of one size 2d; found {found or 'none'}"
        )
    for name in ("control_dim", "condition_dim"):
        counts = {getattr(term, name) for term in terms} - {0}
        if len(counts) > 1:
            raise ValueError(f"the terms of {reader.name_of(module)} must agree in {name}, found {sorted(counts)}")
    like = next((term.weights[0] for term in terms if term.weights), terms[0].tensors[0])
    for term in terms:
        for t in term.tensors:
            if term.weights and (t.dtype != like.dtype or t.device != like.device):
                raise ValueError(
                    f"the terms of {reader.name_of(module)} must share one dtype and device, found {like.dtype} on "
                    f"{like.device} and {t.dtype} on {t.device}"
                )
    terms = [
        term if term.stiffness is None else term._replace(stiffness=term.stiffness.to(like.device, like.dtype))
        for term in terms
    ]
    return SumHamiltonian(tuple(terms), known.pop())


def with_input_columns(term: Term, module: Any) -> Term:
    """A network whose last columns read the control and the condition that the module says.

    Raises
    ------
    ValueError
        Not enough columns, or those of z are odd.
    """
    term = term._replace(control_dim=module.control_dim, condition_dim=module.condition_dim)
    width = term.weights[0].shape[1]
    left = width - term.n_inputs
    if left < 1 or (term.reads == "z" and left % 2):
        raise ValueError(
            f"{reader.name_of(module)} takes {width} numbers: a control of {term.control_dim} and a condition of "
            f"{term.condition_dim} leave {left} for {'z = [q, p], an even size' if term.reads == 'z' else term.reads}"
        )
    return term


def _size_of(term: Term) -> int:
    """2d, or 0 where any is."""
    if term.stiffness is not None:
        return 2 * term.stiffness.numel() if term.stiffness.numel() > 1 else 0
    width = term.weights[0].shape[1] - term.n_inputs
    return width if term.reads == "z" else 2 * width


def _terms_of(module: nn.Module) -> list[Term | System]:
    if getattr(module, "_acts_on_states", False):
        raise TypeError(
            f"{reader.name_of(module)} has friction or a control, which is no part of H; use hjepa_fast.rollout, leapfrog, "
            "vector_field or step_residual, or pass its .H"
        )
    reader.prove(module)
    if isinstance(module, SeparableHNN):
        V = Term("q", *reader.read_mlp(module.potential, even=False))
        quadratic = [] if module.stiffness is None else [Term("q", stiffness=module.stiffness)]
        if module.kinetic is None:
            return [V, *quadratic, Term("p", stiffness=V.weights[0].new_ones(1))]
        return [V, *quadratic, Term("p", *reader.read_mlp(module.kinetic, even=False))]
    known = isinstance(module, LatentHNN) and type(module).forward is LatentHNN.forward
    if known and (module.control_dim or module.condition_dim):
        return [with_input_columns(Term("z", *reader.read_mlp(module, even=False)), module)]
    if not reader.says_terms(module):
        return [Term("z", *reader.read_mlp(module, even=True))]
    given = module.hamiltonian_terms()  # type: ignore[operator]
    terms: list[Term | System] = []
    for part in given if isinstance(given, (list, tuple)) and not isinstance(given, (Term, System)) else [given]:
        if isinstance(part, (Term, System)):
            terms.append(part)
        elif isinstance(part, nn.Module) and part is not module:
            terms += _terms_of(part)
        else:
            raise TypeError(
                f"{reader.name_of(module)}.hamiltonian_terms() must give a Hamiltonian, a term or a list of them; found "
                f"{'itself' if part is module else type(part).__name__}"
            )
    return terms
