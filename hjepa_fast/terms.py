"""Hamiltonians made of a user's own layers: in which order, of which input, times what, and sums of them.

Each is an `nn.Module` that holds the layers it was given, so their parameters are its own, and whose forward is plain PyTorch
code of the same function. A class of one's own need not change: a method `hamiltonian_terms()` that returns one of these, or a
list of them whose sum is H, says what it computes. See docs/hamiltonians.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import activations, adapters, hamiltonian, inputs, reader, validation
from .activations import Activation
from .errors import NotFusedError

ORDERS = ("qp", "pq")


class Hamiltonian(nn.Module):
    """H(z) = factor net((x - shift) / scale), x being z = [q, p] or [p, q], and net one's own layers.

    Parameters
    ----------
    layers : sequence of nn.Module, or an nn.Sequential
        The network's layers in the order in which they run: its `nn.Linear`s, with an activation after each but the last;
        or these with the activations between them, as modules.
    activation : str, nn.Module, function, or a sequence of one for each hidden layer
        Where the layers are `nn.Linear`s alone: a name (see `activations.NAMES`), a module (`nn.Tanh()`), or one of PyTorch's
        functions (`torch.tanh`).
    order : str
        What the network's input is: "qp", or "pq" with p before q. z itself is always [q, p].
    output : int, optional
        Which of the network's outputs H is, where it has several.
    scale, shift : float or Tensor [n], optional
        Statistics of the network's n inputs, in its own order: it sees (x - shift) / scale.
    factor : float or Tensor [], optional
        What the output is multiplied with.
    control_dim, condition_dim : int
        Sizes of a control u and a condition c that the network reads after the state: [z, u, c].

    A `nn.Parameter` given for one of these is trained with the rest.

    Raises
    ------
    TypeError, ValueError
        Layers that are no such network (`NotFusedError`), an order that is no order, an output that is not there, statistics
        of another size, a scale of zero.
    """

    scale: float | Tensor | None
    shift: float | Tensor | None
    factor: float | Tensor | None

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.Sequential,
        activation: Any = None,
        *,
        order: str = "qp",
        output: int | None = None,
        scale: float | Tensor | None = None,
        shift: float | Tensor | None = None,
        factor: float | Tensor | None = None,
        control_dim: int = 0,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; found {order!r}")
        self.control_dim = validation.as_count(control_dim, "control_dim")
        self.condition_dim = validation.as_count(condition_dim, "condition_dim")
        self.net = nn.Sequential(*with_activations(layers_of(layers), activation))
        self.order, self.output = order, output
        (*_, (_, last)) = reader.layers_of(self.net, "Hamiltonian")
        n_outputs = getattr(last, "out_features", 1)
        if output is None and n_outputs != 1:
            raise ValueError(f"the network has {n_outputs} outputs: say which of them is H (output=0 to {n_outputs - 1})")
        if output is not None and not (type(output) is int and -n_outputs <= output < n_outputs):
            raise ValueError(f"output must be one of the network's {n_outputs} outputs, found {output!r}")
        width = self._width()
        for name, value in (("scale", scale), ("shift", shift), ("factor", factor)):
            _keep(self, name, value, () if name == "factor" else (width,))
        if self.scale is not None and bool((torch.as_tensor(self.scale) == 0).any()):
            raise ValueError("scale must not be zero")

    def _width(self) -> int:
        first = next((layer for _, layer in reader.layers_of(self.net, "Hamiltonian")), None)
        width = getattr(first, "in_features", None)
        if not isinstance(width, int):
            raise NotFusedError(f"the network must start with nn.Linear, found {type(first).__name__}")
        left = width - self.control_dim - self.condition_dim
        if left < 2 or left % 2:
            what = f" beside a control of {self.control_dim} and a condition of {self.condition_dim}" if left != width else ""
            raise ValueError(f"a Hamiltonian takes z = [q, p], an even size; the network takes {left}{what}")
        return width

    def forward(self, z: Tensor, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """H(z, u, c): [..., 2d], with [..., control_dim] and [..., condition_dim], to [..., 1]."""
        x = z if self.order == "qp" else torch.cat(z.chunk(2, dim=-1)[::-1], dim=-1)
        x = inputs.joined(self, x, control, condition)
        if self.shift is not None:
            x = x - _like(self.shift, x)
        if self.scale is not None:
            x = x / _like(self.scale, x)
        H: Tensor = self.net(x)
        if self.output is not None:
            H = H[..., self.output, None]
        return H if self.factor is None else H * _like(self.factor, H)

    def hamiltonian_terms(self) -> list[hamiltonian.Term]:
        """The network with everything around it folded into its first and last layers."""
        reader.prove_layers(self.net, "Hamiltonian")
        found, found_biases, activation = reader.read_layers(self.net, "Hamiltonian")
        weights, biases = list(found), list(found_biases)
        scale, shift = (None if x is None else _like(x, weights[0]) for x in (self.scale, self.shift))
        if scale is not None:
            weights[0] = weights[0] / scale
        if shift is not None:
            biases[0] = biases[0] - (weights[0] * shift).sum(1)
        if self.order == "pq":
            d = (weights[0].shape[1] - self.control_dim - self.condition_dim) // 2
            weights[0] = torch.cat((weights[0][:, d : 2 * d], weights[0][:, :d], weights[0][:, 2 * d :]), dim=1)
        if self.output is not None:
            own = self.output % weights[-1].shape[0]
            weights[-1], biases[-1] = weights[-1][own : own + 1], biases[-1][own : own + 1]
        if self.factor is not None:
            _multiply(weights, biases, self.factor)
        return [hamiltonian.with_input_columns(hamiltonian.Term("z", tuple(weights), tuple(biases), activation), self)]

    def _settings(self) -> tuple[Any, ...] | None:
        """What else than the layers is part of H; None where tensors are made of them at every reading. See `reading.py`."""
        plain = all(x is None for x in (self.output, self.scale, self.shift, self.factor))
        own = (self.order, self.control_dim, self.condition_dim)
        return own if self.order == "qp" and plain else None


class Term(nn.Module):
    """factor net(x), a network of x = q, p, or z = [q, p], and where it says so of [x, u, c].

    Parameters
    ----------
    net : nn.Module, or a sequence of layers
        An `nn.Sequential` of Linear layers with a smooth activation between them and one output, or what holds one as `.net`;
        or the layers, as for `Hamiltonian`, of which an `nn.ModuleList` is a sequence.
    reads : str
        "q", "p" or "z".
    activation : as for `Hamiltonian`, for a sequence of layers
    factor : float or Tensor [], optional
        What the output is multiplied with.
    control_dim, condition_dim : int
        Sizes of a control u and a condition c that the network reads after x.
    """

    factor: float | Tensor | None

    def __init__(
        self,
        net: nn.Module | Sequence[nn.Module],
        reads: str,
        activation: Any = None,
        *,
        factor: float | Tensor | None = None,
        control_dim: int = 0,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        self.reads = _reads(reads, ("q", "p", "z"))
        self.control_dim = validation.as_count(control_dim, "control_dim")
        self.condition_dim = validation.as_count(condition_dim, "condition_dim")
        if isinstance(net, nn.Module) and not isinstance(net, nn.ModuleList):
            if activation is not None:
                raise ValueError("a network holds its activations, so none is to be given beside it")
            self.net = net
        else:
            self.net = nn.Sequential(*with_activations(layers_of(net), activation))
        _keep(self, "factor", factor, ())

    def forward(self, z: Tensor, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """[..., 2d], with [..., control_dim] and [..., condition_dim], to [..., 1]."""
        x = inputs.joined(self, _half(z, self.reads), control, condition)
        value = column(self.net(x), x)
        return value if self.factor is None else value * _like(self.factor, value)

    def hamiltonian_terms(self) -> list[hamiltonian.Term]:
        if reader.says_terms(self.net):
            raise NotFusedError(
                f"{reader.name_of(self.net)} says by hamiltonian_terms() what it computes of z, so it is no network of a Term; "
                "add it up with SumHNN"
            )
        reader.prove(self.net)
        found, found_biases, activation = reader.read_mlp(
            self.net, even=self.reads == "z" and not self.control_dim + self.condition_dim
        )
        weights, biases = list(found), list(found_biases)
        if self.factor is not None:
            _multiply(weights, biases, self.factor)
        own = hamiltonian.Term(self.reads, tuple(weights), tuple(biases), activation)
        return [hamiltonian.with_input_columns(own, self)]

    def _settings(self) -> tuple[Any, ...] | None:
        return None if self.factor is not None else (self.reads, self.control_dim, self.condition_dim)


class Quadratic(nn.Module):
    """The quadratic form (k x) . x / 2 of x = q or p.

    Parameters
    ----------
    reads : str
        "q" or "p".
    k : float or Tensor [] or [d]
        One number, or one for each coordinate; a `nn.Parameter` is trained.
    """

    k: float | Tensor

    def __init__(self, reads: str, k: float | Tensor = 1.0) -> None:
        super().__init__()
        self.reads = _reads(reads, ("q", "p"))
        if isinstance(k, Tensor) and (k.ndim > 1 or not k.numel()):
            raise ValueError(f"k must be a number or [d], found {list(k.shape)}")
        _keep(self, "k", k, None)

    def forward(self, z: Tensor) -> Tensor:
        """[..., 2d] to [..., 1]."""
        x = _half(z, self.reads)
        return 0.5 * (_like(self.k, x) * x * x).sum(-1, keepdim=True)

    def hamiltonian_terms(self) -> list[hamiltonian.Term]:
        k = self.k if isinstance(self.k, Tensor) else torch.tensor(self.k, dtype=torch.float64)
        return [hamiltonian.Term(self.reads, stiffness=k.reshape(-1))]

    def _settings(self) -> tuple[Any, ...] | None:
        return None if isinstance(self.k, Tensor) else (self.reads, self.k)


class SumHNN(nn.Module):
    """The sum of Hamiltonians and terms.

    Parameters
    ----------
    *terms : nn.Module
        `Hamiltonian`, `Term`, `Quadratic`, `Separable`, `LatentHNN`, `SeparableHNN`, `SumHNN`, an `nn.Sequential` of z, or any
        class with a method `hamiltonian_terms()`.
    """

    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        if not terms:
            raise TypeError("a sum has one term at least, found none")
        self.terms = nn.ModuleList(terms)
        for name in inputs.NAMES:
            sizes = {getattr(term, f"{name}_dim", 0) for term in terms} - {0}
            if len(sizes) > 1:
                raise ValueError(f"the terms of a sum must agree in {name}_dim, found {sorted(sizes)}")
            setattr(self, f"{name}_dim", max(sizes, default=0))

    def forward(self, z: Tensor, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """H(z, u, c): [..., 2d], with [..., control_dim] and [..., condition_dim], to [..., 1]."""
        beside = {"control": control, "condition": condition}
        for name, given in beside.items():
            inputs.check_given(type(self).__name__, name, given, getattr(self, f"{name}_dim"))
        values = []
        for term in self.terms:
            own = {name: x for name, x in beside.items() if getattr(term, f"{name}_dim", 0)}
            values.append(term(z, **own) if own else column(term(z), z))
        value: Tensor = sum(values)  # type: ignore[assignment]
        return value

    def hamiltonian_terms(self) -> list[nn.Module]:
        return list(self.terms)

    def _settings(self) -> tuple[Any, ...] | None:
        return ()


class Separable(SumHNN):
    """H = T(p) + V(q), with one's own networks.

    Parameters
    ----------
    V : nn.Module, Term, or a sequence of layers
        The potential, a network of q: what `Term` takes, or a term with an activation or a factor of its own.
    T : the same, optional
        The kinetic energy, of p; without one it is |p|^2 / 2.
    quadratic : float or Tensor [] or [d], optional
        k of (k q) . q / 2, added to V.
    """

    def __init__(
        self,
        V: nn.Module | Sequence[nn.Module],
        T: nn.Module | Sequence[nn.Module] | None = None,
        quadratic: float | Tensor | None = None,
    ) -> None:
        terms: list[nn.Module] = [as_term(V, "q")]
        if quadratic is not None:
            terms.append(Quadratic("q", quadratic))
        terms.append(Quadratic("p") if T is None else as_term(T, "p"))
        super().__init__(*terms)


class Held(nn.Module):
    """H(z) of an H(z, u, c) whose control and condition are held: for diagnostics, and all else that takes H of z alone.

    Parameters
    ----------
    H : nn.Module
        With a `control_dim` or a `condition_dim`.
    control, condition : Tensor [m] and [c], optional
        A `nn.Parameter` is trained with the rest.

    Raises
    ------
    TypeError, ValueError
        One that H does not take, or takes and is not given; another size.
    """

    control: Tensor | None
    condition: Tensor | None

    def __init__(self, H: nn.Module, control: Tensor | None = None, condition: Tensor | None = None) -> None:
        super().__init__()
        self.H = H
        found = hamiltonian.from_module(H)
        if not found.takes_inputs:
            raise ValueError(f"{reader.name_of(H)} takes no control and no condition, so there is nothing to hold")
        for name, value in zip(inputs.NAMES, (control, condition), strict=True):
            size: int = getattr(found, f"{name}_dim")
            inputs.check_given(reader.name_of(H), name, value, size)
            if value is not None and not (isinstance(value, Tensor) and value.shape == (size,)):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be a tensor [{size}], found {shape}")
            _keep(self, name, value, None)

    def forward(self, z: Tensor) -> Tensor:
        """H(z, u, c): [..., 2d] to [..., 1]."""
        given = {name: getattr(self, name) for name in inputs.NAMES if getattr(self, name) is not None}
        value: Tensor = self.H(z, **given)
        return value

    def _settings(self) -> None:
        return None

    def hamiltonian_terms(self) -> list[hamiltonian.Term]:
        H = hamiltonian.from_module(self.H)
        assert isinstance(H, hamiltonian.SumHamiltonian)  # which alone takes any
        return list(H.given(self.control, self.condition).terms)


def as_term(net: nn.Module | Sequence[nn.Module], reads: str) -> Term:
    if not isinstance(net, Term):
        return Term(net, reads)
    if net.reads != reads:
        raise ValueError(f"the term in place of a function of {reads} reads {net.reads}")
    return net


def layers_of(layers: Sequence[nn.Module] | nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    given = list(layers.children()) if isinstance(layers, nn.Sequential) else list(layers)
    if not given or not all(isinstance(layer, nn.Module) for layer in given):
        found = ", ".join(type(layer).__name__ for layer in given) or "none"
        raise TypeError(f"layers must be the network's layers, each an nn.Module; found {found}")
    return given


def _multiply(weights: list[Tensor], biases: list[Tensor], factor: float | Tensor) -> None:
    own = _like(factor, weights[-1])
    weights[-1], biases[-1] = weights[-1] * own, biases[-1] * own


def with_activations(layers: list[nn.Module], activation: Any) -> list[nn.Module]:
    """The layers with an activation after each hidden one, unless they hold those themselves."""
    if not all(adapters.is_linear(layer) for layer in layers):
        if activation is not None:
            raise ValueError("the layers hold their activations, so none is to be given beside them")
        return layers
    n = len(layers) - 1
    named = activation if isinstance(activation, (list, tuple)) and not isinstance(activation, Activation) else [activation] * n
    if len(named) != n:
        raise ValueError(f"{len(layers)} layers have {n} activations between them, found {len(named)}")
    found: list[nn.Module] = []
    for layer, own in zip(layers, [*named, None], strict=True):
        found.append(layer)
        if layer is not layers[-1]:
            found.append(_module_of("tanh" if own is None else own))
    return found


def _module_of(activation: Any) -> nn.Module:
    if isinstance(activation, nn.Module):
        return activation
    name = activations.name_of(activation)
    if name is None:
        known = ", ".join(activations.NAMES)
        raise ValueError(f"activation must be one of {known}, a module of one or PyTorch's function; found {activation!r}")
    return Activation(name).module()


def _keep(module: nn.Module, name: str, value: float | Tensor | None, shape: tuple[int, ...] | None) -> None:
    """value as a parameter if it is one, as a buffer if it is another tensor, else as the number it is."""
    if not isinstance(value, Tensor):
        setattr(module, name, None if value is None else validation.as_number(value, name))
        return
    if shape is not None and value.numel() != 1 and tuple(value.shape) != shape:
        raise ValueError(f"{name} must be a number or {list(shape)}, found {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, found {value.dtype}")
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _like(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.to(x.device, x.dtype) if isinstance(value, Tensor) else value


def _reads(reads: str, choices: Sequence[str]) -> str:
    if reads not in choices:
        raise ValueError(f"reads must be one of {', '.join(choices)}; found {reads!r}")
    return reads


def _half(z: Tensor, reads: str) -> Tensor:
    if reads == "z":
        return z
    q, p = z.chunk(2, dim=-1)
    return q if reads == "q" else p


def column(value: Tensor, z: Tensor) -> Tensor:
    return value if value.ndim == z.ndim else value[..., None]
