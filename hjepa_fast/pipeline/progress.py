"""Progress on standard error: a bar on a terminal, a line now and then elsewhere. Where it cannot be shown, work goes on."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

LINE_INTERVAL = 10.0
"""Seconds between two lines where standard error is not a terminal."""


class Progress:
    """Throughput and remaining time of a stage; silent if tqdm is not installed or `enabled` is false.

    `update` counts steps; `callback` has the signature of the pipeline's `progress` arguments::

        with Progress("encoding", unit="clip") as progress:
            encode_videos(videos, folder, config, progress=progress.callback)
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "it", enabled: bool = True) -> None:
        self.description, self.total, self.unit, self.enabled = description, total, unit, enabled
        self.done = 0
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
                        total=self.total, desc=self.description, unit=self.unit, file=sys.stderr, dynamic_ncols=True
                    )
        return self

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
        shown = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items())
        self._fields = ", ".join(shown)
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
            self.done, self.total, elapsed, ncols=0, prefix=self.description, unit=self.unit, postfix=self._fields or None
        )
        with self._shown_if_possible():
            print(line, file=sys.stderr or io.StringIO(), flush=True)
