"""A results file as a Markdown table and plots beside it: `python -m bench.report FILE.json`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hjepa_fast.errors import HJEPAError, MissingDependencyError
from hjepa_fast.pipeline import files, plotting
from hjepa_fast.pipeline.findings import shown
from hjepa_fast.schemes import SCHEMES

from . import machine
from .cases import GRID_PREFIX, MOST_BYTES, MOST_SECONDS, SLOPE_STEPS, WITHOUT_ROLLOUT, Case
from .chip import matrix_rate
from .measure import FAILED, NOT_TIMED
from .progress import prepare_streams
from .rivals import is_ours

RIVALS = ("eager", "jax", "compiled", "baseline", "manual", "func", "eager-float32")
Entry = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]
CONTESTANTS = {
    "torch": plotting.BLUE,
    "cpp": plotting.GREEN,
    "triton": plotting.SKY,
    "cuda": plotting.INDIGO,
    "eager": plotting.ORANGE,
    "manual": plotting.VERMILLION,
    "jax": plotting.PURPLE,
    "compiled": plotting.WINE,
    "func": plotting.OLIVE,
    "baseline": plotting.GREY,
    "eager-float32": plotting.BLACK,
}
"""Colours that are a contestant's wherever it takes part."""
BARS = ("eager", "manual", "jax")
"""What no cell should lose against."""
LOST = 1.05
"""How many times as long as the best of them ours takes in a cell that is said to be lost, at least."""
BUSY = 0.5
"""Load average from which times are said to be disturbed."""


def ours(entry: Entry) -> str | None:
    """The fastest of our backends that keeps everything for the backward pass."""
    return _fastest(entry, lambda name: ":" not in name)


def _fastest(entry: Entry, wanted: Callable[[str], bool]) -> str | None:
    facts = entry["contestants"]
    names = [name for name, fact in facts.items() if fact["ours"] and wanted(name)]
    return min(names, key=lambda name: facts[name]["median_s"], default=None)


def _graphed(entry: Entry) -> str | None:
    """The fastest of our calls that were captured in a CUDA graph."""
    return _fastest(entry, lambda name: name.endswith(":graphed") and name.count(":") == 1)


def bar(entry: Entry) -> tuple[str, str, float] | None:
    """Ours as a user gets it, the best of `BARS`, and how many times as long as ours that takes; None without one of both."""
    mine = "cpp" if "cpp" in entry["contestants"] else ours(entry)
    ratios = {} if mine is None else {rival: r for rival, r in entry["ratios"][mine].items() if rival in BARS}
    if mine is None or not ratios:
        return None
    best = min(ratios, key=lambda rival: ratios[rival])
    return mine, best, ratios[best]


@dataclass(frozen=True)
class Beside:
    """A committed measurement of a case, shown for comparison."""

    file: str
    environment: dict[str, Any]
    chip: dict[str, Any] | None
    entry: Entry

    @property
    def label(self) -> str:
        hardware = self.environment["hardware"]
        return f"committed: {hardware['gpu'] or hardware['processor']}"


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises
    ------
    HJEPAError
        It is missing, unreadable, or not one of `bench.run`.
    """
    try:
        results = files.read_json(path, "results file")
        for entry in results["cases"].values():
            Case.of(entry["case"])
        table(results)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise HJEPAError(f"{path} is no results file of this version of bench.run ({found})") from error
    checked: dict[str, Any] = results
    return checked


def committed(found: dict[str, Any], wanted: Iterable[Case], name: str, folder: Path | None = None) -> dict[str, Beside]:
    """By case, what the repository holds of the same problem on the same kind of device: of the same processor if there
    is any, with the same number of threads, and of the file that is called `name`."""
    beside: dict[str, tuple[tuple[bool, ...], Beside]] = {}
    cases = {case.name: case for case in wanted}
    for path in sorted((folder or machine.COMMITTED).glob("*.json")):
        try:
            results = read(path)
        except HJEPAError as error:
            print(f"warning: left out of the comparison: {error}", file=sys.stderr)
            continue
        theirs, ours = results["environment"]["hardware"], found["hardware"]
        if theirs["device"] != ours["device"]:
            continue
        rank = (
            *(theirs[key] != ours[key] for key in ("gpu", "processor", "threads", "instruction_set")),
            path.stem != name,
        )
        for entry in results["cases"].values():
            case = Case.of(entry["case"])
            mine = cases.get(case.name)
            if mine is None or mine.problem != case.problem or (case.name in beside and beside[case.name][0] <= rank):
                continue
            beside[case.name] = rank, Beside(path.name, results["environment"], entry.get("chip", results.get("chip")), entry)
    return {name: kept for name, (_, kept) in beside.items()}


def rivals_of(names: Iterable[str]) -> list[str]:
    """Columns of the table, in their order: those of the contestants that are not ours."""
    found = {name for name in names if not is_ours(name)}
    return [name for name in RIVALS if name in found] + sorted(found - {*RIVALS})


def header(rivals: Sequence[str]) -> list[str]:
    return ["case", "ours", "ms per step", "20 to 80 %", "rounds", "GFLOP/s", "of matrix rate", *rivals]


def rows(
    name: str, entry: Entry, rivals: Sequence[str], device: str, chip: dict[str, Any] | None, beside: Beside | None = None
) -> list[list[str]]:
    """A case's lines of the table: of our fastest backend, of our fastest graphed call, and of the committed result."""
    found = []
    chip = entry.get("chip", chip)
    for chosen in (ours(entry), _graphed(entry)):
        if chosen is None:
            continue
        fact, ratios, n_steps = entry["contestants"][chosen], entry["ratios"][chosen], entry["case"]["n_steps"]
        spread = f"{_ms(fact['p20_s'] / n_steps)} to {_ms(fact['p80_s'] / n_steps)}"
        rate = f"{fact['gflops_per_s']:.0f}" if "gflops_per_s" in fact else ""
        share = _share(entry, chosen, device, chip)
        faster = [f"{ratios[rival]:.2f}x" if rival in ratios else _instead(entry, rival) for rival in rivals]
        found.append([name, chosen, _ms(fact["median_s"] / n_steps), spread, str(entry["rounds"]), rate, share, *faster])
    if beside is not None:
        found += [[beside.label, *row[1:]] for row in rows(name, beside.entry, rivals, device, beside.chip)]
    return found


def _share(entry: Entry, contestant: str, device: str, chip: dict[str, Any] | None) -> str:
    """Of the chip's own matrix rate."""
    fact, most = entry["contestants"][contestant], matrix_rate(entry.get("chip", chip), entry["case"], device)
    return f"{100 * fact['gflops_per_s'] / most:.0f} %" if most and "gflops_per_s" in fact else ""


def _instead(entry: Entry, rival: str) -> str:
    """What stands in the place of a ratio: nothing for a rival that the case has not."""
    reason: str = entry.get("left_out", {}).get(rival, "")
    return reason if reason.startswith(NOT_TIMED) else "failed" if reason.startswith(FAILED) else "left out" if reason else ""


def introduction(results: dict[str, Any], beside: Iterable[Beside] = ()) -> str:
    """What was measured by what, and what stands beside it."""
    environment, chip = results["environment"], results.get("chip")
    text = f"{machine.described(environment)}\n\n"
    text += (
        "How many times as long each rival takes as ours: the median over rounds of the ratio within a round. Times are\n"
        "medians, with 20th and 80th percentiles. A training step is forward, loss with energy term, and backward.\n"
        "GFLOP/s count the gradients of H, coupled in the way that takes fewer multiplications, and in training three times\n"
        "that, for forward and backward pass.\n\n"
    )
    if chip:
        rates = ", ".join(
            f"{rate:,.0f} GFLOP/s in {name}" if rate > 9 else f"{rate:.2g} GFLOP/s in {name}"
            for name, rate in chip["matrix_gflops_per_s"].items()
        )
        which = "float32" if environment["hardware"]["device"] == "cpu" else "the case's arithmetic"
        sizes = f"{chip['matrix_size']} x {chip['matrix_size']}"
        text += (
            f"Measured in the same run, at {chip['date']}: products of two {sizes} matrices at {rates};\n"
            f"memory copied at {chip['memory_gb_per_s']:,.0f} GB/s, read and written. The matrix rate is that of {which}.\n\n"
        )
    for label, file, theirs in sorted({(b.label, b.file, machine.described(b.environment)) for b in beside}):
        text += f'"{label}" was not measured here. It is of bench/results/{file}: {theirs}.\n\n'
    return text


def table(results: dict[str, Any], beside: dict[str, Beside] | None = None) -> str:
    """Environment, a row a case with ratios, a row a case with memory."""
    beside = beside or {}
    entries, device = results["cases"], results["environment"]["hardware"]["device"]
    beside = {name: kept for name, kept in beside.items() if name in entries}
    shown_entries = [*entries.values(), *(kept.entry for kept in beside.values())]
    rivals = rivals_of(name for entry in shown_entries for name in with_a_cell(entry))
    shown = [row for name, e in entries.items() for row in rows(name, e, rivals, device, results.get("chip"), beside.get(name))]
    return introduction(results, beside.values()) + _markdown(header(rivals), shown) + details(results)


def with_a_cell(entry: Entry) -> list[str]:
    """Contestants with a time, or with a reason in its place."""
    out = [name for name, reason in entry.get("left_out", {}).items() if reason.startswith((NOT_TIMED, FAILED))]
    return [*entry["contestants"], *out]


def of_device(contestant: str, results: dict[str, Any]) -> bool:
    """Whether one could take part: on a processor the backends of GPUs have none."""
    return results["environment"]["hardware"]["device"] != "cpu" or contestant not in ("triton", "cuda")


def details(results: dict[str, Any]) -> str:
    """What the table of ratios does not show: lost cells, the grid, who is missing, integrators, memory, first calls."""
    entries = results["cases"]
    text = losing(results) + zoo(results) + grid(results)
    absent: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for contestant, reason in entry.get("left_out", {}).items():
            if of_device(contestant, results):
                absent.setdefault(f"{contestant}: {reason}", []).append(name)
    if absent:
        text += "\nLeft out:\n\n"
        text += "".join(
            f"- {what} ({'every case' if len(names) == len(entries) else ', '.join(names)})\n" for what, names in absent.items()
        )
    if results.get("not_measured"):
        names = ", ".join(results["not_measured"])
        text += f"\nNot measured, since the time was over: {names}. The same command goes on with them.\n"
    busy = [f"{name} ({entry['load']:.1f})" for name, entry in entries.items() if (entry.get("load") or 0.0) > BUSY]
    if busy:
        text += f"\nMeasured on a machine that had other work (load average before the run): {', '.join(busy)}.\n"
    methods = [
        [name, contestant, _ms(fact["median_s"] / entry["case"]["n_steps"]), *_against(entry, contestant)]
        for name, entry in entries.items()
        if len(entry["case"].get("integrators", ())) > 1
        for contestant, fact in entry["contestants"].items()
        if fact["ours"]
    ]
    if methods:
        text += "\nIntegrators: how many times as long as the same backend's published leapfrog step each takes, and the\n"
        text += "eager published step as long as it:\n\n"
        text += _markdown(["case", "contestant", "ms per step", "of leapfrog", "eager"], methods)
    kept = [
        [name, contestant, f"{fact['kept_bytes'] / _sample_steps(entry) / 1024:.2f}", _ms(fact["median_s"])]
        for name, entry in entries.items()
        for contestant, fact in entry["contestants"].items()
        if fact.get("kept_bytes") is not None
    ]
    if kept:
        text += "\nKept for the backward pass by a rollout with energies, the loss not counted:\n\n"
        text += _markdown(["case", "contestant", "KB per sample and step", "ms per training step"], kept)
    compiled = [
        [name, contestant, f"{fact['first_call_s']:.1f}"]
        for name, entry in entries.items()
        for contestant, fact in entry["contestants"].items()
        if contestant == "jax" or contestant.startswith("compiled")
    ]
    if compiled:
        text += "\nSeconds of the first call, which compiles:\n\n" + _markdown(["case", "contestant", "s"], compiled)
    return text


def losing(results: dict[str, Any]) -> str:
    """The cells in which one of `BARS` is clearly faster than ours, or the sentence that there is none."""
    device = results["environment"]["hardware"]["device"]
    found = {name: judged for name, entry in results["cases"].items() if (judged := bar(entry)) is not None}
    if not found:
        return ""
    timed = {rival for entry in results["cases"].values() for rival in entry["contestants"]}
    rivals = ", ".join(rival for rival in BARS if rival in timed)
    more = f"more than {100 * (LOST - 1):.0f} % longer than the best of {rivals}"
    lost = [
        [name, mine, best, f"{ratio:.2f}x", _share(results["cases"][name], mine, device, results.get("chip"))]
        for name, (mine, best, ratio) in found.items()
        if ratio * LOST < 1
    ]
    if not lost:
        return f"\nLosing cells: none. In no one of {len(found)} does ours take {more}.\n"
    header = ["case", "ours", "best rival", "its time by ours", "of matrix rate"]
    return f"\nLosing cells, {len(lost)} of {len(found)}, in which ours takes {more}:\n\n" + _markdown(header, lost)


def zoo(results: dict[str, Any]) -> str:
    """A line for each model of a public repository."""
    lines = []
    for entry in results["cases"].values():
        case = Case.of(entry["case"])
        judged = bar(entry) if case.kind == "zoo" else None
        if judged is not None:
            mine, _, ratio = judged
            ms, widths = _ms(entry["contestants"][mine]["median_s"]), "-".join(map(str, (case.latent_dim, *case.hidden_dims)))
            how = f"{widths}, {case.activation}, {case.dtype}"
            lines.append([case.replica, how, str(case.batch), str(case.n_steps), ms, f"{ratio:.2f}x"])
    if not lines:
        return ""
    header = ["repository", "states and hidden layers", "batch", "steps", "ours, ms", "its own way"]
    return (
        "\nPublic repositories' models, layouts and losses: milliseconds of a training step, loss and gradients, by ours, and\n"
        "how many times as long the repository's own way takes:\n\n" + _markdown(header, lines)
    )


def grid(results: dict[str, Any]) -> str:
    """Two tables for each network of the grid: rollouts without and with gradients, and the two that have no rollout."""
    networks: dict[str, dict[tuple[int, int], dict[str, Entry]]] = {}
    for name, entry in results["cases"].items():
        if name.startswith(GRID_PREFIX):
            case = Case.of(entry["case"])
            networks.setdefault(_network(case), {}).setdefault((case.batch, case.n_steps), {})[case.kind] = entry
    text = ""
    for network, cells in networks.items():
        for kinds in (("rollout", "training"), WITHOUT_ROLLOUT):
            lines = [
                [str(batch), str(n_steps), *(part for kind in kinds for part in _cell(row.get(kind), results))]
                for (batch, n_steps), row in sorted(cells.items())
                if row.keys() & {*kinds}
            ]
            if lines:
                header = [part for kind in kinds for part in (f"{kind}, ms", "best rival", "of matrix rate")]
                text += f"\n{network}:\n\n" + _markdown(["batch", "steps", *header], lines)
    if not text:
        return ""
    return (
        "\nThe grid: milliseconds of ours for a whole call, and how many times as long the best of "
        f"{', '.join(BARS)} takes. A call that\nwould take the published code about {MOST_SECONDS:g} s or "
        f"{MOST_BYTES / 1e9:g} GB and more is not measured.\n{text}"
    )


def _network(case: Case) -> str:
    """Its widths and activation."""
    inputs = case.latent_dim // 2 if case.separable else case.latent_dim
    layers = f"{'-'.join(map(str, (inputs, *case.hidden_dims, 1)))}, {case.activation}"
    if not case.separable:
        return layers
    return f"|p|^2 / 2 + V(q) + k q^2 / 2, V {layers}" if case.quadratic else f"T(p) + V(q), each {layers}"


def _cell(entry: Entry | None, results: dict[str, Any]) -> list[str]:
    judged = None if entry is None else bar(entry)
    if entry is None or judged is None:
        return [""] * 3
    mine, best, ratio = judged
    share = _share(entry, mine, results["environment"]["hardware"]["device"], results.get("chip"))
    return [_ms(entry["contestants"][mine]["median_s"]), f"{ratio:.2f}x {best}", share]


def _against(entry: Entry, contestant: str) -> list[str]:
    facts, ratios = entry["contestants"], entry["ratios"][contestant]
    plain = contestant.partition(":")[0]
    of_leapfrog = f"{facts[contestant]['median_s'] / facts[plain]['median_s']:.2f}" if plain in facts else ""
    return [of_leapfrog, f"{ratios['eager']:.2f}x" if "eager" in ratios else ""]


def _sample_steps(entry: Entry) -> int:
    return entry["case"]["batch"] * entry["case"]["n_steps"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


@dataclass(frozen=True)
class Plot:
    """A figure of a results file."""

    x: str
    y: str
    finding: str
    curves: Curves
    about: str


def _curves(entries: Iterable[Entry], wanted: Callable[[str], bool], x: str, y: Callable[[Entry, Entry], Any]) -> Curves:
    """Points (case[x], y(entry, fact)) of each wanted contestant over the cases."""
    curves: Curves = {}
    for entry in entries:
        for name, fact in entry["contestants"].items():
            value = y(entry, fact) if wanted(name) else None
            if value is not None:
                curves.setdefault(name, []).append((entry["case"][x], value))
    return {name: sorted(points) for name, points in curves.items()}


def _slopes(entries: Iterable[Entry]) -> Curves:
    """Milliseconds of one step in the middle of a rollout, by latent size: the difference between a long and a short one."""
    times: list[dict[str, dict[float, float]]] = []
    for n in SLOPE_STEPS:
        chosen = [entry for entry in entries if entry["case"]["n_steps"] == n]
        curves = _curves(chosen, _plain, "latent_dim", lambda e, f: f["median_s"])
        times.append({name: dict(points) for name, points in curves.items()})
    short, long = times
    between = SLOPE_STEPS[1] - SLOPE_STEPS[0]
    return {
        name: [(d, 1000 * (seconds - short[name][d]) / between) for d, seconds in points.items() if d in short.get(name, {})]
        for name, points in long.items()
    }


def _plain(name: str) -> bool:
    """Whether a contestant runs the published step, keeps everything, and is called as it is."""
    return ":" not in name


def _alike(entries: Iterable[Entry], x: Sequence[str]) -> list[tuple[Case, list[Entry]]]:
    """Cases that differ in nothing but `x` and in who takes part, and the problem of the first of each such group."""
    groups: dict[Case, list[Entry]] = {}
    for entry in entries:
        case = Case.of(entry["case"])
        same = replace(case.problem, name="", **{name: getattr(Case, name, 0) for name in x})
        groups.setdefault(same, []).append(entry)
    return [(Case.of(group[0]["case"]), group) for group in groups.values()]


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """By name; one for each Hamiltonian, and none with fewer than two points to a curve.

    Batches are those of 15 steps, all states kept, in float32; "latent-size" is the cost of a further step; "memory" what a
    training step keeps, for each integrator.
    """
    entries = [
        entry
        for entry in results["cases"].values()
        if (case := Case.of(entry["case"])).arithmetic == "float32" and not case.name.startswith(GRID_PREFIX)
    ]

    def step_ms(entry: Entry, fact: Entry) -> float:
        seconds: float = fact["median_s"]
        return seconds / entry["case"]["n_steps"] * 1000

    def kept_kb(entry: Entry, fact: Entry) -> float | None:
        kept = fact.get("kept_bytes")
        return None if kept is None else kept / entry["case"]["batch"] / 1024

    found: dict[str, Plot] = {}

    def add(name: str, case: Case, x: str, y: str, curves: Curves, finding: Callable[[Curves], str], about: str) -> None:
        curves = {contestant: points for contestant, points in curves.items() if len({at for at, _ in points}) > 1}
        if curves:
            name += "".join(f"-{kind}" for kind in ("separable", "quadratic", "mechanical") if getattr(case, kind))
            while name in found:  # another network
                name += "-other"
            layers = f"hidden layers {'-'.join(map(str, case.hidden_dims))}, {case.activation}"
            network = layers if x.startswith("latent size") else _network(case)
            found[name] = Plot(x, y, finding(curves), curves, f"{about}; H: {network}")

    single = [entry for entry in entries if len(entry["case"]["memory"]) == len(entry["case"].get("integrators", "1")) == 1]
    for kind in ("rollout", "training"):
        for case, group in _alike((entry for entry in single if entry["case"]["kind"] == kind), ("batch",)):
            if case.states == "all" and case.n_steps == 15:
                times = _curves(group, _plain, "batch", step_ms)
                about = f"{case.n_steps} steps, {case.latent_dim} dimensions, float32; baseline: an MLP without a Hamiltonian"
                add(f"{kind}-batch", case, "batch size", f"ms per step of a {kind} call", times, _fastest_at, about)
    for case, group in _alike((entry for entry in single if entry["case"]["states"] == "final"), ("latent_dim", "n_steps")):
        add("latent-size", case, "latent size (dimensions)", "ms per further step", _slopes(group), _growth,
            f"rollouts of which the final state alone is kept, batch {case.batch}, float32")  # fmt: skip
    kept = [entry for entry in entries if len(entry["case"]["memory"]) > 1]
    for case, group in _alike(kept, ("n_steps", "states")):
        for integrator in sorted({_integrator(name) for entry in group for name in entry["contestants"]}):
            curves = _curves(group, lambda name, i=integrator: _integrator(name) == i, "n_steps", kept_kb)
            curves = {name.replace(f":{integrator}", ""): points for name, points in curves.items()}
            add("memory" if integrator == "leapfrog" else f"memory-{integrator}", case, "steps", "KB kept per sample", curves,
                _saving, f"a training step under {integrator}, batch {case.batch}, {case.latent_dim} dimensions")  # fmt: skip
    return found


def _integrator(name: str) -> str:
    """What a contestant runs: "leapfrog" where its name does not say."""
    return next((part for part in name.split(":") if part in SCHEMES), "leapfrog")


def _fastest_at(curves: Curves) -> str:
    """At how many sizes ours is the fastest of those that compute gradients of H, and by how much."""
    sizes = sorted({x for points in curves.values() for x, _ in points})
    ratios = []
    for size in sizes:
        times = {name: dict(points)[size] for name, points in curves.items() if size in dict(points)}
        mine = [time for name, time in times.items() if is_ours(name)]
        rivals = [time for name, time in times.items() if not is_ours(name) and not name.startswith("baseline")]
        if mine and rivals:
            ratios.append(min(rivals) / min(mine))
    if not ratios:
        return "No rival was timed beside ours"
    won = sum(ratio > 1 for ratio in ratios)
    where = "at every batch size" if won == len(ratios) else f"at {won} of {len(ratios)} batch sizes" if won else "nowhere"
    spread = f"{shown(min(ratios))} to {shown(max(ratios))}" if len(ratios) > 1 else shown(ratios[0])
    return f"Ours is the fastest {where}: the best rival that computes gradients of H takes {spread} times as long"


def _growth(curves: Curves) -> str:
    """How many times as long a further step takes at the largest size as at the smallest, ours and the others."""
    parts = []
    for name, points in curves.items():
        (first, start), (last, end) = points[0], points[-1]
        if start > 0:
            parts.append(f"{name} {shown(end / start)}")
    return f"From {first:,} to {last:,} dimensions a further step takes this many times as long: {', '.join(parts)}"


def _saving(curves: Curves) -> str:
    """What keeps most and what keeps least at the largest number of steps that both have."""
    last = max(points[-1][0] for points in curves.values())
    kept = {name: points[-1][1] for name, points in curves.items() if points[-1][0] == last and points[-1][1] > 0}
    if len(kept) < 2:
        return f"Kept for the backward pass of {last:,} steps"
    most, least = max(kept, key=lambda name: kept[name]), min(kept, key=lambda name: kept[name])
    return f"Over {last:,} steps {most} keeps {shown(kept[most] / kept[least])} times as much for the backward pass as {least}"


def write(path: Path, results: dict[str, Any], beside: dict[str, Beside] | None = None) -> str:
    """Write `<name>.md` and `<name>-<plot>.png` beside the results; returns the table."""
    shown = text = table(results, beside)
    try:
        for name, plot in plots(results).items():
            image = path.with_name(f"{path.stem}-{name}.png")
            _draw(image, plot, machine.described(results["environment"]))
            text += f"\n![{plot.y} against {plot.x}]({image.name})\n"
    except HJEPAError as error:
        if not isinstance(error, MissingDependencyError):
            raise
        print(f"no plots: {error}", file=sys.stderr)
    except Exception as error:  # matplotlib is optional, and what it reads of its surroundings may be broken
        print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
    files.write_text(path.with_suffix(".md"), text)
    return shown


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each contestant, none twice: its own, or one that is left; only as many as there are colours."""
    names = sorted(names, key=lambda name: (not is_ours(name), RIVALS.index(name) if name in RIVALS else len(RIVALS), name))
    colors = {name: CONTESTANTS[name] for name in names if name in CONTESTANTS}
    left = [color for color in (*plotting.PALETTE, plotting.BLACK) if color not in colors.values()]
    return colors | dict(zip((name for name in names if name not in colors), left, strict=False))


def _draw(image: Path, plot: Plot, environment: str) -> None:
    with plotting.defaults():
        colors = colors_of(plot.curves)
        missing = [name for name in plot.curves if name not in colors]
        about = f"{plot.about}\n{environment}" + (f"\nnot drawn: {', '.join(missing)}" if missing else "")
        figure, axes = plotting.new_figure(plot.finding, about)
        axis = axes[0, 0]
        lines: dict[tuple[tuple[float, float], ...], list[str]] = {}
        for name in colors:
            lines.setdefault(tuple(plot.curves[name]), []).append(name)
        for points, names in lines.items():  # what is equal is one line
            style = "o-" if is_ours(names[0]) else "s--"
            axis.loglog(*zip(*points, strict=True), style, color=colors[names[0]], label=", ".join(names), lw=1.6, ms=5)
        sizes = sorted({x for points in lines for x, _ in points})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set(xlabel=plot.x, ylabel=plot.y)
        axis.grid(color="#EEEEEE")
        plotting.legend(figure, 4)
        with files.atomic_path(image) as temporary:
            figure.savefig(temporary, dpi=plotting.DPI)


def beside_of(path: Path, results: dict[str, Any], wanted: Iterable[Case] | None = None) -> dict[str, Beside]:
    """The committed results to show with those of `path`, by case; none if it is itself one of them."""
    if path.resolve().parent == machine.COMMITTED:
        return {}
    if wanted is None:
        wanted = [Case.of(entry["case"]) for entry in results["cases"].values()]
    return committed(results["environment"], wanted, re.sub(r"-[0-9a-f]{8}$", "", path.stem))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Table and plots of a results file.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    prepare_streams()
    if path.suffix != ".json":
        parser.error(f"{path}: a results file ends in .json, and the table is written beside it")
    try:
        results = read(path)
        print(write(path, results, beside_of(path, results)))
    except HJEPAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
