"""A results file as a Markdown table and plots beside it: `python -m bench.report FILE.json`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hjepa_fast.pipeline import files

from .cases import SLOPE_STEPS
from .chip import matrix_rate

RIVALS = ("eager", "jax", "compiled", "baseline", "manual", "func", "eager-float32")
Entry = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]


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


def table(results: dict[str, Any]) -> str:
    """Environment, a row a case with ratios, a row a case with memory."""
    hardware, versions = results["environment"]["hardware"], results["environment"]["versions"]
    entries = results["cases"]
    rivals = [*RIVALS, *sorted({n for e in entries.values() for n, f in e["contestants"].items() if not f["ours"]} - {*RIVALS})]
    rivals = [name for name in rivals if any(name in e["contestants"] for e in entries.values())]
    rows = []
    chip = results.get("chip")
    shown = [(name, e, chosen) for name, e in entries.items() for chosen in (ours(e), _graphed(e)) if chosen is not None]
    for name, entry, chosen in shown:
        fact, ratios, n_steps = entry["contestants"][chosen], entry["ratios"][chosen], entry["case"]["n_steps"]
        spread = f"{_ms(fact['p20_s'] / n_steps)} to {_ms(fact['p80_s'] / n_steps)}"
        rate = f"{fact['gflops_per_s']:.0f}" if "gflops_per_s" in fact else ""
        most = matrix_rate(chip, entry["case"])
        share = f"{100 * fact['gflops_per_s'] / most:.0f} %" if most and "gflops_per_s" in fact else ""
        faster = [f"{ratios[rival]:.2f}x" if rival in ratios else "" for rival in rivals]
        rows.append([name, chosen, _ms(fact["median_s"] / n_steps), spread, rate, share, *faster])
    device = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads, {hardware['instruction_set']}"
    text = (
        f"{device}; torch {versions['torch']}, JAX {versions['jax'] or 'absent'}, Python {versions['python']}, "
        f"hjepa_fast {versions['hjepa_fast']} ({versions['source']})\n\n"
        "How many times as long each rival takes as ours: the median over rounds of the ratio within a round. Times are\n"
        "medians, with 20th and 80th percentiles. A training step is forward, loss with energy term, and backward.\n\n"
    )
    if chip:
        rates = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in chip["matrix_gflops_per_s"].items())
        text += (
            f"Measured in the same run: products of two {chip['matrix_size']} x {chip['matrix_size']} matrices at {rates}; "
            f"memory copied at {chip['memory_gb_per_s']:,.0f} GB/s, read and written.\n\n"
        )
    text += _markdown(["case", "ours", "ms per step", "20 to 80 %", "GFLOP/s", "of matrix rate", *rivals], rows)
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


def _against(entry: Entry, contestant: str) -> list[str]:
    facts, ratios = entry["contestants"], entry["ratios"][contestant]
    plain = contestant.partition(":")[0]
    of_leapfrog = facts[contestant]["median_s"] / facts[plain]["median_s"]
    return [f"{of_leapfrog:.2f}", f"{ratios['eager']:.2f}x" if "eager" in ratios else ""]


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
        plain = case["states"] == "all" and full and single
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


def write(path: Path, results: dict[str, Any]) -> str:
    """Write `<name>.md` and `<name>-<plot>.png` beside the results; returns the table."""
    text = table(results)
    shown = text
    drawn = plots(results)
    if drawn:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        for name, (x, y, curves) in drawn.items():
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            for contestant, points in curves.items():
                axes.loglog(*zip(*points, strict=True), marker="o", label=contestant)
            axes.set(xlabel=x, ylabel=y)
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
            image = path.with_name(f"{path.stem}-{name}.png")
            with files.atomic_path(image) as temporary:
                figure.savefig(temporary, dpi=150)
            plt.close(figure)
            text += f"\n![{y} against {x}]({image.name})\n"
    files.write_text(path.with_suffix(".md"), text)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Table and plots of a results file.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    print(write(path, files.read_json(path, "results file")))


if __name__ == "__main__":
    main()
