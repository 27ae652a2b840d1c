"""A results file as a Markdown table and plots beside it: `python -m bench.report FILE.json`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hjepa_fast.errors import HJEPAError
from hjepa_fast.pipeline import files

from . import machine
from .cases import GRID_PREFIX, MOST_BYTES, MOST_SECONDS, SLOPE_STEPS, WITHOUT_ROLLOUT, Case
from .chip import matrix_rate
from .measure import FAILED, NOT_TIMED
from .progress import prepare_streams
from .rivals import is_ours

RIVALS = ("eager", "jax", "compiled", "baseline", "manual", "func", "eager-float32")
Entry = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]
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


def _curves(entries: Iterable[Entry], wanted: Callable[[Entry], bool], x: str, y: Callable[[Entry, Entry], Any]) -> Curves:
    """Points (case[x], y(entry, fact)) of each contestant over the wanted cases."""
    curves: Curves = {}
    for entry in entries:
        if wanted(entry):
            for name, fact in entry["contestants"].items():
                value = y(entry, fact)
                if value is not None:
                    curves.setdefault(name, []).append((entry["case"][x], value))
    return {name: sorted(points) for name, points in curves.items()}


def _slopes(entries: Iterable[Entry]) -> Curves:
    """Seconds of one step in the middle of a rollout, by latent size: the difference between a long and a short one."""
    times = [
        _curves(entries, lambda e, n=n: e["case"]["states"] == "final" and e["case"]["n_steps"] == n,
                "latent_dim", lambda e, f: f["median_s"])
        for n in SLOPE_STEPS
    ]  # fmt: skip
    short, long = times
    between = SLOPE_STEPS[1] - SLOPE_STEPS[0]
    return {
        name: [(d, (seconds - dict(short[name])[d]) / between) for d, seconds in points if d in dict(short.get(name, []))]
        for name, points in long.items()
    }


def plots(results: dict[str, Any]) -> dict[str, tuple[str, str, Curves]]:
    """By name: the labels of both axes and the curves; without those that have fewer than two points."""
    entries = list(results["cases"].values())

    def paper(entry: Entry, kind: str) -> bool:
        case = entry["case"]
        single = len(case["memory"]) == 1 == len(case.get("integrators", ("leapfrog",)))
        full = case["dtype"] == "float32" and case.get("precision", "highest") == "highest"
        published = not case["name"].startswith(GRID_PREFIX) and not case.get("separable", False)
        plain = case["states"] == "all" and full and single and published
        return plain and case["kind"] == kind and case["n_steps"] == 15

    def step_ms(entry: Entry, fact: Entry) -> float:
        return fact["median_s"] / entry["case"]["n_steps"] * 1000

    def kept_kb(entry: Entry, fact: Entry) -> float | None:
        kept = fact.get("kept_bytes")
        return None if kept is None else kept / entry["case"]["batch"] / 1024

    found = {
        f"{kind}-batch": ("batch", f"ms per step, {kind}", _curves(entries, lambda e, k=kind: paper(e, k), "batch", step_ms))
        for kind in ("rollout", "training")
    }
    slopes = {name: [(d, 1000 * seconds) for d, seconds in points] for name, points in _slopes(entries).items()}
    found["latent-size"] = ("latent size", "ms per further step, final state only, batch 32", slopes)
    memory = _curves(entries, lambda e: len(e["case"]["memory"]) > 1, "n_steps", kept_kb)
    found["memory"] = ("steps", "KB kept per sample for the backward pass", memory)
    return {name: plot for name, plot in found.items() if any(len(points) > 1 for points in plot[2].values())}


def write(path: Path, results: dict[str, Any], beside: dict[str, Beside] | None = None) -> str:
    """Write `<name>.md` and `<name>-<plot>.png` beside the results; returns the table."""
    shown = text = table(results, beside)
    try:
        for name, plot in plots(results).items():
            image = path.with_name(f"{path.stem}-{name}.png")
            _draw(image, *plot)
            text += f"\n![{plot[1]} against {plot[0]}]({image.name})\n"
    except HJEPAError:
        raise
    except Exception as error:  # matplotlib is optional, and what it reads of its surroundings may be broken
        print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
    files.write_text(path.with_suffix(".md"), text)
    return shown


def _draw(image: Path, x: str, y: str, curves: Curves) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for contestant, points in curves.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=contestant)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    with files.atomic_path(image) as temporary:
        figure.savefig(temporary, dpi=150)


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
