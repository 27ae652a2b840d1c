"""The benchmark suite: contestants are right or refused, results survive a round trip. Nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import cases, report, run
from bench import chip as chips
from bench.cases import Case
from bench.measure import TOLERANCE, WrongResultError, checked, expected, kept_bytes, time_interleaved, tolerance_of
from bench.measure import measure as measure_case
from bench.rivals import Contestant, eager_rollout, entrants, loss, make_problem, manual_rollout
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
CHEAP = dataclasses.replace(ROLLOUT, name="cheap", rivals=("eager", "baseline"))


def fast(case, builders, *args):
    return measure_case(case, builders, CPU, 2, 0.0)


@pytest.fixture
def quick_measure(monkeypatch):
    """Measure ours as plain PyTorch only, in two rounds of single calls; returns the names of the cases that were."""
    measured = []
    monkeypatch.setattr(api, "backends", lambda: {"torch": "available"})

    def spy(case, builders, device, rounds, seconds):
        measured.append(case.name)
        return fast(case, builders)

    monkeypatch.setattr("bench.measure.BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(chips, "SIZE", {"cpu": 16})
    monkeypatch.setattr(chips, "COPIED", {"cpu": 256})
    monkeypatch.setattr(run, "measure", spy)
    return measured


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("network", ["hamiltonian:leapfrog", "hamiltonian:implicit-leapfrog", "baseline"])
def test_the_reference_is_computed_in_float64(case, network):
    assert {value.dtype for value in expected(make_problem(case), network).values} == {torch.float64}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_contestant_agrees_with_the_float64_reference(case):
    builders, _ = entrants(case, CPU)
    _, contestants, facts = checked(case, builders, CPU)
    assert [contestant.name for contestant in contestants] == list(builders)
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

    results["chip"] = {**found, "matrix_gflops_per_s": {"float32": 200.0, "tf32": 400.0}}
    facts = results["cases"]["cheap"]["contestants"]["torch"]
    facts["gflops_per_s"] = 50.0
    assert "| 50 | 25 % |" in report.table(results)
    results["cases"]["cheap"]["case"]["precision"] = "high"
    assert "| 50 | 12 % |" in report.table(results)
    results["cases"]["cheap"]["case"]["dtype"] = "bfloat16"
    assert "| 50 |  |" in report.table(results)


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
    monkeypatch.setattr(api, "backends", lambda: {"reference": "available", "torch": "available", "triton": "available"})
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
        assert all(
            dataclasses.replace(other, rivals=()) == dataclasses.replace(case, rivals=())
            for other in cases.FULL
            if other.name == case.name
        )


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
    assert Case("paper", "rollout", 1).gradient_flops == pytest.approx(2.1e6, rel=0.01)


def test_a_pattern_without_a_case_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "nonsense"])
    assert "rollout-b1-t15" in capsys.readouterr().err
