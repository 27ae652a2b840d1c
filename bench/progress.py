"""What a run says while it goes: where it is, and how long it still takes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from .cases import Case

TICK = 0.5
"""Seconds between two updates of a terminal's line."""


def prepare_streams() -> None:
    """Whatever the output can encode: a processor's name may hold characters that it cannot."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.environ.pop("MPLBACKEND", None)  # a notebook's makes the import of matplotlib fail elsewhere


def duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """Where a run is.

    Parameters
    ----------
    work : dict
        See `plan`.
    limit : float or None
        Seconds after which the run is planned to end.
    stream : TextIO or None
        Where it is said: as whole lines, on a terminal also what is done at the moment.
    """

    def __init__(self, work: dict[str, float], limit: float | None = None, stream: TextIO | None = None) -> None:
        self.limit, self.stream = limit, stream
        self.begin = self.last = time.perf_counter()
        self.plan(work)
        self.label = self.line = ""
        self.live = False
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stream is no terminal
            self.live = stream is not None and stream.isatty()

    def plan(self, work: dict[str, float]) -> None:
        """Seconds that each case is expected to take, by name, in order; only their ratios count once one is done."""
        self.work, self.open = work, dict(work)
        self.measured = self.expected = 0.0

    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def late(self, seconds: float = 0.0) -> bool:
        """Whether something was measured, and the planned time is over before a case of so many planned seconds ends."""
        return self.limit is not None and self.measured > 0 and self.elapsed() + self._scale() * seconds > self.limit

    def _scale(self) -> float:
        """How many times as long as planned the cases have taken."""
        return self.measured / self.expected if self.expected else 1.0

    def left(self) -> float:
        """Seconds until the last case is done, as far as can be told; more than the limit allows where it cannot be held."""
        running = time.perf_counter() - self.case_begin if self.label else 0.0
        estimate = max(0.0, self._scale() * sum(self.open.values()) - running)
        if self.limit is None or self.elapsed() > self.limit:
            return estimate
        return min(estimate, self.limit - self.elapsed())

    def share(self, name: str) -> float:
        """Seconds of the planned time that a case gets of those that are left; infinite without a limit."""
        if self.limit is None:
            return float("inf")
        return max(0.0, self.limit - self.elapsed()) * self.open[name] / sum(self.open.values())

    def start(self, case: Case, contestants: Sequence[str]) -> None:
        index = len(self.work) - len(self.open) + 1
        self.label = f"[{index}/{len(self.work)}] {case.name}"
        self.case_begin = time.perf_counter()
        self.say(f"{self.label}: {', '.join(contestants)}; {self.times()}")

    def times(self) -> str:
        over = self.limit is not None and self.elapsed() > self.limit
        planned = ", longer than planned" if over else ""
        return f"{duration(self.elapsed())} gone{planned}, about {duration(self.left())} left"

    def tell(self, text: str) -> None:
        """Show what is done at the moment, on a terminal."""
        if self.live and time.perf_counter() - self.last > TICK:
            self.last = time.perf_counter()
            # a line that wraps cannot be written over
            line = f"{self.label}: {text}; {self.times()}"[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + line.ljust(len(self.line)))
            self.line = line

    def done(self, case: Case, measured: bool) -> None:
        expected, self.label = self.open.pop(case.name), ""
        if measured:
            self.measured += time.perf_counter() - self.case_begin
            self.expected += expected

    def say(self, text: str) -> None:
        """A whole line."""
        self.clear()
        self._write(text + "\n")

    def clear(self) -> None:
        """Take the terminal's line away, before anything else is printed."""
        if self.line:
            self._write("\r" + " " * len(self.line) + "\r")
            self.line = ""

    def _write(self, text: str) -> None:
        # what is said on the way is no reason to lose a run
        with contextlib.suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.write(text)
                self.stream.flush()
