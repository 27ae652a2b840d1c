"""Low-rank adapters (LoRA) as the PEFT library puts them into a network, through the weight that they amount to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .errors import NotFusedError


def is_adapter(layer: nn.Module) -> bool:
    """Whether it is PEFT's LoRA around an `nn.Linear`. Known by name: the library is not imported for it."""
    kind = type(layer)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")


def is_linear(layer: nn.Module) -> bool:
    """An `nn.Linear`, or an adapter around one."""
    return isinstance(layer, nn.Linear) or is_adapter(layer)


def inner_layers(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layers that an adapter runs, with their names."""
    yield "base_layer", layer.base_layer
    for part in ("lora_A", "lora_B"):
        for name, inner in getattr(layer, part).items():
            yield f"{part}.{name}", inner


def effective(layer: Any, place: str) -> tuple[Tensor, Tensor | None]:
    """W + sum s B A and the bias of what an adapter computes now; gradients reach all of them.

    Raises
    ------
    NotFusedError
        It computes something else: a variant such as DoRA, a dropout that is on, another dtype, a state between two.
    """
    base = layer.base_layer
    if type(base) is not nn.Linear:
        raise NotFusedError(f"{place} is an adapter around {type(base).__name__}, not around nn.Linear")
    if layer.merged and layer.disable_adapters:
        raise NotFusedError(f"{place} is merged and switched off at once, which its next call would undo")
    weight, bias = base.weight, base.bias
    if layer.merged or layer.disable_adapters:
        return weight, bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {}):
            raise NotFusedError(f"{place} is a variant of LoRA, whose effective weight is not W + s B A")
        if not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0:
            raise NotFusedError(f"{place} has a dropout of {dropout.p} that is on, which makes H random; call .eval() on it")
        if type(A) is not nn.Linear or type(B) is not nn.Linear or A.weight.dtype != weight.dtype:
            raise NotFusedError(f"{place} has an adapter that is no pair of nn.Linear of the layer's dtype")
        scale = layer.scaling[name]
        weight = weight + scale * (B.weight @ A.weight)
        if B.bias is not None:
            bias = scale * B.bias if bias is None else bias + scale * B.bias
    return weight, bias
