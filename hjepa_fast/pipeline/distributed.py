"""One command on many processes, as `torchrun` starts them: who they are, what they share out, and how they end together.

Without torchrun, or outside `joined`, there is one process: then nothing here communicates, and everything returns at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import HJEPAError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(hours=24)
"""How long processes wait for one that works alone, at a video or at a figure. One that has ended is noticed at once."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Group:
    rank: int
    size: int
    store: dist.Store


_group: _Group | None = None
_counters = itertools.count()


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _group is None else _group.rank


def size() -> int:
    """How many processes work together."""
    return 1 if _group is None else _group.size


def is_first() -> bool:
    """Whether this is the process that writes files and draws."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process speaks for all: the first, and before they have joined, such as of a wrong option, the first of a
    machine."""
    return os.environ["LOCAL_RANK"] == "0" if _group is None and launched() else is_first()


def device(asked: str) -> str:
    """The device of this process: under torchrun each has the GPU of its number on its machine, or all have the CPU.

    Raises
    ------
    UsageError
        There are fewer GPUs than processes on this machine, or one device is asked for by number.
    """
    if not launched() or asked == "cpu":
        return asked
    if asked == "auto" and not torch.cuda.is_available():
        return "cpu"
    if asked not in ("auto", "cuda"):
        raise UsageError(
            f"device {asked!r} is one device, and torchrun started processes that need one each: give --device cuda, by which "
            "each takes its own GPU, or --device cpu"
        )
    wanted, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if wanted > found:
        raise UsageError(
            f"torchrun started {wanted} processes on this machine, which has {found} GPUs: give it --nproc-per-node gpu, or "
            "--device cpu to the command"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Work together with the other processes that torchrun started; alone without it.

    What happens within must happen in all of them in the same order, as far as it uses this module. After an error the
    group is left as it is, so that `once` tells it once; the process must then end by `end`, and torchrun ends the others.

    Parameters
    ----------
    device : str
        What `device` said. GPUs exchange gradients by NCCL, CPUs by Gloo; everything else goes by Gloo.

    Raises
    ------
    HJEPAError
        The processes cannot reach each other.
    """
    global _group
    if not launched():
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, number, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"hjepa_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise HJEPAError(
            f"process {os.environ.get('RANK')} cannot reach the others that torchrun started: {_first_line(error)}. On several "
            "machines give torchrun a --rdzv-endpoint that all can reach, and name their network in GLOO_SOCKET_IFNAME"
        ) from error
    _group = _Group(number, count, store)
    yield
    wait()  # lets the group's threads finish, whom destroying it would wait for with the interpreter's lock held
    _group = None
    dist.destroy_process_group()


def end(code: int) -> None:
    """End a process at once that has failed among others: tidying the group up could wait for those that wait for it."""
    if _group is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def once(text: str) -> bool:
    """Whether no other process has asked this about `text`, so that a message is shown once."""
    if _group is None:
        return speaks()
    try:
        return _group.store.add(f"once/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (RuntimeError, OSError):  # torchrun, which holds the store, is gone
        return True


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended."""
    return size() > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)))


def wait() -> None:
    """Go on when all processes have come here."""
    summed(torch.zeros(1))


def broadcast(value: T) -> T:
    """The first process's value; the others' are not used."""
    if size() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0, device=_CPU)
    return found[0]


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, which alone runs it; the others wait."""
    return broadcast(work() if is_first() else None)  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their numbers."""
    found = [value] * size()
    if size() > 1:
        dist.all_gather_object(found, value)
    return found


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' values, on the CPU. Alone, `values` themselves."""
    if size() == 1:
        return values
    total = values.detach().cpu().clone()
    dist.all_reduce(total)
    return total


def own(n: int) -> slice:
    """This process's share of n items, such as the rows of a batch: consecutive ones, as many as the others', within one."""
    number, count = (0, 1) if _group is None else (_group.rank, _group.size)
    return slice(n * number // count, n * (number + 1) // count)


def shared_out(items: Sequence[Any], work: Callable[[Any], T]) -> list[T]:
    """`work` of each item, of each in one process, in the order of `items` in all."""
    parts = gathered({number: work(items[number]) for number in claimed(range(len(items)))})
    results = {number: result for part in parts for number, result in part.items()}
    return [results[number] for number in range(len(items))]


class Counter:
    """A count that all processes add to."""

    def __init__(self) -> None:
        self._key = f"count/{next(_counters)}"
        self._alone = 0

    def add(self, amount: int) -> int:
        """The count with `amount` more."""
        if _group is not None:
            return int(_group.store.add(self._key, amount))
        self._alone += amount
        return self._alone


def claimed(items: Sequence[T]) -> Iterator[T]:
    """Items that no other process has taken, until there are none: who is fast takes more."""
    counter = Counter()

    def take() -> Iterator[T]:
        while (number := counter.add(1)) <= len(items):
            yield items[number - 1]

    return take()


def check_same(facts: dict[str, Any], where: Any) -> None:
    """All processes must have read the same.

    Raises
    ------
    HJEPAError
        They have not; the message names what differs.
    """
    found = gathered(facts)
    for number, others in enumerate(found):
        if differing := [name for name in facts if others[name] != found[0][name]]:
            raise HJEPAError(
                f"processes 0 and {number} found different files in {where}: {differing[0]} is {found[0][differing[0]]!r} and "
                f"{others[differing[0]]!r}. All processes need the same file system"
            )


@contextlib.contextmanager
def by_first(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context in the first process alone, such as a folder's lock, for as long as all of them work within it."""
    with context if is_first() else contextlib.nullcontext():
        wait()
        yield
        wait()


class _Call(nn.Module):
    """A function of a module as a module's forward, which is what DistributedDataParallel prepares."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.module, *args)


class _Parallel:
    def __init__(self, call: _Call, varying: bool) -> None:
        self._call, self._varying = call, varying
        self._parallel: nn.Module | None = None

    def __call__(self, *args: Any) -> Any:
        if self._parallel is None:
            self._parallel = nn.parallel.DistributedDataParallel(
                self._call, broadcast_buffers=False, find_unused_parameters=self._varying or self._leaves_some_out(args)
            )
        return self._parallel(*args)

    def _leaves_some_out(self, args: tuple[Any, ...]) -> bool:
        """Whether a parameter gets no gradient, which DistributedDataParallel must know, and complains of if it is not so."""
        results = [result.sum() for result in self._call(*args) if result.requires_grad]
        trained = [parameter for parameter in self._call.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(torch.stack(results).sum(), trained, allow_unused=True)
        return bool(summed(torch.tensor([sum(gradient is None for gradient in found)])).item())


def data_parallel(
    module: nn.Module, function: Callable[..., tuple[Tensor, ...]], varying: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """`function(module, ...)` as a function of the rest, with gradients averaged over all processes in the backward pass.

    All calls must use the same parameters of the module, unless `varying`. Those that they do not use keep no gradient, as in
    one process.
    """
    return functools.partial(function, module) if _group is None else _Parallel(_Call(module, function), varying)


def refuse(command: str) -> NoReturn:
    """Raises UsageError: `command` is the work of one process."""
    raise UsageError(
        f"{command} runs on one process, and torchrun started {os.environ['WORLD_SIZE']}: start it without torchrun"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
