"""A Hamiltonian as plain tensors: what every backend computes with."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations
from .activations import Activation
from .models import SeparableHNN


class MLPHamiltonian(NamedTuple):
    """H(z) = W_{L+1} s(... s(W_1 z + b_1) ...) + b_{L+1}, a scalar.

    `weights[l]` is [width_{l+1}, width_l], `biases[l]` is [width_{l+1}]; the last width is 1.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Activation

    @property
    def latent_dim(self) -> int:
        return self.weights[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        *hidden, (w_out, b_out) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            z = self.activation(F.linear(z, weight, bias))
        return F.linear(z, w_out, b_out).squeeze(-1)


class Term(NamedTuple):
    """A function of q or of p alone: an MLP (no layers: zero) plus the quadratic form (k . x^2) / 2 (None: zero)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Activation
    stiffness: Tensor | None
    """k, [d] or [1]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.biases, *(() if self.stiffness is None else (self.stiffness,)))

    def value(self, x: Tensor) -> Tensor:
        """[..., d] to [...]."""
        value = MLPHamiltonian(self.weights, self.biases, self.activation).energy(x) if self.weights else x.new_zeros(())
        return value if self.stiffness is None else value + 0.5 * (self.stiffness * x * x).sum(-1)


class SeparableHamiltonian(NamedTuple):
    """H(q, p) = T(p) + V(q)."""

    V: Term
    T: Term
    latent_dim: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.V.tensors, *self.T.tensors)

    def energy(self, z: Tensor) -> Tensor:
        """H(z): [..., 2d] to [...]."""
        q, p = z.chunk(2, dim=-1)
        return self.T.value(p) + self.V.value(q)


Hamiltonian = MLPHamiltonian | SeparableHamiltonian


def from_module(module: nn.Module) -> Hamiltonian:
    """Read the tensors out of a `SeparableHNN`, or out of any module that is, or holds as `.net`, an MLP Hamiltonian.

    Raises
    ------
    TypeError, ValueError
        See `mlp_from_module`.
    """
    if not isinstance(module, SeparableHNN):
        return mlp_from_module(module)
    V = mlp_from_module(module.potential, "even or odd")
    T = None if module.kinetic is None else mlp_from_module(module.kinetic, "even or odd")
    unit = V.weights[0].new_ones(1)
    return SeparableHamiltonian(
        V=Term(V.weights, V.biases, V.activation, module.stiffness),
        T=Term((), (), V.activation, unit) if T is None else Term(T.weights, T.biases, T.activation, None),
        latent_dim=2 * V.weights[0].shape[1],
    )


def mlp_from_module(module: nn.Module, inputs: str = "even") -> MLPHamiltonian:
    """Read the MLP out of a module that is, or holds as `.net`, an `nn.Sequential` of Linear layers.

    The tensors are the module's own, so gradients reach its parameters. A layer without bias gets zeros.

    Raises
    ------
    TypeError
        The module is not such an MLP; the message names the layer that does not fit.
    ValueError
        It is one, but its input is odd, its output is not a scalar, or its tensors differ in dtype or device.
    """
    layers = list(_sequential(module))
    linears: list[nn.Linear] = []
    used: set[Activation] = set()
    for index, layer in enumerate(layers):
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise TypeError(f"layer {index} of {_name(module)}.net has forward hooks, which a fused rollout cannot run")
        if index % 2 == 0:
            if not (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward):
                raise TypeError(f"layer {index} of {_name(module)} must be nn.Linear, found {_name(layer)}")
            linears.append(layer)
            continue
        activation = activations.from_module(layer)
        if activation is None:
            raise TypeError(
                f"layer {index} of {_name(module)} must be a smooth activation "
                f"({', '.join(activations.NAMES)}), found {_name(layer)}"
            )
        used.add(activation)
    if len(linears) * 2 != len(layers) + 1:
        raise TypeError(f"{_name(module)} must start and end with nn.Linear, found {len(layers)} layers")
    if len(used) > 1:
        raise TypeError(f"{_name(module)} mixes activations, one is supported: {sorted(used)}")
    if linears[-1].out_features != 1:
        raise ValueError(f"a Hamiltonian has one output, {_name(module)} has {linears[-1].out_features}")
    if inputs == "even" and linears[0].in_features % 2:
        raise ValueError(f"a Hamiltonian takes z = [q, p], an even size; {_name(module)} takes {linears[0].in_features}")
    weights = tuple(layer.weight for layer in linears)
    biases = tuple(w.new_zeros(w.shape[0]) if layer.bias is None else layer.bias
                   for layer, w in zip(linears, weights, strict=True))  # fmt: skip
    for what in ("dtype", "device"):
        found = {str(getattr(t, what)) for t in (*weights, *biases)}
        if len(found) > 1:
            raise ValueError(f"the layers of {_name(module)} must share one {what}, found {', '.join(sorted(found))}")
    return MLPHamiltonian(weights, biases, used.pop() if used else Activation("tanh"))


def _sequential(module: nn.Module) -> nn.Sequential:
    net = module if isinstance(module, nn.Sequential) else getattr(module, "net", None)
    if not isinstance(net, nn.Sequential):
        hint = "; pass its .hnn" if isinstance(getattr(module, "hnn", None), nn.Module) else ""
        raise TypeError(
            "a Hamiltonian is an nn.Sequential of Linear layers with one smooth activation between them and one output, "
            f"or a module that holds one as .net; found {_name(module)}{hint}"
        )
    if len(net) == 0:
        raise TypeError(f"{_name(module)} has no layers")
    return net


_forward_checked: weakref.WeakSet[type] = weakref.WeakSet()


def check_forward(module: nn.Module, mlp: Hamiltonian, z: Tensor) -> None:
    """Once for each class of module: its forward must compute what its `.net` does.

    A user's class could scale or shift the output of `.net`; a rollout of `.net` alone would then be silently wrong.
    Compared on one row of z [B, 2d]; a forward that does not take z is not compared.

    Raises
    ------
    ValueError
        The module's output differs from its `.net`'s.
    """
    kind = type(module)
    if isinstance(module, (nn.Sequential, SeparableHNN)) or kind in _forward_checked or not _is_plain(z):
        return
    with torch.no_grad():
        row = z[:1]
        expected = mlp.energy(row)
        try:
            found = module(row)
        except Exception:
            found = None  # forward takes something else, such as q and p apart; there is nothing to compare
    if isinstance(found, Tensor) and found.numel() == 1 and bool(expected.isfinite().all()):
        tolerance = 100 * torch.finfo(expected.dtype).eps
        torch_dtype = torch.promote_types(expected.dtype, torch.float32)
        a, b = found.reshape(1).to(torch_dtype), expected.to(torch_dtype)
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"{_name(module)}.forward gives {a.item():.6g} where its .net gives {b.item():.6g}: a Hamiltonian must "
                "return self.net(z) unchanged. Put scales and shifts into the last Linear layer."
            )
    _forward_checked.add(kind)


def _is_plain(z: Tensor) -> bool:
    """Whether values may be looked at: not traced, not captured, no empty batch, no autocast rounding."""
    return (
        type(z) in (Tensor, nn.Parameter)
        and z.shape[0] > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(z.device.type)
        and not (z.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__
