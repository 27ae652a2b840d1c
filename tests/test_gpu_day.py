"""The runner of a GPU's first day: parts end in time, nothing is lost, and what did not run is said."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest

from bench import cases
from tools import gpu_day
from tools.gpu_day import FAILED, LATE, NOTHING, PASSED, SKIPPED, Day, Part


def part(name: str, code: str, seconds: float = 20.0) -> Part:
    return Part(name, seconds, (sys.executable, "-c", code))


def states(out) -> dict[str, str]:
    return {name: entry["state"] for name, entry in json.loads((out / "summary.json").read_text()).items()}


def test_parts_are_told_apart_and_the_rest_goes_on(tmp_path):
    mark = tmp_path / "again"
    planned = [
        part("good", f"open({str(mark)!r}, 'a').write('x'); print('3 passed, 1 skipped in 2 s')"),
        part("bad", "print('boom'); exit(1)"),
        part("empty", "exit(5)"),
        part("without", "print('1 passed, 9 skipped in 2 s')"),
        part("slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=1.5),
        part("last", "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"),
    ]
    start = time.monotonic()
    assert Day(tmp_path / "out", planned).go([], float("inf"), again=False) == 1
    assert time.monotonic() - start < 50
    expected = {"good": PASSED, "bad": FAILED, "empty": NOTHING, "without": SKIPPED, "slow": LATE, "last": PASSED}
    assert states(tmp_path / "out") == expected
    assert "begun" in (tmp_path / "out" / "slow.log").read_text()
    assert (tmp_path / "out" / "last.log").read_text().strip() == str(gpu_day.ROOT)
    assert "boom" in (tmp_path / "out" / "summary.txt").read_text()
    # the same command: what has passed does not run again
    Day(tmp_path / "out", planned[:2]).go([], float("inf"), again=False)
    assert mark.read_text() == "x"


def test_what_there_is_no_time_for_is_left(tmp_path, capsys):
    planned = [part("first", "pass", seconds=30), part("long", "pass", seconds=600)]
    assert Day(tmp_path, planned).go([], 1.0, again=False) == 3
    assert states(tmp_path) == {"first": PASSED}
    assert "left for another call: long" in capsys.readouterr().out
    assert Day(tmp_path, planned).go([], float("inf"), again=False) == 0


def test_the_parts_fit_and_name_cases_that_there_are(tmp_path):
    planned = gpu_day.parts(tmp_path, "cuda", 8)
    assert all(part.seconds < 600 for part in planned)
    known = {case.name: case for case in cases.GPU}
    asked = {*gpu_day.LATENCY, *gpu_day.RATE, *gpu_day.TRAINING, *gpu_day.COMPILED, *gpu_day.TURNS}
    assert asked <= known.keys()
    # the targets: a few samples' latency, the rate at 16,384 in bfloat16, a training step of 32, graphed rivals each
    few = {known[name].batch for name in gpu_day.LATENCY}
    assert {1, 8, 32, 64} <= few
    assert known[gpu_day.RATE[0]].batch == 16384
    assert known[gpu_day.RATE[0]].arithmetic == "bfloat16"
    assert known[gpu_day.TRAINING[0]].batch == 32
    for name in (*gpu_day.LATENCY, gpu_day.RATE[0], gpu_day.TRAINING[0]):
        assert {"eager", "manual", "baseline"} <= set(known[name].rivals)
    with pytest.raises(SystemExit):
        gpu_day.main(["--only", "nonsense"])


def test_targets_are_read_from_the_results():
    def fact(seconds: float, ours: bool = False, **more: float) -> dict[str, object]:
        return {"median_s": seconds, "ours": ours, **more}

    def entry(name: str, facts: dict[str, dict[str, object]], left_out: dict[str, str]) -> dict[str, object]:
        ratios = {
            x: {y: facts[y]["median_s"] / facts[x]["median_s"] for y in facts if y != x} for x in facts if facts[x]["ours"]
        }
        case = dataclasses.asdict(known[name])
        return {"case": case, "contestants": facts, "ratios": ratios, "left_out": left_out}

    known = {case.name: case for case in cases.GPU}
    few, many = "rollout-b1-t15", "bfloat16-rollout-b16384-t15"
    facts = {"cuda": fact(3e-4, True), "cuda:graphed": fact(1.5e-4, True), "eager": fact(0.03), "baseline": fact(3e-4)}
    facts |= {"manual": fact(0.02), "manual-graphed": fact(6e-4), "baseline-graphed": fact(1e-4), "jax": fact(9e-4)}
    results = {
        "chip": {"matrix_gflops_per_s": {"bfloat16": 8e5}},
        "cases": {
            few: entry(few, facts, {"triton": "failed: wrong"}),
            many: entry(many, {"triton": fact(0.01, True, gflops_per_s=2e5), "eager": fact(0.1)}, {}),
        },
    }
    _, *lines = gpu_day.targets(results).splitlines()
    assert lines[0].split("; ") == [
        f"{few}: cuda:graphed 10.0 us a step (batch 1: 30)",
        "200.00 times as fast as eager (50)",
        "2.00 times as fast as baseline (1)",
        "4.00 times as fast as manual-graphed (3)",
        "triton failed: wrong",
    ]
    assert lines[1].split("; ") == [
        f"{many}: triton 666.7 us a step",
        "10.00 times as fast as eager (50)",
        "25.0% of the measured bfloat16 matrix rate (60 %)",
    ]
