"""Whether ours has become slower than in an earlier results file, as far as two runs can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cases import Case
from .rivals import is_ours

HELP = (
    "compare with an earlier results file, such as bench/results/quick-cpu.json, and exit with 1 if ours has become slower. "
    "Machines differ, so no seconds are compared but, for each case and each of our backends and variants, its time relative "
    "to each rival's in the same run (the inverse of the table's ratios), and of these changes the median over the rivals of "
    "both runs. A backend or case that the file has and this run has not counts as slower."
)


@dataclass(frozen=True)
class Comparison:
    """One of ours in one case."""

    case: str
    contestant: str
    factor: float | None
    """How many times as long as before it takes, relative to the rivals; None if that cannot be said."""
    reason: str
    """What it is relative to, or why it cannot be said."""
    missing: bool = False
    """It was measured before, and is not there now."""

    def slower(self, tolerance: float) -> bool:
        return self.missing or (self.factor is not None and self.factor > 1 + tolerance)


def compare(before: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[Comparison]:
    """Each of ours in each of these cases that the earlier results hold."""
    return [
        _compared(name, contestant, before["cases"][name], now["cases"].get(name))
        for name in names
        if name in before["cases"]
        for contestant in before["cases"][name]["ratios"]
        if is_ours(contestant)
    ]


def _compared(name: str, contestant: str, old: dict[str, Any], new: dict[str, Any] | None) -> Comparison:
    if new is None:
        return Comparison(name, contestant, None, "the time was over before this case", missing=True)
    if old == new:
        return Comparison(name, contestant, None, "it is the same measurement")
    if Case.of(old["case"]).problem != Case.of(new["case"]).problem:
        return Comparison(name, contestant, None, "the case was another problem")
    if contestant not in new["ratios"]:
        if contestant.partition(":")[0] in {other.partition(":")[0] for other in new["ratios"]}:
            return Comparison(name, contestant, None, "this run does not time that variant")
        why = new.get("left_out", {}).get(contestant, "it did not take part")
        return Comparison(name, contestant, None, f"no longer there: {why}", missing=True)
    was, now = old["ratios"][contestant], new["ratios"][contestant]
    rivals = [rival for rival in was if rival in now and not is_ours(rival)]
    if not rivals:
        return Comparison(name, contestant, None, "no rival was timed in both runs")
    return Comparison(name, contestant, statistics.median(was[r] / now[r] for r in rivals), f"relative to {', '.join(rivals)}")


def told(comparisons: list[Comparison], tolerance: float, file: str) -> tuple[str, bool]:
    """The comparison as text, and whether it holds: something was compared, and nothing is slower."""
    lines = [
        f"Compared with {file}, our time relative to the rivals' (1.00: as before; at most {1 + tolerance:.2f} is allowed):"
    ]
    for c in comparisons:
        verdict = (
            "MISSING" if c.missing else "SLOWER" if c.slower(tolerance) else "ok" if c.factor is not None else "not compared"
        )
        factor = "" if c.factor is None else f"{c.factor:.2f}, "
        lines.append(f"  {verdict:<12} {c.case} {c.contestant}: {factor}{c.reason}")
    slower = sum(c.slower(tolerance) for c in comparisons)
    compared = sum(c.factor is not None for c in comparisons)
    lines.append(f"{slower} slower or missing, {compared} compared, {len(comparisons) - compared} not comparable")
    if not compared:
        lines.append("nothing could be compared")
    return "\n".join(lines), bool(compared) and not slower
