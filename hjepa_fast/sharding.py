"""What PyTorch's fully sharded data parallelism (FSDP2) needs to be told about parameters that are single numbers."""

from __future__ import annotations

import functools

import torch.distributed as dist
from torch import Tensor, nn


def replicated_scalars(module: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """The parameters of a module that are 0-d, such as `SymplecticIntegrator.dt`, for `fully_shard`, which refuses them::

        fully_shard(model, ignored_params=hf.replicated_scalars(model))

    Every process keeps them whole, under their own names in the state dict. Their gradients are averaged over the processes in
    the backward pass, as FSDP averages those that it shards. As with those, processes must start from the same values. FSDP
    moves them to no device: the module must be on its own before.

    Parameters
    ----------
    module : nn.Module
        Any, with integrators anywhere within. Call this once for a module, before `fully_shard`.
    group : ProcessGroup, optional
        The processes that the mesh given to `fully_shard` shares batches out to; by default all.

    Raises
    ------
    RuntimeError
        There is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("replicated_scalars needs a process group: call torch.distributed.init_process_group first")
    scalars = {parameter for parameter in module.parameters() if not parameter.ndim}
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(_average, group))
    return scalars


def _average(group: dist.ProcessGroup | None, parameter: Tensor) -> None:
    assert parameter.grad is not None
    # Gloo has no average
    dist.all_reduce(parameter.grad, group=group)
    parameter.grad.div_(dist.get_world_size(group))
