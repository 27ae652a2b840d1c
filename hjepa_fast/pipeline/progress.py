"""Progress on standard error: a bar on a terminal, a line now and then elsewhere. Where it cannot be shown, work goes on."""

from __future__ import annotations

import contextlib
import contextvars
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

LINE_INTERVAL = 10.0
"""Seconds between two lines where standard error is not a terminal."""

_within: contextvars.ContextVar[str] = contextvars.ContextVar("within", default="")


@contextlib.contextmanager
def part(text: str) -> Iterator[None]:
    """What is shown within it is part of something larger, such as "stage 3 of 5", which is shown before its name."""
    token = _within.set(f"{_within.get()}{text}, ")
    try:
        yield
    finally:
        _within.reset(token)


class Outlook:
    """How long several jobs will take in all, from how long parts of them took.

    Parameters
    ----------
    work : mapping
        Each job's name, and how much work each of its parts is, in any unit.
    """

    def __init__(self, work: Mapping[str, Sequence[float]]) -> None:
        self._work = {name: list(parts) for name, parts in work.items()}
        self._seconds: dict[str, list[float]] = {name: [] for name in work}

    def add(self, name: str, seconds: float) -> None:
        """The next part of a job took so long, now or before an interruption."""
        self._seconds[name].append(seconds)

    @property
    def left(self) -> float | None:
        """Seconds; None as long as nothing was done. A job of which nothing was done goes on as fast as all others did."""
        rates: dict[str, float] = {}
        took = done = 0.0
        for name, seconds in self._seconds.items():
            work = sum(self._work[name][: len(seconds)])
            took, done = took + sum(seconds), done + work
            if work:
                rates[name] = sum(seconds) / work
        if not done:
            return None
        return sum(rates.get(name, took / done) * sum(parts[len(self._seconds[name]) :]) for name, parts in self._work.items())


class Progress:
    """Throughput and remaining time of a stage; silent if tqdm is not installed or `enabled` is false.

    Parameters
    ----------
    total : int, optional
        Number of steps, if it is known.
    initial : int
        Steps that were done before, in no time.

    `update` counts steps; `callback` has the signature of the pipeline's `progress` arguments::

        with Progress("encoding", unit="clip") as progress:
            encode_videos(videos, folder, config, progress=progress.callback)
    """

    def __init__(
        self, description: str, total: int | None = None, unit: str = "it", enabled: bool = True, initial: int = 0
    ) -> None:
        self.description, self.total, self.unit, self.enabled = f"{_within.get()}{description}", total, unit, enabled
        self.done = self._initial = initial
        self._fields = ""
        self._tqdm: Any = None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled:
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            self._tqdm = tqdm
            self._start = self._last = time.monotonic()
            if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
                with self._shown_if_possible():
                    self._bar = tqdm(
                        total=self.total,
                        desc=self.description,
                        unit=self.unit,
                        file=sys.stderr,
                        dynamic_ncols=True,
                        initial=self._initial,
                    )
        return self

    def announce(self, **fields: Any) -> None:
        """Say at once that it begins, and what is known before its first step; elsewhere than on a terminal as a line."""
        self._fields = _joined(fields)
        if self._bar is not None:
            with self._shown_if_possible():
                self._bar.set_postfix_str(self._fields)
        elif self._tqdm is not None:
            count = f"{self.done}/{'?' if self.total is None else self.total} {self.unit}"
            self._print(f"{self.description}: {', '.join(filter(None, (count, self._fields)))}")

    @contextlib.contextmanager
    def _shown_if_possible(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the terminal or pipe is gone, or closed
            self._bar = self._tqdm = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with self._shown_if_possible():
                self._bar.close()
        elif self._tqdm is not None:
            self._print_line()
        self._tqdm = self._bar = None

    def update(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more steps; `fields` (a loss, say) are shown beside the count."""
        self.done += n
        self._fields = _joined(fields)
        if self._bar is not None:
            with self._shown_if_possible():
                self._bar.set_postfix_str(self._fields, refresh=False)
                self._bar.update(n)
        elif self._tqdm is not None and time.monotonic() - self._last >= LINE_INTERVAL:
            self._print_line()

    def callback(self, done: int, total: int) -> None:
        """Set the count to `done` of `total`."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
        self.update(done - self.done)

    def _print_line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        line = self._tqdm.format_meter(
            self.done, self.total, elapsed, ncols=0, prefix=self.description, unit=self.unit, postfix=self._fields or None,
            initial=self._initial,
        )  # fmt: skip
        self._print(line)

    def _print(self, line: str) -> None:
        with self._shown_if_possible():
            print(line, file=sys.stderr or io.StringIO(), flush=True)


def _joined(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items())


def clock(seconds: float) -> str:
    """A span of time as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
