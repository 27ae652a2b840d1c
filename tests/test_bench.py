"""The benchmark suite: contestants are right or refused, results survive a round trip. Nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench import against, cases, machine, report, run
from bench import chip as chips
from bench.cases import Case
from bench.measure import (
    FEWEST_ROUNDS,
    TOLERANCE,
    Effort,
    WrongResultError,
    checked,
    expected,
    kept_bytes,
    time_interleaved,
    tolerance_of,
)
from bench.measure import measure as measure_case
from bench.progress import Progress, prepare_streams
from bench.rivals import (
    DISTINCT_ROWS,
    Contestant,
    eager_rollout,
    entrants,
    loss,
    make_problem,
    manual_rollout,
    objective,
)
from hjepa_fast import api

CPU = torch.device("cpu")
EVERY = tuple(name for name in cases.EXTENDED if name != "compiled")
ROLLOUT = Case("tiny-rollout", "rollout", 3, 4, 12, (10, 9, 8), rivals=EVERY)
TRAINING = Case(
    "tiny-training", "training", 3, 4, 12, (10, 9, 8), memory=("store", "recompute", "checkpoint"), rivals=EVERY
)  # fmt: skip
TINY = (
    ROLLOUT,
    dataclasses.replace(ROLLOUT, name="tiny-final", states="final"),
    TRAINING,
    dataclasses.replace(TRAINING, name="tiny-integrators", memory=("store",), integrators=("leapfrog", "implicit-leapfrog")),
    dataclasses.replace(
        TRAINING, name="tiny-reversible", states="final", integrators=("implicit-leapfrog",), memory=("reversible",), rivals=()
    ),
    dataclasses.replace(ROLLOUT, name="tiny-separable-rollout", separable=True, rivals=("eager",)),
    dataclasses.replace(TRAINING, name="tiny-separable-training", separable=True, rivals=("eager",)),
    dataclasses.replace(ROLLOUT, name="tiny-bfloat16", dtype="bfloat16", rivals=("eager", "eager-float32", "manual")),
    dataclasses.replace(
        TRAINING, name="tiny-backward", kind="backward", memory=("store",), rivals=("eager", "manual", "baseline")
    ),
)
PLAIN = ("eager", "manual", "jax")
OF_HAMJEPA = {"activation": "gelu", "separable": True, "quadratic": True, "rivals": PLAIN}
IN_THE_GRID = (
    dataclasses.replace(ROLLOUT, name="tiny-tanh-rollout", activation="tanh", rivals=PLAIN),
    dataclasses.replace(ROLLOUT, name="tiny-hamjepa-rollout", **OF_HAMJEPA),
    dataclasses.replace(TRAINING, name="tiny-hamjepa-training", memory=("store",), **OF_HAMJEPA),
    dataclasses.replace(
        TRAINING, name="tiny-hamjepa-final", memory=("store",), states="final", **OF_HAMJEPA | {"rivals": ("manual",)}
    ),
    dataclasses.replace(ROLLOUT, name="tiny-two-networks-rollout", separable=True, rivals=PLAIN),
    dataclasses.replace(TRAINING, name="tiny-two-networks-training", memory=("store",), separable=True, rivals=PLAIN),
    Case("tiny-matching", "matching", 70, 1, 12, (10, 9), "tanh", rivals=(*PLAIN, "func")),
    Case("tiny-residual", "residual", 70, 1, 12, (10, 9), "tanh", rivals=(*PLAIN, "func")),
    Case("tiny-hamjepa-matching", "matching", 3, 1, 12, (10, 9), **OF_HAMJEPA | {"rivals": ("eager", "manual")}),
    Case("tiny-hamjepa-residual", "residual", 3, 1, 12, (10, 9), **OF_HAMJEPA),
    *(
        Case(
            f"tiny-mechanical-{kind}",
            kind,
            3,
            2,
            4,
            (9, 8),
            "tanh",
            mechanical=True,
            integrators=("rk4",),
            dt=0.0625,
            rivals=("eager",),
        )
        for kind in ("rollout", "training")
    ),
    Case("tiny-two-networks-residual", "residual", 3, 1, 12, (10, 9), separable=True, rivals=("eager", "manual")),
)
CHEAP = dataclasses.replace(ROLLOUT, name="cheap", rivals=("eager", "baseline"))


FAST = Effort(rounds=2, seconds=0.0)


def fast(case, builders, effort=FAST):
    return measure_case(case, builders, CPU, effort)


@pytest.fixture
def quick_measure(monkeypatch):
    """Measure ours as plain PyTorch only, in two rounds of single calls; returns the names of the cases that were."""
    measured = []
    monkeypatch.setattr(api, "available_backends", lambda: {"torch": "available"})

    def spy(case, builders, device, effort, tell):
        measured.append(case.name)
        entry = fast(case, builders, dataclasses.replace(effort, rounds=2, seconds=0.0))
        return entry | {"asked": {**entry["asked"], "rounds": effort.rounds, "seconds": effort.seconds}}

    monkeypatch.setattr("bench.measure.BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(chips, "SIZE", {"cpu": 16})
    monkeypatch.setattr(chips, "COPIED", {"cpu": 256})
    monkeypatch.setattr(run, "measure", spy)
    return measured


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("network", ["hamiltonian:leapfrog", "hamiltonian:implicit-leapfrog", "baseline"])
def test_the_reference_is_computed_in_float64(case, network):
    assert {value.dtype for value in expected(make_problem(case), network).values} == {torch.float64}


@pytest.mark.parametrize("case", [*TINY, *IN_THE_GRID], ids=lambda case: case.name)
def test_every_contestant_agrees_with_the_float64_reference(case):
    builders, _ = entrants(case, CPU)
    _, contestants, facts, left_out = checked(case, builders, CPU)
    assert [contestant.name for contestant in contestants] == list(builders)
    assert not left_out
    assert all(facts[name]["error"] <= tolerance_of(case) for name in builders)
    assert any(contestant.ours for contestant in contestants)
    assert {*case.rivals} - {"jax"} <= builders.keys()


def test_jax_takes_part_where_it_is_installed():
    builders, left_out = entrants(ROLLOUT, CPU)
    if importlib.util.find_spec("jax") is None:
        assert left_out["jax"] == "not installed: pip install jax"
        pytest.skip("JAX, an optional rival, is not installed")
    assert "jax" in builders


def test_the_energy_term_has_a_share_in_every_gradient():
    """Otherwise a rival without it would pass: the check's tolerance is far below the term's share."""
    problem = make_problem(TRAINING).to(torch.float64)
    states, energy = eager_rollout(problem)
    network = list(problem.hnn.parameters())[:-1]
    with_term = torch.autograd.grad(loss(states, energy, problem.target), network, retain_graph=True)
    without = torch.autograd.grad(loss(states, None, problem.target), network)
    share = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(with_term, without, strict=True)]
    assert min(share) > 10 * TOLERANCE["float32", "training"]


def test_a_backward_case_makes_its_forward_pass_once(monkeypatch):
    """What is timed is the backward pass alone, as often as it is asked for."""
    case = TINY[-1]
    runs = []
    monkeypatch.setattr("bench.rivals.manual_rollout", lambda p, f=manual_rollout: runs.append(p) or f(p))
    contestant = entrants(case, CPU)[0]["manual"](make_problem(case))
    once, again = contestant.run(), contestant.run()
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    assert len(runs) == 1


def test_products_are_as_the_case_says_and_only_there(quick_measure, monkeypatch):
    seen = []

    def spy(problem):
        seen.append(torch.get_float32_matmul_precision())
        return entrants(CHEAP, CPU)[0]["eager"](problem)

    fast(dataclasses.replace(CHEAP, precision="high"), {"eager": spy})
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_contestant_that_does_not_fit_is_left_out_by_name(quick_measure, monkeypatch, tmp_path):
    def large(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def both(*_):
        return {**entrants(dataclasses.replace(CHEAP, rivals=()), CPU)[0], "large": large}, {}

    monkeypatch.setattr(run, "entrants", both)
    for _ in range(2):
        entry = run.run([CHEAP], tmp_path / "r.json", CPU)["cases"]["cheap"]
        assert entry["left_out"] == {"large": run.TOO_LARGE}
        assert list(entry["contestants"]) == ["torch"]
    assert quick_measure == ["cheap"], "measured again for what cannot be"


def test_the_chips_rates_stand_in_the_same_file_and_the_report(quick_measure, monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    results = run.run([CHEAP], path, CPU)
    found = json.loads(path.read_text())["chip"]
    assert found["matrix_gflops_per_s"].keys() == {"float32", "bfloat16"}
    assert min(*found["matrix_gflops_per_s"].values(), found["memory_gb_per_s"]) > 0
    assert run.run([CHEAP], path, CPU)["chip"] == found, "measured again"

    entry = results["cases"]["cheap"]
    entry["chip"] = {**found, "matrix_gflops_per_s": {"float32": 200.0, "tf32": 400.0}}
    entry["contestants"]["torch"]["gflops_per_s"] = 50.0
    assert "| 50 | 25 % |" in report.table(results)
    entry["case"]["dtype"] = "bfloat16"
    assert "| 50 | 25 % |" in report.table(results), "a processor's rate is that of float32"
    results["environment"]["hardware"]["device"] = "cuda"
    assert "| 50 |  |" in report.table(results), "no rate of that arithmetic was measured"
    entry["case"] |= {"dtype": "float32", "precision": "high"}
    assert "| 50 | 12 % |" in report.table(results)


def test_our_graphed_call_has_a_row_of_its_own(quick_measure, tmp_path):
    results = run.run([CHEAP], tmp_path / "r.json", CPU)
    entry = results["cases"]["cheap"]
    for part in ("contestants", "ratios"):
        entry[part]["torch:graphed"] = entry[part]["torch"]
    table = report.table(results)
    assert "| cheap | torch |" in table
    assert "| cheap | torch:graphed |" in table


@pytest.mark.parametrize("kind", ["rollout", "training", "backward"])
def test_who_takes_part_on_a_gpu(kind, monkeypatch):
    """Graphs of what is a whole call; without torch.compile and JAX where a backward pass is timed alone."""
    there = dict.fromkeys(("reference", "torch", "triton"), "available")
    monkeypatch.setattr(api, "available_backends", lambda: there)
    monkeypatch.setattr(api, "choose_backend", lambda name, z0: name)
    rivals = tuple(name for name in cases.EXTENDED if name != "jax")
    case = dataclasses.replace(ROLLOUT, kind=kind, rivals=rivals if kind != "backward" else ("eager", "manual", "baseline"))
    with FakeTensorMode():
        names = [list(entrants(case, torch.device(device), compile=True)[0]) for device in ("cpu", "cuda")]
    assert not any("graphed" in name for name in names[0])
    graphed = {name for name in names[1] if "graphed" in name}
    assert graphed == (set() if kind == "backward" else {"triton:graphed", "manual-graphed", "baseline-graphed"})
    assert ("compiled-reduce-overhead" in names[1]) is (kind != "backward")


def test_cases_of_a_gpu():
    quick, every = cases.of_device("cuda")
    assert cases.of_device("cpu") == (cases.QUICK, cases.FULL)
    assert {case.batch for case in quick if case.kind == "rollout"} >= {1, 8, 32, 64, 256, 1024, 4096, 16384}
    assert {case.arithmetic for case in quick} == {"float32", "tf32", "bfloat16"}
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    assert {case.name for case in quick} | {case.name for case in cases.FULL} == set(names)
    assert all(tolerance_of(case) > 0 for case in every)
    # a name means the same problem wherever it stands
    for case in quick:
        assert all(other.problem == case.problem for other in cases.FULL if other.name == case.name)


def test_a_gpu_that_is_not_there_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there, so none is missing")
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("case", [ROLLOUT, TRAINING], ids=lambda case: case.name)
@pytest.mark.parametrize("fault", ["off", "nan", "missing"])
def test_a_wrong_contestant_is_refused(case, fault):
    def wrong(problem):
        right = entrants(case, CPU)[0]["eager"](problem)

        def call():
            first, *rest = right.run()
            if fault == "missing":
                return rest
            # a single number of the states, or of the last gradient
            last = rest[-1] if rest else first
            last.view(-1)[-1] *= float("nan") if fault == "nan" else 1.01
            return [first, *rest]

        return dataclasses.replace(right, name="wrong", run=call)

    with pytest.raises(WrongResultError, match="wrong is wrong in tiny"):
        fast(case, {"wrong": wrong})


def test_a_wrong_contestant_stops_the_run(monkeypatch, tmp_path, capsys):
    def lazy(problem):
        return Contestant("lazy", lambda: [problem.z0[:, None].expand(-1, problem.case.n_steps + 1, -1)])

    monkeypatch.setattr(run, "entrants", lambda *_: ({"lazy": lazy}, {}))
    monkeypatch.setattr(cases, "QUICK", (CHEAP,))
    assert run.main(["--out", str(tmp_path / "r.json"), "--device", "cpu"]) == 1
    assert "lazy is wrong in cheap" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_timing_is_interleaved():
    calls = []
    contestants = [Contestant(name, lambda name=name: calls.append(name) or []) for name in "abc"]
    times = time_interleaved(contestants, 5, 0.0, CPU)
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 5)
    blocks = [a for a, b in zip(calls, [*calls[1:], None], strict=True) if a != b]
    rounds = [frozenset(blocks[i : i + 3]) for i in range(len(blocks))]
    assert rounds.count(frozenset("abc")) >= 5


def test_kept_bytes_counts_each_storage_once():
    """z is saved twice by z * z, exp(z) by itself and by the product with dt: two storages, dt a parameter."""
    problem = make_problem(TRAINING)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def roll():
        z = x + 1
        return (z * z + z.exp() * problem.dt).sum(), None

    contestant = Contestant("hand", lambda: [], roll=roll)
    assert kept_bytes(contestant, problem) == 2 * x.nbytes


def test_leaner_modes_keep_less(quick_measure):
    facts = fast(TRAINING, entrants(TRAINING, CPU)[0])["contestants"]
    kept = [facts[name]["kept_bytes"] for name in ("torch:checkpoint", "torch:recompute", "torch", "eager")]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_results_round_trip_and_resume(quick_measure, tmp_path):
    path = tmp_path / "out" / "tiny.json"
    slopes = [
        dataclasses.replace(CHEAP, name=f"final-d{d}-t{n}", latent_dim=d, n_steps=n, states="final")
        for d in (4, 6)
        for n in cases.SLOPE_STEPS
    ]
    results = run.run([CHEAP], path, CPU)
    results = run.run([CHEAP, TRAINING, *slopes], path, CPU)
    assert quick_measure == ["cheap", "tiny-training", *(case.name for case in slopes)]
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))

    entry = results["cases"]["cheap"]
    assert entry["rounds"] == 2
    assert entry["ratios"]["torch"].keys() == entry["contestants"].keys() - {"torch"}
    for fact in entry["contestants"].values():
        assert fact["p20_s"] <= fact["median_s"] <= fact["p80_s"]

    table = report.write(path, results)
    assert all(f"| {name} |" in table for name in results["cases"])
    assert "KB per sample and step" in table
    assert table in path.with_suffix(".md").read_text()
    assert (tmp_path / "out" / "tiny-latent-size.png").stat().st_size > 1000
    assert not list(path.parent.glob(".partial-*"))


def test_a_case_with_a_new_contestant_is_measured_again(quick_measure, tmp_path):
    path = tmp_path / "r.json"
    run.run([CHEAP], path, CPU)
    run.run([dataclasses.replace(CHEAP, rivals=("eager",))], path, CPU)
    assert quick_measure == ["cheap"]
    run.run([dataclasses.replace(CHEAP, rivals=(*CHEAP.rivals, "manual"))], path, CPU)
    run.run([CHEAP], path, CPU, again=True)
    assert quick_measure == ["cheap"] * 3


def test_what_was_measured_is_kept_when_a_run_is_interrupted(quick_measure, monkeypatch, tmp_path, capsys):
    path = tmp_path / "r.json"
    measure = run.measure

    def interrupted(case, *args):
        if case.name == "tiny-final":
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(run, "measure", interrupted)
    monkeypatch.setattr(cases, "QUICK", (CHEAP, dataclasses.replace(CHEAP, name="tiny-final")))
    assert run.main(["--out", str(path), "--device", "cpu"]) == 130
    assert "goes on" in capsys.readouterr().err
    assert list(json.loads(path.read_text())["cases"]) == ["cheap"]


def test_results_of_other_hardware_are_not_mixed(quick_measure, tmp_path):
    path = tmp_path / "r.json"
    run.run([CHEAP], path, CPU)
    results = json.loads(path.read_text())
    results["environment"]["hardware"]["processor"] = "another"
    path.write_text(json.dumps(results))
    with pytest.raises(run.ResultsError, match=r"processor was another.*--again"):
        run.run([CHEAP], path, CPU)
    assert run.run([CHEAP], path, CPU, again=True)["environment"]["hardware"]["processor"] != "another"


def test_names_are_unique_and_patterns_select():
    names = [case.name for case in cases.FULL]
    assert len(set(names)) == len(names)
    assert {case.name for case in cases.select(cases.FULL, "final-*-t15")} == {f"final-d{d}-t15" for d in cases.LATENT_SIZES}
    assert [case.name for case in cases.select(cases.FULL, "memory-t15")] == ["memory-t15"]
    assert all("training" in case.name for case in cases.select(cases.FULL, "training"))


def test_a_pattern_without_a_case_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "nonsense"])
    assert "rollout-b1-t15" in capsys.readouterr().err


@pytest.fixture
def checkout(quick_measure, monkeypatch, tmp_path):
    """`main` with two cheap cases as the quick set, and with folders for results that are the test's own."""
    monkeypatch.setattr(machine, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(machine, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(cases, "QUICK", (CHEAP, dataclasses.replace(CHEAP, name="cheap-final", states="final")))
    return tmp_path


def main(*arguments):
    return run.main(["--device", "cpu", *arguments])


def stored(folder):
    return sorted(folder.rglob("*.json"))


def test_a_users_results_are_kept_apart_by_machine_and_ignored_by_git(checkout, monkeypatch, capsys):
    monkeypatch.setattr("platform.node", lambda: "host")
    assert main() == 0
    (path,) = stored(checkout)
    assert path.parent == machine.LOCAL / "host"
    assert path.with_suffix(".md").exists()
    assert str(path) in capsys.readouterr().err
    ignored = (machine.HERE.parent / ".gitignore").read_text().split()
    assert "bench/local/" in ignored
    assert not machine.COMMITTED.exists()


@pytest.mark.parametrize(
    ("host", "folder"),
    [
        ("box.example.org", "box.example.org"), ("", "unnamed"), ("..", "unnamed"), ("a/b\\c", "a-b-c"), ("Ünï 机器", "n"),
        ("机器", "unnamed"), (".hidden", "hidden"), ("x\n\0y", "x-y"), ("a" * 300, "a" * 64), ("--out", "out"),
    ],
)  # fmt: skip
def test_a_hosts_name_becomes_a_folders(host, folder):
    assert machine.folder_name(host) == folder


def test_other_sources_have_a_file_of_their_own(checkout, quick_measure, monkeypatch):
    """Neither refused nor mixed; going back to the first sources goes on with theirs."""
    found = run.environment(CPU)

    def other(device):
        return {**found, "versions": {**found["versions"], "source": "other"}}

    assert main() == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "environment", other)
        assert main() == 0
    assert main() == 0
    assert quick_measure == ["cheap", "cheap-final"] * 2
    sources = {json.loads(path.read_text())["environment"]["versions"]["source"] for path in stored(checkout)}
    assert sources == {"other", found["versions"]["source"]}


def test_what_changes_a_time_is_part_of_the_environment(monkeypatch):
    before = run.environment(CPU)
    assert run.environment(CPU) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run.environment(CPU) == before, "the number of threads says that"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("LD_PRELOAD", "/home/somebody/lib/libjemalloc.so")
    assert machine.differences(before, run.environment(CPU)) == [
        "variables.LD_PRELOAD was None, is libjemalloc.so",
        "variables.ONEDNN_MAX_CPU_ISA was None, is AVX2",
    ]


def test_committed_results_are_written_only_when_asked_for(checkout, quick_measure, capsys):
    path = machine.COMMITTED / "quick-cpu.json"
    assert main("--commit-results") == 0
    assert stored(checkout) == [path]
    results = json.loads(path.read_text())
    results["environment"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(results))
    before = path.read_bytes()
    assert main("--commit-results") == 1
    assert "torch was 1.0" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main("--commit-results", "--again") == 0
    assert json.loads(path.read_text())["environment"]["versions"]["torch"] == torch.__version__
    (checkout / "elsewhere").mkdir()
    assert main("--out", str(checkout / "elsewhere")) == 0
    assert (checkout / "elsewhere" / "quick-cpu.json").exists()


def test_the_table_grows_and_an_interrupted_run_goes_on(checkout, quick_measure, monkeypatch, capsys):
    measure = run.measure

    def interrupted(case, *args):
        if case.name == "cheap-final":
            raise KeyboardInterrupt
        return measure(case, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", interrupted)
        assert main() == 130
    out, err = capsys.readouterr()
    assert "| cheap " in out
    assert "| cheap-final" not in out
    assert "[1/2] cheap: torch, eager, baseline;" in err
    assert " left\n[2/2] cheap-final" in err.replace("warning", "")
    assert "\r" not in err, "it is no terminal"

    quick_measure.clear()
    assert main() == 0
    out, err = capsys.readouterr()
    assert quick_measure == ["cheap-final"]
    assert "cheap: kept, measured" in err
    assert "| cheap-final" in out


@pytest.mark.parametrize("change", [{"batch": 4}, {"n_steps": 5}, {"precision": "high"}])
def test_another_problem_of_the_same_name_is_measured_again(quick_measure, tmp_path, change):
    path = tmp_path / "r.json"
    run.run([CHEAP], path, CPU)
    run.run([dataclasses.replace(CHEAP, **change)], path, CPU)
    assert quick_measure == ["cheap"] * 2


@pytest.mark.parametrize("more", [{"rounds": 10}, {"seconds": 6.0}])
def test_what_was_measured_less_thoroughly_is_measured_again(quick_measure, tmp_path, more):
    path = tmp_path / "r.json"
    run.run([CHEAP], path, CPU)
    run.run([CHEAP], path, CPU, rounds=5, seconds=1.0)
    assert quick_measure == ["cheap"]
    run.run([CHEAP], path, CPU, **more)
    assert quick_measure == ["cheap"] * 2


class Slow:
    """A stopwatch under which a call of a rival takes 2 s a step, or what `seconds` says of it next."""

    seconds: list[float] | None = None

    def __init__(self, device):
        pass

    def __call__(self, call, number=1):
        for _ in range(number):
            out = call()
        steps = out[0].shape[1] - 1 if isinstance(out, list) and out and out[0].ndim == 3 else 1
        return self.seconds.pop(0) if self.seconds else 2.0 * steps


def test_a_rival_that_is_too_slow_is_not_timed_and_says_so(quick_measure, monkeypatch, tmp_path):
    """One step tells, before a whole call; ours is timed however long it takes."""
    monkeypatch.setattr("bench.measure.Stopwatch", Slow)
    case = dataclasses.replace(CHEAP, rivals=("eager",))
    path = tmp_path / "r.json"
    results = run.run([case], path, CPU, longest_call=5.0)
    entry = results["cases"]["cheap"]
    reason = "not timed: one call of 1 step took 2 s, of 4 steps about 8 s"
    assert entry["left_out"]["eager"] == reason
    assert list(entry["contestants"]) == ["torch"]
    text = report.table(results)
    assert f"| {reason} |" in text
    assert f"- eager: {reason} (every case)" in text

    run.run([case], path, CPU, longest_call=5.0)
    assert quick_measure == ["cheap"], "measured again for what is known"
    run.run([case], path, CPU, longest_call=9.0)
    assert quick_measure == ["cheap"] * 2
    assert list(json.loads(path.read_text())["cases"]["cheap"]["contestants"]) == ["torch", "eager"]


@pytest.mark.parametrize(("calls", "timed"), [((60.0, 1.0), True), ((60.0, 20.0), False)])
def test_a_rival_that_compiles_is_judged_by_its_second_call(quick_measure, monkeypatch, calls, timed):
    builders = entrants(CHEAP, CPU)[0]

    def compiled(problem):
        return dataclasses.replace(builders["eager"](problem), name="compiled")

    monkeypatch.setattr("bench.measure.Stopwatch", Slow)
    monkeypatch.setattr(Slow, "seconds", list(calls))
    entry = fast(CHEAP, {"compiled": compiled}, dataclasses.replace(FAST, longest_call=5.0))
    assert ("compiled" in entry["contestants"]) is timed
    assert entry["left_out"] == ({} if timed else {"compiled": "not timed: one call took 20 s"})


def test_a_rival_that_fails_is_left_out_by_name_and_ours_is_not(quick_measure, monkeypatch, tmp_path):
    def broken(problem):
        raise RuntimeError("no compiler\nand more")

    real = entrants

    def with_broken(case, *_):
        return {**real(dataclasses.replace(CHEAP, rivals=("eager",)), CPU)[0], "broken": broken}, {}

    monkeypatch.setattr(run, "entrants", with_broken)
    results = run.run([CHEAP], tmp_path / "r.json", CPU)
    assert results["cases"]["cheap"]["left_out"] == {"broken": "failed: RuntimeError: no compiler"}
    assert "| failed |" in report.table(results)
    run.run([CHEAP], tmp_path / "r.json", CPU)
    assert quick_measure == ["cheap"]
    with pytest.raises(RuntimeError, match="no compiler"):
        fast(CHEAP, {"cpp": broken})


def test_a_budget_cuts_rounds_and_whole_cases():
    contestants = [Contestant(name, lambda: []) for name in "ab"]
    times = time_interleaved(contestants, 9, 60.0, CPU, most=0.0)
    assert {len(t) for t in times.values()} == {FEWEST_ROUNDS}
    assert {len(t) for t in time_interleaved(contestants, 2, 0.0, CPU, most=0.0).values()} == {2}
    assert time_interleaved([], 9, 60.0, CPU) == {}


def test_cases_that_no_time_is_left_for_are_named(checkout, quick_measure, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "elapsed", lambda self: 1e6 * len(quick_measure))
    assert main("--minutes", "5") == 0
    assert quick_measure == ["cheap"]
    said = "Not measured, since the time was over: cheap-final. The same command goes on"
    assert said in capsys.readouterr().out
    (path,) = stored(checkout)
    assert said in path.with_suffix(".md").read_text()
    monkeypatch.setattr(Progress, "elapsed", lambda self: 0.0)
    assert main("--minutes", "5") == 0
    assert quick_measure == ["cheap", "cheap-final"]
    assert "Not measured" not in capsys.readouterr().out + path.with_suffix(".md").read_text()


def test_the_time_left_is_scaled_by_what_cases_took(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress({}, limit=50.0, stream=io.StringIO())
    progress.plan({"cheap": 2.0, "b": 4.0, "c": 4.0})
    assert progress.share("cheap") == 10.0
    progress.start(CHEAP, ["torch"])
    now[0] += 6
    progress.done(CHEAP, measured=True)
    assert progress.left() == 24.0
    now[0] += 30
    assert progress.left() == 14.0, "no more than planned"
    assert not progress.late()
    assert not progress.late(4.0)
    assert progress.late(5.0), "it would take three times as long"
    now[0] += 20
    assert progress.late()
    assert progress.times() == "56 s gone, longer than planned, about 24 s left"


def test_a_terminals_line_is_taken_away_before_the_next_whole_one(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("bench.progress.TICK", -1.0)
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress({"cheap": 1.0}, stream=stream)
    progress.start(CHEAP, ["torch"])
    progress.tell("checking torch, which is a long text for a narrow terminal")
    progress.say("done")
    first, rest = stream.getvalue().split("\n", 1)
    assert first.startswith("[1/1] cheap: torch")
    _, line, blank, last = rest.split("\r")
    assert len(line) == len(blank) == 39
    assert not blank.strip()
    assert last == "done\n"


def another(results, **hardware):
    """The results as if measured elsewhere."""
    copy = json.loads(json.dumps(results))
    copy["environment"]["hardware"] |= hardware
    return copy


def test_the_committed_result_stands_beside_with_its_machine(checkout, capsys):
    path = checkout / "r.json"
    results = run.run([CHEAP], path, CPU)
    machine.COMMITTED.mkdir()

    def commit(name, found):
        (machine.COMMITTED / name).write_text(json.dumps(found))

    commit("a.json", another(results, processor="Alpha"))
    commit("quick-cpu.json", another(results, processor="Beta"))
    commit("gpu.json", another(results, device="cuda", gpu="Card"))
    commit("broken.json", {})
    wanted = dict(name="quick-cpu", folder=machine.COMMITTED)
    beside = report.committed(results["environment"], [CHEAP], **wanted)
    assert beside["cheap"].label == "committed: Beta", "the file of the same name"
    assert "broken.json is no results file" in capsys.readouterr().err
    commit("z.json", another(results))
    beside = report.committed(results["environment"], [CHEAP], **wanted)
    assert beside["cheap"].file == "z.json", "the same processor"
    assert not report.committed(results["environment"], [dataclasses.replace(CHEAP, batch=4)], **wanted)

    beside = {"cheap": dataclasses.replace(beside["cheap"], environment=another(results, processor="Beta")["environment"])}
    text = report.table(results, beside)
    assert "| cheap | torch |" in text
    assert "| committed: Beta | torch |" in text
    assert '"committed: Beta" was not measured here. It is of bench/results/z.json: Beta, ' in text
    assert report.beside_of(path, results)
    assert not report.beside_of(machine.COMMITTED / "z.json", results), "it stands in its own table"


def test_every_committed_result_can_be_read_and_compared():
    paths = sorted((Path(report.__file__).parent / "results").glob("*.json"))
    assert paths
    for path in paths:
        results = report.read(path)
        for comparison in against.compare(results, json.loads(json.dumps(results)) | {"chip": None}, results["cases"]):
            assert comparison.reason == "it is the same measurement"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"environment": {}, "cases": {}}', '{"environment": 1, "cases": 2}', "\0", "9" * 5000,
     "[" * 100_000, '{"cases": {"x": {"case": {"flavour": 1}}}}'],
)  # fmt: skip
def test_a_file_that_is_no_result_is_refused_with_a_message(checkout, content, capsys):
    path = checkout / "r.json"
    path.write_text(content)
    assert main("--out", str(path)) == 1
    assert "error: " in capsys.readouterr().err
    assert path.read_text() == content
    assert main("--against", str(path)) == 1
    assert report.main([str(path)]) == 1
    assert main("--out", str(path), "--again") == 0
    assert report.main([str(path)]) == 0


def test_two_runs_do_not_write_one_file(checkout, capsys):
    path = checkout / "r.json"
    with run._alone(path):
        assert main("--out", str(path)) == 1
    assert "another run is writing" in capsys.readouterr().err
    assert main("--out", str(path)) == 0


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(checkout, quick_measure, capsys):
    (checkout / "file").write_text("")
    assert main("--out", str(checkout / "file" / "r.json")) == 1
    assert "cannot write" in capsys.readouterr().err
    assert not quick_measure


def test_a_closed_output_loses_nothing(checkout, quick_measure, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    path = checkout / "r.json"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert main("--out", str(path)) == 1
    assert "Broken pipe; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main("--out", str(path)) == 0
    assert quick_measure == ["cheap", "cheap-final"]


def test_an_output_that_lacks_characters_gets_others(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_streams()
    print("Intel\u00ae", flush=True)
    assert raw.getvalue() == b"Intel?\n"


def test_without_matplotlib_there_is_the_table(checkout, monkeypatch, capsys):
    monkeypatch.setattr(cases, "QUICK", (CHEAP, dataclasses.replace(CHEAP, name="more", batch=4, n_steps=15),
                                         dataclasses.replace(CHEAP, name="most", batch=5, n_steps=15)))  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main() == 0
    assert "no plots: " in capsys.readouterr().err
    assert "| cheap |" in stored(checkout)[0].with_suffix(".md").read_text()
    assert not list(checkout.rglob("*.png"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"], ["--rounds", "x"], ["--seconds", "nan"], ["--seconds", "-1"], ["--threads", "0"],
        ["--minutes", "inf"], ["--longest-call", "0"], ["--tolerance", "0.1"], ["--tolerance", "-1", "--against", "x"],
        ["--device", "nonsense"], ["--device", "meta"], ["--out", "table.md"], ["--out", "a.json", "--commit-results"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_cannot_be_used(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def entry_of(**ratios):
    """An entry in which each rival takes so many times as long as cpp."""
    return {"case": dataclasses.asdict(CHEAP), "ratios": {"cpp": ratios}, "left_out": {}}


@pytest.mark.parametrize(
    ("before", "now", "factor"),
    [
        ({"eager": 4.0}, {"eager": 2.0}, 2.0),
        ({"eager": 2.0}, {"eager": 4.0}, 0.5),
        # one rival that has become another is outvoted
        ({"eager": 2.0, "manual": 3.0, "jax": 4.0}, {"eager": 2.0, "manual": 3.0, "jax": 1.0}, 1.0),
        # contestants of our own are no yardstick, nor is a rival of one run only
        ({"eager": 2.0, "torch": 9.0, "func": 9.0}, {"eager": 2.0, "torch": 3.0, "jax": 1.0}, 1.0),
    ],
)
def test_what_is_compared_with_an_earlier_run(before, now, factor):
    (found,) = against.compare({"cases": {"cheap": entry_of(**before)}}, {"cases": {"cheap": entry_of(**now)}}, ["cheap"])
    assert found.factor == factor
    assert found.slower(0.1) is (factor > 1.1)
    _, holds = against.told([found], 0.1, "FILE")
    assert holds is (factor <= 1.1)


def test_nothing_compared_is_no_success():
    old = entry_of(eager=2.0)
    other = entry_of(eager=3.0) | {"case": dataclasses.asdict(dataclasses.replace(CHEAP, batch=9))}
    for now in (old, other, entry_of(jax=2.0)):
        text, holds = against.told(against.compare({"cases": {"cheap": old}}, {"cases": {"cheap": now}}, ["cheap"]), 0.1, "F")
        assert not holds
        assert "nothing could be compared" in text
    assert against.told([], 0.1, "F")[1] is False
    lost = entry_of() | {"ratios": {"torch": {"eager": 1.0}}, "left_out": {"cpp": "was not built"}}
    for now in ({"cheap": lost}, {}):
        found = against.compare({"cases": {"cheap": old}}, {"cases": now}, ["cheap"])
        good = against.Comparison("b", "cpp", 1.0, "relative to eager")
        assert not against.told([good, *found], 0.1, "F")[1]


def test_against_a_file_exits_with_1_on_a_regression(checkout, capsys):
    assert main() == 0
    (path,) = stored(checkout)
    results = json.loads(path.read_text())
    for name, scale in (("same", 1.0), ("better", 2.0)):
        for entry in results["cases"].values():
            entry["ratios"]["torch"] = {rival: ratio * scale for rival, ratio in entry["ratios"]["torch"].items()}
            entry["date"] = "earlier"
        (checkout / f"{name}.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert main("--against", str(checkout / "same.json")) == 0
    assert "ok           cheap torch: 1.00, relative to eager, baseline" in capsys.readouterr().out
    assert main("--against", str(checkout / "better.json")) == 1
    assert "SLOWER       cheap torch: 2.00" in capsys.readouterr().out
    assert main("--against", str(checkout / "better.json"), "--tolerance", "1.01") == 0
    assert main("--against", str(path)) == 1
    assert "it is the same measurement" in capsys.readouterr().out
    assert main("--against", str(checkout / "absent.json")) == 1
    assert "results file not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "gradients", "first"),
    [
        # one sample: W_q^T and W_p one after the other; many: K, made once from 512 columns
        (Case("a", "rollout", 1, 1), 3, 3 * 2 * 512 * 512),
        (Case("b", "rollout", 1000, 100), 3, 1000 * 300 * 512**2 + 512**2 * 512),
        (Case("c", "rollout", 10000, 15, 2, (200, 200), "tanh"), 3, 10000 * 45 * 2 * 200),
        # a kick before the first step, and one after each; T = |p|^2 / 2 takes no product
        (Case("d", "rollout", 32, 15, 1024, (256, 256), "gelu", True, True), 16 / 15, 32 * 16 * 256**2 + 256**2 * 512),
        (Case("e", "rollout", 32, 15, 1024, (256, 256), "gelu", True), 31 / 15, 32 * 31 * 256**2 + 256**2 * 512),
        # the first layer forward and back
        (Case("f", "residual", 7, 1, 20, (200, 200), "tanh"), 1, 7 * 2 * 200 * 20),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_the_cheaper_coupling_is_counted(case, gradients, first):
    """By hand, in multiplications."""
    samples = case.batch * case.n_steps * gradients
    later = samples * 2 * sum(a * b for a, b in zip(case.hidden_dims, case.hidden_dims[1:], strict=False))
    passes = 1 if case.kind == "rollout" else 3
    assert case.flops == pytest.approx(2 * passes * (first + later), rel=1e-12)
    if passes == 1:
        assert dataclasses.replace(case, kind="training").flops == 3 * case.flops


@pytest.mark.parametrize("kind", ["rollout", "training", "backward"])
def test_arithmetic_is_counted_as_pytorch_counts_it(kind):
    """Of the steps alone, in the hand-written code: where a pair is counted, with 16 columns each, its products with the first
    layer have 32 columns forward and 16 back."""

    def counted(n_steps):
        case = dataclasses.replace(ROLLOUT, kind=kind, n_steps=n_steps, latent_dim=32, hidden_dims=(48, 32, 16))
        problem = make_problem(case)
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with forward, torch.set_grad_enabled(kind != "rollout"):
            states = manual_rollout(problem)[0]
        total = 0 if kind == "backward" else forward.get_total_flops()
        if kind != "rollout":
            with backward:
                torch.autograd.grad(states[:, -1].sum(), problem.parameters, allow_unused=True)
            total += backward.get_total_flops()
        # H at each gradient, of which it is no part
        energies = n_steps * 3 * 2 * case.batch * 16 if kind == "training" else 0
        wider = case.passes * n_steps * 3 * 2 * case.batch * 48 * 16
        return case.flops, total - energies - wider

    (few, few_counted), (many, many_counted) = counted(3), counted(6)
    assert many - few == many_counted - few_counted


def test_the_grid_is_complete_and_selected_by_name():
    names = [case.name for case in cases.SMALL]
    assert len(set(names)) == len(names)
    assert set(cases.SMALL) <= set(cases.FULL)
    networks = {(case.latent_dim, case.hidden_dims, case.activation, case.separable, case.quadratic) for case in cases.GRID}
    assert networks == {
        *((d, (200, 200), "tanh", False, False) for d in (2, 4, 20)),
        (64, (256, 256), "tanh", False, False),
        (192, (256, 256), "softplus", False, False),
        (1024, (512, 512, 256), "softplus", False, False),
        (1024, (256, 256), "gelu", True, True),
    }
    rollouts = {(case.kind, case.batch, case.n_steps) for case in cases.GRID if not case.matches}
    assert rollouts == {(k, b, n) for k in ("rollout", "training") for b in (1, 32, 1000, 10000) for n in (1, 15, 100)}
    assert len(cases.GRID) == 7 * len(rollouts) + 4 * 2 * 4
    assert all(("compiled" in case.rivals) is (case.n_steps == 1) for case in cases.GRID)
    assert all({*PLAIN} <= {*case.rivals} for case in cases.GRID)

    def chosen(pattern):
        return [case.name for case in cases.select(cases.SMALL, pattern)]

    assert chosen("small-2-200-200-rollout-b32-t15") == ["small-2-200-200-rollout-b32-t15"]
    assert chosen("small-hamjepa-training-*-t1") == [f"small-hamjepa-training-b{b}-t1" for b in (1, 32, 1000, 10000)]
    assert chosen("*-20-200-200-residual-*") == [f"small-20-200-200-residual-b{b}" for b in (1, 32, 200, 10000)]


def test_what_the_grid_leaves_out_follows_from_counts():
    """The published code's own numbers: 11.0 million operations a sample and step, 99 KB kept in training."""
    published = Case("x", "rollout", 1000, 1)
    assert published.eager_flops == pytest.approx(11.0e9, rel=0.01)
    training = dataclasses.replace(published, kind="training", n_steps=100)
    assert training.eager_flops == 3 * 100 * published.eager_flops
    assert training.eager_bytes == pytest.approx(1000 * 100 * (99 * 1024 + 4 * 4 * 1024), rel=0.01)
    assert "about 33 s at 100 GFLOP/s" in cases.impractical(training)
    wide = dataclasses.replace(training, batch=200_000, n_steps=1, hidden_dims=(8,))
    assert "holds about" in cases.impractical(wide)
    assert not cases.impractical(published)
    assert [case for case in cases.GRID if case not in cases.SMALL] == [case for case in cases.GRID if cases.impractical(case)]
    assert 0.8 * len(cases.GRID) < len(cases.SMALL) < len(cases.GRID)


@pytest.mark.parametrize("options", [{"activation": "tanh"}, OF_HAMJEPA], ids=["one network", "hamjepa"])
def test_what_is_kept_in_training_is_about_what_is_estimated(options):
    case = Case("kept", "training", 8, 6, 64, (48, 48), **options)
    problem = make_problem(case)
    kept = kept_bytes(entrants(case, CPU)[0]["eager"](problem), problem)
    assert 0.5 * case.eager_bytes < kept < case.eager_bytes


def test_only_what_auto_takes_stands_for_ours_in_the_grid():
    case = dataclasses.replace(CHEAP, backends="auto")
    mine = [name for name in entrants(case, CPU)[0] if name not in CHEAP.rivals]
    assert mine == [api.choose_backend("auto", make_problem(case).z0)]
    assert case.problem == CHEAP.problem


@pytest.mark.parametrize("kind", ["training", "matching", "residual"])
def test_repeated_rows_have_the_reference_of_the_whole_batch(kind):
    """Against float64 autograd over all of them."""
    n_steps = 2 if kind == "training" else 1
    case = dataclasses.replace(TRAINING, kind=kind, batch=2 * DISTINCT_ROWS + 5, n_steps=n_steps)
    whole = make_problem(case).to(torch.float64)
    assert torch.equal(whole.z0[3], whole.z0[3 + DISTINCT_ROWS])
    assert torch.equal(whole.target[3], whole.target[3 + DISTINCT_ROWS])
    value = objective(whole, *eager_rollout(whole))
    gradients = torch.autograd.grad(value, whole.parameters, materialize_grads=True)
    found = expected(make_problem(case), "hamiltonian:leapfrog").values
    for x, y in zip([value, *gradients], found, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-9, atol=1e-11)


def test_a_hand_written_separable_step_takes_one_gradient_of_v(monkeypatch):
    calls = []
    gradient = manual_rollout.__globals__["_mlp_gradient"]
    monkeypatch.setattr("bench.rivals._mlp_gradient", lambda *args, **kwargs: calls.append(args) or gradient(*args, **kwargs))
    for case, a_step in ((IN_THE_GRID[1], 1), (IN_THE_GRID[4], 2)):
        calls.clear()
        manual_rollout(make_problem(case))
        assert len(calls) == a_step * case.n_steps + 1 == case.gradients


def test_gradients_of_many_states_have_more_tolerance():
    few, many = (dataclasses.replace(TRAINING, batch=batch, n_steps=100) for batch in (32, 1000))
    assert tolerance_of(few) == TOLERANCE["float32", "training"]
    # still below what a wrong contestant is off by in these tests
    assert tolerance_of(few) < tolerance_of(many) < 1e-2
    assert tolerance_of(dataclasses.replace(many, kind="rollout")) == TOLERANCE["float32", "rollout"]


def judged(name="small-2-200-200-rollout-b32-t15", ours="cpp", gflops=50.0, **ratios):
    """An entry of a grid's cell in which each rival takes so many times as long as ours, 2 ms."""
    (case,) = (case for case in cases.FULL if case.name == name)
    fact = {"median_s": 2e-3, "p20_s": 2e-3, "p80_s": 2e-3, "error": 0.0, "first_call_s": 0.0}
    return {
        "case": dataclasses.asdict(case),
        "rounds": 3,
        "left_out": {},
        "contestants": {ours: fact | {"ours": True, "gflops_per_s": gflops}, **dict.fromkeys(ratios, fact | {"ours": False})},
        "ratios": {ours: ratios},
        "chip": {"matrix_gflops_per_s": {"float32": 200.0}},
    }


def of_cells(*entries):
    return {"environment": {"hardware": {"device": "cpu"}}, "cases": {entry["case"]["name"]: entry for entry in entries}}


TRAINED = "small-2-200-200-training-b32-t15"


def test_losing_cells_are_listed_with_their_ratio_and_fraction():
    results = of_cells(
        judged(eager=3.0, manual=1.5, jax=0.8, compiled=0.1), judged(TRAINED, eager=0.94, manual=2.0, jax=3.0, gflops=20.0)
    )
    text = report.losing(results)
    assert "Losing cells, 2 of 2, in which ours takes more than 5 % longer than the best of eager, manual, jax:" in text
    assert "| small-2-200-200-rollout-b32-t15 | cpp | jax | 0.80x | 25 % |" in text
    assert f"| {TRAINED} | cpp | eager | 0.94x | 10 % |" in text
    assert report.details(results).startswith(text)


def test_no_losing_cell_is_said():
    # within five percent; torch.compile and the baseline are no bar; without a rival there is nothing to lose
    results = of_cells(judged(eager=3.0, jax=0.96, compiled=0.1, baseline=0.1), judged(TRAINED, compiled=0.1))
    said = "Losing cells: none. In no one of 1 does ours take more than 5 % longer than the best of eager, jax."
    assert report.losing(results).strip() == said
    assert report.losing(of_cells()) == ""


def test_ours_is_judged_as_a_user_gets_it():
    entry = judged(jax=0.5)
    entry["contestants"]["torch"] = entry["contestants"]["cpp"] | {"median_s": 1e-3}
    entry["ratios"]["torch"] = {"jax": 1.0}
    assert report.bar(entry) == ("cpp", "jax", 0.5)
    assert report.bar(judged(ours="torch", eager=2.0)) == ("torch", "eager", 2.0)


def test_the_grid_is_shown_by_network():
    residual = judged("small-2-200-200-residual-b750", eager=1.5)
    text = report.grid(
        of_cells(
            judged(eager=3.0, jax=0.8), judged(TRAINED, manual=1.25), residual, judged("small-hamjepa-rollout-b1-t1", jax=2.0)
        )
    )
    assert "2-200-200-1, tanh:" in text
    assert "| 32 | 15 | 2 | 0.80x jax | 25 % | 2 | 1.25x manual | 25 % |" in text
    assert "| 750 | 1 |  |  |  | 2 | 1.50x eager | 25 % |" in text
    assert "|p|^2 / 2 + V(q) + k q^2 / 2, V 512-256-256-1, gelu:" in text
    assert "| 1 | 1 | 2 | 2.00x jax | 25 % |  |  |  |" in text
    assert report.grid(of_cells()) == ""


def test_the_small_set_has_a_file_of_its_own_and_can_be_compared(checkout, quick_measure, monkeypatch, capsys):
    (cell,) = cases.select(cases.SMALL, "small-2-200-200-rollout-b1-t1")
    cell = dataclasses.replace(cell, backends="every", rivals=("eager",))
    monkeypatch.setattr(cases, "SMALL", (cell, dataclasses.replace(CHEAP, name="small-other", batch=2)))
    assert main("--small", "--only", "small-2-*") == 0
    assert quick_measure == [cell.name]
    (path,) = stored(checkout)
    assert path.name.startswith("small-cpu-")
    assert "2-200-200-1, tanh:" in path.with_suffix(".md").read_text()
    results = json.loads(path.read_text())
    entry = results["cases"][cell.name]
    entry["date"] = "earlier"
    ratio = entry["ratios"]["torch"]["eager"]
    for name, factor in (("same", 1.0), ("better", 1.5)):
        entry["ratios"]["torch"]["eager"] = ratio * factor
        (checkout / f"{name}.json").write_text(json.dumps(results))
    assert main("--small", "--only", "small-2-*", "--against", str(checkout / "same.json"), "--tolerance", "0.1") == 0
    assert main("--small", "--only", "small-2-*", "--against", str(checkout / "better.json"), "--tolerance", "0.1") == 1
    assert f"SLOWER       {cell.name} torch: 1.50" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--small", "--full")


def test_the_zoo_is_checked_and_shown(checkout, quick_measure, monkeypatch, capsys):
    (case,) = cases.select(cases.ZOO, "zoo-torchdyn")
    monkeypatch.setattr(cases, "ZOO", (dataclasses.replace(case, backends="every"),))
    assert main("--zoo", "--commit-results") == 0
    (path,) = stored(checkout)
    assert path.name == "zoo-cpu.json"
    assert "| torchdyn | 2-64, tanh, float32 | 100 | 1 |" in capsys.readouterr().out
    assert set(json.loads(path.read_text())["cases"]["zoo-torchdyn"]["contestants"]) == {"torch", "eager"}

    monkeypatch.setattr("bench.zoo.Torchdyn.fused", lambda self, *_, **__: 2 * self.textbook(*self.batch(100, 1)))
    assert main("--zoo", "--again", "--commit-results") == 1
    assert "torch is wrong in zoo-torchdyn" in capsys.readouterr().err


def timed(name, kind, batch, times, **changes):
    """An entry in which contestants take so many milliseconds a step."""
    case = dataclasses.replace(Case(name, kind, batch), **changes)
    facts = {
        contestant: {"median_s": ms * case.n_steps / 1000, "ours": contestant.partition(":")[0] in api.BACKENDS}
        for contestant, ms in times.items()
    }
    return {"case": dataclasses.asdict(case), "contestants": facts}


def test_plots_keep_hamiltonians_apart():
    """At batch 32 there are a general and a separable H, a network of other widths and one under other integrators."""
    general, separable = {"cpp": 1.0, "eager": 3.0}, {"cpp": 8.0, "eager": 32.0}
    results = of_cells(
        timed("a", "rollout", 1, general),
        timed("b", "rollout", 32, {"cpp": 2.0, "eager": 5.0}),
        timed("c", "rollout", 32, separable, separable=True),
        timed("d", "rollout", 1, separable, separable=True),
        timed("e", "rollout", 32, {"cpp": 99.0}, hidden_dims=(8, 8)),
        timed("f", "rollout", 32, {"cpp": 77.0}, integrators=("leapfrog", "rk4")),
        timed("g", "rollout", 32, {"cpp": 66.0}, dtype="bfloat16"),
        timed("h", "training", 32, general),
    )
    drawn = report.plots(results)
    assert set(drawn) == {"rollout-batch", "rollout-batch-separable"}
    assert drawn["rollout-batch"].curves == {"cpp": [(1, 1.0), (32, 2.0)], "eager": [(1, 3.0), (32, 5.0)]}
    assert drawn["rollout-batch-separable"].curves == {"cpp": [(1, 8.0), (32, 8.0)], "eager": [(1, 32.0), (32, 32.0)]}
    assert "T(p) + V(q)" in drawn["rollout-batch-separable"].about
    assert drawn["rollout-batch"].finding == (
        "Ours is the fastest at every batch size: the best rival that computes gradients of H takes 2.5 to 3 times as long"
    )


def test_a_plot_says_where_ours_is_not_the_fastest():
    slow, fast = {"cpp": 2.0, "eager": 1.0, "baseline": 0.1}, {"cpp": 1.0, "eager": 4.0}
    losing = of_cells(timed("a", "rollout", 1, slow), timed("b", "rollout", 32, fast))
    text = report.plots(losing)["rollout-batch"].finding
    assert text.startswith("Ours is the fastest at 1 of 2 batch sizes: ")
    assert text.endswith("takes 0.5 to 4 times as long")
    lost = of_cells(*(timed(str(batch), "rollout", batch, {"cpp": 2.0, "eager": 1.0}) for batch in (1, 8)))
    assert report.plots(lost)["rollout-batch"].finding.startswith("Ours is the fastest nowhere: ")


def test_plots_of_latent_sizes_and_memory():
    sizes = [
        timed(f"{d}-{n}", "rollout", 32, {"cpp": ms, "eager": d / 64.0}, latent_dim=d, n_steps=n, states="final")
        for d, ms in ((64, 1.0), (256, 0.5)) for n in cases.SLOPE_STEPS
    ]  # fmt: skip
    kept = [timed(f"m{n}", "training", 2, {"cpp": 1, "cpp:checkpoint": 1, "cpp:rk4": 1, "cpp:rk4:checkpoint": 1}, n_steps=n,
                  memory=("store", "checkpoint"), integrators=("leapfrog", "rk4")) for n in (10, 20)]  # fmt: skip
    for entry in kept:
        for i, fact in enumerate(entry["contestants"].values()):
            fact["kept_bytes"] = 2048 * entry["case"]["n_steps"] / 4**i
    drawn = report.plots(of_cells(*sizes, *kept))
    assert set(drawn) == {"latent-size", "memory", "memory-rk4"}
    assert drawn["latent-size"].finding.endswith("this many times as long: cpp 0.5, eager 4")
    assert dict(drawn["latent-size"].curves["eager"]) == {64: pytest.approx(1), 256: pytest.approx(4)}
    assert drawn["memory"].curves["cpp"] == [(10, 10.0), (20, 20.0)]
    assert set(drawn["memory-rk4"].curves) == {"cpp", "cpp:checkpoint"}
    assert drawn["memory"].finding == "Over 20 steps cpp keeps 4 times as much for the backward pass as cpp:checkpoint"


def test_no_colour_of_a_plot_is_used_twice(tmp_path):
    assert len(set(report.CONTESTANTS.values())) == len(report.CONTESTANTS)
    for path in sorted((Path(report.__file__).parent / "results").glob("*.json")):
        for plot in report.plots(report.read(path)).values():
            colors = report.colors_of(plot.curves)
            assert colors.keys() == plot.curves.keys()
            assert len(set(colors.values())) == len(colors)
            assert all(colors[name] == report.CONTESTANTS[name] for name in colors if name in report.CONTESTANTS)
    many = report.colors_of([f"rival-{i}" for i in range(30)])
    assert len(many) == len(set(many.values())) < 30
    plot = report.Plot("batch size", "ms", "f", {f"rival-{i}": [(1, 1.0 + i), (2, 2.0)] for i in range(30)}, "about")
    report._draw(tmp_path / "x.png", plot, "environment")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_committed_plots_are_those_of_the_committed_results():
    folder = Path(report.__file__).parent / "results"
    wanted = {f"{path.stem}-{name}.png" for path in folder.glob("*.json") for name in report.plots(report.read(path))}
    assert {path.name for path in folder.glob("*.png")} == wanted
