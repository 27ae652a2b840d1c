"""Reads the MLP out of a user's module, and refuses a module that computes anything else.

A rollout runs on the tensors of the layers; the module's own `forward` is never called. So before the tensors are taken it is
made sure that a call of the module would have used them and nothing else. No values are compared: a scale that is 1 today may
be trained tomorrow.

- Nothing may stand around the layers: no hooks, no `forward` put on an instance, no `__call__` of a subclass.
- A `forward` is followed with a stand-in for z, which notes what is done to it. Layers of `.net` in their order and changes of
  shape are all that it may meet.
- Where the bytecode of a `forward` shows that it depends on z and `self.net` alone, once is enough; any other is followed
  at every call.
"""

from __future__ import annotations

import dis
import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from . import activations, adapters
from .activations import Activation, Activations
from .errors import NotFusedError
from .models import LatentHNN, SeparableHNN
from .transforms import outside_graphs

# PyTorch's older wrappers of layers: each recomputes a layer's weight in a hook, just before the layer runs
_COMPUTES_WEIGHT = {
    ("torch.nn.utils.weight_norm", "WeightNorm"),
    ("torch.nn.utils.spectral_norm", "SpectralNorm"),
    ("torch.nn.utils.prune", "BasePruningMethod"),
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def sequential_of(module: nn.Module) -> nn.Sequential:
    """The `nn.Sequential` that a module is, or holds as `.net`.

    Raises
    ------
    NotFusedError
        There is none.
    TypeError
        It wraps one; the message says what to pass instead.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a Hamiltonian must be an nn.Module, found {_kind(module)}")
    net = module if isinstance(module, nn.Sequential) else getattr(module, "net", None)
    if not isinstance(net, nn.Sequential):
        hint = _hint(module)
        raise (TypeError if hint else NotFusedError)(
            "a Hamiltonian is an nn.Sequential of Linear layers with one smooth activation between them and one output, "
            f"or a module that holds one as .net; found {name_of(module)}{hint}"
        )
    return net


def _hint(module: nn.Module) -> str:
    if isinstance(getattr(module, "hnn", None), nn.Module):
        return "; pass its .hnn"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "; pass its .module (gradients are averaged where the wrapper's own forward calls the rollout)"
    return ""


def layers_of(net: nn.Sequential, owner: str) -> list[tuple[str, nn.Module]]:
    """The layers of `net` that compute something, each with its place: nested Sequentials are opened, Identity, Dropout that
    is off and Flatten that changes nothing are left out.

    Raises
    ------
    TypeError
        A Dropout that is on.
    """
    found: list[tuple[str, nn.Module]] = []
    _collect(net, "", owner, found)
    if found and type(found[-1][1]) is nn.Flatten and found[-1][1].start_dim == 0:
        found.pop()  # [B, 1] to [B]
    return found


def _collect(net: nn.Sequential, prefix: str, owner: str, found: list[tuple[str, nn.Module]]) -> None:
    for key, layer in net._modules.items():
        place = prefix + key
        if isinstance(layer, nn.Sequential):
            _collect(layer, place + ".", owner, found)
        elif isinstance(layer, _DROPOUTS):
            if layer.training and layer.p > 0:
                raise TypeError(
                    f"layer {place} of {owner} is {name_of(layer)}(p={layer.p}) in training mode, which makes H random; "
                    "call .eval() on it or take it out"
                )
        elif type(layer) is nn.Identity or (type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)):
            continue
        else:
            found.append((place, layer))


def read_mlp(module: nn.Module, even: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Activations]:
    """Weights, biases and the activations of the MLP that `module` is, or holds as `.net`.

    The tensors are the module's own, so gradients reach its parameters. A layer without bias gets zeros.

    Parameters
    ----------
    module : nn.Module
    even : bool
        Whether the input is z = [q, p] and its size must be even.

    Raises
    ------
    NotFusedError
        The module is not such an MLP; the message names the layer that does not fit.
    ValueError
        It is one, but its input is odd, its output is not a scalar, its layers do not fit together or its tensors differ in
        dtype or device.
    """
    owner = name_of(module)
    weights, biases, activation = read_layers(sequential_of(module), owner)
    if weights[-1].shape[0] != 1:
        raise ValueError(f"a Hamiltonian has one output, {owner} has {weights[-1].shape[0]}")
    if even and weights[0].shape[1] % 2:
        raise ValueError(f"a Hamiltonian takes z = [q, p], an even size; {owner} takes {weights[0].shape[1]}")
    return weights, biases, activation


def read_layers(net: nn.Sequential, owner: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Activations]:
    """As `read_mlp`, of an `nn.Sequential` with any numbers of inputs and outputs."""
    return read_listed(layers_of(net, owner), owner)


def read_listed(layers: list[tuple[str, nn.Module]], owner: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Activations]:
    """As `read_layers`, of what `layers_of` gave."""
    if not layers:
        raise TypeError(f"{owner} has no layers")
    linears: list[tuple[str, Any]] = []
    used: list[Activation] = []
    for index, (place, layer) in enumerate(layers):
        if index % 2 == 0:
            if not adapters.is_linear(layer):
                raise NotFusedError(f"layer {place} of {owner} must be nn.Linear, found {_layer_kind(layer)}")
            linears.append((place, layer))
            continue
        activation = activations.from_module(layer)
        # an energy of ReLU alone is piecewise linear, so there is nothing for a vector field to learn from
        if activation is None or all(type(other) is nn.ReLU for _, other in layers[1::2]):
            raise NotFusedError(
                f"layer {place} of {owner} must be a smooth activation "
                f"({', '.join(activations.NAMES)}), found {_layer_kind(layer)}"
            )
        used.append(activation)
    if len(linears) * 2 != len(layers) + 1:
        raise NotFusedError(f"{owner} must start and end with nn.Linear, found {len(layers)} layers")
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for place, layer in linears:
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())  # sets layer.weight; `prove` has made sure that it does no more
        weight: Tensor
        bias: Tensor | None
        if adapters.is_adapter(layer):
            weight, bias = adapters.effective(layer, f"layer {place} of {owner}")
        else:
            weight, bias = layer.weight, layer.bias
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {place} of {owner} has no weights yet; call the network once to create them")
        if weights and weight.shape[1] != weights[-1].shape[0]:
            raise ValueError(
                f"layer {place} of {owner} takes {weight.shape[1]} numbers, the layer before gives {weights[-1].shape[0]}"
            )
        if weight.shape[0] < 1 or weight.shape[1] < 1:
            raise ValueError(f"layer widths must be positive, layer {place} of {owner} is {list(weight.shape)}")
        weights.append(weight)
        biases.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
    for what in ("dtype", "device"):
        values = {str(getattr(t, what)) for t in (*weights, *biases)}
        if len(values) > 1:
            raise ValueError(f"the layers of {owner} must share one {what}, found {', '.join(sorted(values))}")
    return tuple(weights), tuple(biases), activations.of_layers(used)


def _layer_kind(layer: nn.Module) -> str:
    """With what to do about it, where that is known."""
    kind = type(layer)
    if isinstance(layer, nn.Linear):
        return name_of(layer)
    if hasattr(layer, "base_layer"):
        return f"{kind.__module__}.{kind.__qualname__}, an adapter; merge it into its layer first (merge_and_unload)"
    if kind.__name__ == "Linear":
        return f"{kind.__module__}.{kind.__qualname__}, which is no nn.Linear; a quantised network must be dequantised first"
    return name_of(layer)


def says_terms(module: nn.Module) -> bool:
    """Whether the module's class says what it computes by a method `hamiltonian_terms`.

    What a base class says does not hold for the forward that a subclass puts in its place.
    """
    for base in type(module).__mro__:
        if "hamiltonian_terms" in base.__dict__:
            return True
        if "forward" in base.__dict__:
            return False
    return False


# What stands around the layers


def prove(module: nn.Module) -> None:
    """Make sure that calling `module` runs the layers of its `nn.Sequential` and nothing else.

    In a graph of torch.compile this happens while the graph is traced.

    Raises
    ------
    TypeError
        A forward that cannot be called with z.
    NotFusedError
        A hook, a replaced forward, a forward that does more than run `.net`.
    """
    if torch.compiler.is_dynamo_compiling():
        _prove_while_tracing(module)
    else:
        _prove(module)


def _prove_while_tracing(module: nn.Module) -> None:
    from torch._dynamo.comptime import comptime

    # the second is what runs after a graph break, outside of any graph
    comptime(_at_trace_time, lambda: _prove(module))


def _at_trace_time(context: Any) -> None:
    from torch._dynamo.exc import UserError, UserErrorType

    variable = context.get_local("module")._ComptimeVar__variable
    try:
        _prove(variable.value if hasattr(variable, "value") else context.tx.output.get_submodule(variable.module_key))
    except (TypeError, ValueError) as error:
        raise UserError(UserErrorType.INVALID_INPUT, str(error)) from error


@outside_graphs("reading a Hamiltonian's module looks at code")
def _prove(module: nn.Module) -> None:
    _check_global_hooks()
    if says_terms(module) or getattr(type(module), "_is_part", False):
        check_untouched(module, name_of(module))
        return
    if not isinstance(module, SeparableHNN):
        _prove_mlp(module, name_of(module))
        return
    owner = name_of(module)
    check_untouched(module, owner)
    if type(module).forward is not SeparableHNN.forward:
        raise NotFusedError(f"{owner} has a forward of its own where a SeparableHNN's computes T(p) + V(q)")
    _prove_mlp(module.potential, f"{owner}.potential")
    if module.kinetic is not None:
        _prove_mlp(module.kinetic, f"{owner}.kinetic")


def prove_layers(net: nn.Sequential, owner: str) -> None:
    """As `prove`, of an `nn.Sequential` that is called as such."""
    if torch.compiler.is_dynamo_compiling():
        return _prove_while_tracing(net)
    check_untouched(net, owner)
    _check_layers(net, owner, "")


def _prove_mlp(module: nn.Module, owner: str) -> None:
    net = sequential_of(module)
    check_untouched(module, owner)
    _check_layers(net, owner, "")
    if net is not module:
        check_untouched(net, f"{owner}.net")
        _check_forward(net, f"{owner}.net")
    _check_forward(module, owner)


def _check_layers(net: nn.Sequential, owner: str, prefix: str) -> None:
    for key, layer in net._modules.items():
        place = prefix + key
        check_untouched(layer, f"layer {place} of {owner}")
        if isinstance(layer, nn.Sequential):
            if not _is_plain_sequential(type(layer)):
                raise NotFusedError(
                    f"layer {place} of {owner} is a {name_of(layer)} with a forward of its own; use nn.Sequential"
                )
            _check_layers(layer, owner, place + ".")
        elif adapters.is_adapter(layer):
            for name, inner in adapters.inner_layers(layer):
                check_untouched(inner, f"{name} of layer {place} of {owner}")
        elif isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward:
            raise NotFusedError(
                f"layer {place} of {owner} must be nn.Linear, found {name_of(layer)} with a forward of its own; "
                "give it the weight that it uses (torch.nn.utils.parametrize), or merge what it adds into its weight"
            )


def _is_plain_sequential(kind: type[nn.Module]) -> bool:
    return kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]


def _check_global_hooks() -> None:
    hooks = nn.modules.module
    for hook in (*hooks._global_forward_hooks.values(), *hooks._global_forward_pre_hooks.values()):
        # PyTorch's own, of its counters and trackers, only look on
        if not (getattr(hook, "__module__", None) or "").startswith("torch."):
            raise NotFusedError(
                f"a forward hook for all modules is registered ({_kind(hook)}), which a fused rollout cannot run"
            )


def check_untouched(module: nn.Module, name: str) -> None:
    """No hooks, no forward put on the instance, no `__call__` of its class.

    Raises
    ------
    NotFusedError
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"{name} has no weights yet; call the network once to create them")
        if not any((base.__module__, base.__name__) in _COMPUTES_WEIGHT for base in type(hook).__mro__):
            raise NotFusedError(f"{name} has a forward pre-hook ({_kind(hook)})")
    for what, hooks in (
        ("forward hook", module._forward_hooks),
        ("backward hook", module._backward_hooks),
        ("backward pre-hook", module._backward_pre_hooks),
    ):
        for hook in hooks.values():
            raise NotFusedError(f"{name} has a {what} ({_kind(hook)})")
    if "forward" in module.__dict__:
        raise NotFusedError(f"{name} has another forward, put on the instance")
    if type(module).__call__ is not nn.Module.__call__:
        raise NotFusedError(f"{name} has a __call__ of its own")


# What a forward does


def _check_forward(module: nn.Module, owner: str) -> None:
    kind = type(module)
    if isinstance(module, nn.Sequential) and _is_plain_sequential(kind):
        return
    if _is_promised(module) or kind.forward is LatentHNN.forward:
        return
    layers = layers_of(sequential_of(module), owner)
    if not layers or not adapters.is_linear(layers[0][1]):
        return  # reading the layers will say what is wrong with them
    plain = is_net(module)
    case: Any = (getattr(kind.forward, "__code__", None), layers[0][1].in_features, len(layers))
    if plain and case in _followed:
        return
    _follow(module, owner, layers)
    if plain:
        if len(_followed) > 1000:
            _followed.clear()
        _followed.add(case)


def is_net(module: nn.Module) -> bool:
    """Whether it is plain to see that the module's forward depends on z and its `.net` alone."""
    kind = type(module)
    code = getattr(kind.forward, "__code__", None)
    return (
        isinstance(code, CodeType)
        and not isinstance(module, nn.Sequential)
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and not hasattr(kind, "net")
        and "net" not in module.__dict__
        and (kind.forward is LatentHNN.forward or _depends_on_net_alone(code))
    )


# codes of forwards, with the sizes of inputs and the numbers of layers that they were followed for
_followed: set[tuple[Any, int, int]] = set()


def _is_promised(module: nn.Module) -> bool:
    """Whether the instance, or the class that defines its forward, says `forward_is_net = True`.

    What a base class says does not hold for the forward that a subclass puts in its place.
    """
    if "forward_is_net" in module.__dict__:
        return bool(module.__dict__["forward_is_net"])
    for base in type(module).__mro__:
        if "forward_is_net" in base.__dict__:
            return bool(base.__dict__["forward_is_net"])
        if "forward" in base.__dict__:
            return False
    return False


# Instructions that move values about, read `.net`, and call methods of what they got
_PLAIN = {
    "RESUME", "CACHE", "NOP", "PUSH_NULL", "PRECALL", "CALL", "CALL_KW", "KW_NAMES", "POP_TOP", "COPY", "SWAP",
    "LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "STORE_FAST", "LOAD_METHOD", "LOAD_ATTR", "LOAD_CONST",
    "LOAD_SMALL_INT", "RETURN_VALUE", "RETURN_CONST", "BUILD_TUPLE", "BINARY_SUBSCR", "BUILD_SLICE",
}  # fmt: skip


@functools.lru_cache(maxsize=1000)
def _depends_on_net_alone(code: CodeType) -> bool:
    """Whether a forward(self, z) has no branches, no globals, and takes nothing but `.net` from self.

    False where that is not plain to see, as for instructions of a Python to come.
    """
    if code.co_argcount != 2 or code.co_kwonlyargcount or code.co_freevars or code.co_cellvars:
        return False
    owner, z = code.co_varnames[:2]
    known = {z}
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOP", "PRECALL", "PUSH_NULL")]
    for this, following in zip(instructions, [*instructions[1:], None], strict=True):
        subscript = this.opname == "BINARY_OP" and this.argrepr == "[]"  # what it is from Python 3.14 on
        if this.opname not in _PLAIN and not subscript:
            return False
        if this.opname.startswith("STORE_FAST"):
            if this.argval == owner:
                return False
            known.add(this.argval)
        if this.opname.startswith("LOAD_FAST"):
            if this.argval == owner:
                if following is None or following.opname not in ("LOAD_ATTR", "LOAD_METHOD") or following.argval != "net":
                    return False
            elif this.argval not in known:
                return False
    return True


def _stand_in(net: nn.Sequential, prefix: str, index: dict[str, int]) -> nn.Sequential:
    """Like `net`, with stand-ins for the layers that compute something, which `index` counts by their places."""
    stand_ins: dict[str, nn.Module] = {}
    for key, layer in net._modules.items():
        place = prefix + key
        if isinstance(layer, nn.Sequential):
            stand_ins[key] = _stand_in(layer, place + ".", index)
        elif isinstance(layer, nn.Flatten):
            stand_ins[key] = layer
        else:
            stand_ins[key] = _LayerStandIn(index[place]) if place in index else nn.Identity()
    return nn.Sequential(OrderedDict(stand_ins))


def _follow(module: nn.Module, owner: str, layers: list[tuple[str, nn.Module]]) -> None:
    """Run the module's forward on a stand-in for z, with stand-ins for the layers."""
    net, first, n_layers = sequential_of(module), layers[0][1], len(layers)
    width: int = first.in_features  # type: ignore[assignment]
    stand_in = _stand_in(net, "", {place: k for k, (place, _) in enumerate(layers)})
    # the same object but for the layers, so that nothing of the user's is touched
    shadow = object.__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["_modules"] = dict(stand_in._modules) if net is module else {**module._modules, "net": stand_in}
    check_takes_z(module)
    wrong = ""
    for rows in (2, 1, 1000):  # a forward may look at how many there are
        z = Probe(np.arange(rows * width).reshape(rows, width), 0, first)
        try:
            out = type(module).forward(shadow, z)
            if not (isinstance(out, Probe) and out.depth == n_layers):
                wrong = f"it gives {_kind(out)} that is not the output of .net"
            elif not np.array_equal(out.elements.ravel(), np.arange(rows)):
                wrong = "it gives the output of .net in another order, or in part"
        except Unfollowed as unfollowed:
            wrong = str(unfollowed)
        except Exception as error:  # whatever a user's forward makes of a stand-in for z
            wrong = f"it cannot be followed ({type(error).__name__}: {error})"
        if wrong:
            break
    if wrong and not _is_field_of_net(module, net, width):
        raise NotFusedError(f"{owner}.forward does more than run its .net: {wrong}")


def check_takes_z(module: nn.Module) -> None:
    """Make sure that a module can be called with z alone.

    Raises
    ------
    TypeError
        It cannot, so nothing says what it is the energy of.
    """
    forward = module.forward
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"{name_of(module)}.forward takes {signature} where that of a Hamiltonian takes (z), so nothing says what it "
            "computes. Pass the network of H(z) itself, as an nn.Sequential; or set forward_is_net = True on the class, if it "
            "gives the energy of .net at z = [q, p]"
        ) from None


class Unfollowed(BaseException):
    """Something was done to a stand-in that it cannot follow. No user's `except Exception` may hide it."""


class _LayerStandIn(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.modes = _modes()

    def forward(self, x: Any) -> Probe:
        if _modes() != self.modes:
            raise Unfollowed("it runs .net with gradients or autocast switched on or off")
        if not isinstance(x, Probe):
            raise Unfollowed(f"layer {self.index} gets {_kind(x)} that is not made of z")
        if x.depth != self.index:
            raise Unfollowed(f"layer {self.index} runs after {x.depth} layers")
        if not (x.elements.ndim > 1 and np.array_equal(x.elements.ravel(), np.arange(x.elements.size))):
            raise Unfollowed("z reaches .net in another order, or in part")
        if x.depth == 0 and x.elements.shape[-1] != x.layer.in_features:
            raise Unfollowed(f"z reaches .net in the shape {list(x.elements.shape)}")
        return Probe(np.arange(len(x.elements.reshape(-1, x.elements.shape[-1]))).reshape(-1, 1), x.depth + 1, x.layer)


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


class Probe:
    """Stands for a tensor: which numbers of z, or of a layer's output, it holds, and how many layers it has been through.

    It takes what changes a tensor's shape, in PyTorch's functions and methods; anything else raises `Unfollowed`.
    """

    def __init__(self, elements: np.ndarray, depth: int, layer: Any) -> None:
        self.elements, self.depth, self.layer = elements, depth, layer

    def _with(self, elements: np.ndarray) -> Probe:
        return Probe(elements, self.depth, self.layer)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        first = args[0] if args else None
        if name in ("cat", "concat", "concatenate") and isinstance(first, (tuple, list)):
            return _cat(*args, **(kwargs or {}))
        if isinstance(first, Probe) and name in _RESHAPES:
            return getattr(first, name)(*args[1:], **(kwargs or {}))
        raise Unfollowed(f"it calls {name}")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unfollowed(f"it uses .{name} of a tensor")

    def _unfollowed(self, *_: Any) -> NoReturn:
        raise Unfollowed("it calculates with a tensor")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _unfollowed
    __pow__ = __rpow__ = __neg__ = __matmul__ = __rmatmul__ = __floordiv__ = __mod__ = __abs__ = _unfollowed
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __setitem__ = _unfollowed
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = _unfollowed

    shape = property(lambda self: torch.Size(self.elements.shape))
    ndim = property(lambda self: self.elements.ndim)
    # of a stored parameter: computing a parametrised weight may change its buffers
    dtype = property(lambda self: next(self.layer.parameters()).dtype)
    device = property(lambda self: next(self.layer.parameters()).device)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.elements.ndim

    def numel(self) -> int:
        return self.elements.size

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: Any) -> Probe:
        return self._with(self.elements[index])

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.unbind())

    def squeeze(self, dim: int | None = None) -> Probe:
        if dim is not None and self.elements.shape[dim] != 1:
            return self
        return self._with(self.elements.squeeze(dim))

    def unsqueeze(self, dim: int) -> Probe:
        return self._with(np.expand_dims(self.elements, dim))

    def reshape(self, *shape: Any) -> Probe:
        return self._with(self.elements.reshape(*shape))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Probe:
        shape = self.elements.shape
        end = end_dim % len(shape)
        return self._with(self.elements.reshape(*shape[:start_dim], math.prod(shape[start_dim : end + 1]), *shape[end + 1 :]))

    def ravel(self) -> Probe:
        return self._with(self.elements.ravel())

    def contiguous(self) -> Probe:
        return self

    def unbind(self, dim: int = 0) -> tuple[Probe, ...]:
        return tuple(self._with(part) for part in np.moveaxis(self.elements, dim, 0))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Probe, ...]:
        return self.split(-(-self.elements.shape[dim] // chunks), dim)

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[Probe, ...]:
        at = np.cumsum(split_size)[:-1] if not isinstance(split_size, int) else range(
            split_size, self.elements.shape[dim], split_size
        )  # fmt: skip
        return tuple(self._with(part) for part in np.split(self.elements, list(at), axis=dim))

    def to(self, *args: Any, **kwargs: Any) -> Probe:
        for wanted in (*args, *kwargs.values()):
            if isinstance(wanted, torch.dtype) and wanted != self.dtype:
                raise Unfollowed(f"it changes the dtype to {wanted}")
        return self

    def float(self) -> Probe:
        return self.to(torch.float32)

    def double(self) -> Probe:
        return self.to(torch.float64)


_RESHAPES = {"squeeze", "unsqueeze", "reshape", "flatten", "ravel", "unbind", "chunk", "split"}


def _cat(parts: Any, dim: int = 0) -> Probe:
    if not all(isinstance(part, Probe) for part in parts) or len({part.depth for part in parts}) != 1:
        raise Unfollowed("it joins z with something else")
    return parts[0]._with(np.concatenate([part.elements for part in parts], axis=dim))


def _is_field_of_net(module: nn.Module, net: nn.Module, width: int) -> bool:
    """Whether forward(z) is the vector field J grad H of H = .net, compared at two states, with no parameter besides.

    What cannot be run now (fake tensors, inference tensors) is none.
    """
    if net is module or {id(p) for p in module.parameters() if p.requires_grad} - {id(p) for p in net.parameters()}:
        return False
    like = next(net.parameters())
    mixed = [t.device.type for t in module.parameters()] + [t.device.type for t in module.buffers()]
    if width % 2 or like.dtype not in (torch.float32, torch.float64) or set(mixed) - {like.device.type} or like.is_meta:
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
            z = torch.sin(torch.arange(1.0, 2 * width + 1, dtype=like.dtype, device=like.device)).reshape(2, width)
            found = module(z.clone())
            if not isinstance(found, Tensor) or found.shape != z.shape:
                return False
            z.requires_grad_()
            Hq, Hp = torch.autograd.grad(net(z).sum(), z)[0].chunk(2, dim=-1)
            wanted = torch.cat((Hp, -Hq), dim=-1)
            return torch.allclose(found, wanted, rtol=1e3 * torch.finfo(z.dtype).eps, atol=1e3 * torch.finfo(z.dtype).eps)
    except Exception:  # it is the user's code, on states of ours
        return False


def name_of(module: nn.Module) -> str:
    return type(module).__name__


def _kind(x: object) -> str:
    name = getattr(x, "__qualname__", None)
    return name if isinstance(name, str) else type(x).__name__
