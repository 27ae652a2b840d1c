"""Windows of latents that stay where they lie until a batch of them is asked for: memory does not grow with a corpus."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError, LatentError
from . import files, latents
from .places import Place, Remote

HELD = 2**28
"""Bytes of latents that a process holds of a streamed corpus, beside the batches in hand: 256 MiB of blocks, and as many at
most of test windows."""
BLOCKS_HELD = 16
"""Blocks that HELD has room for: as many are mixed, in halves, by a block shuffle."""


@dataclass(frozen=True)
class Rows:
    """One video's latents [n, d] in a file, of which only what is asked for is read."""

    path: Place
    offset: int
    """Bytes before the first row."""
    n: int
    d: int
    metadata: dict[str, Any]
    """As `latents.Latents.metadata`."""

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        return self.n

    def read(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, float32 [stop - start, d].

        Raises
        ------
        LatentError
            The file cannot be read, or has become shorter.
        """
        count, first = (stop - start) * self.d, self.offset + 4 * start * self.d
        try:
            if isinstance(self.path, Remote):
                found = np.frombuffer(bytearray(self.path.read(first, first + 4 * count)), "<f4")
            else:
                found = np.fromfile(self.path, "<f4", count, offset=first)
        except (OSError, ValueError, HJEPAError) as error:
            raise LatentError(f"{self.path} cannot be read: {error}") from error
        if found.size != count:
            raise LatentError(f"{self.path} has become shorter since its header was read")
        return found.reshape(stop - start, self.d)


def open_latents(folder: Place) -> list[Rows]:
    """The latent files of a folder by their headers, video_2 before video_10; no latent is read.

    Raises
    ------
    LatentError
        As `latents.load_latents`, but for numbers that are not finite, which show when they are read.
    """
    opened = [_open(path) for path in latents.list_files(folder)]
    latents.check_alike([(rows.path, rows.d, rows.metadata) for rows in opened])
    return opened


def _open(path: Place) -> Rows:
    from . import schemas

    try:
        header = files.read_header(path, "latent file")
        entry = header.tensors["latents"]
        known = latents.known_facts(header.metadata)
        shape, span = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or len(shape) != 2 or 0 in shape or shape[1] > schemas.MOST_DIMENSIONS:
            raise LatentError(f"shape {shape}, {entry['dtype']}")
        begin, end = (header.data + int(x) for x in span)
        if not header.data <= begin <= end <= header.size or end - begin != 4 * shape[0] * shape[1]:
            raise LatentError(f"shape {shape} in bytes {span}, of a file of {header.size:,} bytes")
    except (HJEPAError, KeyError, ValueError, TypeError) as error:
        raise LatentError(f"{path} is not a readable latent file; delete it and encode again ({error})") from error
    latents.check_even(path, shape[1])
    return Rows(path, begin, shape[0], shape[1], known)


@dataclass(frozen=True)
class Moments:
    """Of latents, each as often as windows hold it."""

    count: int
    mean: Tensor
    """[d] float64."""
    squares: Tensor
    """[d] float64, the sum of the squared distances from the mean."""

    def __add__(self, other: Moments) -> Moments:
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )


@dataclass(frozen=True)
class Scan:
    """What reading a file once tells."""

    moments: Moments
    digest: str


def scan(rows: Rows, window: int) -> Scan:
    """The moments of a file's windows and a hash of its latents, read a part at a time.

    Raises
    ------
    LatentError
        Latents are not finite, or cannot be read.
    """
    digest, total = hashlib.sha256(str((rows.n, rows.d)).encode()), None
    step = _rows_a_block(rows.d)
    for start in range(0, rows.n, step):
        part = rows.read(start, min(start + step, rows.n))
        digest.update(part.tobytes())
        x = torch.from_numpy(part).double()
        if not x.isfinite().all():
            raise LatentError(f"{rows.path} has {int((~x.isfinite()).sum())} non-finite values; delete it and encode again")
        at = torch.arange(start, start + len(x))
        # windows that hold a latent: fewer at both ends of the video
        weights = torch.minimum(torch.minimum(at + 1, rows.n - at), torch.tensor(min(window, rows.n - window + 1)))
        mean = (weights[:, None] * x).sum(dim=0) / weights.sum()
        squares = (weights[:, None] * (x - mean).square()).sum(dim=0)
        moments = Moments(int(weights.sum()), mean, squares)
        total = moments if total is None else total + moments
    assert total is not None
    return Scan(total, digest.hexdigest())


def _rows_a_block(d: int) -> int:
    return max(1, HELD // BLOCKS_HELD // (4 * d))


class Windows:
    """Windows [n, window, d] as a tensor of them would be indexed, `windows[rows]`, each read when it is asked for.

    Parameters
    ----------
    videos : sequence of Rows
        Each of at least `window` rows.
    mean, std : Tensor [d]
        What is subtracted from the latents, and what they are divided by then.
    blocks : bool
        Whether windows come by whole blocks of a video, of which `HELD` bytes are kept; then `order` is one that needs no block
        twice.
    centre : Tensor [d]
        The mean of these windows, as they are made of the latents.
    """

    def __init__(
        self,
        videos: Sequence[Rows],
        window: int,
        mean: Tensor,
        std: Tensor,
        blocks: bool,
        centre: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self.videos, self.window, self.mean, self.std, self.blocks = list(videos), window, mean, std, blocks
        self.centre = centre
        self.device = torch.device(device)
        counts = torch.tensor([len(rows) - window + 1 for rows in videos])
        self._firsts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        # so that a block, with the rows that its last windows reach into the next one, takes its share
        self._windows_a_block = max(1, _rows_a_block(mean.numel()) - window + 1)
        self._held: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.window, self.mean.numel()))

    def to(self, device: torch.device | str) -> Windows:
        """The same windows, as they come to another device."""
        return Windows(self.videos, self.window, self.mean, self.std, self.blocks, self.centre, device)

    def place_of(self, row: int) -> tuple[Rows, int]:
        """A window's video, and the first of its latents there."""
        video, start = self._find(torch.tensor([row]))[0]
        return self.videos[video], start

    def __getitem__(self, rows: Tensor) -> Tensor:
        found = np.stack([self._read(video, start) for video, start in self._find(rows.cpu())])
        return ((torch.from_numpy(found) - self.mean) / self.std).to(self.device)

    def _find(self, rows: Tensor) -> list[tuple[int, int]]:
        videos = torch.searchsorted(self._firsts, rows, right=True) - 1
        return list(zip(videos.tolist(), (rows - self._firsts[videos]).tolist(), strict=True))

    def _read(self, video: int, start: int) -> np.ndarray:
        if not self.blocks:
            return self.videos[video].read(start, start + self.window)
        block, offset = divmod(start, self._windows_a_block)
        rows = self._block(video, block)
        return rows[offset : offset + self.window]

    def _block(self, video: int, block: int) -> np.ndarray:
        key = video, block
        if key not in self._held:
            start = block * self._windows_a_block
            stop = min(start + self._windows_a_block + self.window - 1, len(self.videos[video]))
            size = 4 * (stop - start) * self.mean.numel()
            while self._held and size + sum(rows.nbytes for rows in self._held.values()) > HELD:
                self._held.popitem(last=False)
            self._held[key] = self.videos[video].read(start, stop)
        self._held.move_to_end(key)
        return self._held[key]

    def order(self, n: int, generator: torch.Generator) -> Tensor:
        """The n = len(self) windows in a random order.

        By blocks: blocks are shuffled, as many as half of `HELD` has room for are taken together, and the windows of these are
        shuffled.
        """
        if not self.blocks:
            return torch.randperm(n, generator=generator)
        step = self._windows_a_block
        blocks = [
            (start, min(start + step, last))
            for first, last in zip(self._firsts[:-1].tolist(), self._firsts[1:].tolist(), strict=True)
            for start in range(first, last, step)
        ]
        order: list[Tensor] = []
        group: list[Tensor] = []
        room = 0
        for number in torch.randperm(len(blocks), generator=generator).tolist():
            start, stop = blocks[number]
            size = 4 * (stop - start + self.window - 1) * self.mean.numel()
            if group and room + size > HELD // 2:
                order.append(_shuffled(group, generator))
                group, room = [], 0
            group.append(torch.arange(start, stop))
            room += size
        return torch.cat([*order, _shuffled(group, generator)])


def _shuffled(parts: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    together = torch.cat(list(parts))
    return together[torch.randperm(len(together), generator=generator)]


def read_ahead(windows: Tensor | Windows, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch's rows, on the windows' device, and its windows; streamed ones are read while the batch before is used."""
    if isinstance(windows, Tensor):
        for rows in batches:
            rows = rows.to(windows.device)
            yield rows, windows[rows]
        return
    source = iter(batches)

    def following() -> tuple[Tensor, Tensor] | None:
        rows = next(source, None)
        return None if rows is None else (rows.to(windows.device), windows[rows])

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(following)
        while (current := ahead.result()) is not None:
            ahead = pool.submit(following)
            yield current


Order = Callable[[int, torch.Generator], Tensor]


def order_of(windows: Tensor | Windows) -> Order:
    """How windows are shuffled."""
    if isinstance(windows, Windows):
        return windows.order
    return lambda n, generator: torch.randperm(n, generator=generator)
